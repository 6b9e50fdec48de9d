"""The round engine: draw a cohort, plan, send, check what comes back, merge. It knows no transport and no files."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from lamina import model
from lamina.clock import ABANDONED, settle
from lamina.config import Experiment
from lamina.engines import Engine
from lamina.estimators import unfold
from lamina.experiment import Outlook
from lamina.job import Failure, Job, Turn, Update
from lamina.planner import choose_plan
from lamina.shapes import FLOAT_BYTES
from lamina.spec import Spec
from lamina.state import TOTALS, State


@dataclass(frozen=True)
class DeviceRow:
    """One device in one round.

    Attributes:
        device: Index.
        group: Index of its class.
        plan: Label of its plan, or None when it sat out.
        trained_blocks: Number of blocks it trained.
        blocks: Their indices.
        levers: Names of those its plan uses.
        loss: Mean local training loss in nats; None without a usable update.
        examples: Of its shard.
        steps: It was to take.
        down_bytes: It had to receive.
        up_bytes: It sent.
        flops: It computed.
        rejected: Why its update was not used, or None.
        seconds: Of the virtual clock, from the beginning of the round until it had answered or was lost.
    """

    device: int
    group: int
    plan: str | None
    trained_blocks: int
    blocks: tuple[int, ...] = ()
    levers: tuple[str, ...] = ()
    loss: float | None = None
    examples: int = 0
    steps: int = 0
    down_bytes: int = 0
    up_bytes: int = 0
    flops: int = 0
    rejected: str | None = None
    seconds: float = 0.0


def play_round(
    experiment: Experiment,
    outlook: Outlook,
    examples: Sequence[int],
    engine: Engine,
    state: State,
    progress: Callable[[int, int], None] = lambda done, jobs: None,
) -> tuple[State, list[DeviceRow]]:
    """One federated round.

    An update that is not exactly what its plan asked for, or holds a value that is not finite, is left out of the mean;
    if fewer than `clock.min_updates` are left, the global tensors stay as they are and the round counts as abandoned.
    Devices that cannot answer in time are known before, and are not simulated.

    Args:
        experiment: The settings.
        outlook: Classes, budgets and the chosen network.
        examples: Shard size of every device.
        engine: Carries the jobs.
        state: Before the round; not changed.
        progress: Told the number of updates that came, and of jobs, as it goes on.

    Returns:
        The state after the round, and a row per device of the cohort in ascending order.
    """
    spec, method = outlook.chosen.spec, experiment.method
    begin = begins(experiment, outlook, state.totals["clock_seconds"])
    asked = _ask(experiment, outlook, examples, state, draw_cohort(experiment, outlook, state.round, begin))
    asked, seconds = _timed(experiment, outlook, asked, state.round, begin)
    rows = {device: each.row for device, each in asked.items()}
    votes, kept = [], dict(state.devices)
    pending = {device for device, each in asked.items() if each.job}
    count = len(pending)
    for update in engine.run(each.job for each in asked.values() if each.job):
        device = update.turn.device
        if device not in pending:  # never asked, or answered before: an engine may deliver twice
            continue
        job = asked[device].job
        assert job
        if update.turn != job.turn:  # late; the answer that was asked for may still come
            rows[device] = replace(rows[device], rejected="answers another round")
            continue
        pending.remove(device)
        progress(count - len(pending), count)
        rows[device] = _answered(asked[device], update, fault(update, job, spec))
        if isinstance(update, Update) and rows[device].rejected is None:
            votes.append(method.decode(unfold(update, job), job, spec))
            kept |= {device: update.state} if update.state else {}
    params, memory = state.params, state.memory
    if len(votes) < experiment.clock.min_updates:
        kept = dict(state.devices)
        unused = {d: replace(row, loss=None, rejected=ABANDONED) for d, row in rows.items() if row.loss is not None}
        rows |= unused
    else:
        turn = Turn(experiment.seed, state.round, experiment.rounds)
        params, memory = method.merge(params, spec, votes, turn, memory)
    after = replace(state, params=params, memory=memory, devices=kept)
    return _counted(state, after, asked, rows, begin + seconds), [rows[device] for device in sorted(rows)]


@dataclass(frozen=True)
class _Asked:
    """One device of a cohort.

    Attributes:
        row: As if no update came.
        job: None where it sits out.
        flops: That it takes.
        up_bytes: That it sends, as predicted.
        sources: Of the tensors it holds, those that are the server's as they are, by their keys in `State.changed`.
    """

    row: DeviceRow
    job: Job | None = None
    flops: int = 0
    up_bytes: int = 0
    sources: Sequence[str] = ()


def _ask(
    experiment: Experiment, outlook: Outlook, examples: Sequence[int], state: State, cohort: Sequence[int]
) -> dict[int, _Asked]:
    """The jobs of a round."""
    spec, local, tokens, method = outlook.chosen.spec, experiment.local, experiment.task.window, experiment.method
    asked, keys = {}, _keys(state)
    for device in cohort:
        turn = Turn(experiment.seed, state.round, experiment.rounds, device)
        group = outlook.class_of[device]
        budget, steps = outlook.groups[group].budget, local.round_steps(examples[device])
        work = (local, tokens, outlook.steps, turn, experiment.levers, state.memory)
        choice = choose_plan(method, spec, budget, *work)
        plan = choice.plan
        if plan is None:
            asked[device] = _Asked(DeviceRow(device, group, None, 0))
            continue
        arrays = method.encode(state.params, spec, plan, turn, state.memory)
        layout = model.layout(plan.runs(spec))
        sources = {name: keys.get(id(array), "") for name, array in arrays.items()}
        seen = state.seen.get(device, {})
        row = DeviceRow(
            device,
            group,
            plan.label,
            plan.trained_blocks(layout),
            plan.blocks(layout),
            tuple(plan.levers.names()),
            examples=examples[device],
            steps=steps,
            down_bytes=sum(
                FLOAT_BYTES * arrays[name].numel()
                for name, key in sources.items()
                if not key or state.changed[key] > seen.get(key, -1)
            ),
            rejected="no update came",
        )
        job = Job(turn, plan, local, arrays, method, state.devices.get(device, {}))
        flops = choice.cost.flops * steps // outlook.steps
        asked[device] = _Asked(row, job, flops, choice.cost.up_bytes, [key for key in sources.values() if key])
    return asked


def _timed(
    experiment: Experiment, outlook: Outlook, asked: Mapping[int, _Asked], round_: int, begin: float
) -> tuple[dict[int, _Asked], float]:
    """The same after a look at the clock: who does not answer in time has no job; and the length of the round."""
    busy = {device: each for device, each in asked.items() if each.job}
    devices = np.array(list(busy), dtype=np.int64)
    work = np.array([(each.row.down_bytes, each.flops, each.up_bytes) for each in busy.values()]).reshape(-1, 3)
    left, turn = outlook.availability.left(begin)[devices], Turn(experiment.seed, round_, experiment.rounds)
    stints, seconds = settle(experiment.clock, experiment.cohort, devices, work, outlook.rates, left, turn)
    enough = sum(stint.reason is None for stint in stints) >= experiment.clock.min_updates
    timed = dict(asked)
    for (device, each), stint in zip(busy.items(), stints, strict=True):
        row = replace(each.row, seconds=stint.seconds)
        if stint.reason is None and enough:
            timed[device] = replace(each, row=row)
            continue
        spent = {key: getattr(stint, key) for key in ("down_bytes", "flops", "up_bytes")}
        row = replace(row, **spent, rejected=stint.reason or ABANDONED)
        timed[device] = _Asked(row, sources=each.sources if stint.received else ())
    return timed, seconds


def _keys(state: State) -> dict[int, str]:
    """The identity of each of the server's tensors -> its key in `State.changed`.

    What a device gets and is none of them was made or cut for it.
    """
    found = {id(tensor): f"memory:{name}" for name, tensor in state.memory.items()}
    return found | {id(tensor): name for name, tensor in state.params.items()}


def _answered(asked: _Asked, update: Update | Failure, fault: str | None) -> DeviceRow:
    """The row of a device once something came."""
    if isinstance(update, Failure):
        return replace(asked.row, rejected=update.reason)
    return replace(
        asked.row,
        loss=update.loss if fault is None else None,
        up_bytes=sum(array.numel() * array.element_size() for array in update.arrays.values()),
        flops=asked.flops,
        rejected=fault,
    )


def begins(experiment: Experiment, outlook: Outlook, now: float) -> float:
    """When a round begins: as soon as a cohort of devices with a plan is available."""
    able = outlook.able()
    return outlook.availability.begin(now, able, min(experiment.cohort, int(able.sum())))


def draw_cohort(experiment: Experiment, outlook: Outlook, round_: int, begin: float = 0.0) -> list[int]:
    """Devices of a round, ascending: drawn without replacement among the available whose class has a plan."""
    able = np.flatnonzero(outlook.able() & (outlook.availability.left(begin) > 0))
    rng = Turn(experiment.seed, round_, experiment.rounds).rng("cohort")
    return sorted(rng.choice(able, min(experiment.clock.asked(experiment.cohort), len(able)), replace=False).tolist())


def fault(update: Update | Failure, job: Job, spec: Spec) -> str | None:
    """What is wrong with an update, judged by the plan its device was sent; None if nothing is."""
    if isinstance(update, Failure):
        return update.reason
    if not all(isinstance(count, int) and 1 <= count < 2**31 for count in (update.examples, update.steps)):
        return f"says it used {update.examples} examples in {update.steps} steps"
    wanted = job.method.sends(spec, job.plan, update.steps)
    if odd := sorted(update.arrays.keys() ^ wanted.keys()):
        return f"{'has' if odd[0] in update.arrays else 'lacks'} tensor {odd[0]}, against its plan"
    for name, array in update.arrays.items():
        if (tuple(array.shape), array.dtype) != wanted[name]:
            return f"{name} is {array.dtype} {tuple(array.shape)}, against its plan"
        if not array.isfinite().all():
            return f"{name} holds values that are not finite"
    if not math.isfinite(update.loss):
        return "its training loss is not finite"
    return None


def _counted(
    before: State, after: State, asked: Mapping[int, _Asked], rows: Mapping[int, DeviceRow], end: float
) -> State:
    """The state after a round with its books kept; `end` is what the virtual clock shows."""
    done, used = before.round + 1, sum(row.loss is not None for row in rows.values())
    changed = dict(before.changed)
    for prefix, old, new in (("", before.params, after.params), ("memory:", before.memory, after.memory)):
        changed |= {f"{prefix}{name}": done for name, tensor in new.items() if tensor is not old.get(name)}
    spent: dict[str, Any] = {
        key: sum(getattr(row, key) for row in rows.values()) for key in ("up_bytes", "down_bytes", "flops")
    }
    spent |= {
        "updates": used,
        "rejected_updates": sum(row.rejected is not None for row in rows.values()),
        "abandoned_rounds": int(not used),
    }
    seen = dict(before.seen)
    for device, each in asked.items():
        seen[device] = dict(seen.get(device, {})) | dict.fromkeys(each.sources, before.round)
    return replace(
        after,
        round=done,
        changed=changed,
        seen=seen,
        totals={key: before.totals[key] + spent.get(key, 0) for key in TOTALS} | {"clock_seconds": end},
    )
