"""`lamina plan FILE --why CLASS`: the numbers of the planner, what more or less would take, and how it is drawn."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from support import LOCAL, STEPS, TURN, WINDOW, Table, memory, prices, spec, write_world

from lamina import config, tables
from lamina.cost import cost
from lamina.errors import UserError
from lamina.experiment import Outlook, look_ahead
from lamina.explain import explain
from lamina.fleet import Budget
from lamina.levers import Levers, rungs
from lamina.methods.blocks import Caff
from lamina.planner import choose_plan, fit
from lamina.units import human

UP = prices(Caff(), 3)[2].up_bytes
FLEET: dict[str, Table] = {
    "strong": {"name": "strong"},
    "middle": {"name": "middle", "memory": memory(3, 2), "uplink": UP},
    "weak": {"name": "weak", "memory": memory(3, 1)},
    "slow": {"name": "slow", "flops": prices(Caff(), 3)[1].flops},
    "out": {"name": "out", "memory": 1000},
}
PRICE = ["memory_bytes", "up_bytes", "down_bytes", "flops", "memory", "peak_bytes", "peak_moment"]
NEIGHBOUR = ["plan", "levers", "predicted", "missing"]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Table:
    """One network of three blocks; a class that fits nothing is left out."""
    folder = tmp_path_factory.mktemp("explain")
    table = {"networks": [str(folder / "tiny-3")], "method": {"name": "caff", "on_infeasible": "drop"}}
    return write_world(folder, fleet=list(FLEET.values()), cohort=2, **table)


def look(world: Table, **changes: Any) -> tuple[config.Experiment, Outlook]:
    experiment = config.experiment(world | changes, "test")
    return experiment, look_ahead(experiment)


def why(world: Table, name: str, **changes: Any) -> Table:
    return explain(*look(world, **changes), name)


def fleet(name: str, **budget: Any) -> list[Table]:
    """The fleet with one class changed."""
    return [each | budget if each["name"] == name else each for each in FLEET.values()]


CASES = [(name, levers) for name in FLEET for levers in ("none", "exact", "all", ["micro_batch"])]
every_case = pytest.mark.parametrize(("name", "levers"), CASES, ids=[f"{n} {lever}" for n, lever in CASES])


@every_case
def test_it_says_what_the_plan_says(name: str, levers: Any, world: Table) -> None:
    """Keys of docs/json.md; all that `lamina plan --json` has too is the same there."""
    experiment, outlook = look(world, levers=levers)
    found = explain(experiment, outlook, name)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert list(found) == [
        *("schema", "class", "devices", "budget", "network", "plan", "levers", "allowed", "binding"),
        *("predicted", "waterfall", "missing", "richer", "cheaper", "with_levers"),
    ]
    (row,) = (row for row in outlook.classes_json() if row["name"] == name)
    assert (found["schema"], found["class"], found["network"]) == ("lamina.why/1", name, "tiny-3")
    for key in ("devices", "budget", "plan", "binding", "predicted"):
        assert found[key] == row[key], key
    assert found["levers"] == row["levers"] or found["plan"] is None
    assert found["allowed"] == [rung.name for rung in rungs(experiment.levers)]
    assert list(found["predicted"]) == PRICE
    assert (found["missing"] == {}) == (found["plan"] is not None)
    for each in (found["richer"], found["cheaper"]):
        assert each is None or (list(each), list(each["predicted"])) == (NEIGHBOUR, PRICE)


@every_case
def test_the_waterfall_goes_from_no_levers_to_the_plan(name: str, levers: Any, world: Table) -> None:
    experiment, outlook = look(world, levers=levers)
    found = explain(experiment, outlook, name)
    steps = found["waterfall"]
    assert [step["step"] for step in steps] == ["no levers", *(f"+ {lever}" for lever in found["levers"])]
    for step in steps:
        assert list(step) == ["step", *PRICE]
        assert sum(step["memory"].values()) == step["peak_bytes"] == step["memory_bytes"]
    assert {"step": steps[-1]["step"]} | found["predicted"] == steps[-1]
    label = found["plan"] or "last 1 of 3"
    (plan,) = (plan for plan in Caff().plans(spec(3), TURN, {}) if plan.label == label)
    on = Levers()
    parts = fit(spec(3), plan, outlook.groups[list(FLEET).index(name)].budget, LOCAL, WINDOW, STEPS, experiment.levers)
    for step, values in zip(steps, [{}, *(values for _, values in parts.plan.levers.parts())], strict=True):
        on = replace(on, **values)
        price = cost(spec(3), replace(plan, levers=on), LOCAL, WINDOW, STEPS)
        assert step == {"step": step["step"]} | price.to_json()


def test_levers_are_shown_where_they_are_needed(world: Table) -> None:
    """So that the tests above are about something."""
    assert why(world, "weak")["levers"] == []
    assert why(world, "weak", levers="exact")["levers"] != []
    assert len(why(world, "weak", levers="exact")["waterfall"]) == 1 + len(why(world, "weak", levers="exact")["levers"])
    assert why(world, "weak", levers=["micro_batch"])["levers"][0].startswith("micro_batch ")


cases = pytest.mark.parametrize(("name", "levers"), CASES, ids=[" ".join(map(str, case)) for case in CASES])


@cases
def test_that_much_more_gives_the_richer_plan(name: str, levers: Any, world: Table) -> None:
    """And one less does not, of any of it."""
    experiment, outlook = look(world, levers=levers)
    found, richer = explain(experiment, outlook, name), explain(experiment, outlook, name)["richer"]
    if name == "strong" or found["plan"] in (None, "all 3"):
        assert richer is None
        return
    budget = {key: value for key, value in found["budget"].items()}
    assert list(richer["missing"]) == found["binding"] != []
    assert all(size > 0 for size in richer["missing"].values())
    assert richer["missing"] == {key: richer["predicted"][key] - budget[key] for key in found["binding"]}
    more = Budget(**budget | {key: budget[key] + size for key, size in richer["missing"].items()})
    work = (LOCAL, WINDOW, STEPS, TURN, experiment.levers)
    chosen = choose_plan(experiment.method, spec(3), more, *work).plan
    assert chosen and chosen.label == richer["plan"]
    for key in richer["missing"]:
        less = choose_plan(experiment.method, spec(3), replace(more, **{key: getattr(more, key) - 1}), *work).plan
        assert less and less.label == found["plan"]


@cases
def test_the_richer_plan_is_shown_as_it_would_be(name: str, levers: Any, world: Table) -> None:
    """With the levers that it would have, and no others."""
    experiment, outlook = look(world, levers=levers)
    found = explain(experiment, outlook, name)
    if richer := found["richer"]:
        more = {key: found["budget"][key] + size for key, size in richer["missing"].items()}
        budget = Budget(**found["budget"] | more)
        choice = choose_plan(experiment.method, spec(3), budget, LOCAL, WINDOW, STEPS, TURN, experiment.levers)
        assert choice.plan and (choice.plan.label, choice.plan.levers.names()) == (richer["plan"], richer["levers"])
        assert choice.cost.to_json() == richer["predicted"]


def test_the_neighbours_are_the_next_plans(world: Table) -> None:
    labels = ["all 3", "last 2 of 3", "last 1 of 3"]
    for name, place in (("strong", 0), ("middle", 1), ("weak", 2), ("slow", 2)):
        found = why(world, name)
        richer, cheaper = found["richer"], found["cheaper"]
        assert found["plan"] == labels[place]
        assert (richer["plan"] if richer else None) == (labels[place - 1] if place else None)
        assert (cheaper["plan"] if cheaper else None) == (labels[place + 1] if place < 2 else None)
        assert cheaper is None or cheaper["missing"] == {}
        assert cheaper is None or cheaper["predicted"] == prices(Caff(), 3)[2 - place].to_json()
    assert why(world, "middle")["richer"]["missing"] == {
        "memory_bytes": memory(3, 3) - memory(3, 2),
        "up_bytes": prices(Caff(), 3)[3].up_bytes - UP,
    }


def test_a_class_that_sits_out(world: Table) -> None:
    found = why(world, "out")
    assert (found["plan"], found["levers"], found["binding"]) == (None, [], ["memory_bytes"])
    assert (found["richer"], found["cheaper"]) == (None, None)
    assert (
        found["predicted"]
        == prices(Caff(), 3)[1].to_json()
        == {key: value for key, value in found["waterfall"][0].items() if key != "step"}
    )
    assert found["missing"] == {"memory_bytes": memory(3, 1) - 1000}
    assert found["with_levers"] == {}
    several = why(world, "out", fleet=fleet("out", memory=1000, flops=1000, uplink=10**9))
    assert several["missing"] == {"memory_bytes": memory(3, 1) - 1000, "flops": prices(Caff(), 3)[1].flops - 1000}
    with_levers = why(world, "out", levers="exact")
    assert with_levers["levers"] != []
    assert with_levers["missing"]["memory_bytes"] == with_levers["predicted"]["memory_bytes"] - 1000


def test_what_more_levers_would_give(world: Table) -> None:
    """Under the same budget; less than what is allowed now is not spoken of."""
    budgets = {each["name"]: each.get("memory") for each in FLEET.values()}
    wider = {"none": ["exact", "all"], "exact": ["all"], "all": [], ("micro_batch",): ["exact", "all"]}
    for levers, names in wider.items():
        for name in ("strong", "weak", "out"):
            expected = {}
            for allowed in names:
                budget = Budget(memory_bytes=budgets[name])
                plan = choose_plan(Caff(), spec(3), budget, LOCAL, WINDOW, STEPS, TURN, allowed).plan
                if plan:
                    expected[allowed] = {"plan": plan.label, "levers": plan.levers.names()}
            assert why(world, name, levers=levers)["with_levers"] == expected
    assert why(world, "weak")["with_levers"]["exact"]["plan"] != why(world, "weak")["plan"]


def test_ignored_budgets_explain_nothing_away(world: Table) -> None:
    """The richest plan, without levers, over its budget."""
    found = why(world, "weak", levers="exact", method={"name": "caff", "on_infeasible": "ignore"})
    assert (found["plan"], found["levers"], found["binding"], found["richer"]) == ("all 3", [], [], None)
    assert found["predicted"] == prices(Caff(), 3)[3].to_json()
    assert found["predicted"]["memory_bytes"] > found["budget"]["memory_bytes"]
    assert found["cheaper"]["plan"] == "last 2 of 3" and found["cheaper"]["missing"] == {}


def test_an_unknown_class_is_refused(world: Table) -> None:
    with pytest.raises(
        UserError, match=r"^no fleet class 'waek'; did you mean 'weak'\? accepted: strong, middle, weak,"
    ):
        why(world, "waek")


MARKS = dict(
    zip(
        ("weights_bytes", "gradients_bytes", "optimizer_bytes", "activations_bytes", "temporary_bytes"),
        "WGOAT",
        strict=True,
    )
)


@every_case
def test_bars_are_to_scale(name: str, levers: Any, world: Table) -> None:
    """A letter is the same number of bytes everywhere, and the budget is marked where it ends."""
    found = why(world, name, levers=levers)
    drawn = tables.why(found)[0]
    budget = found["budget"]["memory_bytes"]
    largest = max([step["peak_bytes"] for step in found["waterfall"]] + [budget or 0])
    unit = largest / tables._BAR
    assert len(drawn.rows) == len(found["waterfall"])
    for row, step in zip(drawn.rows, found["waterfall"], strict=True):
        assert row[0] == step["step"]
        assert len(row[1]) <= tables._BAR + len(MARKS)
        for category, mark in MARKS.items():
            assert abs(row[1].count(mark) - step["memory"][category] / unit) <= 0.5 + (budget is not None)
        if budget:
            assert abs(row[1].index("|") - budget / unit) <= 0.5
        else:
            assert "|" not in row[1]
    assert ("budget" in drawn.title) == (budget is not None)
    assert all(f"{mark} {category.removesuffix('_bytes')}" in drawn.title for category, mark in MARKS.items())


def said(found: Table) -> str:
    return "\n".join(tables.reasons(found))


def test_the_reasons(world: Table) -> None:
    assert said(why(world, "weak")).splitlines()[0] == "class weak, 1 device, on tiny-3: trains blocks: last 1 of 3"
    found = why(world, "middle", levers=["micro_batch"])
    (first, more, cheaper) = said(found).splitlines()
    assert first == "class middle, 1 device, on tiny-3: trains blocks: last 2 of 3"
    up = human("up_bytes", found["richer"]["missing"]["up_bytes"], up=True)
    (size,) = (name for name in found["richer"]["levers"])
    assert more == f"with {up} of uplink more it would train blocks: all 3 ({size})"
    assert cheaper.startswith("the next cheaper plan, last 1 of 3, takes ")
    both = why(world, "middle")["richer"]["missing"]
    memory_, up = (human(name, both[name], up=True) for name in ("memory_bytes", "up_bytes"))
    assert f"with {memory_} of memory and {up} of uplink more it would train blocks: all 3" in said(
        why(world, "middle")
    )
    exact = why(world, "weak")["with_levers"]["exact"]
    with_levers = f'with levers = "exact" it would train blocks: {exact["plan"]} ({", ".join(exact["levers"])})'
    assert with_levers in said(why(world, "weak")).splitlines()
    strong = said(why(world, "strong")).splitlines()
    assert len(strong) == 2 and strong[0].endswith("trains blocks: all 3")
    used = prices(Caff(), 3)[2]
    assert strong[1] == (
        f"the next cheaper plan, last 2 of 3, takes {human('bytes', used.memory_bytes)} of memory, "
        f"{human('bytes', used.up_bytes)} up and {human('flops', used.flops)}"
    )
    lacks = human("memory_bytes", memory(3, 1) - 1000, up=True)
    (out,) = said(why(world, "out")).splitlines()
    assert out.endswith(f"on tiny-3: sits out; its cheapest plan, shown above, lacks {lacks} of memory")


def test_what_would_be_the_same_is_not_said(world: Table) -> None:
    """Levers that change nothing."""
    assert "with levers" not in said(why(world, "strong"))
    now = why(world, "weak")
    exact = now["with_levers"]["exact"]
    assert said(now | {"with_levers": {"exact": exact, "all": exact}}).count("with levers") == 1
    same = {"plan": now["plan"], "levers": now["levers"]}
    assert said(now | {"with_levers": {"exact": same, "all": same}}).count("with levers") == 0
    assert said(now | {"with_levers": {"exact": same, "all": exact}}).count('with levers = "all"') == 1


def test_needs_are_rounded_up(world: Table) -> None:
    """A reader who adds what is shown has enough."""
    for lacks in (1, 100, 1024, 1025, 5000):
        found = why(world, "weak", fleet=fleet("weak", memory=memory(3, 2) - lacks))
        (text,) = (line for line in said(found).splitlines() if line.startswith("with ") and " more " in line)
        assert found["richer"]["missing"] == {"memory_bytes": lacks}
        shown = float(text.removeprefix("with ").split(" KiB")[0])
        assert lacks <= 1024 * shown < lacks + 103
