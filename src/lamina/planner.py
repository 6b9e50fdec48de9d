"""Budgets -> plans, and which network. The one place where anything is compared with a budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from typing import Any

from lamina import model
from lamina.cost import Cost, cost
from lamina.errors import UserError
from lamina.fleet import RESOURCES, Budget
from lamina.job import Local, Turn
from lamina.methods import Method
from lamina.model import Spec
from lamina.plan import Plan
from lamina.units import human


@dataclass(frozen=True)
class Group:
    """Devices that plan alike.

    Attributes:
        name: Of the class.
        devices: How many there are.
        budget: Of each.
    """

    name: str
    devices: int
    budget: Budget


@dataclass(frozen=True)
class Choice:
    """What a budget leads to.

    Attributes:
        plan: The plan, or None: the device sits out.
        cost: Its price, or, when it sits out, that of the cheapest plan.
        binding: The resources of which the next richer plan needs more than there is; empty at the richest.
    """

    plan: Plan | None
    cost: Cost
    binding: tuple[str, ...]


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
        return plan.trained_blocks(model.layout(self.spec)) if plan else 0

    def to_json(self) -> dict[str, Any]:
        """A row of the score table."""
        return {
            "name": self.name,
            "blocks": self.spec.blocks,
            "mean_trained_blocks": float(self.mean_trained_blocks),
            "feasible": self.feasible,
        }


def choose_plan(
    method: Method, spec: Spec, budget: Budget, local: Local, tokens: int, steps: int, turn: Turn
) -> Choice:
    """The first plan of the method that fits the budget.

    Args:
        method: It lists the plans.
        spec: The adapted network.
        budget: Of the device; not looked at when the method ignores budgets.
        local: Batch size and optimizer.
        tokens: Sequence length.
        steps: Optimizer steps in the round.
        turn: The device and the round.
    """
    limit = Budget() if method.on_infeasible == "ignore" else budget
    binding: tuple[str, ...] = ()
    for plan in method.plans(model.layout(spec), turn):
        price = cost(spec, plan, local, tokens, steps)
        exceeded = limit.exceeded(price)
        if not exceeded:
            return Choice(plan, price, binding)
        binding = tuple(exceeded)
    return Choice(None, price, binding)


def assess(
    method: Method, name: str, spec: Spec, groups: Sequence[Group], local: Local, tokens: int, steps: int
) -> Candidate:
    """What every group would do on one network."""
    adapted = method.adapt(spec)
    turn = Turn(seed=0, round=0, rounds=1)
    choices = tuple(choose_plan(method, adapted, group.budget, local, tokens, steps, turn) for group in groups)
    layout = model.layout(adapted)
    trained = [choice.plan.trained_blocks(layout) if choice.plan else 0 for choice in choices]
    mean = Fraction(
        sum(t * group.devices for t, group in zip(trained, groups, strict=True)),
        sum(group.devices for group in groups),
    )
    taken = [choice.plan is not None for choice, group in zip(choices, groups, strict=True) if group.devices]
    fits = any(taken) if method.on_infeasible == "drop" else all(taken)
    return Candidate(name, adapted, choices, mean, fits)


def choose_network(
    method: Method,
    candidates: Sequence[Candidate],
    groups: Sequence[Group],
    local: Local,
    tokens: int,
    steps: int,
) -> Candidate:
    """The feasible network with the largest mean number of trained blocks; of equals, the deepest (CAFF, 2411.07826).

    A frozen block costs little next to a trained one, so ties are common; the deepest was pretrained best.

    Raises:
        UserError: No network is feasible; the message names the class, the resource and what would help.
    """
    able = [candidate for candidate in candidates if candidate.feasible]
    if able:
        return max(able, key=lambda candidate: (candidate.mean_trained_blocks, candidate.spec.blocks))
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
    text = f"class {group.name!r} fits no plan of {nearest.name}: the cheapest {', and '.join(shortfalls)}"
    if "memory_bytes" in needs:
        category, size = max(asdict(choice.cost.memory).items(), key=lambda item: item[1])
        text += f"; {category} are {human('bytes', size)} of the memory"
    budget = " and ".join(f"{RESOURCES[name]} = {size}" for name, size in needs.items())
    remedies = [budget] if method.on_infeasible == "drop" else [budget, 'method.on_infeasible = "drop"']
    halves = (local.batch_size >> power for power in range(1, local.batch_size.bit_length()))
    for size in halves:
        smaller = replace(local, batch_size=size)
        more = steps if local.steps else -(-steps * local.batch_size // size)  # as many passes over the data
        if choose_plan(method, nearest.spec, group.budget, smaller, tokens, more, Turn(0, 0, 1)).plan:
            remedies.insert(0, f"local.batch_size = {size}")
            break
    raise UserError(f"{text}; try {' or '.join(filter(None, (', '.join(remedies[:-1]), remedies[-1])))}")
