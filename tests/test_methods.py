"""The contract of a method over every row of METHODS and some of their settings, and what is special about each."""

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from support import (
    LOCAL,
    STEPS,
    TURN,
    VARIANTS,
    WINDOW,
    Devices,
    Table,
    begin,
    bits,
    memory,
    moved,
    play,
    prices,
    spec,
    weights,
    write_world,
)
from torch import Tensor

from lamina import client, model
from lamina.cost import cost
from lamina.errors import UserError
from lamina.fleet import RESOURCES
from lamina.job import Job, Update
from lamina.layout import Layout
from lamina.methods import METHODS, Method
from lamina.methods.blocks import Caff
from lamina.methods.full import FedAvg
from lamina.methods.lora import FedLora
from lamina.model import Spec
from lamina.plan import Plan, Vote, merge, narrow
from lamina.state import State

every_method = pytest.mark.parametrize("method", VARIANTS.values(), ids=list(VARIANTS))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Table:
    """An experiment on tiny-3 alone."""
    folder = tmp_path_factory.mktemp("methods")
    return write_world(folder, networks=[str(folder / "tiny-3")])


def on(world: Table, method: Method, weak: int | None = None, **changes: Any) -> Table:
    """The experiment with another method, and classes of devices without limits and with this much memory."""
    name = next(name for name, cls in METHODS.items() if type(method) is cls)
    fleet = [{"name": "strong"}] + ([{"name": "weak", "memory": weak}] if weak else [])
    return world | {"method": {"name": name} | vars(method), "fleet": fleet} | changes


def cheapest(method: Method) -> int:
    return min(price.memory_bytes for price in prices(method, 3).values())


def plans_of(method: Method) -> tuple[Spec, Layout, list[Plan]]:
    """tiny-3 with what the method adds, its layout, and the plans of the method on it."""
    adapted = method.adapt(spec(3))
    return adapted, model.layout(adapted), list(method.plans(adapted, TURN, {}))


def rounds(table: Table, folder: Path, count: int = 2) -> State:
    """The state after some rounds."""
    run = begin(table, folder)
    for _ in range(count):
        run.state, _ = play(run)
    return run.state


@every_method
def test_plans_train_what_they_hold_and_hold_what_there_is(method: Method) -> None:
    _, layout, plans = plans_of(method)
    assert plans
    for plan in plans:
        assert set() < plan.trains <= plan.holds <= set(layout.params)
        assert plan.label


@every_method
def test_plans_are_richest_first(method: Method) -> None:
    adapted, _, plans = plans_of(method)
    demands = [cost(adapted, plan, LOCAL, WINDOW, STEPS) for plan in plans]
    for richer, cheaper in pairwise(demands):
        assert cheaper.memory_bytes < richer.memory_bytes
        assert all(getattr(cheaper, resource) <= getattr(richer, resource) for resource in RESOURCES)


@every_method
def test_plans_survive_json(method: Method) -> None:
    for plan in plans_of(method)[2]:
        assert Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan


@every_method
@pytest.mark.parametrize("absent", ["keep", "skip"])
def test_cutting_out_and_putting_back_changes_nothing(method: Method, absent: Literal["keep", "skip"]) -> None:
    adapted, layout, plans = plans_of(method)
    params = weights(adapted)
    votes = []
    for device, plan in enumerate(plans):
        held = narrow(params, layout, plan)
        assert set(held) == plan.holds
        votes.append(Vote(device, plan, {name: held[name] for name in plan.trains}, 2.0))
    assert moved(params, merge(params, layout, votes, absent)) == set()


@every_method
def test_a_device_gives_back_what_its_plan_trains_and_nothing_else_moves(
    method: Method, world: Table, tmp_path: Path
) -> None:
    shard = begin(on(world, method), tmp_path).task.train[0]
    adapted, layout, plans = plans_of(method)
    params = weights(adapted)
    untouched = bits(params)
    for plan in plans:
        update = client.train(Job(TURN, plan, LOCAL, narrow(params, layout, plan)).owned(), shard, adapted)
        assert set(update.arrays) == plan.trains
        after = merge(params, layout, [Vote(0, plan, update.arrays, 1.0)], method.absent)
        assert moved(params, after) == plan.trains
    assert bits(params) == untouched


@every_method
def test_every_device_trains_the_function_that_the_server_evaluates(method: Method) -> None:
    """Also after others trained what this device does not: whatever some plan trains is at a value of its own."""
    adapted, layout, plans = plans_of(method)
    trained = set().union(*(plan.trains for plan in plans))
    fresh, other = model.init(adapted, torch.Generator().manual_seed(0)), weights(adapted)
    params = {name: other[name] if name in trained else p for name, p in fresh.items()}
    ids = torch.arange(12).reshape(2, 6)
    for plan in plans:
        of_device = model.forward(adapted, narrow(params, layout, plan), ids)
        assert torch.allclose(of_device, model.forward(adapted, params, ids), atol=1e-6)


@every_method
def test_twice_is_the_same_bit_for_bit(method: Method, world: Table, tmp_path: Path) -> None:
    table = on(world, method, weak=cheapest(method))
    assert bits(rounds(table, tmp_path).params) == bits(rounds(table, tmp_path).params)
    assert moved(rounds(table, tmp_path).params, rounds(table | {"seed": 1}, tmp_path).params)


@every_method
def test_a_budget_that_fits_just_so_takes_part(method: Method, world: Table, tmp_path: Path) -> None:
    run = begin(on(world, method, weak=cheapest(method), cohort=6), tmp_path)
    _, rows = play(run)
    assert {row.group for row in rows} == {0, 1}
    assert min(row.trained_blocks for row in rows) == min(prices(method, 3))


@every_method
def test_a_budget_below_the_cheapest_plan_sits_out_and_never_runs(method: Method, world: Table, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"class 'weak' fits no plan of .*tiny-3"):
        begin(on(world, method, weak=cheapest(method) - 1), tmp_path)
    assert not any(tmp_path.iterdir())
    run = begin(on(world, replace(method, on_infeasible="drop"), weak=cheapest(method) - 1, cohort=6), tmp_path)
    devices = Devices(run)
    summary = run.play(engine=devices)
    assert {run.outlook.class_of[job.turn.device] for job in devices.jobs} == {0}
    assert summary["totals"]["updates"] == 3 * 3  # every strong device in each of three rounds
    strong, weak = summary["classes"]
    assert (strong["sat_out"], weak["sat_out"]) == (0, 3)
    assert (weak["plan"], weak["trained_blocks"], weak["binding"]) == (None, 0, ["memory_bytes"])
    assert weak["predicted"]["memory_bytes"] == cheapest(method)


@pytest.mark.parametrize("weighting", ["examples", "uniform"])
def test_devices_count_by_examples_or_all_the_same(weighting: Literal["examples", "uniform"]) -> None:
    update = Update(TURN, {}, examples=7, steps=1, loss=0.0)
    for method in METHODS.values():
        assert method(weighting=weighting).weight(update) == {"examples": 7.0, "uniform": 1.0}[weighting]


@pytest.mark.parametrize("absent", ["keep", "skip"])
def test_caff_with_all_blocks_is_fedavg(absent: Literal["keep", "skip"], world: Table, tmp_path: Path) -> None:
    caff = rounds(on(world, Caff(absent=absent)), tmp_path)
    assert bits(caff.params) == bits(rounds(on(world, FedAvg()), tmp_path).params)
    assert moved(caff.params, begin(world, tmp_path).state.params) == set(caff.params)


def test_caff_trains_the_last_blocks_the_norm_and_the_head() -> None:
    _, layout, plans = plans_of(Caff())
    tail = {"norm.weight", "norm.bias", "head.weight"}
    for trained, plan in zip((3, 2, 1), plans, strict=True):
        blocks = {name for i in range(3 - trained, 3) for name in layout.params if name.startswith(f"h.{i}.")}
        embeddings = {"embed.tokens", "embed.positions"} if trained == 3 else set()
        assert plan.trains == blocks | tail | embeddings
        assert plan.holds == set(layout.params)
    assert [plan.label for plan in plans] == ["all 3", "last 2 of 3", "last 1 of 3"]


def test_caff_can_leave_out_the_head_and_the_embeddings() -> None:
    _, layout, plans = plans_of(VARIANTS["caff without head"])
    for trained, plan in zip((3, 2, 1), plans, strict=True):
        assert plan.trains == {name for i in range(3 - trained, 3) for name in layout.params if f"h.{i}." in name}


@pytest.mark.parametrize("trained", [1, 2, 3])
def test_frozen_blocks_get_no_gradient_and_keep_nothing(
    trained: int, world: Table, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the trained blocks may put anything on the graph; block 0 with its input, where the embeddings train."""
    run = begin(on(world, Caff()), tmp_path)
    plan = plans_of(Caff())[2][3 - trained]
    job = Job(TURN, plan, LOCAL, narrow(run.state.params, model.layout(spec(3)), plan))
    on_graph: dict[int, set[bool]] = {}

    def watched(spec: Spec, params: Any, x: Any, i: int, ops: Any) -> Any:
        out = block(spec, params, x, i, ops)
        if isinstance(out, Tensor):  # the planner runs the blocks on shapes
            on_graph.setdefault(i, set()).add(out.requires_grad)
        return out

    block = model._block
    monkeypatch.setattr(model, "_block", watched)
    client.train(job.owned(), run.task.train[0], spec(3))
    assert on_graph == {i: {i >= 3 - trained} for i in range(3)}
    for name, tensor in job.arrays.items():
        assert tensor.grad is None and not tensor.requires_grad, name
    assert moved(job.arrays, begin(world, tmp_path).state.params) == set()


@pytest.mark.parametrize(
    ("absent", "weighting", "tail", "first"),
    [
        ("skip", "examples", 4.5, 5.0),
        ("keep", "examples", 4.5, 4.0),
        ("skip", "uniform", 4.0, 5.0),
        ("keep", "uniform", 4.0, 3.0),
    ],
)
def test_a_round_of_two_devices_by_hand(
    absent: str, weighting: str, tail: float, first: float, world: Table, tmp_path: Path
) -> None:
    """Five numbers: 4.5, 4, 5, 4 and 3.

    All tensors are 1. The weak device (10 examples) trains the last block of three and answers 3 everywhere, the
    strong one (30 examples) trains all and answers 5 everywhere.
    Where both trained (the last block and the tail):   by examples (10 * 3 + 30 * 5) / 40 = 4.5,  uniform 4.
    Where only the strong one did, skip:                5 whatever the weights.
    Where only the strong one did, keep, the weak one voting for 1:
                                                        by examples (10 * 1 + 30 * 5) / 40 = 4,    uniform 3.
    """
    method = Caff(absent=absent, weighting=weighting)  # type: ignore[arg-type]
    run = begin(on(world, method, weak=memory(3, 1), task=world["task"] | {"devices": 2}, cohort=2), tmp_path)
    strong = run.outlook.class_of.index(0)

    def answer(update: Update) -> list[Update]:
        value, examples = (5.0, 30) if update.turn.device == strong else (3.0, 10)
        return [
            replace(update, arrays={n: torch.full_like(p, value) for n, p in update.arrays.items()}, examples=examples)
        ]

    ones = replace(run.state, params={name: torch.ones_like(p) for name, p in run.state.params.items()})
    state, rows = play(run, Devices(run, answer), ones)
    assert [row.rejected for row in rows] == [None, None]
    both = model.layout(spec(3)).tail(1)
    for name, tensor in state.params.items():
        assert set(tensor.flatten().tolist()) == {tail if name in both else first}, name


def test_lora_trains_more_blocks_with_more_memory() -> None:
    method = VARIANTS["lora budget"]
    adapted, layout, plans = plans_of(method)
    assert [plan.trained_blocks(layout) for plan in plans] == [3, 2, 1]
    for plan in plans:
        first = 3 - plan.trained_blocks(layout)
        added = {name for name, row in layout.params.items() if row.part == "lora" and (row.block or 0) >= first}
        assert plan.trains == added | {"head.weight"}
        assert plan.holds == set(layout.params)  # the adapters below are frozen, but others may have trained them
    assert len({cost(adapted, plan, LOCAL, WINDOW, STEPS).memory_bytes for plan in plans}) == 3


@pytest.mark.parametrize(
    ("settings", "blocks", "added"),
    [({}, 3, 12), ({"targets": "qv"}, 3, 4), ({"depth": 2}, 2, 12), ({"depth": 9}, 3, 12), ({"depth": 1}, 1, 12)],
)
def test_lora_has_one_plan_unless_it_follows_the_budget(settings: Table, blocks: int, added: int) -> None:
    _, layout, (plan,) = plans_of(FedLora(**settings))
    assert plan.trained_blocks(layout) == blocks
    assert sum(name.endswith(("lora_a", "lora_b")) for name in plan.trains) == blocks * added


def test_lora_starts_as_the_network_itself_and_scales_by_alpha_over_rank(world: Table, tmp_path: Path) -> None:
    run = begin(on(world, FedLora(rank=2)), tmp_path)
    larger, params = run.outlook.chosen.spec, run.state.params
    assert larger.lora is not None and larger.lora.alpha == 4  # 2 r unless given
    ids = torch.from_numpy(run.task.train[0].batch(torch.arange(3).numpy())[0])
    plain, merged = model.merged(larger, params)
    torch.testing.assert_close(model.forward(larger, params, ids), model.forward(plain, merged, ids))
    assert moved(merged, begin(world, tmp_path).state.params) == set()
    name = "h.1.ffn.up"
    changed = params | {f"{name}.lora_b": torch.ones_like(params[f"{name}.lora_b"])}
    delta = model.merged(larger, changed)[1][f"{name}.weight"] - params[f"{name}.weight"]
    torch.testing.assert_close(delta, (4 / 2) * params[f"{name}.lora_a"].sum(0).expand_as(delta), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("settings", [{"rank": 0}, {"alpha": -1.0}, {"depth": 0}], ids=str)
def test_lora_refuses_sizes_that_mean_nothing(settings: Table) -> None:
    (key,) = settings
    with pytest.raises(ValueError, match=f"^{key} must .*got {settings[key]}"):
        FedLora(**settings)
