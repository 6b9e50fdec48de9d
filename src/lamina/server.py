"""The round engine: draw a cohort, plan, send, check what comes back, merge. It knows no transport and no files."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from itertools import chain
from typing import Any, TypeGuard

import numpy as np
from torch import Tensor

from lamina import model
from lamina.clock import ABANDONED, settle
from lamina.config import Experiment
from lamina.engines import Engine
from lamina.estimators import unfold
from lamina.experiment import Outlook
from lamina.job import Failure, Job, Turn, Update
from lamina.layout import Params
from lamina.methods import Method
from lamina.plan import Plan, Vote
from lamina.planner import Choice, choose_plan
from lamina.shapes import FLOAT_BYTES
from lamina.spec import Spec
from lamina.state import TOTALS, State

_PLANS = 16
"""Plans whose tensors are kept during a round, since other devices may have the same."""


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
        clipped: Whether its change was scaled to `clip_updates`.
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
    clipped: bool = False
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
    played = _Round(experiment, outlook, examples, state)
    votes = played.votes(engine, progress)
    params, memory = state.params, state.memory
    if first := next(votes, None):
        turn = Turn(experiment.seed, state.round, experiment.rounds)
        params, memory = experiment.method.merge(params, outlook.chosen.spec, chain([first], votes), turn, memory)
    deque(votes, maxlen=0)  # what is left, should a method not ask for all
    after = replace(state, params=params, memory=memory, devices=played.kept)
    if sum(row.loss is not None for row in played.rows.values()) < experiment.clock.min_updates:
        after = state
        played.abandon()
    return _counted(state, after, played), list(played.rows.values())


@dataclass(frozen=True)
class _Sent:
    """What devices with one plan get.

    Attributes:
        arrays: All that they hold.
        tensors: Indices, in `State.changed`, of the server's tensors that are among them as they are.
        bytes: Of each of these.
        made_bytes: Of those that were made or cut for the plan.
    """

    arrays: Params
    tensors: np.ndarray
    bytes: np.ndarray
    made_bytes: int


def _encode(method: Method, spec: Spec, state: State, plan: Plan, turn: Turn) -> _Sent:
    """What devices with a plan get."""
    arrays = method.encode(state.params, spec, plan, turn, state.memory)
    place = {name: index for index, name in enumerate(state.changed)}
    place_of = {id(tensor): place[f"memory:{name}"] for name, tensor in state.memory.items()}
    place_of |= {id(tensor): place[name] for name, tensor in state.params.items()}
    size = {name: FLOAT_BYTES * array.numel() for name, array in arrays.items()}
    same = {name: place_of[id(array)] for name, array in arrays.items() if id(array) in place_of}
    return _Sent(
        arrays,
        np.array(list(same.values()), np.int64),
        np.array([size[name] for name in same], np.int64),
        sum(size[name] for name in arrays if name not in same),
    )


class _Round:
    """A round on its way: jobs are made as the engine asks for them, votes leave in ascending order of devices.

    Attributes:
        rows: One per device of the cohort, ascending.
        received: Device -> indices, in `State.changed`, of the server's tensors that it was sent as they are.
        kept: What devices keep for the method.
        end_seconds: What the virtual clock shows at its end.
    """

    def __init__(self, experiment: Experiment, outlook: Outlook, examples: Sequence[int], state: State) -> None:
        """Draw the cohort, choose the plans and look at the clock; nothing is sent yet."""
        self._experiment, self._outlook, self._state = experiment, outlook, state
        self._method, self._spec = experiment.method, outlook.chosen.spec
        self.rows: dict[int, DeviceRow] = {}
        self.received: dict[int, np.ndarray] = {}
        self.kept = dict(state.devices)
        self._choices: dict[int, Choice] = {}
        self._jobs: dict[int, Job] = {}
        self._sent = lru_cache(_PLANS)(partial(_encode, self._method, self._spec, state))
        begin = begins(experiment, outlook, state.totals["clock_seconds"])
        for device in draw_cohort(experiment, outlook, state.round, begin):
            self._choose(device, examples[device])
        self.end_seconds = begin + self._settle(outlook.availability.left(begin))

    def _choose(self, device: int, examples: int) -> None:
        """The plan of a device, and its row as if no update came."""
        experiment, outlook = self._experiment, self._outlook
        group, steps = outlook.class_of[device], experiment.local.round_steps(examples)
        turn, work = self._turn(device), (experiment.local, experiment.task.window, outlook.steps)
        choice = choose_plan(
            self._method, self._spec, outlook.budget_in(turn), *work, turn, experiment.levers, self._state.memory
        )
        plan = choice.plan
        if plan is None:
            self.rows[device] = DeviceRow(device, group, None, 0)
            return
        self._choices[device] = choice
        blocks = plan.blocks(model.layout(plan.runs(self._spec)))
        self.rows[device] = DeviceRow(
            device,
            group,
            plan.label,
            len(blocks),
            blocks,
            tuple(plan.levers.names()),
            examples=examples,
            steps=steps,
            rejected="no update came",
        )

    def _turn(self, device: int) -> Turn:
        return Turn(self._experiment.seed, self._state.round, self._experiment.rounds, device)

    def _settle(self, left: np.ndarray) -> float:
        """Look at the clock: who does not answer in time gets no job. Returns the length of the round in seconds."""
        experiment, state = self._experiment, self._state
        versions = np.fromiter(state.changed.values(), np.int32)
        devices, work = np.array(list(self._choices), np.int64), np.zeros((len(self._choices), 3), np.int64)
        for i, (device, choice) in enumerate(self._choices.items()):
            sent = self._sends(device)
            missing = versions[sent.tensors] != state.copies.of(device, len(versions))[sent.tensors]
            work[i] = sent.made_bytes + int(sent.bytes[missing].sum()), self._flops(device), choice.cost.up_bytes
            self.received[device] = sent.tensors
        clock, rates = experiment.clock, self._outlook.rates
        stints, seconds = settle(clock, experiment.cohort, devices, work, rates, left[devices], self._turn(-1))
        enough = sum(stint.reason is None for stint in stints) >= clock.min_updates
        for device, stint in zip(devices.tolist(), stints, strict=True):
            row = replace(self.rows[device], down_bytes=stint.down_bytes, seconds=stint.seconds)
            if stint.reason or not enough:
                lost = stint.reason or ABANDONED
                row = replace(row, up_bytes=stint.up_bytes, flops=stint.flops, rejected=lost)
                del self._choices[device]
            if not stint.received:
                del self.received[device]
            self.rows[device] = row
        return seconds

    def abandon(self) -> None:
        """No update is used."""
        unused = {
            d: replace(row, loss=None, rejected=ABANDONED) for d, row in self.rows.items() if row.loss is not None
        }
        self.rows |= unused

    def jobs(self) -> Iterator[Job]:
        """One per device that answers, ascending."""
        for device, choice in self._choices.items():
            assert choice.plan
            work = (choice.plan, self._experiment.local, self._sends(device).arrays, self._method)
            self._jobs[device] = Job(self._turn(device), *work, self._state.devices.get(device, {}))
            yield self._jobs[device]

    def _flops(self, device: int) -> int:
        """Operations that a device is to do."""
        return self._choices[device].cost.flops * self.rows[device].steps // self._outlook.steps

    def _sends(self, device: int) -> _Sent:
        """What a device gets."""
        plan = self._choices[device].plan
        assert plan
        return self._sent(plan, self._turn(device if self._method.own_start else -1))

    def votes(self, engine: Engine, progress: Callable[[int, int], None]) -> Iterator[Vote]:
        """What usable updates say, in ascending order of devices; one that comes early waits for its turn."""
        waiting, count = deque(self._choices), len(self._choices)
        answers: dict[int, tuple[Update, Job] | None] = {}
        for done, (update, job) in enumerate(self._answers(engine), 1):
            progress(done, count)
            answers[job.turn.device] = (update, job) if self._accepts(update, job) else None
            while waiting and waiting[0] in answers:
                if answer := answers.pop(waiting.popleft()):
                    yield self._vote(*answer)
        yield from (self._vote(*answer) for device in waiting if (answer := answers.pop(device, None)))

    def _answers(self, engine: Engine) -> Iterator[tuple[Update | Failure, Job]]:
        """What comes in answer to the jobs of the round, once for each."""
        for update in engine.run(self.jobs()):
            device = update.turn.device
            if device not in self._jobs:  # never asked, or answered before: an engine may deliver twice
                continue
            if update.turn != self._jobs[device].turn:  # late; the answer that was asked for may still come
                self.rows[device] = replace(self.rows[device], rejected="answers another round")
                continue
            yield update, self._jobs.pop(device)

    def _accepts(self, update: Update | Failure, job: Job) -> TypeGuard[Update]:
        """Whether an update is usable; the row of its device tells."""
        device, reason = job.turn.device, fault(update, job, self._spec)
        if isinstance(update, Failure):
            self.rows[device] = replace(self.rows[device], rejected=reason)
            return False
        self.rows[device] = replace(
            self.rows[device],
            loss=update.loss if reason is None else None,
            up_bytes=sum(array.numel() * array.element_size() for array in update.arrays.values()),
            flops=self._flops(device),
            rejected=reason,
        )
        if reason is None and update.state:
            self.kept[device] = update.state
        return reason is None

    def _vote(self, update: Update, job: Job) -> Vote:
        vote, most = self._method.decode(unfold(update, job), job, self._spec), self._experiment.clip_updates
        bounded = bound(vote, job, self._state.params, self._spec, most) if most else vote
        if bounded is not vote:
            self.rows[vote.device] = replace(self.rows[vote.device], clipped=True)
        return bounded


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
        if not math.isfinite(array.sum()) and not array.isfinite().all():  # a sum is quick, but may overflow
            return f"{name} holds values that are not finite"
    if not math.isfinite(update.loss):
        return "its training loss is not finite"
    return None


def bound(vote: Vote, job: Job, params: Params, spec: Spec, most: float) -> Vote:
    """The vote with a change of at most this norm: the same one where it is, else one of exactly this norm.

    The change of a tensor is from what its device was sent, or, where the vote is in other terms than the job, from the
    server's. Norms are summed in float64.

    Args:
        vote: Of a device.
        job: What it answers.
        params: The server's tensors before the round.
        spec: The server's network.
        most: Largest Euclidean norm of the change, over all tensors.
    """
    layout = model.layout(spec)

    def before(name: str, array: Tensor) -> Tensor:
        sent = job.arrays.get(name)
        if sent is not None and sent.shape == array.shape:
            return sent
        index = vote.plan.index(layout, name)
        return params[name] if index is None else params[name][index]

    changes = {name: array.double() - before(name, array) for name, array in vote.arrays.items()}
    norm = math.sqrt(sum(float(change.square().sum()) for change in changes.values()))
    if norm <= most:
        return vote
    arrays = {
        name: (before(name, array) + changes[name] * (most / norm)).to(array.dtype)
        for name, array in vote.arrays.items()
    }
    return replace(vote, arrays=arrays)


def _counted(before: State, after: State, played: _Round) -> State:
    """The state after a round with its books kept."""
    rows = played.rows
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
    return replace(
        after,
        round=done,
        changed=changed,
        copies=before.copies.after(played.received, np.fromiter(before.changed.values(), np.int32)),
        totals={key: before.totals[key] + spent.get(key, 0) for key in TOTALS} | {"clock_seconds": played.end_seconds},
    )
