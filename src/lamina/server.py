"""The round engine: draw a cohort, plan, send, check what comes back, merge. It knows no transport and no files."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from lamina import model
from lamina.config import Experiment
from lamina.engines import Engine
from lamina.experiment import Outlook
from lamina.job import Failure, Job, Turn, Update
from lamina.layout import Layout, Params
from lamina.plan import Vote, merge, narrow
from lamina.planner import choose_plan
from lamina.shapes import FLOAT_BYTES

TOTALS = ("up_bytes", "down_bytes", "flops", "updates", "rejected_updates", "abandoned_rounds")


@dataclass(frozen=True)
class State:
    """All that a run is after some rounds; the same state gives the same future, bit for bit.

    Attributes:
        round: Rounds done.
        params: Global tensors.
        changed: Tensor -> the round after which it last changed; 0 for the tensors of the base network.
        seen: Device -> the round before which it last received tensors. What its plans hold does not change.
        totals: What the run has cost so far.
    """

    round: int
    params: Params
    changed: Mapping[str, int]
    seen: Mapping[int, int]
    totals: Mapping[str, int] = field(default_factory=lambda: dict.fromkeys(TOTALS, 0))


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
    if none is left, the global tensors stay as they are and the round counts as abandoned.

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
    layout = model.layout(outlook.chosen.spec)
    jobs, rows, flops = _ask(experiment, outlook, examples, state)
    votes = []
    pending = set(jobs)
    for update in engine.run(jobs.values()):
        device = update.turn.device
        if device not in pending:  # never asked, or answered before: an engine may deliver twice
            continue
        job = jobs[device]
        if update.turn != job.turn:  # late; the answer that was asked for may still come
            rows[device] = replace(rows[device], rejected="answers another round")
            continue
        pending.remove(device)
        progress(len(jobs) - len(pending), len(jobs))
        if isinstance(update, Failure):
            rows[device] = replace(rows[device], rejected=update.reason)
            continue
        rejected = fault(update, job, layout)
        rows[device] = replace(
            rows[device],
            loss=update.loss if rejected is None else None,
            up_bytes=sum(array.numel() * array.element_size() for array in update.arrays.values()),
            flops=flops[device],
            rejected=rejected,
        )
        if rejected is None:
            votes.append(Vote(device, job.plan, update.arrays, experiment.method.weight(update)))
    params = merge(state.params, layout, votes, experiment.method.absent) if votes else state.params
    return _after(state, params, jobs, votes, rows), [rows[device] for device in sorted(rows)]


def _ask(
    experiment: Experiment, outlook: Outlook, examples: Sequence[int], state: State
) -> tuple[dict[int, Job], dict[int, DeviceRow], dict[int, int]]:
    """The jobs of a round, a row per device of the cohort as if no update came, and the operations of each job."""
    spec, local, tokens = outlook.chosen.spec, experiment.local, experiment.task.window
    layout = model.layout(spec)
    jobs: dict[int, Job] = {}
    rows: dict[int, DeviceRow] = {}
    flops: dict[int, int] = {}
    for device in draw_cohort(experiment, outlook, state.round):
        turn = Turn(experiment.seed, state.round, experiment.rounds, device)
        group = outlook.class_of[device]
        budget, steps = outlook.groups[group].budget, local.round_steps(examples[device])
        choice = choose_plan(experiment.method, spec, budget, local, tokens, outlook.steps, turn, experiment.levers)
        if choice.plan is None:
            rows[device] = DeviceRow(device, group, None, 0)
            continue
        jobs[device] = Job(turn, choice.plan, local, narrow(state.params, layout, choice.plan))
        flops[device] = choice.cost.flops * steps // outlook.steps
        fresh = device not in state.seen
        rows[device] = DeviceRow(
            device,
            group,
            choice.plan.label,
            choice.plan.trained_blocks(layout),
            choice.plan.blocks(layout),
            tuple(choice.plan.levers.names()),
            examples=examples[device],
            steps=steps,
            down_bytes=sum(
                FLOAT_BYTES * array.numel()
                for name, array in jobs[device].arrays.items()
                if fresh or state.changed[name] > state.seen[device]
            ),
            rejected="no update came",
        )
    return jobs, rows, flops


def draw_cohort(experiment: Experiment, outlook: Outlook, round_: int) -> list[int]:
    """Devices of a round, ascending: drawn without replacement among those whose class has a plan."""
    able = [d for d, group in enumerate(outlook.class_of) if outlook.chosen.choices[group].plan is not None]
    rng = Turn(experiment.seed, round_, experiment.rounds).rng("cohort")
    return sorted(int(d) for d in rng.choice(able, min(experiment.cohort, len(able)), replace=False))


def fault(update: Update, job: Job, layout: Layout) -> str | None:
    """What is wrong with an update, judged by the plan its device was sent; None if nothing is."""
    names = set(update.arrays)
    if names != job.plan.trains:
        odd = sorted(names ^ job.plan.trains)[0]
        return f"{'has' if odd in names else 'lacks'} tensor {odd}, against its plan"
    for name, array in update.arrays.items():
        if tuple(array.shape) != job.plan.shape(layout, name) or array.dtype != job.arrays[name].dtype:
            return f"{name} is {array.dtype} {tuple(array.shape)}, against its plan"
        if not array.isfinite().all():
            return f"{name} holds values that are not finite"
    if not math.isfinite(update.loss):
        return "its training loss is not finite"
    if not all(isinstance(count, int) and 1 <= count < 2**31 for count in (update.examples, update.steps)):
        return f"says it used {update.examples} examples in {update.steps} steps"
    return None


def _after(
    state: State,
    params: Params,
    jobs: Mapping[int, Job],
    votes: Sequence[Vote],
    rows: Mapping[int, DeviceRow],
) -> State:
    done = state.round + 1
    moved: set[str] = set().union(*(vote.plan.trains for vote in votes))
    spent: dict[str, Any] = {
        key: sum(getattr(row, key) for row in rows.values()) for key in ("up_bytes", "down_bytes", "flops")
    }
    spent |= {
        "updates": len(votes),
        "rejected_updates": sum(row.rejected is not None for row in rows.values()),
        "abandoned_rounds": int(not votes),
    }
    return State(
        round=done,
        params=params,
        changed={name: done if name in moved else before for name, before in state.changed.items()},
        seen=dict(state.seen) | dict.fromkeys(jobs, state.round),
        totals={key: state.totals[key] + spent[key] for key in TOTALS},
    )
