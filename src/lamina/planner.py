"""Budgets -> plans, and which network. The one place where anything is compared with a budget."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from functools import cached_property, lru_cache, reduce
from itertools import chain, combinations, takewhile
from typing import Any, Literal

import numpy as np

from lamina import model
from lamina.cost import Cost, cost
from lamina.errors import DoesNotFitError, UserError
from lamina.fleet import RESOURCES, Budget
from lamina.job import Local, Turn
from lamina.layout import Params
from lamina.levers import Allowed, Levers, Rung, rungs
from lamina.methods import Method, to_table
from lamina.plan import Plan
from lamina.spec import Spec
from lamina.units import human

Prefer = Literal["trained", "deep"]
_PLAIN = Method()


@dataclass(frozen=True)
class Group:
    """Devices that plan alike.

    Attributes:
        name: Of the class.
        devices: How many there are.
        budget: Of each, in every round.
        best_memory_bytes: Of each, in the best of rounds; None: always the same.
    """

    name: str
    devices: int
    budget: Budget
    best_memory_bytes: int | None = None

    def budget_in(self, turn: Turn) -> Budget:
        """What one of the devices can spend in a round."""
        least, best = self.budget.memory_bytes, self.best_memory_bytes
        if best is None or least is None:
            return self.budget
        steps = 256  # so that budgets, and with them plans, come again
        return replace(
            self.budget, memory_bytes=least + (best - least) * int(turn.rng("drift").integers(steps + 1)) // steps
        )


@dataclass(frozen=True)
class Choice:
    """What a budget leads to.

    Attributes:
        plan: The plan, or None: the device sits out.
        cost: Its price, or, when it sits out, that of the cheapest plan.
        binding: The resources of which the next richer plan needs more than there is; empty at the richest.
        round: For which it was made.
    """

    plan: Plan | None
    cost: Cost
    binding: tuple[str, ...]
    round: int = 0


@dataclass(frozen=True)
class Fitted:
    """A plan with the levers it needs, or, where it does not fit, with those that bring it nearest.

    Attributes:
        plan: With its levers.
        cost: Its price.
        exceeded: The resources of which it needs more than there is; empty if it fits.
    """

    plan: Plan
    cost: Cost
    exceeded: tuple[str, ...]


@dataclass(frozen=True)
class Candidate:
    """A network and what every group would do on it.

    Attributes:
        name: Of the network.
        spec: Its sizes, with what the method adds.
        choices: One per group.
        mean_trained_blocks: Over all devices; those that sit out count zero.
        feasible: Whether the method may run on it.
    """

    name: str
    spec: Spec
    choices: tuple[Choice, ...]
    mean_trained_blocks: Fraction
    feasible: bool

    def trained_blocks(self, group: int) -> int:
        """Blocks that the devices of a group train; 0 when they sit out."""
        plan = self.choices[group].plan
        return plan.trained_blocks(model.layout(plan.runs(self.spec))) if plan else 0

    def to_json(self) -> dict[str, Any]:
        """A row of the score table."""
        return {
            "name": self.name,
            "blocks": self.spec.blocks,
            "mean_trained_blocks": float(self.mean_trained_blocks),
            "feasible": self.feasible,
        }


@dataclass(frozen=True)
class Fleet:
    """What a method may know of the devices before the first round.

    Attributes:
        class_of: Class index of every device.
        plans: Of every class, None where it sits out; see `Method.peak_rounds`.
        fits: Whether a plan fits the budget of a class.
        mix: Training examples of each class that each device has, int64 [devices, classes]; None where they have none.
    """

    class_of: Sequence[int]
    plans: tuple[Plan | None, ...]
    fits: Callable[[int, Plan], bool]
    mix: np.ndarray | None = None

    @cached_property
    def able(self) -> list[int]:
        """The classes of which devices take part."""
        return sorted({group for group in self.class_of if self.plans[group] is not None})


def choose_plan(
    method: Method,
    spec: Spec,
    budget: Budget,
    local: Local,
    tokens: int,
    steps: int,
    turn: Turn,
    levers: Allowed = "none",
    memory: Params | None = None,
) -> Choice:
    """The plan that the method picks among those of its own that fit the budget, with no more levers than it needs.

    Args:
        method: It lists the plans.
        spec: The adapted network.
        budget: Of the device; not looked at when the method ignores budgets.
        local: Batch size and optimizer.
        tokens: Sequence length.
        steps: Optimizer steps in the round.
        turn: The device and the round.
        levers: Those that may be used.
        memory: Of the method.
    """
    limit = Budget() if method.on_infeasible == "ignore" else budget
    tried: list[Fitted] = []

    def fits(plan: Plan) -> Plan | None:
        tried.append(fit(spec, plan, limit, local, tokens, steps, levers, method))
        return None if tried[-1].exceeded else tried[-1].plan

    picked = method.pick(method.fitting(spec, turn, memory or {}, fits), turn)
    if picked is None:
        picked = next(filter(None, map(fits, method.last_resort(spec, turn, memory or {}))), None)
    richer = list(takewhile(lambda each: each.exceeded, tried))
    binding = richer[-1].exceeded if richer else ()
    if picked is None:
        return Choice(None, tried[-1].cost, binding, turn.round)
    return Choice(picked, next(each.cost for each in tried if each.plan is picked), binding, turn.round)


def choose_peak(
    method: Method,
    spec: Spec,
    budget: Budget,
    local: Local,
    tokens: int,
    steps: int,
    levers: Allowed = "none",
    rounds: int = 1,
) -> Choice:
    """The choice of the round that asks most of any device: one that it does not fit, or that of the most memory."""
    turns = (Turn(0, round_, rounds) for round_ in method.peak_rounds(rounds))
    choices = [choose_plan(method, spec, budget, local, tokens, steps, turn, levers) for turn in turns]
    return max(choices, key=lambda choice: (choice.plan is None, choice.cost.memory_bytes))


def fit(
    spec: Spec,
    plan: Plan,
    limit: Budget,
    local: Local,
    tokens: int,
    steps: int,
    allowed: Allowed,
    method: Method = _PLAIN,
) -> Fitted:
    """The plan with the levers it needs to fit, cheapest first, and its price."""
    found = _fit(spec, plan.bare(spec), limit, local, tokens, steps, allowed, method)
    return Fitted(replace(plan, levers=found.plan.levers), found.cost, found.exceeded)


@lru_cache(maxsize=4096)
def _fit(
    spec: Spec, plan: Plan, limit: Budget, local: Local, tokens: int, steps: int, allowed: Allowed, method: Method
) -> Fitted:
    """The same, cached.

    Levers that cost neither operations nor time worth mentioning come first, then several passes, then recomputing,
    then the inexact ones. Within the first of these settings that fits, every lever that is not needed is let go.
    What does not fit gets those that bring it nearest in memory. What has to be sent or received, no lever changes.
    """
    changeable = replace(limit, up_bytes=None, down_bytes=None)

    def price(levers: Levers) -> Cost:
        return cost(spec, replace(plan, levers=levers), local, tokens, steps, method)

    def fits(levers: Levers) -> bool:
        return not changeable.exceeded(price(levers))

    def result(levers: Levers) -> Fitted:
        return Fitted(replace(plan, levers=levers), price(levers), tuple(limit.exceeded(price(levers))))

    if fits(plan.levers):
        return result(plan.levers)
    settings = list(_settings(allowed, local, plan.levers))
    ends = [levers for inexact, levers in settings if inexact in (0, settings[-1][0])]  # the others lie between
    if not any(map(fits, reversed(ends))):
        memory_alone = Budget(memory_bytes=limit.memory_bytes)
        if changeable != memory_alone:
            nearest = _fit(spec, plan, memory_alone, local, tokens, steps, allowed, method)
            return result(nearest.plan.levers)
        least = min(ends, key=lambda each: price(each).memory_bytes)
        most = price(least).memory_bytes
        found = _let_go(least, plan.levers, allowed, local, lambda each: price(each).memory_bytes <= most)
        return result(found)
    found = next(levers for _, levers in settings if fits(levers))
    return result(_let_go(found, plan.levers, allowed, local, fits))


def _free(allowed: Allowed, own: Levers) -> list[Rung]:
    """The levers that the planner may turn: those allowed that the method has not set itself."""
    return [rung for rung in rungs(allowed) if all(getattr(own, key) == getattr(Levers(), key) for key in rung.sets)]


def _settings(allowed: Allowed, local: Local, own: Levers) -> Iterator[tuple[int, Levers]]:
    """Combinations of levers from cheap to dear, each with its number of inexact ones.

    Those that cost nothing are on from the start; but the cache, which may hold more than it saves, comes with and
    without, and fused updates, for which clipping takes every batch twice, come last where gradients are clipped, and
    not where gradients must wait for other passes anyway.
    """
    turnable = _free(allowed, own)
    named = {rung.name: rung.sets for rung in turnable}
    costly = [name for name in ("micro_batch", "recompute", *(["fused_update"] if local.clip else [])) if name in named]
    free = [name for name in ("chunked_loss", "fused_update") if name in named and name not in costly]
    caches = [[name] for name in ("cache_disk", "cache_ram") if name in named][:1]
    idle = {"cache16"} if not caches else set()
    idle |= {"adamw8", "adafactor"} if local.kind != "adamw" else set()
    inexact = [rung.name for rung in turnable if not rung.exact and rung.name not in idle]
    slow = sorted(_subsets(costly), key=lambda names: [costly.index(name) for name in reversed(names)])
    for count in range(len(inexact) + 1):
        for names in slow:
            for cache in ([], *caches):
                useful = [name for name in free if name != "fused_update" or "micro_batch" not in names]
                chosen = (*useful, *cache, *names, *inexact[:count])
                yield count, replace(own, **reduce(operator.or_, (named[name] for name in chosen), {}))


def _subsets(names: Sequence[str]) -> Iterator[tuple[str, ...]]:
    """All of them, the empty one first."""
    return chain.from_iterable(combinations(names, size) for size in range(len(names) + 1))


def _let_go(levers: Levers, own: Levers, allowed: Allowed, local: Local, fits: Callable[[Levers], bool]) -> Levers:
    """The same with every lever that is not needed off, dearest first, or weaker; still fitting."""
    before = None
    while levers != before:
        before = levers
        for rung in reversed(_free(allowed, own)):
            for key in rung.sets:
                weaker = [getattr(own, key)]
                if key == "micro_batch":
                    weaker += [local.batch_size >> power for power in range(1, local.batch_size.bit_length())]
                else:
                    weaker += [other.sets[key] for other in rungs(allowed) if key in other.sets]
                if getattr(levers, key) in weaker:
                    weaker = weaker[: weaker.index(getattr(levers, key)) + 1]
                levers = next(new for value in weaker if fits(new := replace(levers, **{key: value})))
    return levers


def demand_task(method: Method, spec: Spec) -> None:
    """Refuse a method that is not for the kind of task that a network, as the task uses it, is for.

    Raises:
        UserError: Saying for which it is.
    """
    kind = "classification" if spec.labels else "language"
    if kind not in method.tasks:
        accepted = " and ".join(method.tasks)
        raise UserError(f"method {to_table(method)['name']!r} is for {accepted} only; the task is {kind}")


def assess(
    method: Method,
    name: str,
    spec: Spec,
    groups: Sequence[Group],
    local: Local,
    tokens: int,
    steps: int,
    levers: Allowed = "none",
    rounds: int = 1,
) -> Candidate:
    """What every group would do on one network, in the round in which it needs most.

    Raises:
        UserError: The method is not for this kind of task.
    """
    demand_task(method, spec)
    adapted = method.adapt(spec)
    work = (local, tokens, steps, levers, rounds)
    choices = tuple(choose_peak(method, adapted, group.budget, *work) for group in groups)
    plans = [choice.plan for choice in choices]
    trained = [plan.trained_blocks(model.layout(plan.runs(adapted))) if plan else 0 for plan in plans]
    mean = Fraction(
        sum(t * group.devices for t, group in zip(trained, groups, strict=True)),
        sum(group.devices for group in groups),
    )
    taken = [plan is not None for plan, group in zip(plans, groups, strict=True) if group.devices]
    fits = any(taken) if method.on_infeasible == "drop" else all(taken)
    return Candidate(name, adapted, choices, mean, fits)


def choose_network(
    method: Method,
    candidates: Sequence[Candidate],
    groups: Sequence[Group],
    local: Local,
    tokens: int,
    steps: int,
    levers: Allowed = "none",
    rounds: int = 1,
    prefer: Prefer = "trained",
) -> Candidate:
    """The feasible network of which devices train most, or the deepest.

    "trained" is the rule of CAFF (2411.07826): the largest mean number of trained blocks, and of equals the deepest. A
    frozen block costs little next to a trained one, so ties are common; the deepest was pretrained best. "deep" is
    ours: of the networks that leave fewest devices out, the deepest. See docs/study.md.

    Raises:
        DoesNotFitError: No network is feasible; the message names the class, the resource and what would help.
    """
    able = [candidate for candidate in candidates if candidate.feasible]
    if able:
        return max(able, key=lambda candidate: _rank(candidate, groups, prefer))
    misfits = [
        (candidate, group, choice)
        for candidate in candidates
        for group, choice in zip(groups, candidate.choices, strict=True)
        if choice.plan is None and group.devices
    ]
    nearest, group, choice = min(misfits, key=lambda misfit: misfit[2].cost.memory_bytes)
    needs = {name: human(name, getattr(choice.cost, name), up=True) for name in choice.binding}
    shortfalls = [
        f"needs {size} of {RESOURCES[name]}, the budget is {human(name, getattr(group.budget, name))}"
        for name, size in needs.items()
    ]
    if group.best_memory_bytes and group.budget.memory_bytes and "memory_bytes" in needs:
        shortfalls[0] += f" of {human('bytes', group.best_memory_bytes)} in the worst of rounds, by drift"
        full = choice.cost.memory_bytes * group.best_memory_bytes / group.budget.memory_bytes
        needs["memory_bytes"] = human("bytes", full, up=True)
    text = f"class {group.name!r} fits no plan of {nearest.name}: the cheapest {', and '.join(shortfalls)}"
    if "memory_bytes" in needs:
        category, size = max(asdict(choice.cost.memory).items(), key=lambda item: item[1])
        text += f"; {category} are {human('bytes', size)} of the memory"
    budget = " and ".join(f"{RESOURCES[name]} = {size}" for name, size in needs.items())
    remedies = [budget] if method.on_infeasible == "drop" else [budget, 'method.on_infeasible = "drop"']
    budget_of, spec = group.budget, nearest.spec
    if levers == "none" and choose_peak(method, spec, budget_of, local, tokens, steps, "exact", rounds).plan:
        remedies.insert(0, 'levers = "exact"')
    halves = (local.batch_size >> power for power in range(1, local.batch_size.bit_length()))
    for size in halves:
        smaller = replace(local, batch_size=size)
        more = steps if local.steps else -(-steps * local.batch_size // size)  # as many passes over the data
        if choose_peak(method, spec, budget_of, smaller, tokens, more, levers, rounds).plan:
            remedies.insert(0, f"local.batch_size = {size}")
            break
    raise DoesNotFitError(f"{text}; try {' or '.join(filter(None, (', '.join(remedies[:-1]), remedies[-1])))}")


def _rank(candidate: Candidate, groups: Sequence[Group], prefer: Prefer) -> tuple[Fraction, int]:
    """The larger, the better."""
    if prefer == "trained":
        return candidate.mean_trained_blocks, candidate.spec.blocks
    taken = (group.devices for group, choice in zip(groups, candidate.choices, strict=True) if choice.plan)
    return Fraction(sum(taken)), candidate.spec.blocks
