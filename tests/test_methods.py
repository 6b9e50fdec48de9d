"""The contract of a method over every row of METHODS and some of their settings, and what is special about each."""

import inspect
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
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
    outcome,
    play,
    spec,
    suited,
    suited_task,
    weights,
    write_world,
)
from torch import Tensor

from lamina import client, device, measure, model
from lamina.cost import Cost, cost
from lamina.errors import UserError
from lamina.estimators import PROJECTED, unfold
from lamina.fleet import RESOURCES
from lamina.job import Job, Turn, Update
from lamina.layout import Layout, Params
from lamina.methods import METHODS, Method, from_table, to_table
from lamina.methods.blocks import Caff
from lamina.methods.full import FedAvg
from lamina.methods.lora import FedLora
from lamina.ops import TORCH
from lamina.plan import Plan, Vote, narrow
from lamina.planner import Fleet
from lamina.run import resume
from lamina.server import bound
from lamina.spec import Spec
from lamina.state import State

every_method = pytest.mark.parametrize("method", VARIANTS.values(), ids=list(VARIANTS))


TENSORS_OF_OTHERS: dict[str, tuple[str, ...]] = {
    "fedex-lora": ("attn", "ffn"),
    "hetlora": ("lora",),
    "slora": ("lora", "sparse"),
}
"""Method -> parts of the network that its merge moves besides what the plans train."""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Table:
    """An experiment on tiny-3 alone."""
    folder = tmp_path_factory.mktemp("methods")
    return write_world(folder, networks=[str(folder / "tiny-3")])


def on(world: Table, method: Method, weak: int | None = None, **changes: Any) -> Table:
    """The experiment with another method, and classes of devices without limits and with this much memory."""
    fleet = [{"name": "strong"}] + ([{"name": "weak", "memory": weak}] if weak else [])
    task = suited_task(method, world)
    return world | {"task": task, "method": to_table(method), "fleet": fleet} | changes


def name_of(method: Method) -> str:
    return str(to_table(method)["name"])


@dataclass
class Server:
    """A method on tiny-3: its network, tensors of which none is zero or one, its memory, and the plans it lists."""

    method: Method

    def __post_init__(self) -> None:
        plain = suited(self.method, spec(3))
        self.spec = self.method.adapt(plain)
        self.layout = model.layout(self.spec)
        self.params = self.method.equip(self.spec, weights(self.spec), weights(plain))
        self.turn = max(
            (Turn(0, each, 3, 0) for each in self.method.peak_rounds(3)),
            key=lambda turn: self.price(next(self.method.plans(self.spec, turn, {}))).memory_bytes,
        )
        plans = tuple(self.method.plans(self.spec, self.turn, {}))
        fleet = Fleet([0, 0], (plans[0],), lambda group, plan: True)
        self.memory = self.method.prepare(self.spec, self.params, fleet, replace(self.turn, device=-1))
        self.plans = list(self.method.plans(self.spec, self.turn, self.memory))

    def job(self, plan: Plan) -> Job:
        arrays = self.method.encode(self.params, self.spec, plan, self.turn, self.memory)
        state = {name: torch.zeros(plan.shape(self.layout, name)) for name in sorted(self.method.kept(self.spec, plan))}
        return Job(self.turn, plan, LOCAL, arrays, self.method, state)

    def price(self, plan: Plan) -> Cost:
        return cost(self.spec, plan, LOCAL, WINDOW, STEPS, self.method)

    def merged(self, votes: list[Vote]) -> Params:
        turn = replace(self.turn, device=-1)
        return self.method.merge(self.params, self.spec, votes, turn, self.memory)[0]


def cheapest(method: Method) -> int:
    """What the planner finds, before the method remembers anything."""
    server = Server(method)
    return min(server.price(plan).memory_bytes for plan in method.plans(server.spec, server.turn, {}))


def plans_of(method: Method) -> tuple[Spec, Layout, list[Plan]]:
    """tiny-3 with what the method adds, its layout, and the plans of the method on it."""
    adapted = method.adapt(suited(method, spec(3)))
    return adapted, model.layout(adapted), list(method.plans(adapted, TURN, {}))


def rounds(table: Table, folder: Path, count: int = 2) -> State:
    """The state after some rounds."""
    run = begin(table, folder)
    for _ in range(count):
        run.state, _ = play(run)
    return run.state


def all_bits(state: State) -> dict[str, bytes]:
    """Of every tensor: the network's, the method's, the devices'."""
    return bits(state.pack()[1])


@every_method
def test_plans_train_what_they_hold_and_hold_what_there_is(method: Method) -> None:
    server = Server(method)
    assert server.plans
    for plan in server.plans:
        layout = model.layout(plan.runs(server.spec))
        assert set() < plan.trains <= plan.holds <= set(layout.params)
        assert set(plan.keep) <= set(layout.sizes)
        assert plan.label
        for name in plan.holds:
            assert all(
                0 < kept <= size for kept, size in zip(plan.shape(layout, name), layout.shape(name), strict=True)
            )


@every_method
def test_plans_are_richest_first(method: Method) -> None:
    server = Server(method)
    demands = [server.price(plan) for plan in server.plans]
    for richer, cheaper in pairwise(demands):
        assert any(getattr(cheaper, resource) < getattr(richer, resource) for resource in RESOURCES)
    memory = [price.memory_bytes for price in demands]
    assert len(memory) == 1 or min(memory) < memory[0]  # not always the most: factors of high rank take more


@every_method
def test_plans_survive_json(method: Method) -> None:
    for plan in Server(method).plans:
        assert Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan


@every_method
def test_methods_survive_json(method: Method) -> None:
    assert from_table(json.loads(json.dumps(to_table(method)))) == method


@every_method
def test_what_people_are_told_about_it(method: Method) -> None:
    for text in (method.group, method.source, method.cuts, method.note, inspect.getdoc(method)):
        assert text and text == text.strip()
    assert set(method.tasks) <= {"language", "classification"} and method.tasks
    assert bool(method.stateful) == any(method.kept(Server(method).spec, plan) for plan in Server(method).plans)


@every_method
@pytest.mark.parametrize("absent", ["keep", "skip"])
def test_cutting_out_and_putting_back_changes_nothing(method: Method, absent: Literal["keep", "skip"]) -> None:
    server = Server(replace(method, absent=absent))
    votes = []
    for number, plan in enumerate(server.plans):
        job = replace(server.job(plan), turn=replace(server.turn, device=number)).owned()
        assert set(job.arrays) == plan.holds
        aside = method.remember(job, dict(job.arrays), TORCH)
        aside |= {"labels": torch.ones(server.spec.vocab, dtype=torch.bool)} if method.objective(job).own_labels else {}
        aside |= {PROJECTED: torch.zeros(STEPS, method.directions)} if plan.gradient == "zeroth" else {}
        arrays, state = method.finish(job, dict(job.arrays), aside, TORCH)
        update = Update(job.turn, arrays, examples=2, steps=STEPS, loss=0.0, state=state)
        votes.append(server.method.decode(unfold(update, job), job, server.spec))
    after = server.merged(votes)
    assert after.keys() == server.params.keys()
    if not method.lossy:
        for name, tensor in after.items():
            torch.testing.assert_close(tensor, server.params[name], rtol=1e-5, atol=1e-6, msg=name)
    else:
        others = TENSORS_OF_OTHERS.get(name_of(method), ())
        by_others = {name for name, row in server.layout.params.items() if row.part in others}
        assert moved(server.params, after) <= by_others.union(*(vote.plan.trains for vote in votes))


@every_method
def test_a_device_gives_back_what_its_plan_trains_and_nothing_else_moves(
    method: Method, world: Table, tmp_path: Path
) -> None:
    shard = begin(on(world, method), tmp_path).task.train[0]
    server = Server(method)
    untouched, others = bits(server.params), TENSORS_OF_OTHERS.get(name_of(method), ())
    for plan in server.plans:
        job = server.job(plan)
        held = bits(job.arrays)
        update = client.train(job.owned(), shard, server.spec)
        assert bits(job.arrays) == held
        sent = {name: (tuple(array.shape), array.dtype) for name, array in update.arrays.items()}
        assert sent == method.sends(server.spec, plan, STEPS)
        assert set(update.state) == method.kept(server.spec, plan)
        vote = method.decode(unfold(update, job), job, server.spec)
        after = server.merged([vote])
        for name in moved(server.params, after):
            if server.layout.params[name].part in others:
                continue
            assert name in vote.plan.trains
            outside, index = torch.ones(after[name].shape, dtype=torch.bool), vote.plan.index(server.layout, name)
            outside[... if index is None else index] = False
            assert torch.equal(after[name][outside], server.params[name][outside])
        assert moved(server.params, after)
    assert bits(server.params) == untouched


@every_method
def test_no_update_moves_more_than_its_bound(method: Method, world: Table, tmp_path: Path) -> None:
    server, shard = Server(method), begin(on(world, method), tmp_path).task.train[0]
    for plan in {server.plans[0], server.plans[-1]}:
        job = server.job(plan)
        vote = method.decode(unfold(client.train(job.owned(), shard, server.spec), job), job, server.spec)
        alike = {name for name, p in job.arrays.items() if name in vote.arrays and vote.arrays[name].shape == p.shape}
        start = {name: job.arrays[name] for name in alike}
        for name in vote.arrays.keys() - alike:
            index = vote.plan.index(server.layout, name)
            start[name] = server.params[name] if index is None else server.params[name][index]

        def norm(arrays: Params, start: Params = start) -> float:
            return math.sqrt(
                sum(float((array.double() - start[name]).square().sum()) for name, array in arrays.items())
            )

        whole = norm(vote.arrays)
        assert bound(vote, job, server.params, server.spec, 1.001 * whole) is vote
        cut = bound(vote, job, server.params, server.spec, whole / 3)
        assert norm(cut.arrays) == pytest.approx(whole / 3, rel=1e-3)
        assert replace(cut, arrays=vote.arrays) == vote
        for name, array in cut.arrays.items():
            assert torch.allclose(array - start[name], (vote.arrays[name] - start[name]) / 3, atol=1e-5)


@every_method
def test_devices_with_one_plan_start_from_the_same_unless_the_method_says_so(method: Method) -> None:
    server = Server(method)
    starts = [
        [
            bits(method.encode(server.params, server.spec, plan, replace(server.turn, device=device), server.memory))
            for plan in server.plans
        ]
        for device in (-1, 0, 5)
    ]
    assert (starts[0] == starts[1] == starts[2]) != method.own_start


def whole(method: Method) -> bool:
    """Whether every device holds a network that runs through all blocks, uncut and with all that others train."""
    network = method.adapt(suited(method, spec(3)))
    plans = list(method.plans(network, TURN, {}))
    outer = {"embed.tokens", "head.weight", *(f"h.{i}.norm1.weight" for i in range(3))}
    return not any(plan.keep or plan.network or outer - plan.holds for plan in plans)


@pytest.mark.parametrize("name", [name for name, method in VARIANTS.items() if whole(method)])
def test_every_device_trains_the_function_that_the_server_evaluates(name: str) -> None:
    """Also after others trained what this device does not: whatever some plan trains is at a value of its own."""
    server = Server(VARIANTS[name])
    trained = set().union(*(plan.trains for plan in server.plans))
    fresh, other = model.init(server.spec, torch.Generator().manual_seed(0)), weights(server.spec)
    params = {name: other[name] if name in trained else p for name, p in fresh.items()}
    ids = torch.arange(12).reshape(2, 6)
    for plan in server.plans:
        of_device = model.forward(server.spec, narrow(params, server.layout, plan), ids)
        handed_out = server.method.deploy(server.spec, params, server.turn, server.memory)
        assert torch.allclose(of_device, model.forward(*handed_out, ids), atol=1e-6)


@every_method
def test_twice_is_the_same_bit_for_bit(method: Method, world: Table, tmp_path: Path) -> None:
    table = on(world, method, weak=cheapest(method))
    first, second, other = (rounds(table | {"seed": seed}, tmp_path) for seed in (0, 0, 1))
    assert all_bits(first) == all_bits(second)
    assert moved(first.params, other.params)


@every_method
def test_a_run_that_was_stopped_goes_on_as_if_it_was_not(method: Method, world: Table, tmp_path: Path) -> None:
    """With what the method and its devices keep."""
    table = on(world, method, weak=cheapest(method), eval_every=1)
    whole = begin(table, tmp_path)
    whole.play()

    def stop(row: Any, devices: Any) -> None:
        if row.round == 2:
            raise KeyboardInterrupt

    stopped = begin(table, tmp_path)
    with pytest.raises(KeyboardInterrupt):
        stopped.play(stop)
    resume(stopped.folder).play()
    assert outcome(stopped.folder) == outcome(whole.folder)


@every_method
def test_predicted_memory_and_bytes_are_what_they_are(method: Method) -> None:
    """Live tensors within two percent at the peak, and never more than predicted by more than a kilobyte."""
    server = Server(method)
    for plan in {server.plans[0], server.plans[-1]}:
        price = server.price(plan)
        steps = 8 if method.objective(server.job(plan)).widths else 2  # by then the widest was drawn
        timeline = measure.watch(server.spec, plan, replace(LOCAL, steps=steps), WINDOW, method)
        real = sum(timeline.peak()[0].values())
        assert real == pytest.approx(price.memory_bytes, rel=0.02)
        sent = method.sends(server.spec, plan, STEPS).values()
        assert price.up_bytes == sum(math.prod(shape) * dtype.itemsize for shape, dtype in sent)


@every_method
def test_a_device_in_a_process_of_its_own_sends_the_same(
    method: Method, world: Table, tmp_path: Path, processes: device.Devices
) -> None:
    """All that a device is told crosses as JSON and safetensors."""
    shard = begin(on(world, method), tmp_path).task.train[0]
    server = Server(method)
    job = server.job(server.plans[-1])
    answer = processes.run(job, shard, server.spec).answer
    here = client.train(job.owned(), shard, server.spec)
    assert isinstance(answer, Update)
    assert (bits(answer.arrays), bits(answer.state), answer.loss) == (bits(here.arrays), bits(here.state), here.loss)


@pytest.fixture(scope="module")
def processes() -> Iterator[device.Devices]:
    """One that lasts."""
    devices = device.Devices()
    yield devices
    devices.close()


@every_method
def test_a_budget_that_fits_just_so_takes_part(method: Method, world: Table, tmp_path: Path) -> None:
    run = begin(on(world, method, weak=cheapest(method), cohort=6), tmp_path)
    _, rows = play(run)
    assert {row.group for row in rows if row.plan} == {0, 1}
    weak = run.outlook.chosen.choices[1]
    assert weak.plan and weak.cost.memory_bytes <= cheapest(method)


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

    def watched(spec: Spec, params: Any, x: Any, i: int, *others: Any) -> Any:
        out = block(spec, params, x, i, *others)
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
