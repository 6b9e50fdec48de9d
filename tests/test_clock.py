"""The virtual clock: rates, when a round ends, who answers in time, and what that changes."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import Devices, Table, begin, bits, lines, outcome, play, write_world

from lamina import config, run, tables
from lamina.clock import ABANDONED, AWAY, FAILED, LATE, Clock, settle
from lamina.errors import UserError
from lamina.fleet import DeviceClass, Rates, rate, roster
from lamina.job import Turn, Update
from lamina.run import Run
from lamina.units import duration

TURN = Turn(seed=3, round=1, rounds=5)


@pytest.mark.parametrize(
    ("key", "text", "number"),
    [
        ("up_rate", "4 Mbit/s", 500_000),
        ("up_rate", "1 MB/s", 1_000_000),
        ("down_rate", "1.5 MiB/s", 3 * 2**19),
        ("down_rate", "12 bit/s", 1.5),
        ("down_rate", " 300kB/s ", 300_000),
        ("speed", "20 GFLOP/s", 20e9),
        ("speed", "0.5 TFLOP/s", 5e11),
    ],
)
def test_rates_are_bytes_or_operations_per_second(key: str, text: str, number: float) -> None:
    assert rate(key, text) == number


@pytest.mark.parametrize(
    ("key", "text"),
    [
        *(
            ("up_rate", text)
            for text in ("4", "4 MB", "4 Mbps", "4 Mb/s", "4 GFLOP/s", "0 MB/s", "-4 MB/s", "MB/s", "")
        ),
        *(("speed", text) for text in ("4", "4 GFLOP", "4 GFLOPS", "4 GB/s", "1.2.3 GFLOP/s", "1e99 TFLOP/s")),
    ],
)
def test_what_is_no_rate_is_refused(key: str, text: str) -> None:
    with pytest.raises(ValueError, match=f"^{key} must be a rate above 0, such as "):
        rate(key, text)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0.0 s"),
        (9.94, "9.9 s"),
        (9.96, "10 s"),
        (59.4, "59 s"),
        (59.6, "1 min 00 s"),
        (200, "3 min 20 s"),
        (3599.6, "1 h 00 min"),
        (7500, "2 h 05 min"),
        (86_399, "1 d 00 h"),
        (273_600, "3 d 04 h"),
    ],
)
def test_durations_as_people_read_them(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def rates(*rows: tuple[float, float, float], spread: float = 0.0) -> Rates:
    """Of devices that receive, compute and send so fast."""
    down, speed, up = np.array(rows, dtype=float).T
    return Rates(down, speed, up, np.full(len(rows), spread), np.full(len(rows), spread))


def test_what_is_not_given_takes_no_time() -> None:
    classes = [DeviceClass("a", speed="2 kFLOP/s"), DeviceClass("b", up_rate="8 kbit/s", down_rate="4 kB/s")]
    found = roster(classes, 4, seed=0)
    work = np.tile([8000, 6000, 3000], (4, 1))
    expected = {0: [0, 3, 0], 1: [2, 0, 3]}
    assert found.rates.phases(np.arange(4), work).tolist() == [expected[group] for group in found.class_of]


def test_links_vary_around_their_means_from_round_to_round() -> None:
    count = 4000
    steady = rates(*[(100.0, 1e9, math.inf)] * count)
    varied = replace(steady, down_spread=np.full(count, 0.5))
    everyone, work = np.arange(count), np.tile([1000, 10**9, 1000], (count, 1))
    assert (steady.phases(everyone, work, TURN) == [10, 1, 0]).all()
    assert (varied.phases(everyone, work) == [10, 1, 0]).all()
    found = varied.phases(everyone, work, TURN)
    rate_now = 1000 / found[:, 0]
    assert (rate_now > 0).all() and (found[:, 1:] == [1, 0]).all()
    assert rate_now.mean() == pytest.approx(100, rel=0.03)
    assert rate_now.std() == pytest.approx(50, rel=0.08)
    later = varied.phases(everyone, work, replace(TURN, round=2))
    assert np.corrcoef(found[:, 0], later[:, 0])[0, 1] < 0.1
    few = np.array([77, 5])
    assert varied.phases(few, work[:2], TURN).tolist() == found[few].tolist()  # whoever else is asked


NOBODY_LEAVES = math.inf
FOUR = rates((10, 10, 10), (10, 5, 10), (10, 2, 10), (1, 10, 10))
WORK = np.tile([100, 100, 100], (4, 1))
"""They take 10 + 10 + 10, 10 + 20 + 10, 10 + 50 + 10 and 100 + 10 + 10 seconds."""


def settled(clock: Clock, cohort: int = 4, left: Any = (NOBODY_LEAVES,) * 4) -> tuple[list[tuple[Any, ...]], float]:
    """Seconds, what was spent, and the reason, of each of the four devices."""
    stints, over = settle(clock, cohort, np.arange(4), WORK, FOUR, np.array(left, dtype=float), TURN)
    return [(each.seconds, each.down_bytes, each.flops, each.up_bytes, each.reason) for each in stints], over


def test_a_round_ends_when_all_have_answered() -> None:
    full = (100, 100, 100, None)
    assert settled(Clock()) == ([(30, *full), (40, *full), (70, *full), (120, *full)], 120)


def test_a_deadline_ends_a_round_and_late_devices_have_spent_what_they_did_until_then() -> None:
    full, some = (100, 100, 100, None), [(35, 100, 50, 0, LATE), (35, 35, 0, 0, LATE)]
    assert settled(Clock(deadline=40)) == (
        [(30, *full), (40, *full), (40, 100, 60, 0, LATE), (40, 40, 0, 0, LATE)],
        40,
    )
    assert settled(Clock(deadline=35))[0] == [(30, *full), (35, 100, 100, 50, LATE), *some]
    assert settled(Clock(deadline=500))[1] == 120


def test_a_round_of_more_than_the_cohort_ends_with_the_last_answer_that_is_wanted() -> None:
    found, over = settled(Clock(over_selection=2), cohort=2)
    assert [each[-1] for each in found] == [None, None, LATE, LATE]
    assert over == 40
    assert settled(Clock(over_selection=2, deadline=35), cohort=2)[1] == 35


def test_devices_that_go_away_are_lost_and_the_round_does_not_wait_for_them() -> None:
    found, over = settled(Clock(), left=(30, 39, NOBODY_LEAVES, 60))
    assert [each[-1] for each in found] == [None, AWAY, None, AWAY]
    assert found[1] == (39, 100, 100, 90, AWAY)
    assert found[3] == (60, 60, 0, 0, AWAY)
    assert over == 70
    found, over = settled(Clock(deadline=50), left=(30, 39, NOBODY_LEAVES, 60))
    assert [each[-1] for each in found] == [None, AWAY, LATE, LATE]
    assert settled(Clock(), left=(20, 10, 10, 5))[1] == 20


def test_devices_break_down_somewhere_in_their_work() -> None:
    count, chance = 2000, 0.3
    alike, work, stay = rates(*[(10, 10, 10)] * count), np.tile([100, 100, 100], (count, 1)), np.full(count, np.inf)
    stints, over = settle(Clock(failures=chance), count, np.arange(count), work, alike, stay, TURN)
    failed = [each for each in stints if each.reason == FAILED]
    assert {each.reason for each in stints} == {None, FAILED} and over == 30
    assert len(failed) / count == pytest.approx(chance, abs=0.04)
    assert np.mean([each.seconds for each in failed]) == pytest.approx(15, rel=0.06)
    for each in failed:
        spent = [math.floor(min(100, max(0, 10 * each.seconds - before))) for before in (0, 100, 200)]
        assert [each.down_bytes, each.flops, each.up_bytes] == spent
        assert each.received == (each.seconds >= 10)
    few = np.array([77, 5, 1203])
    again, _ = settle(Clock(failures=chance), 3, few, work[few], alike, stay[few], TURN)
    assert again == [stints[device] for device in few]  # whoever else is asked
    later, _ = settle(Clock(failures=chance), count, np.arange(count), work, alike, stay, replace(TURN, round=2))
    assert sum(a.reason == b.reason for a, b in zip(stints, later, strict=True)) < 0.7 * count


def test_who_breaks_down_may_have_been_late_or_gone_before() -> None:
    clock, everyone = Clock(failures=0.999), np.arange(4)
    broken, over = settle(clock, 4, everyone, WORK, FOUR, np.full(4, np.inf), TURN)
    times = [each.seconds for each in broken]
    assert over == max(times) and {each.reason for each in broken} == {FAILED}
    gone, _ = settle(clock, 4, everyone, WORK, FOUR, np.array(times) - 0.1, TURN)
    assert {each.reason for each in gone} == {AWAY}
    kept, _ = settle(replace(clock, deadline=min(times)), 4, everyone, WORK, FOUR, np.full(4, np.inf), TURN)
    assert sorted(str(each.reason) for each in kept) == [FAILED, LATE, LATE, LATE]


def test_without_rates_only_the_answer_of_a_broken_device_is_lost(tmp_path: Path) -> None:
    made = begin(write_world(tmp_path, cohort=6, clock={"failures": 0.5}), tmp_path / "runs")
    state, rows = play(made)
    failed = [row for row in rows if row.rejected == FAILED]
    assert 0 < len(failed) < 6
    assert state.totals["updates"] == 6 - len(failed)
    assert all(row.up_bytes and row.flops and row.loss is None for row in failed)


def test_of_those_that_answer_at_the_same_time_a_draw_says_who_is_first() -> None:
    count = 60
    alike, work = rates(*[(10, 10, 10)] * count), np.tile([100, 100, 100], (count, 1))

    def firsts(round_: int) -> set[int]:
        turn = replace(TURN, round=round_)
        stints, over = settle(Clock(over_selection=2), 30, np.arange(count), work, alike, np.full(count, np.inf), turn)
        assert over == 30
        return {i for i, each in enumerate(stints) if each.reason is None}

    found = [firsts(round_) for round_ in range(40)]
    assert {len(each) for each in found} == {30}
    assert all(8 <= sum(device in each for each in found) <= 32 for device in range(count))


@given(
    st.lists(st.tuples(*[st.integers(1, 40)] * 7), min_size=1, max_size=8),
    st.integers(1, 8),
    st.integers(0, 60),
)
@settings(max_examples=60, deadline=None)
def test_it_is_what_comes_out_when_each_second_is_played(rows: list[Any], cohort: int, deadline: int) -> None:
    """Against a simulation with exact fractions of a second; all times that occur are distinct or tied alike."""
    table = np.array(rows)
    speeds, work, left = rates(*table[:, :3]), table[:, 3:6] * table[:, :3], table[:, 6] * 1.0  # whole seconds each
    stints, over = settle(Clock(deadline=deadline), cohort, np.arange(len(rows)), work, speeds, left, TURN)
    durations = table[:, 3:6]
    done = durations.sum(axis=1)
    second, answered, lost = 0, 0, 0
    while True:
        answered = int(((done <= second) & (done <= left)).sum())
        lost = int(((left <= second) & (left < done)).sum())
        if (deadline and second == deadline) or answered >= cohort or answered + lost == len(rows):
            break
        second += 1
    assert over == second
    assert sum(each.reason is None for each in stints) == min(answered, cohort)
    for each, (down, flops, up), (to, at, back), end, stay in zip(stints, work, durations, done, left, strict=True):
        stop = min(end, stay, second)
        assert each.seconds == stop
        assert each.received == (stop >= to)
        if each.reason is None:
            assert end <= min(stay, second)
        elif each.reason == AWAY:
            assert stay < end and stay <= second
        else:
            assert second < min(end, stay) or answered > cohort or (second < end and second < stay)
        spent = (
            down * min(1, stop / to),
            flops * np.clip((stop - to) / at, 0, 1),
            up * np.clip((stop - to - at) / back, 0, 1),
        )
        assert np.allclose((each.down_bytes, each.flops, each.up_bytes), spent, atol=1)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Table:
    """Six devices, in the mean two fast ones and four slow ones."""
    folder = tmp_path_factory.mktemp("clock")
    fleet = [
        {"name": "fast", "share": 2, "speed": "1 GFLOP/s", "up_rate": "1 MB/s", "down_rate": "1 MB/s"},
        {"name": "slow", "share": 4, "speed": "20 MFLOP/s", "up_rate": "100 kB/s", "down_rate": "50 kB/s"},
    ]
    return write_world(folder, networks=[str(folder / "tiny-3")], fleet=fleet, cohort=6)


def started(world: Table, folder: Path, **clock: Any) -> Run:
    return begin(world | {"clock": clock}, folder)


def seconds_of(made: Run, group: int) -> float:
    """How long a device of a class takes in its first round, by hand."""
    cost = made.outlook.chosen.choices[group].cost
    down, speed, up = made.experiment.fleet[group].rates  # type: ignore[index]
    return cost.down_bytes / down + cost.flops / speed + cost.up_bytes / up


def test_time_passes_as_the_slowest_device_needs_it(world: Table, tmp_path: Path) -> None:
    made = started(world, tmp_path)
    fast, slow = seconds_of(made, 0), seconds_of(made, 1)
    assert slow > 10 * fast
    state, rows = play(made)
    assert [row.seconds for row in rows] == pytest.approx([(fast, slow)[row.group] for row in rows], rel=1e-12)
    assert state.totals["clock_seconds"] == pytest.approx(slow, rel=1e-12)
    assert state.totals["updates"] == 6
    again, _ = play(made, state=state)
    assert again.totals["clock_seconds"] == pytest.approx(2 * slow, rel=1e-12)  # all tensors moved, and come again


def test_late_devices_are_not_simulated_and_their_updates_not_used(world: Table, tmp_path: Path) -> None:
    """As if they had said nothing, but for what they spent."""
    made = started(world, tmp_path)
    limit = 2 * seconds_of(made, 0)
    made.experiment = replace(made.experiment, clock=Clock(deadline=limit))
    devices = Devices(made)
    state, rows = play(made, devices)
    late = [row for row in rows if row.rejected == LATE]
    assert {row.group for row in late} == {1} and len(late) == 4
    assert sorted(job.turn.device for job in devices.jobs) == [row.device for row in rows if row.group == 0]
    assert state.totals["clock_seconds"] == limit
    assert (state.totals["updates"], state.totals["rejected_updates"]) == (2, 4)
    for row in late:
        assert (row.loss, row.seconds, row.up_bytes, row.flops) == (None, limit, 0, 0)
        assert row.down_bytes == math.floor(limit * 50_000) < made.outlook.chosen.choices[1].cost.down_bytes
    made.experiment = replace(made.experiment, clock=Clock())
    silent = Devices(
        made, lambda update: [update] if update.turn.device in {r.device for r in rows if not r.group} else []
    )
    assert bits(play(made, silent)[0].params) == bits(state.params)


def test_who_has_received_all_when_the_round_ends_does_not_receive_it_again(world: Table, tmp_path: Path) -> None:
    """With everyone late nothing changes, so only who was cut off while receiving receives all in the next round."""
    made = started(world, tmp_path)
    cost, slow = made.outlook.chosen.choices[1].cost, made.experiment.fleet[1]  # type: ignore[index]
    for share, again in ((0.5, cost.down_bytes), (1.0, 0)):
        limit = share * cost.down_bytes / 50_000 + (share == 1) * 1e-3
        made.experiment = replace(made.experiment, clock=Clock(deadline=limit), fleet=(replace(slow, name="all"),))
        made.outlook = replace(made.outlook, rates=roster([slow], 6, 0).rates)
        state, rows = play(made)
        assert {row.rejected for row in rows} == {LATE}
        assert state.totals["abandoned_rounds"] == 1
        made.experiment = replace(made.experiment, clock=Clock())
        assert {row.down_bytes for row in play(made, state=state)[1]} == {again}


def test_a_round_with_too_few_updates_changes_nothing_but_the_books(world: Table, tmp_path: Path) -> None:
    made = started(world, tmp_path)
    made.experiment = replace(made.experiment, clock=Clock(deadline=2 * seconds_of(made, 0), min_updates=3))
    devices = Devices(made)
    state, rows = play(made, devices)
    assert devices.jobs == []  # it was clear before
    assert bits(state.params) == bits(made.state.params)
    assert {(row.group, row.rejected, row.loss) for row in rows} == {(0, ABANDONED, None), (1, LATE, None)}
    cost = made.outlook.chosen.choices[0].cost
    spent = {(row.down_bytes, row.flops, row.up_bytes) for row in rows if row.group == 0}
    assert spent == {(cost.down_bytes, cost.flops, cost.up_bytes)}
    totals = state.totals
    assert (totals["updates"], totals["abandoned_rounds"], totals["rejected_updates"]) == (0, 1, 6)

    def broken(update: Update) -> list[Update]:
        return [update] if update.turn.device < 2 else []

    made.experiment = replace(made.experiment, clock=Clock(min_updates=3))
    state, rows = play(made, Devices(made, broken))  # it becomes clear while they train
    assert bits(state.params) == bits(made.state.params)
    assert [row.rejected for row in rows] == [ABANDONED] * 2 + ["no update came"] * 4
    assert state.totals["abandoned_rounds"] == 1
    made.experiment = replace(made.experiment, clock=Clock(min_updates=2))
    state, rows = play(made, Devices(made, broken))
    assert bits(state.params) != bits(made.state.params)
    assert state.totals["updates"] == 2


def test_more_are_asked_than_are_needed(world: Table, tmp_path: Path) -> None:
    made = started(world | {"cohort": 2, "rounds": 4}, tmp_path, over_selection=2.0)
    made.play()
    for row, line in zip(made_rows(made.folder), lines(made.folder / "rounds.jsonl"), strict=True):
        assert len(row) == 4 and line["updates"] == 2
        assert sorted(each["seconds"] for each in row if not each["rejected"])[-1] == max(e["seconds"] for e in row)
        assert [each["rejected"] for each in row if each["rejected"]] == [LATE] * 2
    assert Clock(over_selection=1.1).asked(10) == 11
    assert Clock(over_selection=1.3).asked(10) == 13
    assert Clock(over_selection=1.25).asked(10) == 13
    assert Clock().asked(7) == 7


def made_rows(folder: Path) -> list[list[Table]]:
    """The lines of devices.jsonl, round by round."""
    rows: dict[int, list[Table]] = {}
    for line in lines(folder / "devices.jsonl"):
        rows.setdefault(line["round"], []).append(line)
    return list(rows.values())


def write_traces(path: Path, spans: list[list[list[int]]], period: int = 100) -> Path:
    table = {"period_seconds": period, "traces": {f"d{i}": each for i, each in enumerate(spans)}}
    path.write_text(json.dumps(table), encoding="utf-8")
    return path


def test_only_available_devices_are_asked_and_the_clock_waits_for_them(world: Table, tmp_path: Path) -> None:
    path = write_traces(tmp_path / "t.json", [[[0, 50]], [[60, 90]], [[60, 90]], [[60, 90]], [[70, 100]], [[0, 5]]])
    made = started(world | {"cohort": 3}, tmp_path, availability=str(path))
    state, rows = play(made)
    assert [row.device for row in rows] == [1, 2, 3]
    last = max(row.seconds for row in rows)
    assert state.totals["clock_seconds"] == 60 + last
    made.experiment = replace(made.experiment, cohort=5)
    with pytest.raises(UserError, match="a round needs 5 devices, but never are more than 4 of those with a plan"):
        play(made)


def test_devices_that_go_before_they_have_answered_are_lost(world: Table, tmp_path: Path) -> None:
    made = started(world, tmp_path)
    slow = next(d for d, group in enumerate(made.outlook.class_of) if group == 1)
    stay = math.floor(seconds_of(made, 1)) - 1
    assert stay > seconds_of(made, 0)
    spans = [[[0, stay if device == slow else 5000]] for device in range(6)]
    made = started(world, tmp_path, availability=str(write_traces(tmp_path / "t.json", spans, 5000)))
    devices = Devices(made)
    state, rows = play(made, devices)
    assert [(row.device, row.seconds) for row in rows if row.rejected == AWAY] == [(slow, stay)]
    assert slow not in {job.turn.device for job in devices.jobs}
    assert state.totals["updates"] == 5


def test_a_stopped_run_goes_on_bit_for_bit(world: Table, tmp_path: Path) -> None:
    path = write_traces(tmp_path / "t.json", [[[0, 50], [60, 100]], [[5, 90]], [[0, 70]]], 101)
    table = world | {"cohort": 2, "rounds": 5, "eval_every": 1}
    clock: Table = {"availability": str(path), "over_selection": 1.5, "deadline": 30.0}
    whole = started(table, tmp_path / "whole", **clock)
    summary = whole.play()
    assert summary["totals"]["clock_seconds"] > 0
    stopped = started(table, tmp_path / "stopped", **clock)

    class Stop(Exception):
        pass

    def stop(row: run.RoundRow, _: Any) -> None:
        if row.round == 2:
            raise Stop

    with pytest.raises(Stop):
        stopped.play(stop)
    run.resume(stopped.folder).play()
    assert outcome(stopped.folder) == outcome(whole.folder)
    times = [line["clock_seconds"] for line in lines(whole.folder / "rounds.jsonl")]
    assert times == sorted(times) and times[-1] == summary["totals"]["clock_seconds"]
    (stopped.folder / "summary.json").unlink()
    write_traces(path, [[[0, 50]], [[5, 90]], [[0, 70]]], 101)
    with pytest.raises(UserError, match="availability is not what it was when the run in"):
        run.resume(stopped.folder)


def test_the_clock_changes_no_result_where_all_answer(world: Table, tmp_path: Path) -> None:
    """The same networks as without rates."""
    bare = [{key: each[key] for key in ("name", "share")} for each in world["fleet"]]
    timed, timeless = begin(world, tmp_path), begin(world | {"fleet": bare}, tmp_path)
    assert timed.play()["accuracy"] == timeless.play()["accuracy"]
    assert bits(timed.state.params) == bits(timeless.state.params)
    assert timeless.state.totals["clock_seconds"] == 0


def test_what_people_are_told(world: Table, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = started(world | {"rounds": 1}, tmp_path)
    made.experiment = replace(made.experiment, clock=Clock(deadline=2 * seconds_of(made, 0)))
    classes = made.outlook.classes_json()
    assert [each["seconds"] for each in classes] == pytest.approx([seconds_of(made, 0), seconds_of(made, 1)])
    table = tables.classes(classes)
    column = list(table.head).index("time")
    assert [row[column] for row in table.rows] == [duration(seconds_of(made, group)) for group in (0, 1)]
    from lamina.view import View

    with (view := View()).rounds(0, 1) as live:
        summary = made.play(lambda row, devices: live.round(row, devices, ["fast", "slow"]))
    time = duration(summary["totals"]["clock_seconds"])
    (line,) = capsys.readouterr().out.splitlines()
    assert ", 4 late, " in line and line.endswith(f", clock {time}")
    assert ("virtual time", time) in tables.totals(summary).rows
    view.say("done")
    bare = config.experiment(world | {"fleet": [{"name": "all"}]}, "test")
    assert "time" not in tables.classes([{**classes[0], "seconds": 0.0}]).head and not bare.clock.needs_rates


def test_a_comparison_shows_time_where_there_is_some() -> None:
    path = Path(__file__).parents[1] / "records" / "compare" / "compare.json"
    collected = json.loads(path.read_text(encoding="utf-8"))
    assert "time" not in tables.comparison(collected)[0].head
    for row in collected["methods"]:
        if row["seeds"]:
            row["totals"]["clock_seconds"] = 200.0
    table = tables.comparison(collected)[0]
    assert table.head[-1] == "time"
    assert {len(row) for row in table.rows} == {len(table.head)}
    assert {row[-1] for row in table.rows} == {"3 min 20 s", ""}


def test_the_page_tells_what_is_recorded() -> None:
    root = Path(__file__).parents[1]
    page = (root / "docs" / "clock.md").read_text(encoding="utf-8")
    few, all_ = (lines(root / "records" / "traces" / name / "rounds.jsonl") for name in ("asked-13", "asked-10"))
    for row in few:
        assert f"accuracy {row['accuracy']['mean_over_devices']:.2%}, 3 late, {row['seconds']:.1f} s, clock " in page
        assert f"clock {duration(row['clock_seconds'])}\n" in page
    reached = [next(r for r in rows if r["accuracy"]["mean_over_devices"] > 0.544) for rows in (few, all_)]
    for text, kept in (
        ("eight rounds", [few[-1], all_[-1]]),
        ("54.4% reached after", reached),
    ):
        assert f"| {text} | {' | '.join(format(row['clock_seconds'], '.0f') + ' s' for row in kept)} |" in page
