"""Quantities, budgets, and which device is of which class: `python -m pytest tests/test_fleet.py`."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import asdict
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lamina.cost import Cost, Memory
from lamina.errors import UserError
from lamina.fleet import RESOURCES, Budget, DeviceClass, assign, quantity
from lamina.units import human


@pytest.mark.parametrize(
    ("text", "number"),
    [
        (8000000, 8_000_000),
        ("64000000", 64_000_000),
        ("64 MB", 64_000_000),
        ("64MB", 64_000_000),
        (" 64 MB ", 64_000_000),
        ("61 MiB", 61 * 2**20),
        ("61.5 MiB", 123 * 2**19),
        ("1 KiB", 1024),
        ("1 kB", 1000),
        ("2 GiB", 2**31),
        ("1 TiB", 2**40),
        ("3 G", 3 * 10**9),
        ("3 Gi", 3 * 2**30),
        ("1e9", 10**9),
        ("2.5e3 KB", 2_500_000),
        ("8 B", 8),
        ("1", 1),
    ],
)
def test_quantities(text: str | int, number: int) -> None:
    assert quantity("memory", text) == number


@pytest.mark.parametrize(
    ("text", "number"),
    [("20 GFLOP", 2 * 10**10), ("20 GFLOPs", 2 * 10**10), ("1.5 TFLOP", 15 * 10**11), ("3 G", 3 * 10**9)],
)
def test_quantities_of_operations(text: str, number: int) -> None:
    assert quantity("flops", text) == number


@pytest.mark.parametrize(("key", "text"), [("memory", "20 GFLOP"), ("flops", "20 GB"), ("uplink", "10 Mb")])
def test_units_must_be_those_of_the_quantity(key: str, text: str) -> None:
    with pytest.raises(ValueError, match="must be a quantity"):
        quantity(key, text)


@given(st.integers(1, 10**12), st.sampled_from([("", 1), ("K", 10**3), ("Mi", 2**20)]))
def test_quantities_of_whole_units_are_exact(number: int, unit: tuple[str, int]) -> None:
    name, size = unit
    if number * size < 2**53:
        assert quantity("memory", f"{number} {name}B") == number * size


@pytest.mark.parametrize(
    "value",
    [
        "",
        " ",
        "0",
        0,
        -1,
        "-5 MB",
        "0.5",
        "0 MiB",
        "much",
        "MB",
        "5 XB",
        "5 MBit",
        "1.2.3",
        "...",
        "5 e 3",
        "1e-3 MB",
        "nan",
        "inf",
        "5,000",
        True,
        "\u0663",
    ],
    ids=repr,
)
def test_what_is_no_quantity_is_refused(value: str | int) -> None:
    with pytest.raises(ValueError) as caught:
        quantity("uplink", value)
    assert str(caught.value) == f'uplink must be a quantity above 0, such as 64000000 or "61 MiB"; got {value!r}'


def test_a_number_beyond_all_bounds_is_no_quantity() -> None:
    with pytest.raises(ValueError, match="must be a quantity"):
        quantity("memory", "1e999")


def test_decimal_quantities_are_exact() -> None:
    assert quantity("memory", "536.8 MB") == 536_800_000


def test_a_class_without_limits_has_no_budget() -> None:
    assert DeviceClass("free").budget == Budget(None, None, None, None)


def test_a_budget_has_the_quantities_of_its_class() -> None:
    each = DeviceClass("all", memory="1 KiB", uplink="2 KB", downlink=3, flops="4 MFLOP")
    assert each.budget == Budget(memory_bytes=1024, up_bytes=2000, down_bytes=3, flops=4_000_000)
    assert DeviceClass("some", downlink="5 KB").budget == Budget(down_bytes=5000)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"share": 0}, "share must be above 0 and at most 1e+30, got 0"),
        ({"share": -1.5}, "share must be above 0 and at most 1e+30, got -1.5"),
        ({"share": math.nan}, "share must be above 0 and at most 1e+30, got nan"),
        ({"memory": "64 XB"}, "memory must be a quantity above 0, such as 64000000 or \"61 MiB\"; got '64 XB'"),
        ({"memory": "1 MB", "drift": 1}, "drift must be from 0 to below 1, got 1"),
        ({"drift": 0.1}, "drift is of the memory, and none is given; got 0.1"),
        ({"flops": 0}, 'flops must be a quantity above 0, such as 64000000 or "20 GFLOP"; got 0'),
    ],
)
def test_impossible_classes_are_refused(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError) as caught:
        DeviceClass("mine", **fields)
    assert str(caught.value) == says


@pytest.mark.parametrize("share", [math.inf, 1e308])
def test_shares_whose_sum_would_overflow_are_refused(share: float) -> None:
    with pytest.raises(ValueError, match="share must be"):
        DeviceClass("mine", share=share)
    assert sorted(assign([DeviceClass("a", share=1e30), DeviceClass("b", share=1e30)], 4, seed=0)) == [0, 0, 1, 1]


def test_budgets_are_exceeded_above_them_only() -> None:
    spent = Cost(Memory(1, 2, 3, 4, 5), "backward", saved_bytes=4, up_bytes=20, down_bytes=30, flops=40)
    assert list(RESOURCES) == ["memory_bytes", "up_bytes", "down_bytes", "flops"] == list(asdict(Budget()))
    assert Budget().exceeded(spent) == []
    assert Budget(15, 20, 30, 40).exceeded(spent) == []
    assert Budget(14, 19, 29, 39).exceeded(spent) == list(RESOURCES)
    for limit, name in zip((14, 19, 29, 39), RESOURCES, strict=True):
        assert Budget(**{name: limit}).exceeded(spent) == [name]
        assert Budget(**{name: limit + 1}).exceeded(spent) == []


shares = st.lists(st.one_of(st.integers(1, 20), st.floats(0.01, 100)), min_size=1, max_size=6)


@given(shares, st.integers(0, 300), st.integers(0, 2**32))
def test_counts_follow_the_shares_by_largest_remainder(parts: list[float], devices: int, seed: int) -> None:
    class_of = assign([DeviceClass(str(i), share) for i, share in enumerate(parts)], devices, seed)
    assert len(class_of) == devices
    exact = [devices * share / sum(parts) for share in parts]
    counts = [class_of.count(index) for index in range(len(parts))]
    rounded_up = [share - math.floor(share) for share, count in zip(exact, counts, strict=True) if count > share]
    rounded_down = [share - count for share, count in zip(exact, counts, strict=True) if count <= share]
    assert all(abs(count - share) < 1 + 1e-9 for share, count in zip(exact, counts, strict=True))
    assert min(rounded_up, default=1) >= max(rounded_down, default=0) - 1e-9


def test_shares_by_hand() -> None:
    """Of 10 devices with shares 1 : 1 : 1 the first class gets the tenth; 55 : 30 : 15 of 7 are 3.85, 2.1 and 1.05."""
    thirds = [DeviceClass(name) for name in "abc"]
    assert Counter(assign(thirds, 10, 0)) == {0: 4, 1: 3, 2: 3}
    uneven = [DeviceClass("a", 55), DeviceClass("b", 30), DeviceClass("c", 15)]
    assert Counter(assign(uneven, 7, 0)) == {0: 4, 1: 2, 2: 1}
    assert assign(uneven[:1], 3, 0) == [0, 0, 0]


def test_places_are_drawn_by_the_seed_alone() -> None:
    classes = [DeviceClass("a", 0.5), DeviceClass("b", 0.5)]
    once = assign(classes, 40, 3)
    assert once == assign(classes, 40, 3)
    assert once != assign(classes, 40, 4) != sorted(once)
    assert once != sorted(once)
    assert once == assign([DeviceClass("other", 2), DeviceClass("names", 2, memory="1 MB")], 40, 3)


@pytest.mark.parametrize(
    ("resource", "value", "limit", "text"),
    [
        ("memory_bytes", 61 * 2**20, None, "61.0 MiB"),
        ("memory_bytes", 61 * 2**20, 64 * 2**20, "61.0 / 64.0 MiB"),
        ("up_bytes", 2**20, None, "1.0 MiB"),
        ("up_bytes", 2**19, 2**30, "512.0 KiB / 1.0 GiB"),
        ("down_bytes", 100, None, "0.1 KiB"),
        ("down_bytes", 0, None, "0.0 KiB"),
        ("flops", 2.5e9, None, "2.5 GFLOP"),
        ("flops", 3.21e12, 4e12, "3.2 / 4.0 TFLOP"),
        ("flops", 5, None, "0.0 MFLOP"),
    ],
)
def test_quantities_for_people(resource: str, value: float, limit: float | None, text: str) -> None:
    assert human(resource, value, limit) == text


def test_classes_may_name_their_devices_and_the_others_are_drawn_from_the_rest() -> None:
    classes = [DeviceClass("a", devices=(4, 1)), DeviceClass("b", share=3.0), DeviceClass("c")]
    found = assign(classes, 10, 0)
    assert [i for i, index in enumerate(found) if index == 0] == [1, 4]
    assert (found.count(1), found.count(2)) == (6, 2)
    assert found != assign(classes, 10, 1)
    assert assign([DeviceClass("a", devices=(1, 2)), DeviceClass("b", devices=(0,))], 3, 0) == [1, 0, 0]


@pytest.mark.parametrize(
    ("named", "reason"),
    [
        (((0, 1), (1,)), "different ones from 0 to 2, got 0, 1, 1"),
        (((0, 1, 2, 3), None), "different ones from 0 to 2, got 0, 1, 2, 3"),
        (((-1,), None), "different ones from 0 to 2, got -1"),
        (((0,), (2,)), "device 1 is of no class"),
    ],
)
def test_devices_that_cannot_be_as_they_are_named_are_refused(named: tuple[Any, Any], reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        assign([DeviceClass(name, devices=devices) for name, devices in zip("ab", named, strict=True)], 3, 0)


def test_a_column_has_one_unit_unless_it_would_show_a_zero() -> None:
    assert [human("flops", value, among=5.5e12) for value in (5.5e12, 944.8e9, 1e9)] == [
        *("5.5 TFLOP", "0.9 TFLOP", "1.0 GFLOP")
    ]
    assert human("bytes", 200 * 2**10, among=5 * 2**20) == "0.2 MiB"
