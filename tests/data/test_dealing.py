"""Dealing as the tables of [task] ask for it: `python -m pytest tests/data/test_dealing.py`."""

from collections import Counter
from dataclasses import replace
from typing import Any, get_args, get_type_hints

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lamina.data import split
from lamina.data.dealing import DEALT_DEVICES, SPLITS, Dealing, Dealt
from lamina.errors import UserError

label_lists = st.lists(st.integers(0, 6), min_size=1, max_size=60).map(lambda labels: np.array(labels, np.int64))
dealings = st.builds(
    Dealing,
    split=st.sampled_from(SPLITS[1:]),
    devices=st.integers(1, 15),
    alpha=st.one_of(st.sampled_from([5e-324, 1e-9, 1e300]), st.floats(0.05, 5.0)),
    classes_per_device=st.integers(1, 4),
    min_examples=st.integers(1, 4),
)


def deal(dealing: Dealing, labels: np.ndarray, test_labels: np.ndarray, seed: int = 0, **more: Any) -> Dealt:
    groups = [device % 3 for device in range(dealing.count_devices())]
    return dealing.deal(labels, test_labels, seed, groups, **more)


def lists(dealt: Dealt) -> list[list[int]]:
    return [part.tolist() for part in (*dealt.train, *dealt.test)]


@settings(deadline=None, max_examples=300)
@example(Dealing("dirichlet-unequal", 15, 5e-324, 2, 4), np.full(60, 6), np.empty(0, np.int64), 0)  # one class
@example(Dealing("quantity", 15, 5e-324, 2, 4), np.array([0, 6] * 30), np.array([3] * 7), 0)  # classes without examples
@given(dealings, label_lists, st.one_of(label_lists, st.just(np.empty(0, np.int64))), st.integers(0, 9))
def test_every_example_goes_to_one_device(
    dealing: Dealing, labels: np.ndarray, test_labels: np.ndarray, seed: int
) -> None:
    devices = dealing.count_devices()
    if len(labels) < devices * dealing.min_examples:
        with pytest.raises(UserError, match=f"there are {len(labels)}; lower task.devices or task.min_examples"):
            deal(dealing, labels, test_labels, seed)
        return
    dealt = deal(dealing, labels, test_labels, seed)
    assert len(dealt.train) == len(dealt.test) == devices
    assert dealt.names == tuple(f"device {device}" for device in range(devices))
    for parts, of in ((dealt.train, labels), (dealt.test, test_labels)):
        assert np.sort(np.concatenate(parts)).tolist() == list(range(len(of)))
    sizes, tested = (np.array(list(map(len, parts))) for parts in (dealt.train, dealt.test))
    assert sizes.min() >= dealing.min_examples
    if np.ptp(sizes) <= 1:
        assert np.ptp(tested) <= 1
    else:
        assert (np.abs(tested - len(test_labels) * sizes / len(labels)) < 1).all()
    if dealing.split in ("iid", "dirichlet"):
        assert np.ptp(sizes) <= 1
    assert lists(dealt) == lists(deal(dealing, labels, test_labels, seed))


@settings(deadline=None)
@given(
    st.lists(st.sampled_from("abcd"), min_size=1, max_size=30),
    st.lists(st.sampled_from("abcde"), max_size=30),
    st.integers(1, 4),
    st.one_of(st.none(), st.integers(1, 5)),
    st.integers(0, 9),
)
def test_natural(users: list[str], test_users: list[str], least: int, devices: int | None, seed: int) -> None:
    enough = sorted(user for user, count in Counter(users).items() if count >= least)
    dealing = Dealing("natural", devices, min_examples=least)
    labels, test_labels = np.zeros(len(users), np.int64), np.zeros(len(test_users), np.int64)

    def dealt() -> Dealt:
        return dealing.deal(labels, test_labels, seed, users=users, test_users=test_users)

    if len(enough) < (devices or 1):
        with pytest.raises(UserError, match="no user has task.min_examples" if not enough else "at most"):
            dealt()
        return
    found = dealt()
    assert len(found.names) == dealing.count_devices(users) == (devices or len(enough))
    assert list(found.names) == sorted(set(found.names) & set(enough))
    for name, own, tested in zip(found.names, found.train, found.test, strict=True):
        assert own.tolist() == [row for row, user in enumerate(users) if user == name]
        assert tested.tolist() == [row for row, user in enumerate(test_users) if user == name]
    assert (found.names, lists(found)) == (dealt().names, lists(dealt()))


def test_natural_draws_users_by_the_seed() -> None:
    users = [f"user {n:02}" for n in range(50)]
    nothing = np.empty(0, np.int64)
    drawn = {Dealing("natural", 5).deal(np.zeros(50, int), nothing, seed, users=users).names for seed in range(4)}
    assert len(drawn) == 4


def test_natural_deals_tests_that_say_no_user_by_the_mix() -> None:
    labels, users = np.array([0, 0, 0, 0, 1, 1, 1, 1]), list("aaaabbbb")
    dealt = Dealing("natural").deal(labels, np.array([1, 0, 1, 0]), 0, users=users)
    assert [sorted(part.tolist()) for part in dealt.test] == [[1, 3], [0, 2]]


@pytest.mark.parametrize("name", SPLITS[1:])
def test_the_test_mix_follows_the_training_mix(name: str) -> None:
    rng = np.random.default_rng(0)
    labels, test_labels = rng.integers(0, 10, 8000), rng.integers(0, 10, 2000)
    dealt = deal(Dealing(name, 20, min_examples=10), labels, test_labels)  # type: ignore[arg-type]
    trained, tested = (
        split.mixes(of, parts, 10) / [[max(1, len(part))] for part in parts]
        for of, parts in ((labels, dealt.train), (test_labels, dealt.test))
    )
    overlap = np.minimum(trained, tested).sum(axis=1)
    assert overlap[[len(part) > 40 for part in dealt.test]].min() > 0.85


@pytest.mark.parametrize(
    ("name", "sizes_differ", "mixes_differ"),
    [
        ("iid", False, False),
        ("dirichlet", False, True),
        ("dirichlet-unequal", True, True),
        ("shards", False, True),
        ("quantity", True, False),
        ("resource", False, True),
    ],
)
def test_what_differs_between_devices(name: str, sizes_differ: bool, mixes_differ: bool) -> None:
    labels = np.repeat(np.arange(10), 600)
    dealt = deal(Dealing(name, 12, min_examples=100), labels, labels)  # type: ignore[arg-type]
    mixes = split.mixes(labels, dealt.train, 10)
    assert (np.ptp(mixes.sum(axis=1)) > 500) == sizes_differ
    shares = mixes / mixes.sum(axis=1, keepdims=True)
    assert (np.minimum(shares, 0.1).sum(axis=1).mean() < 0.8) == mixes_differ


def test_resource_ties_labels_to_groups() -> None:
    labels = np.repeat(np.arange(10), 60)
    dealt = deal(Dealing("resource", 9, alpha=0.01), labels, labels)
    kinds = [set(labels[np.concatenate(dealt.train[group::3])]) for group in range(3)]
    assert sum(map(len, kinds)) <= 12


def test_seeds_deal_differently() -> None:
    labels = np.repeat(np.arange(4), 30)
    for name in SPLITS[1:]:
        dealing = Dealing(name, 4)  # type: ignore[arg-type]
        once, again = deal(dealing, labels, labels, 0), deal(dealing, labels, labels, 1)
        assert lists(once)[:4] != lists(again)[:4]
        assert lists(once)[4:] != lists(again)[4:]


def test_count_devices() -> None:
    assert Dealing().count_devices() == DEALT_DEVICES == 100
    assert Dealing("natural", 3).count_devices() == Dealing(devices=3).count_devices() == 3
    assert Dealing("natural", min_examples=2).count_devices(["a", "b", "a"]) == 1


def test_the_names_of_the_splits() -> None:
    assert get_args(get_type_hints(Dealing)["split"]) == SPLITS


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"split": "idd"}, "task.split must be one of natural, iid, dirichlet, dirichlet-unequal, shards, "),
        ({"devices": 0}, "task.devices must be at least 1, got 0"),
        ({"alpha": 0.0}, "task.alpha must be finite and above 0, got 0.0"),
        ({"alpha": float("nan")}, "task.alpha must be finite and above 0, got nan"),
        ({"classes_per_device": 0}, "task.classes_per_device must be at least 1, got 0"),
        ({"min_examples": 0}, "task.min_examples must be at least 1, got 0"),
    ],
)
def test_fields_out_of_range(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        replace(Dealing(), **fields)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    ("dealing", "groups", "users", "message"),
    [
        (Dealing(devices=4), None, None, "4 devices with task.min_examples = 1 take 4 training examples; there are 3;"),
        (Dealing("natural"), None, None, 'task.split = "natural" needs to know whose each example is'),
        (Dealing("natural", min_examples=3), None, list("aab"), "no user has task.min_examples = 3 training examples"),
        (Dealing("natural", 3), None, list("aab"), "task.devices must be at most 2, the users with"),
        (Dealing("resource", 2), None, None, "needs the resource class, from 0, of each of the 2 devices; got none"),
        (Dealing("resource", 2), [1], None, "each of the 2 devices; got 1, the smallest 1"),
        (Dealing("resource", 2), [0, -1], None, "each of the 2 devices; got 2, the smallest -1"),
    ],
)
def test_what_cannot_be_dealt(
    dealing: Dealing, groups: list[int] | None, users: list[str] | None, message: str
) -> None:
    with pytest.raises(UserError) as caught:
        dealing.deal(np.array([0, 1, 1]), np.array([0]), 0, groups, users)
    assert message in str(caught.value)
