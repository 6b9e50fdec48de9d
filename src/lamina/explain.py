"""Why a class of devices gets the plan it gets: what binds, what each lever saves, and what more or less would take."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

from lamina.config import Experiment
from lamina.cost import cost
from lamina.errors import UserError, nearest
from lamina.experiment import Outlook
from lamina.fleet import Budget
from lamina.job import Local, Turn
from lamina.levers import Allowed, Levers, rungs
from lamina.methods import Method
from lamina.planner import Fitted, choose_peak, fit
from lamina.spec import Spec

SCHEMA = "lamina.why/1"


def explain(experiment: Experiment, outlook: Outlook, name: str) -> dict[str, Any]:
    """Everything about the plan of one class, as plain data; documented in docs/json.md.

    Raises:
        UserError: There is no such class.
    """
    names = [group.name for group in outlook.groups]
    if name not in names:
        raise UserError(f"no fleet class {name!r}; {nearest(name, names)}")
    index = names.index(name)
    group, choice, spec = outlook.groups[index], outlook.chosen.choices[index], outlook.chosen.spec
    work = (experiment.local, experiment.task.window, outlook.steps)
    limit = Budget() if experiment.method.on_infeasible == "ignore" else group.budget
    method = experiment.method
    turn = Turn(0, choice.round, experiment.rounds)
    plans = (*method.plans(spec, turn, {}), *method.last_resort(spec, turn, {}))
    fitted = [fit(spec, plan, limit, *work, experiment.levers, method) for plan in plans]
    taken = next((i for i, each in enumerate(fitted) if each.plan == choice.plan), None)
    shown = fitted[-1 if taken is None else taken]
    others = {}
    wider: tuple[Allowed, ...] = ("exact", "all")
    for allowed in wider[wider.index(experiment.levers) + 1 :] if experiment.levers in wider else wider:
        found = choose_peak(method, spec, group.budget, *work, allowed, experiment.rounds).plan
        if found:
            others[str(allowed)] = {"plan": found.label, "levers": found.levers.names()}
    return {
        "schema": SCHEMA,
        "class": name,
        "devices": group.devices,
        "budget": asdict(group.budget),
        "network": outlook.chosen.name,
        "plan": choice.plan.label if choice.plan else None,
        "levers": shown.plan.levers.names(),
        "allowed": [rung.name for rung in rungs(experiment.levers)],
        "binding": list(choice.binding),
        "predicted": shown.cost.to_json(),
        "waterfall": _waterfall(spec, shown, work, method),
        "missing": _missing(shown, limit),
        "richer": _neighbour(fitted[taken - 1], limit) if taken else None,
        "cheaper": _neighbour(fitted[taken + 1], limit) if taken is not None and taken + 1 < len(fitted) else None,
        "with_levers": others,
    }


def _waterfall(spec: Spec, fitted: Fitted, work: tuple[Local, int, int], method: Method) -> list[dict[str, Any]]:
    """The price without levers, then with one more of the plan's at a time."""
    rows, on = [("no levers", Levers())], Levers()
    for name, values in fitted.plan.levers.parts():
        on = replace(on, **values)
        rows.append((f"+ {name}", on))
    return [
        {"step": text, **cost(spec, replace(fitted.plan, levers=levers), *work, method).to_json()}
        for text, levers in rows
    ]


def _neighbour(fitted: Fitted, limit: Budget) -> dict[str, Any]:
    """A plan next to the one taken; `missing`: of each resource, what the budget lacks."""
    return {
        "plan": fitted.plan.label,
        "levers": fitted.plan.levers.names(),
        "predicted": fitted.cost.to_json(),
        "missing": _missing(fitted, limit),
    }


def _missing(fitted: Fitted, limit: Budget) -> dict[str, int]:
    """Of each resource, what the budget lacks."""
    return {name: getattr(fitted.cost, name) - getattr(limit, name) for name in fitted.exceeded}
