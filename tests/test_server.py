"""The round engine: what it refuses, what that changes, and what a round costs."""

import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support import TURN, WINDOW, Devices, Table, begin, bits, lines, memory, moved, play, prices, spec, write_world
from torch import Tensor

from lamina import model, server
from lamina.cost import cost
from lamina.engines.local import LocalEngine
from lamina.job import Failure, Local, Update
from lamina.levers import Levers
from lamina.methods.blocks import Caff
from lamina.plan import Vote, merge
from lamina.run import Run
from lamina.server import DeviceRow, draw_cohort, play_round
from lamina.state import State

STRONG, WEAK = 0, 1
HEAD = "head.weight"
Answer = Callable[[Update], list[Update]]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Table:
    """Three strong devices train tiny-3 and three weak ones its last block."""
    folder = tmp_path_factory.mktemp("server")
    return write_world(folder, networks=[str(folder / "tiny-3")])


@pytest.fixture(scope="module")
def run(world: Table, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Before its first round; tests do not play it on."""
    return begin(world | {"cohort": 5}, tmp_path_factory.mktemp("runs"))


def cohort(run: Run, group: int) -> list[int]:
    """Devices of the first round that are of a class."""
    return [d for d in draw_cohort(run.experiment, run.outlook, 0) if run.outlook.class_of[d] == group]


def array(change: Callable[[Tensor], Tensor]) -> Answer:
    """Another head."""
    return lambda update: [replace(update, arrays=update.arrays | {HEAD: change(update.arrays[HEAD])})]


def put(value: float) -> Answer:
    """One odd value in the head."""
    return array(lambda p: p.index_put((torch.tensor(3), torch.tensor(5)), torch.tensor(value)))


def field(**changes: Any) -> Answer:
    return lambda update: [replace(update, **changes)]


def without(update: Update) -> list[Update]:
    return [replace(update, arrays={name: p for name, p in update.arrays.items() if name != HEAD})]


def other(**changes: Any) -> Answer:
    """An answer to another job."""
    return lambda update: [replace(update, turn=replace(update.turn, **changes))]


def fails(update: Update) -> list[Any]:
    """What a device sends that needed too much."""
    return [Failure(update.turn, "exceeded its memory budget of 1.0 MiB")]


AGAINST = "against its plan"
FAULTS: dict[str, tuple[Answer, str]] = {
    "nan": (put(torch.nan), f"{HEAD} holds values that are not finite"),
    "infinity": (put(torch.inf), f"{HEAD} holds values that are not finite"),
    "minus infinity": (put(-torch.inf), f"{HEAD} holds values that are not finite"),
    "a tensor missing": (without, f"lacks tensor {HEAD}, {AGAINST}"),
    "no tensors": (field(arrays={}), rf"lacks tensor [a-z0-9_.]+, {AGAINST}"),
    "an extra tensor": (
        lambda update: [replace(update, arrays=update.arrays | {"bogus": torch.zeros(1)})],
        f"has tensor bogus, {AGAINST}",
    ),
    "broadcastable": (array(lambda p: torch.zeros(1)), rf"{HEAD} is torch.float32 \(1,\), {AGAINST}"),
    "a row": (array(lambda p: p[:1]), rf"{HEAD} is torch.float32 \(1, 16\), {AGAINST}"),
    "a scalar": (array(lambda p: p[0, 0]), rf"{HEAD} is torch.float32 \(\), {AGAINST}"),
    "empty": (array(lambda p: p[:0]), rf"{HEAD} is torch.float32 \(0, 16\), {AGAINST}"),
    "transposed": (array(lambda p: p.T), rf"{HEAD} is torch.float32 \(16, 96\), {AGAINST}"),
    "an extra axis": (array(lambda p: p[None]), rf"{HEAD} is torch.float32 \(1, 96, 16\), {AGAINST}"),
    "float64": (array(Tensor.double), rf"{HEAD} is torch.float64 \(96, 16\), {AGAINST}"),
    "float16": (array(Tensor.half), rf"{HEAD} is torch.float16 \(96, 16\), {AGAINST}"),
    "complex": (array(lambda p: p + 0j), rf"{HEAD} is torch.complex64 \(96, 16\), {AGAINST}"),
    "integers": (array(Tensor.long), rf"{HEAD} is torch.int64 \(96, 16\), {AGAINST}"),
    "another round": (other(round=7), "answers another round"),
    "another run": (other(seed=7), "answers another round"),
    "no examples": (field(examples=0), "says it used 0 examples in 3 steps"),
    "negative examples": (field(examples=-5), "says it used -5 examples in 3 steps"),
    "no steps": (field(steps=0), r"says it used \d+ examples in 0 steps"),
    "a loss of nan": (field(loss=torch.nan), "its training loss is not finite"),
    "an infinite loss": (field(loss=torch.inf), "its training loss is not finite"),
    "silence": (lambda update: [], "no update came"),
    "a failure": (fails, "exceeded its memory budget of 1.0 MiB"),
}
every_fault = pytest.mark.parametrize(("answer", "reason"), FAULTS.values(), ids=list(FAULTS))


def spoil(devices: list[int], answer: Answer) -> Answer:
    """Only these devices answer so."""
    return lambda update: answer(update) if update.turn.device in devices else [update]


@pytest.fixture(scope="module")
def honest(run: Run) -> tuple[State, list[DeviceRow], list[Vote]]:
    """The first round in which all is well, and the votes in it."""
    votes = []

    def answer(update: Update) -> list[Update]:
        plan = run.outlook.chosen.choices[run.outlook.class_of[update.turn.device]].plan
        assert plan
        votes.append(Vote(update.turn.device, plan, update.arrays, float(update.examples)))
        return [update]

    return *play(run, Devices(run, answer)), votes


def test_a_round_is_the_merge_of_what_its_devices_trained(
    run: Run, honest: tuple[State, list[DeviceRow], list[Vote]]
) -> None:
    state, rows, votes = honest
    layout = model.layout(spec(3))
    assert [row.device for row in rows] == sorted(vote.device for vote in votes)
    assert bits(state.params) == bits(merge(run.state.params, layout, votes, "keep"))
    assert moved(run.state.params, state.params) == set(state.params)
    assert (state.round, state.changed) == (1, dict.fromkeys(state.params, 1))
    drawn = {row.device for row in rows}
    for device in range(6):
        assert state.copies.of(device, len(state.params)).tolist() == [0 if device in drawn else -1] * len(state.params)
    for row in rows:
        price = prices(Caff(), 3)[row.trained_blocks]
        assert row.trained_blocks == {STRONG: 3, WEAK: 1}[row.group]
        assert row.plan == {STRONG: "all 3", WEAK: "last 1 of 3"}[row.group]
        assert (row.up_bytes, row.down_bytes, row.flops) == (price.up_bytes, price.down_bytes, price.flops)
        assert (row.examples, row.steps, row.rejected) == (len(run.task.train[row.device]), 3, None)
    assert state.totals == {
        "up_bytes": sum(row.up_bytes for row in rows),
        "down_bytes": sum(row.down_bytes for row in rows),
        "flops": sum(row.flops for row in rows),
        "updates": 5,
        "rejected_updates": 0,
        "abandoned_rounds": 0,
        "clock_seconds": 0,
    }


def test_the_state_before_the_round_is_not_touched(run: Run) -> None:
    before, fields = bits(run.state.params), {k: v for k, v in vars(run.state).items() if k != "params"}
    play(run)
    assert bits(run.state.params) == before
    assert {k: v for k, v in vars(run.state).items() if k != "params"} == fields
    assert all((run.state.copies.of(device, 3) == -1).all() for device in range(6))


@pytest.mark.parametrize("group", [STRONG, WEAK], ids=["strong", "weak"])
@every_fault
def test_a_bad_update_is_left_out_and_counted(
    answer: Answer, reason: str, group: int, run: Run, honest: tuple[State, list[DeviceRow], list[Vote]]
) -> None:
    bad = cohort(run, group)[0]
    state, rows = play(run, Devices(run, spoil([bad], answer)))
    others = [vote for vote in honest[2] if vote.device != bad]
    assert bits(state.params) == bits(merge(run.state.params, model.layout(spec(3)), others, "keep"))
    assert moved(state.params, honest[0].params)
    (row,) = [row for row in rows if row.rejected]
    assert (row.device, row.loss) == (bad, None)
    assert re.fullmatch(reason, row.rejected or ""), row.rejected
    assert state.totals["rejected_updates"] == 1
    assert state.totals["updates"] == 4
    assert [row for row in rows if row.device != bad] == [row for row in honest[1] if row.device != bad]


def test_an_update_that_is_too_large_is_scaled_to_the_bound(
    run: Run, honest: tuple[State, list[DeviceRow], list[Vote]]
) -> None:
    """A million times too large, it counts as one of the bound; those below it count as they are, to the bit."""

    def change(vote: Vote) -> dict[str, Tensor]:
        return {name: array.double() - run.state.params[name] for name, array in vote.arrays.items()}

    def norm(changes: dict[str, Tensor]) -> float:
        return math.sqrt(sum(float(each.square().sum()) for each in changes.values()))

    bad, votes = cohort(run, STRONG)[0], honest[2]
    most = 1.01 * max(norm(change(vote)) for vote in votes)
    (vote,) = [vote for vote in votes if vote.device == bad]
    scale = most / norm(change(vote))

    def moves(factor: float) -> dict[str, Tensor]:
        return {name: (run.state.params[name] + factor * each).float() for name, each in change(vote).items()}

    large = spoil([bad], lambda update: [replace(update, arrays=moves(1e6))])
    bounded = replace(run, experiment=replace(run.experiment, clip_updates=most))
    state, rows = play(bounded, Devices(bounded, large))
    assert [row.device for row in rows if row.clipped] == [bad] and not any(row.rejected for row in rows)
    others = [each for each in votes if each.device != bad]
    wanted = sorted([*others, replace(vote, arrays=moves(scale))], key=lambda vote: vote.device)
    merged = merge(run.state.params, model.layout(spec(3)), wanted, "keep")
    for name, p in merged.items():
        assert torch.allclose(state.params[name], p, rtol=0, atol=1e-6), name
    assert bits(play(bounded, Devices(bounded, lambda update: [update]))[0].params) == bits(honest[0].params)
    loose, _ = play(run, Devices(run, large))
    assert norm({name: loose.params[name].double() - p for name, p in run.state.params.items()}) > 1e4 * most


def duplicate(update: Update) -> list[Update]:
    """The same device again, with something else."""
    return [update, replace(update, arrays={name: p + 1 for name, p in update.arrays.items()})]


def stranger(device: int) -> Answer:
    """An answer in the name of another device, before the device's own."""
    return lambda update: [*other(device=device)(update), update]


def test_duplicates_and_strangers_change_nothing(run: Run, honest: tuple[State, list[DeviceRow], list[Vote]]) -> None:
    (idle,) = set(range(6)) - {row.device for row in honest[1]}
    for answer in (duplicate, stranger(idle), stranger(99), stranger(-1)):
        state, rows = play(run, Devices(run, spoil(cohort(run, WEAK)[:1], answer)))
        assert bits(state.params) == bits(honest[0].params)
        assert (rows, state.totals) == (honest[1], honest[0].totals)


def test_a_late_answer_does_not_displace_the_one_that_was_asked_for(
    run: Run, honest: tuple[State, list[DeviceRow], list[Vote]]
) -> None:
    def late(update: Update) -> list[Update]:
        return [*other(round=7)(update), update]

    state, _ = play(run, Devices(run, spoil(cohort(run, WEAK)[:1], late)))
    assert bits(state.params) == bits(honest[0].params)


def test_a_failure_costs_its_own_update(run: Run, honest: tuple[State, list[DeviceRow], list[Vote]]) -> None:
    """It received tensors, and sent and computed nothing that counts."""
    bad = cohort(run, STRONG)[0]
    state, rows = play(run, Devices(run, spoil([bad], fails)))
    (row,), (before,) = ([row for row in each if row.device == bad] for each in (rows, honest[1]))
    assert row == replace(before, loss=None, up_bytes=0, flops=0, rejected="exceeded its memory budget of 1.0 MiB")
    assert row.down_bytes == before.down_bytes > 0
    for key in ("up_bytes", "flops"):
        assert state.totals[key] == honest[0].totals[key] - getattr(before, key)
    assert (state.totals["updates"], state.totals["rejected_updates"], state.totals["abandoned_rounds"]) == (4, 1, 0)
    assert moved(run.state.params, state.params)


def test_failures_that_were_not_asked_for_change_nothing(
    run: Run, honest: tuple[State, list[DeviceRow], list[Vote]]
) -> None:
    """In the name of others, late, or after the answer; but a failure is an answer, too."""
    (idle,) = set(range(6)) - {row.device for row in honest[1]}
    first = cohort(run, WEAK)[:1]

    def before(**changes: Any) -> Answer:
        return lambda update: [*fails(replace(update, turn=replace(update.turn, **changes))), update]

    harmless: list[Answer] = [before(device=device) for device in (idle, 99, -1)]
    harmless += [before(round=7), before(seed=7), lambda update: [update, *fails(update)]]
    for answer in harmless:
        state, rows = play(run, Devices(run, spoil(first, answer)))
        assert bits(state.params) == bits(honest[0].params)
        assert (rows, state.totals) == (honest[1], honest[0].totals)
    state, rows = play(run, Devices(run, spoil(first, before())))
    assert [row.device for row in rows if row.rejected] == first
    assert state.totals["updates"] == 4


def test_failures_of_another_round_alone_are_no_answer(run: Run) -> None:
    told: list[tuple[int, int]] = []
    late: Answer = lambda update: fails(replace(update, turn=replace(update.turn, round=7)))  # noqa: E731
    examples = [len(shard) for shard in run.task.train]
    state, rows = play_round(
        run.experiment,
        run.outlook,
        examples,
        Devices(run, spoil(cohort(run, WEAK)[:1], late)),
        run.state,
        lambda done, jobs: told.append((done, jobs)),
    )
    assert [row.rejected for row in rows if row.rejected] == ["answers another round"]
    assert told == [(done, 5) for done in range(1, 5)]
    assert state.totals["rejected_updates"] == 1


def test_failures_are_progress(run: Run) -> None:
    told: list[tuple[int, int]] = []
    examples = [len(shard) for shard in run.task.train]
    engine = Devices(run, spoil(cohort(run, STRONG), fails))
    play_round(run.experiment, run.outlook, examples, engine, run.state, lambda *each: told.append(each))
    assert told == [(done, 5) for done in range(1, 6)]


def test_failures_are_written_down(world: Table, tmp_path: Path) -> None:
    """The second round loses everyone, and the run goes on."""
    run = begin(world | {"cohort": 6}, tmp_path)
    answer: Answer = lambda update: fails(update) if update.turn.round == 1 else [update]  # noqa: E731
    summary = run.play(engine=Devices(run, answer))
    first, second, third = lines(run.folder / "rounds.jsonl")
    assert second["rejected"] == [f"device {d}: exceeded its memory budget of 1.0 MiB" for d in range(6)]
    assert (second["loss"], second["updates"], second["up_bytes"], second["flops"]) == (None, 0, 0, 0)
    assert (first["rejected"], third["rejected"], third["updates"]) == ([], [], 6)
    refused = [line for line in lines(run.folder / "devices.jsonl") if line["rejected"]]
    assert {(line["round"], line["rejected"], line["loss"], line["steps"]) for line in refused} == {
        (2, "exceeded its memory budget of 1.0 MiB", None, 3)
    }
    totals = summary["totals"]
    assert (totals["updates"], totals["rejected_updates"], totals["abandoned_rounds"]) == (12, 6, 1)


THRIFTY = Local(lr=0.1, optimizer="sgd", steps=3, batch_size=4)


@pytest.fixture(scope="module")
def thrifty(world: Table) -> Table:
    """One class trains all in less than half the memory that it takes, one the last two blocks in four fifths."""
    half, most = memory(3, 3, THRIFTY) * 45 // 100, memory(3, 2, THRIFTY) * 4 // 5
    fleet = [{"name": "strong", "memory": half}, {"name": "weak", "memory": most, "uplink": uplink(3) - 1}]
    table = {"lr": THRIFTY.lr, "optimizer": THRIFTY.optimizer, "steps": THRIFTY.steps, "batch_size": THRIFTY.batch_size}
    return world | {"local": table, "fleet": fleet, "levers": "exact", "cohort": 6}


def uplink(trained: int) -> int:
    return prices(Caff(), 3)[trained].up_bytes


def test_a_round_plays_the_plans_that_were_shown(thrifty: Table, tmp_path: Path) -> None:
    """Levers included, and the rows name them."""
    run = begin(thrifty, tmp_path)
    devices = Devices(run)
    _, rows = play(run, devices)
    plans = {job.turn.device: job.plan for job in devices.jobs}
    assert sorted(plans) == [row.device for row in rows] == list(range(6))
    shown = run.outlook.classes_json()
    for row in rows:
        choice = run.outlook.chosen.choices[run.outlook.class_of[row.device]]
        assert plans[row.device] == choice.plan
        assert choice.plan and choice.plan.levers != Levers()
        assert list(row.levers) == choice.plan.levers.names() == shown[row.group]["levers"]
        assert row.plan == choice.plan.label == shown[row.group]["plan"]
        assert row.flops == choice.cost.flops
    assert {name.split()[0] for row in rows for name in row.levers} == {
        *("chunked_loss", "cache_disk", "micro_batch", "recompute")
    }


def test_levers_change_rounding_alone(thrifty: Table, tmp_path: Path) -> None:
    """The same plans with and without: the same network after a run, but for the last digits."""
    fleet = [{"name": "strong"}, {"name": "weak", "uplink": uplink(3) - 1}]
    alone = thrifty | {"engine": "serial"}  # devices that are simulated together do not use exact levers
    with_levers = begin(alone, tmp_path / "with")
    plain = begin(alone | {"levers": "none", "fleet": fleet}, tmp_path / "plain")
    for run in (with_levers, plain):
        assert [choice.plan.label for choice in run.outlook.chosen.choices if choice.plan] == ["all 3", "last 2 of 3"]
    before = {name: p.clone() for name, p in plain.state.params.items()}
    with_levers.play()
    plain.play()
    keys = {name for name in before if name.endswith("attn.k.bias")}  # of which the gradient vanishes
    assert moved(before, plain.state.params) >= set(before) - keys
    assert moved(with_levers.state.params, plain.state.params)
    for name, p in plain.state.params.items():
        torch.testing.assert_close(with_levers.state.params[name], p, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("examples", [float("nan"), float("inf")], ids=str)
def test_odd_weights_are_left_out(examples: Any, run: Run) -> None:
    """They poison the mean of everyone."""
    state, _ = play(run, Devices(run, spoil(cohort(run, WEAK)[:1], field(examples=examples))))
    assert state.totals["rejected_updates"] == 1
    assert all(p.isfinite().all() for p in state.params.values())


@every_fault
def test_a_round_of_bad_updates_is_abandoned(answer: Answer, reason: str, run: Run) -> None:
    state, rows = play(run, Devices(run, answer))
    assert bits(state.params) == bits(run.state.params)
    assert (state.round, state.changed) == (1, run.state.changed)
    assert all(re.fullmatch(reason, row.rejected or "") and row.loss is None for row in rows)
    totals = {key: state.totals[key] for key in ("updates", "rejected_updates", "abandoned_rounds")}
    assert totals == {"updates": 0, "rejected_updates": 5, "abandoned_rounds": 1}


def test_a_run_goes_on_after_an_abandoned_round(world: Table, tmp_path: Path) -> None:
    """Everyone takes part; what nobody changed in the second round need not be sent again in the third."""
    run = begin(world | {"cohort": 6}, tmp_path)
    states = []

    def answer(update: Update) -> list[Update]:
        return put(torch.nan)(update) if update.turn.round == 1 else [update]

    summary = run.play(lambda row, devices: states.append(run.state), engine=Devices(run, answer))
    first, second, third = lines(run.folder / "rounds.jsonl")
    assert bits(states[0].params) == bits(states[1].params)
    assert moved(states[1].params, states[2].params)
    assert (second["loss"], second["updates"], len(second["rejected"])) == (None, 0, 6)
    assert second["rejected"][0] == f"device 0: {HEAD} holds values that are not finite"
    assert first["loss"] > 0 and third["loss"] > 0
    assert (first["down_bytes"], second["down_bytes"], third["down_bytes"]) == (6 * 4 * 13456, 6 * 4 * 13456, 0)
    totals = summary["totals"]
    refused = [line for line in lines(run.folder / "devices.jsonl") if line["rejected"]]
    assert len(refused) == totals["rejected_updates"]
    assert {(line["round"], line["loss"]) for line in refused} == {(2, None)}
    assert (totals["rounds"], totals["updates"], totals["rejected_updates"], totals["abandoned_rounds"]) == (
        3,
        12,
        6,
        1,
    )


@pytest.mark.parametrize("shuffle", [1, 2, 3])
def test_the_order_of_arrival_does_not_matter(
    shuffle: int, run: Run, honest: tuple[State, list[DeviceRow], list[Vote]]
) -> None:
    state, rows = play(run, Devices(run, shuffle=shuffle))
    assert (bits(state.params), rows) == (bits(honest[0].params), honest[1])


def test_no_order_of_arrival_changes_the_rounding(run: Run) -> None:
    """2^60 + 1 - 2^60 is 0 in one order and 1 in another."""
    drawn = draw_cohort(run.experiment, run.outlook, 0)
    values = dict(zip(drawn, (2.0**60, 1.0, -(2.0**60), 0.0, 0.0), strict=True))

    def answer(update: Update) -> list[Update]:
        value = values[update.turn.device]
        arrays = {name: torch.full_like(p, value) for name, p in update.arrays.items()}
        return [replace(update, arrays=arrays, examples=1)]

    outcomes = [bits(play(run, Devices(run, answer, shuffle))[0].params) for shuffle in range(8)]
    assert all(each == outcomes[0] for each in outcomes)


def test_the_local_engine_is_the_devices(run: Run, honest: tuple[State, list[DeviceRow], list[Vote]]) -> None:
    engine = LocalEngine(run.outlook.chosen.spec, run.task.train, workers=2)
    examples = [len(shard) for shard in run.task.train]
    state, rows = play_round(run.experiment, run.outlook, examples, engine, run.state)
    assert (bits(state.params), rows, state.totals) == (bits(honest[0].params), honest[1], honest[0].totals)


def test_progress_is_told(run: Run) -> None:
    told: list[tuple[int, int]] = []
    examples = [len(shard) for shard in run.task.train]
    play_round(
        run.experiment, run.outlook, examples, Devices(run), run.state, lambda done, jobs: told.append((done, jobs))
    )
    assert told == [(done, 5) for done in range(1, 6)]


def test_a_device_receives_only_what_changed_since_it_last_took_part(
    world: Table, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By hand: tiny-3 has 2048 weights in the embeddings, 3280 per block and 1568 in the norm and the head.

    One class trains the last two blocks, the other the last; the embeddings and block 0 never change.
        round 0: devices 0-3   first contact: all, 2048 + 3 * 3280 + 1568 = 13456 weights. Only a one-block device is
                               heard, so block 2 and the tail change.
        round 1: devices 0-4   0-3: 3280 + 1568 = 4848.  4: first contact, 13456.  All are heard: blocks 1 and 2 and the
                               tail change.
        round 2: devices 0, 4  2 * 3280 + 1568 = 8128.  Nobody is heard; nothing changes.
        round 3: devices 0, 1, 5   0: nothing.  1, last seen before round 1: 8128.  5: first contact, 13456.
    """
    fleet = [{"name": "two", "memory": memory(3, 2)}, {"name": "one", "memory": memory(3, 1)}]
    run = begin(world | {"fleet": fleet, "rounds": 4}, tmp_path)
    cohorts = [[0, 1, 2, 3], [0, 1, 2, 3, 4], [0, 4], [0, 1, 5]]
    monkeypatch.setattr(server, "draw_cohort", lambda experiment, outlook, round_, begin: cohorts[round_])
    one = next(d for d in range(4) if run.outlook.class_of[d] == 1)
    heard = [{one}, {0, 1, 2, 3, 4}, set[int](), {0, 1, 5}]

    def answer(update: Update) -> list[Update]:
        return [update] if update.turn.device in heard[update.turn.round] else []

    received, state = [], run.state
    for _ in cohorts:
        state, rows = play(run, Devices(run, answer), state)
        received.append({row.device: row.down_bytes // 4 for row in rows})
        assert all(row.down_bytes % 4 == 0 for row in rows)
    assert received == [
        dict.fromkeys(range(4), 13456),
        {0: 4848, 1: 4848, 2: 4848, 3: 4848, 4: 13456},
        {0: 8128, 4: 8128},
        {0: 0, 1: 8128, 5: 13456},
    ]
    assert state.totals["down_bytes"] == 4 * sum(sum(each.values()) for each in received)


def test_a_cohort_is_drawn_by_seed_and_round_among_those_that_can(run: Run, world: Table, tmp_path: Path) -> None:
    drawn = [draw_cohort(run.experiment, run.outlook, round_) for round_ in range(40)]
    for each in drawn:
        assert each == sorted(set(each)) and len(each) == 5 and set(each) <= set(range(6))
    assert drawn == [draw_cohort(run.experiment, run.outlook, round_) for round_ in range(40)]
    assert len(set(map(tuple, drawn))) == 6  # whoever is left out
    seeded = replace(run.experiment, seed=1)
    assert drawn != [draw_cohort(seeded, run.outlook, round_) for round_ in range(40)]
    fleet = [{"name": "strong"}, {"name": "out", "memory": 1000}]
    few = begin(world | {"cohort": 6, "fleet": fleet, "method": {"name": "caff", "on_infeasible": "drop"}}, tmp_path)
    able = [device for device in range(6) if few.outlook.class_of[device] == 0]
    assert draw_cohort(few.experiment, few.outlook, 0) == able
    assert len(able) == 3


def test_a_class_is_planned_for_its_longest_shard_and_pays_for_its_own(world: Table, tmp_path: Path) -> None:
    """With one pass over the data the plan shown is the plan run, and no device is over its operations."""
    local = Local(lr=0.02, batch_size=4)
    adapted, caff = spec(3), Caff()
    plans = list(caff.plans(adapted, TURN, {}))
    budget = cost(adapted, plans[-1], local, WINDOW, 8).flops
    table = world | {"local": {"lr": 0.02, "batch_size": 4}, "fleet": [{"name": "all", "flops": budget}], "cohort": 6}
    run = begin(table, tmp_path)
    _, rows = play(run)
    steps = [-(-len(run.task.train[row.device]) // 4) for row in rows]
    assert run.outlook.steps == max(steps) == 8
    assert {row.plan for row in rows} == {plans[-1].label}
    assert [row.steps for row in rows] == steps
    assert [row.flops for row in rows] == [cost(adapted, plans[-1], local, WINDOW, n).flops for n in steps]
    assert len(set(steps)) > 1


def test_plans_go_by_the_memory_that_a_device_has_in_the_round(tmp_path: Path) -> None:
    """One block always fits, all three in good rounds; the network is the one on which the least is enough."""
    full, least = memory(3, 3) * 5 // 4, memory(3, 1)
    drift = 1 - least / full
    fleet = [{"name": "all", "memory": full, "drift": drift}]
    networks = [str(tmp_path / f"tiny-{blocks}") for blocks in (3, 4)]
    made = begin(write_world(tmp_path, networks=networks, fleet=fleet, cohort=6, rounds=40), tmp_path / "runs")
    group, seen, state = made.outlook.groups[0], set(), made.state
    assert made.outlook.chosen.name == "tiny-3" and made.outlook.chosen.choices[0].cost.memory_bytes == least
    assert (group.budget.memory_bytes, group.best_memory_bytes) == (least, full)
    for round_ in range(40):
        rows = server._Round(made.experiment, made.outlook, [99] * 6, replace(state, round=round_)).rows.values()
        for row in rows:
            turn = replace(TURN, seed=made.experiment.seed, round=round_, device=row.device)
            limit = made.outlook.budget_in(turn).memory_bytes
            assert limit is not None and least <= limit <= full
            assert row.trained_blocks == max(trained for trained in (1, 2, 3) if memory(3, trained) <= limit)
            seen.add(row.trained_blocks)
    assert seen == {1, 2, 3}
    twice = [[row.plan for row in play(made)[1]] for _ in range(2)]
    assert twice[0] == twice[1] and len(set(twice[0])) > 1
