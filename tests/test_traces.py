"""Phones, links, and when devices are there."""

from __future__ import annotations

import json
import runpy
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import begin, write_world

from lamina import config, toml
from lamina.availability import DAY_SECONDS, Availability, availability, read
from lamina.errors import UserError
from lamina.traces import GIB, KIB, Traces
from lamina.turn import generator

ROOT = Path(__file__).parents[1]
ASSET = json.loads((ROOT / "src" / "lamina" / "assets" / "phones.json").read_text(encoding="utf-8"))


def test_the_phones_and_links_are_all_there() -> None:
    assert (len(ASSET["phones"]), len(ASSET["links"])) == (333, 19)
    assert ["Xiaomi Redmi Note 8", 2019, 4.0, 1546] in ASSET["phones"]
    assert [5125.0, 2087.6, 3729.8, 461.5] in ASSET["links"]
    assert all(year >= 2009 and 0.5 <= ram <= 12 and score > 100 for _, year, ram, score in ASSET["phones"])


def test_the_script_makes_rows_of_the_source() -> None:
    pack = runpy.run_path(str(ROOT / "scripts" / "make_phones.py"))["pack"]
    phone = {"Model": " B", "Year": "2019", "RAM": "0.5GB", "CPU_F_AI_Score": "105"}
    link = {"down_u": 7.04, "down_sigma": 0.96, "up_u": 5, "up_sigma": 1.01}
    found = pack([phone, phone | {"Model": "A"}] + [phone] * 331, {str(i): link for i in range(19)})
    assert found["phones"][:2] == [["A", 2019, 0.5, 105], ["B", 2019, 0.5, 105]]
    assert found["links"] == [[7.0, 1.0, 5, 1.0]] * 19
    with pytest.raises(SystemExit, match="other files than FLASH's"):
        pack([phone], {"0": link})


def test_everyone_fits_the_memory_of_their_class() -> None:
    fleet = Traces(memory_share=0.02, classes=5)
    found = fleet.roster(3000, seed=1)
    phone = generator(1, "phones").integers(333, size=3000)
    ram = np.array([ASSET["phones"][i][2] for i in phone])
    budgets = [each.memory_bytes or 0 for each in found.budgets]
    assert budgets == sorted(budgets, reverse=True) and len(set(found.names)) == len(budgets) <= 5
    group = np.array(found.class_of)
    for index, budget in enumerate(budgets):
        members = ram[group == index]
        assert budget == int(0.02 * members.min() * GIB)
        assert members.min() >= ram[group > index].max(initial=0)
        assert found.names[index] == (
            f"{members.min():g} GB" if members.min() == members.max() else f"{members.min():g}-{members.max():g} GB"
        )


def test_classes_are_about_as_large_as_the_sizes_of_memory_allow() -> None:
    for count in (1, 2, 4, 8, 50):
        found = Traces(classes=count).roster(333, seed=0)
        assert len(found.names) <= min(count, 11)
        assert found.names[-1].startswith("0.5")
        assert found.names[0].split()[0].split("-")[-1] == "12"
    assert len(Traces(classes=50).roster(1, seed=0).names) == 11  # one per size, whoever was drawn
    sizes = np.bincount(Traces(classes=4).roster(20_000, seed=0).class_of) / 20_000
    assert len(sizes) == 4 and sizes.min() > 0.15 and sizes.max() < 0.35


def test_speed_goes_with_the_score_and_links_are_those_of_the_list() -> None:
    found = Traces(speed="3 GFLOP/s").roster(2000, seed=0)
    phone = generator(0, "phones").integers(333, size=2000)
    score = np.array([ASSET["phones"][i][3] for i in phone])
    assert found.rates.speed == pytest.approx(3e9 * score / 1548, rel=1e-12)
    links = {tuple(row) for row in ASSET["links"]}
    rates = found.rates
    parts = (rates.down / KIB, rates.down_spread * rates.down / KIB, rates.up / KIB, rates.up_spread * rates.up / KIB)
    drawn = {tuple(round(value, 1) for value in row) for row in zip(*(part.tolist() for part in parts), strict=True)}
    assert drawn == links


def test_devices_are_drawn_by_the_seed() -> None:
    first, again, other = (Traces().roster(200, seed) for seed in (5, 5, 6))
    assert first.class_of == again.class_of != other.class_of
    assert (first.rates.speed == again.rates.speed).all() and (first.rates.up == again.rates.up).all()
    assert (first.rates.speed != other.rates.speed).any()


def test_old_phones_can_be_left_out() -> None:
    found = Traces(since=2019).roster(5000, seed=0)
    scores = [score for _, year, _, score in ASSET["phones"] if year == 2019]
    assert found.rates.speed.min() == pytest.approx(2e9 * min(scores) / 1548)


def test_what_phones_cannot_be_is_refused() -> None:
    found = Traces(drift=0.5).roster(50, seed=0)
    assert found.best_memory_bytes == tuple(each.memory_bytes for each in Traces().roster(50, seed=0).budgets)
    assert [each.memory_bytes for each in found.budgets] == [int(0.5 * (best or 0)) for best in found.best_memory_bytes]
    with pytest.raises(ValueError, match=r"^drift must be from 0 to below 1, got -0\.1$"):
        Traces(drift=-0.1)


@pytest.mark.parametrize("given", ["traces", {"name": "traces"}, {"name": "traces", "classes": 6}])
def test_the_fleet_of_a_file(given: Any, tmp_path: Path) -> None:
    table = write_world(tmp_path) | {"fleet": given}
    made = config.experiment(table, "test")
    assert made.fleet == Traces()
    assert config.experiment(tomllib.loads(toml.dump(made.to_table())), "again") == made
    run = begin(table, tmp_path / "runs")
    assert len(run.outlook.class_of) == len(run.outlook.rates.up) == 6
    assert run.play()["totals"]["clock_seconds"] > 0


SPANS = st.lists(st.tuples(st.integers(1, 8), st.integers(1, 8)), max_size=4)


def traces(gaps: list[list[tuple[int, int]]]) -> list[list[list[int]]]:
    """Spans with these gaps before and these lengths."""
    made = []
    for each in gaps:
        ends = np.cumsum(np.array(each, dtype=int).reshape(-1)).tolist()
        made.append([[start - 1, end - 1] for start, end in zip(ends[::2], ends[1::2], strict=True)])
    return made


@given(st.lists(SPANS, min_size=1, max_size=5), st.integers(0, 200), st.integers(1, 5), st.integers(0, 31))
@settings(max_examples=100, deadline=None)
def test_spans_say_who_is_there_and_when_enough_are(
    tmp_path_factory: pytest.TempPathFactory, gaps: list[list[tuple[int, int]]], quarter: int, count: int, mask: int
) -> None:
    """Against a look at every quarter of a second."""
    path, spans = tmp_path_factory.getbasetemp() / "spans.json", traces(gaps)
    path.write_text(json.dumps({"period_seconds": 64, "traces": dict(enumerate(spans))}), encoding="utf-8")
    found, now = read(path, 5), quarter / 4
    able = np.array([bool(mask >> i & 1) for i in range(5)])

    def there(device: int, moment: float) -> bool:
        return any(start <= moment % 64 < end for start, end in spans[device % len(spans)])

    def stays(device: int, moment: float) -> float:
        ends = (later for later in np.arange(moment, moment + 65, 0.25) if not there(device, later))
        return float(next(ends, np.inf) - moment)

    assert found.left(now).tolist() == [stays(device, now) for device in range(5)]
    moments = np.arange(now, now + 64, 0.25)
    enough = [t for t in moments if sum(there(d, t) for d in range(5) if able[d]) >= count]
    if enough:
        assert found.begin(now, able, count) == enough[0]
        assert ((found.left(enough[0]) > 0) & able).sum() >= count
    else:
        with pytest.raises(UserError, match=f"a round needs {count} devices, but never are more than"):
            found.begin(now, able, count)


def test_always_and_a_whole_period_never_end(tmp_path: Path) -> None:
    assert (availability("always", 8.0, 3, 0).left(1e9 + 0.3) == np.inf).all()
    path = tmp_path / "t.json"
    path.write_text('{"period_seconds": 10, "traces": {"a": [[0, 4], [4, 10]], "b": [[0, 2], [9, 10]]}}')
    assert read(path, 2).left(9.5).tolist() == [np.inf, 2.5]
    assert read(path, 2).digest != read(path, 1).digest


def shares(found: Availability) -> list[float]:
    """Of all devices, those that are there at each half hour of the second day."""
    return [float((found.left(DAY_SECONDS + 1800 * half) > 0).mean()) for half in range(48)]


def test_the_diurnal_model_is_what_it_says() -> None:
    found = availability("diurnal", 8.0, 20_000, seed=0)
    hours = found.length_seconds / 3600
    assert hours.mean() == pytest.approx(8, rel=0.01)
    assert hours.min() == pytest.approx(4, abs=0.05) and hours.max() == pytest.approx(12, abs=0.05)
    there = shares(found)
    assert max(there) / min(there) == pytest.approx(4, rel=0.1)
    assert there.index(max(there)) in range(3, 9)  # from half past one to four
    assert found.digest == availability("diurnal", 8.0, 20_000, seed=0).digest
    assert found.digest != availability("diurnal", 8.0, 20_000, seed=1).digest
    assert (availability("diurnal", 24.0, 500, seed=0).length_seconds <= DAY_SECONDS).all()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not valid JSON: "),
        ("[]", 'must be such as {"period_seconds": 86400, "traces": '),
        ('{"period_seconds": 0, "traces": {"a": []}}', "must be such as"),
        ('{"period_seconds": 10, "traces": {}}', "must be such as"),
        ('{"period_seconds": 10.0, "traces": {"a": []}}', "must be such as"),
        ('{"period_seconds": 10, "traces": {"a": 3}}', "'a' must be a list of spans .* at most 10; got 3"),
        ('{"period_seconds": 10, "traces": {"a": [3]}}', r"got 3"),
        ('{"period_seconds": 10, "traces": {"a": [[3, 3]]}}', r"got \[3, 3\]"),
        ('{"period_seconds": 10, "traces": {"a": [[3, 11]]}}', r"got \[3, 11\]"),
        ('{"period_seconds": 10, "traces": {"a": [[-1, 2]]}}', r"got \[-1, 2\]"),
        ('{"period_seconds": 10, "traces": {"a": [[1, 2.5]]}}', r"got \[1, 2.5\]"),
        ('{"period_seconds": 10, "traces": {"a": [[1, 4], [3, 5]]}}', r"got \[3, 5\]"),
        ('{"period_seconds": 10, "traces": {"a": [[1, true]]}}', r"got \[1, True\]"),
    ],
)
def test_traces_that_are_none_are_refused(content: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=message):
        read(path, 2)


def test_a_file_that_is_missing_is_named() -> None:
    with pytest.raises(UserError, match='must be "always" or "diurnal" or a JSON file; \'nightly\' is neither'):
        availability("nightly", 8.0, 2, 0)
