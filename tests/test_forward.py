"""Gradients without a backward pass against autograd, what the methods plan, and the fallback of every method."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from support import (
    LOCAL,
    STEPS,
    TURN,
    WINDOW,
    Table,
    begin,
    bits,
    counting,
    moved,
    play,
    spec,
    suited,
    suited_task,
    taken,
    weights,
    write_world,
)
from torch import Tensor

from lamina import client, measure, model, ops
from lamina.cost import cost
from lamina.data.task import Pairs
from lamina.duals import Dual, Duals, parts
from lamina.estimators import PROJECTED, STRETCH, unfold
from lamina.explain import explain
from lamina.fleet import Budget
from lamina.job import Job, Local, Turn, Update
from lamina.kernels import Mix
from lamina.layout import Params
from lamina.levers import Levers
from lamina.methods import METHODS, Method
from lamina.methods.base import Objective
from lamina.methods.blocks import Caff
from lamina.methods.forward import Mezo, Spry
from lamina.methods.full import FedAvg
from lamina.methods.lora import FedLora
from lamina.model import Output
from lamina.ops import TORCH
from lamina.plan import Plan
from lamina.planner import choose_plan
from lamina.spec import LINEARS, Factored, Lora, Sparse, Spec

SPEC = spec(3)
LAYOUT = model.layout(SPEC)
SGD = Local(lr=1.0, optimizer="sgd", steps=1, batch_size=5)

PLAIN = Spec(2, embed=12, heads=3, head_dim=4, ffn=20, vocab=23, positions=9)
RICH = replace(
    PLAIN,
    lora=Lora(2, 3.0, ("attn.q", "attn.o", "ffn.down")),
    sparse=Sparse(0.1, 0, ("attn.k", "ffn.up", "attn.o")),
    adapter=3,
    exits=(0,),
)
NETWORKS = {
    "plain": PLAIN,
    "rich": RICH,
    "factored": replace(PLAIN, factored=Factored(2, 4, 1)),
    "scaled": replace(PLAIN, lora=RICH.lora, scale=1.25),
}


def drawn(spec: Spec, seed: int = 0) -> tuple[Params, Params, Tensor, Tensor]:
    """Tensors in double precision, a direction, token ids and targets."""
    rng = torch.Generator().manual_seed(seed)
    shape = model.layout(spec)
    params = {name: 0.4 * torch.randn(shape.shape(name), generator=rng, dtype=torch.double) for name in shape.params}
    direction = {name: torch.randn(p.shape, generator=rng, dtype=torch.double) for name, p in params.items()}
    ids, targets = (torch.randint(spec.vocab, (3, 8), generator=rng) for _ in range(2))
    return params, direction, ids, targets


@dataclass(frozen=True)
class Loss:
    """How the outputs of a network become a number."""

    mutual: float = 0.0
    own_labels: bool = False
    chunked: bool = False

    def __call__(self, spec: Spec, params: Mapping[str, Tensor], ids: Tensor, targets: Tensor, kernels: ops.Ops) -> Any:
        x, outputs = model.embed(spec, params, ids, kernels), []
        for block in range(spec.blocks):
            x = model.run_blocks(spec, params, x, [block], kernels)
            if block in spec.exits:
                outputs.append(Output(x, block, params))
        outputs.append(Output(x, spec.blocks, params))
        mix = Mix((1.0, 0.5), ((0.0, self.mutual), (self.mutual, 0.0))) if len(outputs) > 1 else None
        labels = torch.arange(spec.vocab) % 3 > 0 if self.own_labels else None
        return model.loss(spec, outputs, targets, mix, labels, self.chunked, kernels)


def gradient(loss: Loss, spec: Spec, params: Params, ids: Tensor, targets: Tensor) -> Params:
    """By torch's backward; zero where nothing arrives."""
    leaves = {name: p.clone().requires_grad_() for name, p in params.items()}
    loss(spec, leaves, ids, targets, TORCH).backward()
    return {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in leaves.items()}


def slope(
    loss: Loss, spec: Spec, params: Params, direction: Params, trained: set[str], ids: Tensor, targets: Tensor
) -> tuple[float, float]:
    """The loss and its derivative along a direction in some tensors, by dual numbers."""
    mixed = {name: Dual(p, direction[name]) if name in trained else p for name, p in params.items()}
    with torch.no_grad():
        value, tangent = parts(loss(spec, cast(Params, mixed), ids, targets, Duals(TORCH)))
    assert tangent is not None
    return value.item(), tangent.item()


@pytest.mark.parametrize("name", NETWORKS)
def test_a_tangent_is_the_gradient_times_the_direction(name: str) -> None:
    """To 12 digits, for a direction in any one tensor, in those of each kind, and in all."""
    network = NETWORKS[name]
    params, direction, ids, targets = drawn(network)
    found = gradient(Loss(), network, params, ids, targets)
    under = {f"{each.removesuffix('sparse')}weight" for each in params if each.endswith("sparse")}  # frozen
    rows = {each: row for each, row in model.layout(network).params.items() if each not in under}
    kinds = [{each for each, row in rows.items() if row.part == part} for part in {row.part for row in rows.values()}]
    for trained in [*({each} for each in rows), *kinds, set(rows)]:
        expected = sum(float((found[each] * direction[each]).sum()) for each in trained)
        _, got = slope(Loss(), network, params, direction, trained, ids, targets)
        assert got == pytest.approx(expected, rel=1e-10, abs=1e-12), trained
        assert abs(expected) > 1e-6 or trained <= {f"h.{i}.attn.k.bias" for i in range(2)}


@pytest.mark.parametrize("network", [PLAIN, RICH], ids=["one output", "two outputs"])
@pytest.mark.parametrize(
    "loss", [Loss(chunked=True), Loss(mutual=0.7), Loss(own_labels=True), Loss(0.3, True, True)], ids=str
)
def test_every_loss_has_its_tangent(loss: Loss, network: Spec, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also in many chunks. Where outputs teach one another, the teacher stands still."""
    monkeypatch.setattr(ops, "_CHUNK_ELEMENTS", 1)
    monkeypatch.setattr(ops, "_CHUNK_TOKENS", 5)
    params, direction, ids, targets = drawn(network)
    found = gradient(loss, network, params, ids, targets)
    expected_value = loss(network, params, ids, targets, TORCH).item()
    for trained in ({"head.weight"}, {"h.1.ffn.up.bias", "norm.weight"}, {"embed.tokens", "head.weight"}):
        expected = sum(float((found[each] * direction[each]).sum()) for each in trained)
        value, got = slope(loss, network, params, direction, trained, ids, targets)
        assert value == pytest.approx(expected_value, rel=1e-12)
        assert got == pytest.approx(expected, rel=1e-10, abs=1e-12)
        assert abs(expected) > 1e-6


def test_what_is_frozen_runs_as_it_is() -> None:
    """Plain tensors give plain tensors, the same bit for bit."""
    network = NETWORKS["scaled"]
    params, _, ids, targets = drawn(network)
    plain = Loss()(network, params, ids, targets, TORCH)
    got, tangent = parts(Loss()(network, params, ids, targets, Duals(TORCH)))
    assert tangent is None and torch.equal(got, plain)


def test_far_logits_have_a_finite_tangent() -> None:
    """A score beyond the range of exp, in the future and in the past of a token."""
    q = torch.tensor([[[300.0, 0.0], [-300.0, 0.0], [1.0, 0.0]]], dtype=torch.double)
    k, v, d = (torch.randn(1, 3, 2, dtype=torch.double, generator=torch.Generator().manual_seed(i)) for i in range(3))
    k = 10 * k
    leaf = q.clone().requires_grad_()
    TORCH.attention(leaf, k, v, 1).sum().backward()  # type: ignore[no-untyped-call]
    _, tangent = parts(Duals(TORCH).attention(cast(Tensor, Dual(q, d)), k, v, 1))
    assert tangent is not None and leaf.grad is not None
    assert tangent.sum().item() == pytest.approx(float((leaf.grad * d).sum()), rel=1e-9, abs=1e-12)


def z(turn: Turn, number: int, index: int, name: str, shape: Sequence[int]) -> Tensor:
    """A direction's part, as the docstring of `lamina.estimators` has it."""
    rng = turn.rng(f"direction/{number}/{index}/{name}")
    return torch.from_numpy(rng.standard_normal(tuple(shape), dtype=np.float32))


def test_directions_are_standard_normal_and_each_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """However they are drawn: whole, or in parts as they are added."""
    monkeypatch.setattr(ops, "DRAWN", 701)
    shape, keys = (90, 111), [(0, 0, "a"), (1, 0, "a"), (0, 1, "a"), (0, 0, "b")]
    seen = []
    for turn in (TURN, replace(TURN, device=3), replace(TURN, round=2), replace(TURN, seed=5)):
        for number, index, name in keys:
            expected = z(turn, number, index, name, shape)

            def draw(turn: Turn = turn, where: str = f"direction/{number}/{index}/{name}") -> np.random.Generator:
                return turn.rng(where)

            p = torch.ones(shape)
            assert torch.equal(TORCH.direction(p, draw), expected)
            TORCH.shift(p, draw, 0.5)
            assert torch.equal(p, torch.ones(shape).add(expected, alpha=0.5))
            TORCH.steer(p, [(draw, 2.0), (draw, -0.5)])
            torch.testing.assert_close(p.grad, 1.5 * expected)
            seen.append(expected.flatten())
    correlations = torch.corrcoef(torch.stack(seen))
    assert (correlations - torch.eye(len(seen))).abs().max() < 0.05
    everything = torch.cat(seen)
    assert abs(everything.mean()) < 0.01 and everything.std() == pytest.approx(1, abs=0.01)


@dataclass(frozen=True)
class Mutual(FedAvg):
    """Two exits that teach one another."""

    def objective(self, job: Job) -> Objective:
        return Objective(mutual=0.5)


@dataclass(frozen=True)
class Narrow(FedAvg):
    """A narrower network in each step, taught by the whole one, on the labels at hand."""

    def objective(self, job: Job) -> Objective:
        widths: Any = ({"h.0.ffn": 40, "h.2.ffn": 24}, {"h.1.ffn": 8})
        return Objective(widths=widths, distill=True, own_labels=True)


@dataclass(frozen=True)
class Drawn(FedAvg):
    """With a penalty that pulls everything to zero."""

    def pull(self, job: Job, params: Mapping[str, Tensor], aside: Params, ops: ops.Ops) -> None:
        for p in params.values():
            ops.pull(p, (p, 0.5))


@dataclass(frozen=True)
class Added(Method):
    """Sparse additions and adapters train."""

    def plans(self, spec: Spec, turn: Turn, memory: Params) -> Iterator[Plan]:
        rows = model.layout(spec).params
        names = frozenset(name for name, row in rows.items() if row.part in ("sparse", "adapter"))
        yield Plan(frozenset(rows), names, label="added")


@dataclass(frozen=True)
class Case:
    """A method, the place of one of its plans, levers, and settings."""

    method: Method
    plan: int = 0
    levers: Levers = field(default_factory=Levers)
    local: Local = SGD
    spec: Spec = SPEC

    def job(self, gradient: Any, directions: int = 1) -> Job:
        method = replace(self.method, directions=directions)
        network = method.adapt(self.spec)
        plan = replace(list(method.plans(network, TURN, {}))[self.plan], gradient=gradient, levers=self.levers)
        return Job(TURN, plan, self.local, weights(network), method)

    @property
    def network(self) -> Spec:
        return self.method.adapt(self.spec)


CACHED = Levers(prefix_cache="disk", chunked_loss=True, micro_batch=2)
CASES = {
    "all": Case(FedAvg()),
    "suffix": Case(Caff(), 1),
    "cached, micro, chunked": Case(Caff(), 1, CACHED),
    "recompute, fused": Case(Caff(), 1, Levers(recompute=True, fused_update=True)),
    "packed": Case(Caff(), 2, Levers(frozen_bits=8)),
    "lora": Case(FedLora(targets="qv")),
    "lora, packed": Case(FedLora(), 0, Levers(frozen_bits=16, chunked_loss=True)),
    "mutual": Case(Mutual(), spec=replace(SPEC, exits=(0, 1))),
    "narrow": Case(Narrow(), levers=Levers(micro_batch=3)),
}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))


def tokens(examples: int = 9, length: int = 7) -> Pairs:
    drawn = np.random.default_rng(3).integers(0, SPEC.vocab, (2, examples, length))
    return Pairs(*drawn)


def trained(case: Case, gradient: Any, directions: int = 1) -> tuple[Job, Params, Update]:
    """The job, what became of its tensors on the device, and what it sent."""
    job = case.job(gradient, directions)
    owned = job.owned()
    update = client.train(owned, tokens(), case.network)
    return job, {name: owned.arrays[name].detach() for name in job.plan.trains}, update


@every_case
def test_a_step_of_forward_mode_goes_along_its_directions_as_far_as_the_gradient_says(case: Case) -> None:
    """With SGD at lr = 1: p - mean_i <g, v_i> v_i, with g from a step with backward."""
    job, after, _ = trained(case, "backward")
    step = {name: job.arrays[name] - p for name, p in after.items()}
    job, moved_to, _ = trained(case, "forward", directions=2)
    directions = [{name: z(TURN, 0, i, name, p.shape) for name, p in step.items()} for i in range(2)]
    slopes = [sum(float((p * v[name]).sum()) for name, p in step.items()) for v in directions]
    assert max(map(abs, slopes)) > 0.01
    for name, p in moved_to.items():
        expected = sum(slope * v[name] / 2 for slope, v in zip(slopes, directions, strict=True))
        torch.testing.assert_close(job.arrays[name] - p, expected, rtol=1e-3, atol=2e-5, msg=name)


@pytest.mark.parametrize("levers", [Levers(), Levers(fused_update=True)], ids=["together", "block by block"])
def test_forward_mode_clips_the_whole_gradient_and_hears_penalties(levers: Levers) -> None:
    local = replace(SGD, clip=0.25)
    case = Case(Drawn(), levers=levers, local=local)
    job, after, _ = trained(replace(case, local=SGD), "forward")
    whole = {name: job.arrays[name] - p for name, p in after.items()}
    norm = float(torch.stack([p.norm() for p in whole.values()]).norm())
    assert norm > 1
    _, clipped, _ = trained(case, "forward")
    for name, p in clipped.items():
        torch.testing.assert_close(job.arrays[name] - p, whole[name] * 0.25 / norm, rtol=1e-3, atol=1e-6, msg=name)
    _, plain, _ = trained(Case(FedAvg(), levers=levers), "forward")
    for name, p in plain.items():
        torch.testing.assert_close(whole[name], job.arrays[name] - p + 0.5 * job.arrays[name], rtol=1e-4, atol=1e-5)


@every_case
def test_a_step_of_zeroth_order_is_the_difference_of_two_losses(case: Case) -> None:
    """p - lr mean_i g_i z_i with g_i from losses at p +- e z_i, from a device that trains next to nothing there."""
    job, after, update = trained(case, "zeroth", directions=2)
    (sent,) = update.arrays.values()
    losses: list[float] = []
    for i in range(2):
        ends = []
        for sign in (1, -1):
            arrays = dict(job.arrays)
            for name in after:
                arrays[name] = arrays[name] + sign * STRETCH * z(TURN, 0, i, name, arrays[name].shape)
            plan = replace(job.plan, gradient="backward", levers=replace(case.levers, prefix_cache=""))
            there = replace(job, plan=plan, local=replace(SGD, lr=1e-30), arrays=arrays).owned()
            ends.append(client.train(there, tokens(), case.network).loss)
        losses += ends
        if not isinstance(case.method, Narrow):  # what is reported there is not all that is minimised
            assert sent[0, i].item() == pytest.approx((ends[0] - ends[1]) / (2 * STRETCH), rel=2e-2, abs=2e-3)
    assert update.loss == pytest.approx(np.mean(losses), rel=1e-4)
    for name, p in after.items():
        expected = sum(float(sent[0, i]) * z(TURN, 0, i, name, p.shape) / 2 for i in range(2))
        moved_by = (job.arrays[name] - p) / (job.method.zeroth_lr / sum(map(torch.numel, after.values())))
        torch.testing.assert_close(moved_by, expected, rtol=1e-2, atol=1e-2, msg=name)


@pytest.mark.parametrize("name", [name for name in CASES if name != "mutual"])
def test_slopes_of_zeroth_order_tend_to_those_of_forward_mode(name: str) -> None:
    """Within two percent of the largest. Where outputs teach one another, a teacher that moves is seen to move."""
    case = CASES[name]
    job, after, _ = trained(case, "backward")
    step = {name: job.arrays[name] - p for name, p in after.items()}
    _, _, update = trained(case, "zeroth", directions=6)
    slopes = [sum(float((p * z(TURN, 0, i, name, p.shape)).sum()) for name, p in step.items()) for i in range(6)]
    assert update.arrays[PROJECTED][0].tolist() == pytest.approx(slopes, abs=0.02 * max(map(abs, slopes)))


@every_case
def test_the_server_repeats_what_a_device_did_bit_for_bit(case: Case) -> None:
    """From the slopes alone, over several rounds of a schedule, whatever the optimizer would be."""
    local = Local(lr=0.3, optimizer="adamw", schedule="cosine", steps=4, batch_size=3, weight_decay=0.1, clip=0.1)
    case = replace(case, local=local)
    job = case.job("zeroth", 3)
    for turn in (Turn(1, 0, 3, 5), Turn(1, 2, 3, 6)):
        job = replace(job, turn=turn)
        owned = job.owned()
        update = client.train(owned, tokens(), case.network)
        sent = {name: (tuple(array.shape), array.dtype) for name, array in update.arrays.items()}
        assert sent == job.method.sends(case.network, job.plan, 4) == {PROJECTED: ((4, 3), torch.float32)}
        after = unfold(update, job)
        assert bits(after.arrays) == bits({name: owned.arrays[name] for name in job.plan.trains})
        assert moved({name: job.arrays[name] for name in job.plan.trains}, after.arrays) == job.plan.trains
        assert unfold(after, job) is after


def test_the_learning_rate_of_zeroth_order_is_its_own_and_follows_the_schedule() -> None:
    """In the last of three rounds a cosine is at a tenth."""
    steps = {}
    for lr, schedule in ((1e-3, "constant"), (0.5, "constant"), (0.5, "cosine")):
        case = Case(FedAvg(zeroth_lr=0.25), local=replace(SGD, lr=lr, schedule=cast(Any, schedule)))
        job = replace(case.job("zeroth"), turn=Turn(0, 2, 3, 0))
        owned = job.owned()
        (slopes,) = client.train(owned, tokens(), case.network).arrays.values()
        step = job.arrays["h.0.ffn.up.weight"] - owned.arrays["h.0.ffn.up.weight"].detach()
        numbers = sum(map(torch.numel, owned.arrays.values()))
        unit = float(slopes) / numbers * z(job.turn, 0, 0, "h.0.ffn.up.weight", step.shape)
        steps[lr, schedule] = float((step * unit).sum() / (unit * unit).sum())
    assert list(steps.values()) == pytest.approx([0.25, 0.25, 0.025], rel=1e-3)


def _dual(tensor: Any, *shape: int) -> Any:
    return Dual(tensor(*shape), tensor(*shape))


KERNELS: dict[str, Any] = {
    "norm of a frozen layer": lambda ops, t: ops.norm(_dual(t, 3, 9, 8), t(8), t(8), 1e-5),
    "norm": lambda ops, t: ops.norm(_dual(t, 3, 9, 8), _dual(t, 8), _dual(t, 8), 1e-5),
    "first norm that trains": lambda ops, t: ops.norm(t(3, 9, 8), _dual(t, 8), _dual(t, 8), 1e-5),
    "attention": lambda ops, t: ops.attention(*(_dual(t, 2, 40, 8) for _ in range(3)), 2),
    "attention to frozen values": lambda ops, t: ops.attention(_dual(t, 2, 40, 8), t(2, 40, 8), t(2, 40, 8), 2),
    "attention of frozen scores": lambda ops, t: ops.attention(t(2, 40, 8), t(2, 40, 8), _dual(t, 2, 40, 8), 2),
    "cross-entropy": lambda ops, t: ops.cross_entropy(_dual(t, 2, 7, 30), torch.zeros(2, 7, dtype=torch.int64)),
}


@pytest.mark.parametrize("kernel", KERNELS.values(), ids=list(KERNELS))
def test_what_a_kernel_takes_meanwhile_is_in_its_price(kernel: Any) -> None:
    """To a few numbers, as for masks of bytes: also where no network has its peak. What goes in is not counted."""
    predicted, measured = taken(kernel)
    assert abs(predicted - measured) <= 120 and measured > 500


MOVES: dict[str, Case] = CASES | {
    "spry": Case(Spry()),
    "spry, all": Case(Spry(rank=2, targets="all", blocks=2, train_head=True), 0, Levers(chunked_loss=True)),
    "mezo": Case(Mezo()),
    "norms": Case(Caff(), 0, Levers(micro_batch=1)),
    "adafactor, fused": Case(FedAvg(), 0, Levers(optimizer="adafactor", fused_update=True), replace(LOCAL, clip=1.0)),
    "everything": Case(FedLora(), 0, Levers(True, True, "disk", 16, 2, True, 8, "adamw8"), LOCAL),
    "sparse and adapters": Case(Added(), spec=replace(SPEC, sparse=Sparse(0.1, 0, ("ffn.up", "attn.o")), adapter=5)),
    "factored": Case(FedAvg(), spec=replace(SPEC, factored=Factored(4, 8), scale=2.0)),
}


@pytest.mark.parametrize("gradient", ["forward", "zeroth"])
@pytest.mark.parametrize("name", MOVES)
def test_the_price_is_what_is_measured(name: str, gradient: Any) -> None:
    """To a few numbers; a packed head, of which slabs are counted whole, to half a percent."""
    case = MOVES[name]
    job = case.job(gradient, directions=2)
    local = replace(case.local, steps=2, batch_size=3)
    price = cost(case.network, job.plan, local, WINDOW, 2, job.method)
    found, moment = measure.watch(case.network, job.plan, local, WINDOW, job.method).peak()
    assert abs(sum(found.values()) - price.memory_bytes) <= max(
        32, 0.005 * price.memory_bytes * case.levers.chunked_loss
    )
    assert moment == price.moment
    assert price.memory.activations == 0 or gradient == "forward"  # of the loss alone
    assert price.memory.optimizer == 0 or gradient == "forward"


@pytest.mark.parametrize("gradient", ["forward", "zeroth"])
@pytest.mark.parametrize("name", ["suffix", "cached, micro, chunked", "packed", "lora", "factored", "spry"])
def test_operations_are_those_torch_counts(name: str, gradient: Any) -> None:
    """With attention as the plain formula."""
    case = MOVES[name]
    job = case.job(gradient, 3)
    local = replace(case.local, steps=2, batch_size=4)
    with counting() as counter:
        client.train(replace(job, local=local).owned(), tokens(8), case.network)
    assert cost(case.network, job.plan, local, 7, 2, job.method).flops == counter.get_total_flops()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Table:
    """An experiment on tiny-3 alone."""
    folder = tmp_path_factory.mktemp("forward")
    return write_world(folder, networks=[str(folder / "tiny-3")])


def choose(method: Method, memory: int) -> Any:
    network = method.adapt(SPEC)
    return choose_plan(method, network, Budget(memory_bytes=memory), LOCAL, WINDOW, STEPS, TURN)


@pytest.mark.parametrize("gradient", ["forward", "zeroth"])
def test_a_device_that_fits_no_plan_gets_the_cheapest_without_backward(gradient: Any) -> None:
    """And one that fits a plan never does; nor does one that does not fit even that."""
    method = Caff(fallback=gradient)
    cheapest = list(method.plans(SPEC, TURN, {}))[-1]
    resort = replace(cheapest, gradient=gradient)
    own, without = (cost(SPEC, plan, LOCAL, WINDOW, STEPS, method).memory_bytes for plan in (cheapest, resort))
    assert without < own
    assert choose(method, own).plan == cheapest
    for memory in (own - 1, without):
        choice = choose(method, memory)
        label = f"last 1 of 3, {'forward mode' if gradient == 'forward' else 'zeroth order'}"
        assert choice.plan == replace(resort, label=label)
        assert (choice.cost.memory_bytes, choice.binding) == (without, ("memory_bytes",))
    choice = choose(method, without - 1)
    assert (choice.plan, choice.cost.memory_bytes) == (None, without)
    assert choose(Caff(), own - 1).plan is None


def test_why_shows_the_fallback_next_to_the_plan_that_it_stands_in_for(world: Table) -> None:
    memory = choose(Caff(fallback="zeroth"), 1).cost.memory_bytes
    table = world | {
        "method": {"name": "caff", "fallback": "zeroth"},
        "fleet": [{"name": "strong"}, {"name": "weak", "memory": memory}],
    }
    run = begin(table, Path(world["networks"][0]).parent / "runs")
    found = explain(run.experiment, run.outlook, "weak")
    assert (found["plan"], found["richer"]["plan"]) == ("last 1 of 3, zeroth order", "last 1 of 3")
    assert (found["cheaper"], found["missing"]) == (None, {})
    assert run.outlook.classes_json()[1]["predicted"]["up_bytes"] == 4 * STEPS


FALLING = [name for name, cls in METHODS.items() if not cls.for_fleet and cls not in (Spry, Mezo)]


@pytest.mark.parametrize("gradient", ["forward", "zeroth"])
@pytest.mark.parametrize("name", FALLING)
def test_every_method_falls_back(name: str, gradient: Any, world: Table, tmp_path: Path) -> None:
    """Its devices take part in a round, each sending what was asked for, in the memory that was foreseen."""
    method = replace(METHODS[name](), fallback=gradient)
    network = method.adapt(suited(method, SPEC))
    turns = [Turn(0, each, 3) for each in method.peak_rounds(3)]
    resorts = [next(method.last_resort(network, turn, {})) for turn in turns]
    plan = resorts[0]
    own, price = (
        cost(network, each, LOCAL, WINDOW, STEPS, method) for each in (replace(plan, gradient="backward"), plan)
    )
    found = measure.watch(network, plan, replace(LOCAL, steps=2), WINDOW, method).peak()[0]
    assert sum(found.values()) == pytest.approx(price.memory_bytes, rel=0.02)
    if price.memory_bytes >= own.memory_bytes:
        assert gradient == "forward"  # it pays where more than the head trains
        return
    table = {"name": name, "fallback": gradient, "on_infeasible": "drop"}
    most = max(cost(network, each, LOCAL, WINDOW, STEPS, method).memory_bytes for each in resorts)
    fleet = [{"name": "weak", "memory": most}]
    task = suited_task(method, world)
    run = begin(world | {"task": task, "method": table, "fleet": fleet, "cohort": 2}, tmp_path)
    state, rows = play(run)
    assert [(row.plan, row.rejected) for row in rows] == [(plan.label, None)] * 2
    assert moved(run.state.params, state.params)


def test_tokens_of_a_device_arrive_beside_its_slopes(world: Table, tmp_path: Path) -> None:
    """And codings of changes are let be, where no changes are sent."""
    for settings in ({"name": "fedrolex", "own_labels": True}, {"name": "federated-dropout", "bits": 4}):
        method = METHODS[str(settings["name"])](**{key: value for key, value in settings.items() if key != "name"})  # type: ignore[arg-type]
        own = min(cost(SPEC, plan, LOCAL, WINDOW, STEPS, method).memory_bytes for plan in method.plans(SPEC, TURN, {}))
        fleet = [{"name": "weak", "memory": own - 1}]
        run = begin(world | {"method": settings | {"fallback": "zeroth"}, "fleet": fleet, "cohort": 2}, tmp_path)
        state, rows = play(run)
        assert [(row.plan is not None, row.rejected) for row in rows] == [(True, None)] * 2
        assert moved(run.state.params, state.params)


@pytest.mark.parametrize("name", [name for name, cls in METHODS.items() if cls.for_fleet])
def test_methods_that_plan_for_the_whole_fleet_have_no_fallback(name: str) -> None:
    with pytest.raises(ValueError, match=r"^fallback must be .*got 'zeroth'"):
        METHODS[name](fallback="zeroth")


def test_zeroth_order_sends_a_number_per_step_and_direction(world: Table, tmp_path: Path) -> None:
    run = begin(world | {"method": {"name": "mezo", "directions": 2}, "fleet": [{"name": "all"}]}, tmp_path)
    state, rows = play(run)
    assert [row.up_bytes for row in rows] == [4 * 2 * STEPS] * 4
    assert {name for name in moved(run.state.params, state.params)} == {n for n in state.params if "lora_" in n}


@pytest.mark.parametrize("blocks", [0, 1, 2, 3, 5])
def test_devices_of_spry_share_the_blocks_out(blocks: int) -> None:
    """In a round, devices that follow one another have the blocks in turn, and so has a device in rounds that do."""
    method = Spry(blocks=blocks)
    network = method.adapt(SPEC)
    layout = model.layout(network)
    count = min(blocks or 3, 3)

    def plan(device: int, round_: int = 0) -> Plan:
        (only,) = method.plans(network, Turn(0, round_, 9, device), {})
        assert only.holds == frozenset(layout.params) and only.gradient == "forward"
        assert len(only.blocks(layout)) == count
        assert only.trains == {f"h.{i}.attn.{x}.lora_{ab}" for i in only.blocks(layout) for x in "qv" for ab in "ab"}
        return only

    for turns in ([(device, 4) for device in range(3)], [(5, round_) for round_ in range(3)]):
        times = [i for turn in turns for i in plan(*turn).blocks(layout)]
        assert sorted(times) == sorted(list(range(3)) * count)
    anybody = cost(network, plan(-1), LOCAL, WINDOW, STEPS, method)
    assert plan(-1).first_trained(layout) == 0
    for device in range(3):
        price = cost(network, plan(device), LOCAL, WINDOW, STEPS, method)
        assert (price.memory_bytes, price.flops) <= (anybody.memory_bytes, anybody.flops)
    assert plan(0).label == ("low rank, block 2" if blocks == 1 else plan(0).label)


def test_what_trains_and_what_the_labels_say() -> None:
    (head,) = Mezo(trains="head").plans(SPEC, TURN, {})
    assert head.label == "head 3, two losses"
    assert head.trains == {"norm.weight", "norm.bias", "head.weight"}
    (everything,) = Mezo(trains="all").plans(SPEC, TURN, {})
    assert everything.trains == set(LAYOUT.params) and Mezo(trains="all").adapt(SPEC) == SPEC
    larger = Mezo(rank=3, targets="all").adapt(SPEC)
    (low,) = Mezo(rank=3, targets="all").plans(larger, TURN, {})
    assert low.trains == {name for name in model.layout(larger).params if "lora_" in name}
    assert larger.lora == Lora(3, 6.0, LINEARS)
    assert {plan.gradient for plan in (head, everything, low)} == {"zeroth"}
    adapted = Spry(train_head=True).adapt(SPEC)
    (with_head,) = Spry(train_head=True).plans(adapted, TURN, {})
    assert "head.weight" in with_head.trains and "norm.weight" not in with_head.trains


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize(("key", "value"), [("directions", 0), ("zeroth_lr", 0.0), ("zeroth_lr", -1.0)])
def test_every_method_refuses_steps_that_mean_nothing(name: str, key: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"^{key} must be .*got {value}"):
        METHODS[name](**{key: value})


@pytest.mark.parametrize("method", [Spry, Mezo])
@pytest.mark.parametrize(("key", "value"), [("rank", 0), ("alpha", -1.0), ("directions", 0)])
def test_sizes_that_mean_nothing_are_refused(method: type[Method], key: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"^{key} must .*got {value}"):
        method(**{key: value})
    with pytest.raises(ValueError, match=r"^blocks must not be negative, got -1"):
        Spry(blocks=-1)


@pytest.mark.parametrize(
    "table",
    [
        {"name": "spry", "directions": 8},
        {"name": "spry", "directions": 2, "blocks": 0, "train_head": True},
        {"name": "mezo", "directions": 4},
        {"name": "mezo", "trains": "all"},
        {"name": "caff", "fallback": "zeroth"},
    ],
    ids=str,
)
def test_a_few_rounds_lower_the_loss(table: Table, world: Table, tmp_path: Path) -> None:
    """Of all devices' texts."""
    fleet = [{"name": "all", "memory": 130 * 1024}] if "fallback" in table else [{"name": "all"}]
    run = begin(world | {"method": table, "fleet": fleet, "cohort": 2, "rounds": 3}, tmp_path)

    def loss(params: Params) -> float:
        ids, targets = zip(*(shard.batch(np.arange(len(shard))) for shard in run.task.train), strict=True)
        logits = model.forward(run.outlook.chosen.spec, params, torch.from_numpy(np.concatenate(ids)))
        return TORCH.cross_entropy(logits, torch.from_numpy(np.concatenate(targets))).item()

    before = loss(run.state.params)
    for _ in range(3):
        run.state, rows = play(run)
        assert all(row.plan and row.rejected is None for row in rows)
    assert loss(run.state.params) < before - 0.003
