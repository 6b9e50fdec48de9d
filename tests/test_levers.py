"""Levers: exact ones change nothing but memory, inexact ones little, and every price is what is measured."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from itertools import accumulate
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from support import CLASSES, TURN, VARIANTS, bits, counting, moved, spec, suited, weights
from torch import Tensor

from lamina import client, ledger, levers, measure, model, ops, packed
from lamina.cost import cost
from lamina.flash import Flash
from lamina.job import Job, Local, Turn
from lamina.kernels import Mix
from lamina.layout import Axis, Params
from lamina.levers import EXACT, LADDER, NAMES, Levers
from lamina.methods import Method
from lamina.methods.blocks import Caff
from lamina.methods.full import FedAvg
from lamina.methods.lora import FedLora
from lamina.ops import HOST, TORCH, Ops
from lamina.plan import Keep, Plan, narrow
from lamina.source import run_prefix
from lamina.spec import Spec
from lamina.timeline import Timeline

PLAIN = Method()
SPEC = spec(3)
LAYOUT = model.layout(SPEC)
PARAMS = weights(SPEC)
ALL_EXACT = Levers(chunked_loss=True, fused_update=True, prefix_cache="disk", micro_batch=1, recompute=True)
EXACT_LEVERS = {
    "chunked": Levers(chunked_loss=True),
    "fused": Levers(fused_update=True),
    "ram": Levers(prefix_cache="ram"),
    "disk": Levers(prefix_cache="disk"),
    "micro 1": Levers(micro_batch=1),
    "micro 2": Levers(micro_batch=2),
    "micro 3": Levers(micro_batch=3),
    "micro 9": Levers(micro_batch=9),
    "recompute": Levers(recompute=True),
    "recompute, micro 3": Levers(recompute=True, micro_batch=3),
    "fused, micro 3": Levers(fused_update=True, micro_batch=3),
    "fused, recompute": Levers(fused_update=True, recompute=True),
    "chunked, micro 2": Levers(chunked_loss=True, micro_batch=2),
    "ram, recompute": Levers(prefix_cache="ram", recompute=True),
    "fused, recompute, ram": Levers(fused_update=True, recompute=True, prefix_cache="ram"),
    "all but micro": replace(ALL_EXACT, micro_batch=0),
    "all": ALL_EXACT,
    "all, micro 3": replace(ALL_EXACT, micro_batch=3, prefix_cache="ram"),
}
every_exact = pytest.mark.parametrize("lever", EXACT_LEVERS.values(), ids=list(EXACT_LEVERS))


@dataclass(frozen=True)
class Sequences:
    """Random sequences, each the same whenever it is asked for."""

    examples: int
    tokens: int
    vocab: int = SPEC.vocab

    def __len__(self) -> int:
        return self.examples

    def batch(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        ids = np.random.default_rng(1).integers(0, self.vocab, (self.examples, self.tokens + 1))[rows]
        return ids[:, :-1].copy(), ids[:, 1:].copy()

    def at(self, turn: Turn) -> Sequences:
        return self


@dataclass(frozen=True)
class Classified(Sequences):
    """The same, cut at different lengths, each with a class."""

    def batch(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        ids, following = super().batch(rows)
        ids[np.arange(self.tokens) > following[:, :1] % self.tokens] = -1
        return ids, following[:, -1:] % len(CLASSES)


def examples(network: Spec, count: int, tokens: int) -> Sequences:
    """Random ones that the network takes."""
    return (Classified if network.labels else Sequences)(count, tokens)


def run(
    network: Spec,
    plan: Plan,
    local: Local,
    shard: Any,
    params: Params,
    slice_tokens: int = 256,
    method: Method = PLAIN,
) -> tuple[list[float], Params]:
    """Loss of each step of a round, and what was trained, from tensors of the plan's network."""
    losses: list[float] = []
    make = client._trainer

    @dataclass
    class Noting:
        steps: Any

        def step(self, *batch: Any) -> float:
            losses.append(self.steps.step(*batch))
            return losses[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(client, "_trainer", lambda *arguments: Noting(make(*arguments)))
        patch.setattr(ops, "SLICE_TOKENS", slice_tokens)
        job = Job(TURN, plan, local, narrow(params, model.layout(plan.runs(network)), plan), method).owned()
        update = client.train(job, shard, network)
    assert update.steps == len(losses)
    assert update.loss == pytest.approx(np.mean(losses), rel=1e-9)
    return losses, {name: job.arrays[name].detach() for name in plan.trains}  # trained in place, however it is sent


@cache
def without(
    network: Spec, plan: Plan, local: Local, shard: Sequences, method: Method = PLAIN
) -> tuple[list[float], Params]:
    """The same round with no lever at all."""
    assert plan.levers == Levers()
    return run(network, plan, local, shard, weights(plan.runs(network)), method=method)


def same(
    network: Spec,
    plan: Plan,
    lever: Levers,
    local: Local,
    shard: Sequences,
    slice_tokens: int,
    method: Method = PLAIN,
) -> None:
    """A round with levers is that without, but for rounding.

    AdamW divides the gradient by its size, so it makes much of the rounding of gradients that are near zero; those of
    the keys' bias are nothing but rounding, since they shift all scores of a query alike, so it may end anywhere.
    """
    losses, tensors = without(network, plan, local, shard, method)
    params = weights(plan.runs(network))
    got_losses, got = run(network, replace(plan, levers=lever), local, shard, params, slice_tokens, method)
    coarse = plan.gradient == "zeroth"  # slopes are differences of two rounded losses over a thousandth
    assert got_losses == pytest.approx(losses, rel=1e-3 if coarse else 2e-6)
    assert set(got) == set(tensors) == plan.trains
    travelled = local.lr * len(losses)
    for name, tensor in tensors.items():
        atol = (
            0.01
            if coarse
            else 1e-6
            if local.optimizer == "sgd"
            else travelled * (2 if name.endswith("k.bias") else 1e-3)
        )
        assert torch.allclose(got[name], tensor, rtol=1e-5, atol=atol), name


TOO_ALIKE = (
    *("micro 2", "micro 9", "chunked, micro 2", "fused, micro 3", "ram, recompute", "fused, recompute, ram"),
    *("all but micro", "all"),
)
DISTINCT = [name for name in EXACT_LEVERS if name not in TOO_ALIKE]


@pytest.mark.parametrize("name", DISTINCT)
@pytest.mark.parametrize("variant", VARIANTS)
def test_exact_levers_leave_every_method_as_it_is(variant: str, name: str) -> None:
    """Twenty steps of AdamW; blocks run one or two sequences at a time where they run in slices."""
    method = VARIANTS[variant]
    network = method.adapt(suited(method, SPEC))
    plans = list(method.plans(network, TURN, {}))
    plan = replace(plans[len(plans) // 2], levers=Levers())  # without those that are the method's own
    local = Local(lr=3e-3, steps=20, batch_size=4, weight_decay=0.1)
    same(network, plan, EXACT_LEVERS[name], local, examples(network, 18, 12), 24, method)


LOCALS = {
    "sgd": Local(lr=0.3, optimizer="sgd", steps=6, batch_size=4),
    "sgd, clipped": Local(lr=0.3, optimizer="sgd", steps=6, batch_size=4, clip=0.1),
    "momentum, clipped": Local(lr=0.1, optimizer="sgd", momentum=0.9, steps=6, batch_size=4, clip=0.1),
    "adamw, clipped": Local(lr=3e-3, steps=6, batch_size=4, clip=0.3),
    "epochs": Local(lr=0.1, optimizer="sgd", momentum=0.9, batch_size=4, epochs=2),
    "cosine": Local(lr=0.3, optimizer="sgd", steps=3, batch_size=5, schedule="cosine", weight_decay=0.1),
}


@every_exact
@pytest.mark.parametrize("local", LOCALS.values(), ids=list(LOCALS))
def test_exact_levers_leave_every_optimizer_as_it_is(local: Local, lever: Levers) -> None:
    """Sequences longer than a slice; batches that micro-batches do not divide; epochs that end with a smaller batch."""
    plan = list(Caff().plans(SPEC, TURN, {}))[1]
    same(SPEC, plan, lever, local, Sequences(10, 17), slice_tokens=8)


@pytest.mark.parametrize("variant", VARIANTS)
def test_all_levers_at_once_leave_every_plan_as_it_is(variant: str) -> None:
    method = VARIANTS[variant]
    network = method.adapt(suited(method, SPEC))
    plans = list(method.plans(network, TURN, {}))
    for plan in plans[:: 1 + len(plans) // 5]:
        for lever, slice_tokens in ((EXACT_LEVERS["all, micro 3"], 24), (ALL_EXACT, 256)):
            local = replace(LOCALS["momentum, clipped"], steps=2)
            bare = replace(plan, levers=Levers())
            same(network, bare, lever, local, examples(network, 18, 12), slice_tokens, method)


@every_exact
def test_exact_levers_train_cut_networks_alike(lever: Levers) -> None:
    """Width, head dimensions, some heads and some of the feed-forward part, in trained blocks and in a frozen one."""
    cut = {
        "embed": Keep(12, start=7),
        "head_dim": Keep(6, start=5),
        "h.0.ffn": Keep(30),
        "h.1.heads": Keep(1, start=1),
        "h.2.ffn": Keep(20),
    }
    plan = replace(list(Caff().plans(SPEC, TURN, {}))[1], keep={Axis(axis): keep for axis, keep in cut.items()})
    same(SPEC, plan, lever, replace(LOCALS["sgd"], steps=2), Sequences(10, 17), slice_tokens=34)


def only(*prefixes: str) -> Plan:
    """Train what begins so; hold everything."""
    names = frozenset(LAYOUT.params)
    return Plan(names, frozenset(name for name in names if name.startswith(prefixes)), label=" ".join(prefixes))


GRADIENT_PLANS = {plan.label: plan for plan in Caff().plans(SPEC, TURN, {})} | {
    plan.label: plan
    for plan in (
        only("h.1."),
        only("h.0.", "h.2."),
        only("h.1.ffn.down.bias"),
        only("h.0.attn.q", "norm.bias"),
        only("norm."),
        only("head."),
        only("embed.positions"),
        only("embed.tokens", "h.1."),
        only("embed.", "head."),
    )
}
CUTTING = {name: EXACT_LEVERS[name] for name in ("micro 3", "recompute", "recompute, micro 3", "fused", "ram")} | {
    "fused, recompute, micro 3": Levers(fused_update=True, recompute=True, micro_batch=3),
    "all": ALL_EXACT,
}


@cache
def whole_gradient(plan: Plan, shard: Sequences, local: Local) -> tuple[Params, float]:
    """With the graph over the whole network."""
    ids, targets = (torch.from_numpy(each) for each in shard.batch(local.batches(TURN, len(shard))[0]))
    leaves = {name: p.clone().requires_grad_() for name, p in PARAMS.items()}
    loss = F.cross_entropy(model.forward(SPEC, leaves, ids).transpose(1, 2), targets)
    loss.backward()  # type: ignore[no-untyped-call]
    return {name: p.grad for name, p in leaves.items() if name in plan.trains and p.grad is not None}, loss.item()


@pytest.mark.parametrize("lever", CUTTING.values(), ids=list(CUTTING))
@pytest.mark.parametrize("plan", GRADIENT_PLANS.values(), ids=list(GRADIENT_PLANS))
def test_everything_that_trains_gets_its_gradient_and_nothing_else_moves(plan: Plan, lever: Levers) -> None:
    """Also where frozen blocks lie above trained ones. With SGD at lr = 1, the step is the gradient."""
    local, shard = Local(lr=1.0, optimizer="sgd", steps=1, batch_size=5), Sequences(9, 7)
    given = {name: p.clone() for name, p in PARAMS.items()}
    job = Job(TURN, replace(plan, levers=lever), local, given)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ops, "SLICE_TOKENS", 14)
        update = client.train(job, shard, SPEC)
    expected, loss = whole_gradient(plan, shard, local)
    assert update.loss == pytest.approx(loss, rel=1e-6)
    assert set(update.arrays) == set(expected) == plan.trains
    for name, grad in expected.items():
        assert torch.allclose(PARAMS[name] - update.arrays[name], grad, rtol=1e-4, atol=3e-7), name
        assert grad.abs().max() > 1e-5 or name.endswith("k.bias")
    assert moved(PARAMS, given) <= plan.trains  # trained in place, all else bit for bit as it was
    assert all(p.grad is None for name, p in given.items() if name not in plan.trains)


@pytest.mark.parametrize("lever", CUTTING.values(), ids=list(CUTTING))
def test_a_job_on_disk_trains_as_one_in_memory(lever: Levers, tmp_path: Any) -> None:
    plan = replace(GRADIENT_PLANS["last 2 of 3"], levers=lever)
    local, shard = LOCALS["sgd, clipped"], Sequences(18, 12)
    path = tmp_path / "job.safetensors"
    save_file(PARAMS, path)
    on_disk = client.train(Job(TURN, plan, local, Flash(path)), shard, SPEC)
    in_memory = client.train(Job(TURN, plan, local, PARAMS).owned(), shard, SPEC)
    assert bits(on_disk.arrays) == bits(in_memory.arrays)
    assert on_disk.loss == in_memory.loss
    assert bits(dict(Flash(path))) == bits(PARAMS)


def chunked_loss(x: Tensor, weight: Any, targets: Tensor) -> Tensor:
    """Of one head that learns from the targets alone."""
    return TORCH.head_loss([x], [weight], [None], targets, Mix.plain(1), None, chunked=True)


def reference(x: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Loss and both gradients in double precision."""
    x, weight = x.double().requires_grad_(), weight.double().requires_grad_()
    loss = F.cross_entropy(F.linear(x, weight).flatten(0, -2), targets.flatten())
    of_x, of_weight = torch.autograd.grad(loss, (x, weight))
    return loss.detach(), of_x, of_weight


def near(got: Tensor | None, expected: Tensor, tolerance: float = 1e-5) -> bool:
    """Within a share of the largest element."""
    return got is not None and bool((got - expected).abs().max() <= tolerance * expected.abs().max().clamp(min=1e-9))


@given(
    batch=st.integers(1, 4),
    length=st.integers(1, 9),
    vocab=st.integers(1, 40),
    width=st.integers(1, 9),
    chunk=st.integers(1, 50),
    scale=st.sampled_from([0.1, 1.0, 30.0]),
    upstream=st.sampled_from([1.0, 0.375, -2.5]),
    frozen=st.sampled_from(["", "x", "weight"]),
    seed=st.integers(0, 99),
)
@settings(max_examples=120)
def test_the_chunked_loss_is_the_loss(
    batch: int,
    length: int,
    vocab: int,
    width: int,
    chunk: int,
    scale: float,
    upstream: float,
    frozen: str,
    seed: int,
) -> None:
    """Value and gradients against double precision, in many chunks; only what needs a gradient gets one."""
    rng = torch.Generator().manual_seed(seed)
    x = scale * torch.randn(batch, length, width, generator=rng)
    weight = torch.randn(vocab, width, generator=rng)
    targets = torch.randint(vocab, (batch, length), generator=rng)
    loss, of_x, of_weight = reference(x, weight, targets)
    x.requires_grad_(frozen != "x")
    weight.requires_grad_(frozen != "weight")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ops, "_CHUNK_ELEMENTS", chunk)
        patch.setattr(ops, "_CHUNK_TOKENS", chunk % 5 + 1)
        got = chunked_loss(x, weight, targets)
        (got * upstream).backward()  # type: ignore[no-untyped-call]
    # Logits are off by their rounding, probabilities by as much of themselves, and a gradient is a sum of p - 1 or p.
    off = 3e-7 * (1 + float((x @ weight.T).detach().abs().max()))
    assert got.item() == pytest.approx(loss.item(), rel=1e-6, abs=2 * off)
    for p, expected, factor in ((x, of_x, weight), (weight, of_weight, x)):
        assert (p.grad is None) == (not p.requires_grad)
        if p.grad is not None:
            assert (p.grad - upstream * expected).abs().max() <= 2 * off * abs(upstream) * factor.detach().abs().max()


@pytest.mark.parametrize("bits_", [8, 16])
@pytest.mark.parametrize("slab", [1, 5, 17, 1024])
def test_the_chunked_loss_of_a_packed_head_is_that_of_the_unpacked_one(
    slab: int, bits_: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = torch.Generator().manual_seed(0)
    weight = torch.randn(17, 6, generator=rng)
    head = packed.pack(weight.shape, bits_, lambda rows: weight[rows.start : rows.stop], HOST)
    monkeypatch.setattr(packed, "SLAB_ROWS", slab)
    monkeypatch.setattr(ops, "_CHUNK_ELEMENTS", 17 * 4)
    monkeypatch.setattr(ops, "_CHUNK_TOKENS", 1)
    x = torch.randn(3, 5, 6, generator=rng).requires_grad_()
    targets = torch.randint(17, (3, 5), generator=rng)
    got = chunked_loss(x, head, targets)
    got.backward()  # type: ignore[no-untyped-call]
    loss, of_x, _ = reference(x.detach(), head.unpack(), targets)
    assert got.item() == pytest.approx(loss.item(), rel=1e-6)
    assert near(x.grad, of_x)


def test_the_chunked_loss_of_huge_logits_is_finite() -> None:
    x = torch.tensor([[[3e4, 0.0], [-3e4, 0.0]]], requires_grad=True)
    weight = torch.tensor([[3e4, 0.0], [-3e4, 1.0], [0.0, 0.0]], requires_grad=True)
    targets = torch.tensor([[1, 1]])
    got = chunked_loss(x, weight, targets)
    got.backward()  # type: ignore[no-untyped-call]
    loss, of_x, of_weight = reference(x.detach(), weight.detach(), targets)
    assert got.item() == pytest.approx(loss.item(), rel=1e-6)
    assert near(x.grad, of_x)
    assert near(weight.grad, of_weight)


@pytest.mark.parametrize("vocab", [7, 97, 1000, 50257])
@pytest.mark.parametrize("tokens", [1, 31, 33, 5000, 2**21])
def test_a_chunk_is_about_a_million_logits(tokens: int, vocab: int) -> None:
    size = ops.chunk_tokens(tokens, vocab)
    assert 1 <= size <= tokens
    assert size * vocab <= max(2**20, 32 * vocab)
    assert size == tokens or size == 32 or (size + 1) * vocab > 2**20


def test_the_chunked_loss_keeps_its_gradients_and_no_logits() -> None:
    kept: list[tuple[int, ...]] = []

    def note(each: Tensor) -> Tensor:
        kept.append(tuple(each.shape))
        return each

    x, weight = torch.randn(4, 50, 3).requires_grad_(), torch.randn(400, 3).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(note, lambda each: each):
        chunked_loss(x, weight, torch.zeros(4, 50, dtype=torch.int64))
    assert sorted(kept) == [(200, 3), (400, 3)]


SHAPES: dict[str, tuple[Spec, int, int]] = {  # network, batch, tokens
    "wide": (Spec(3, embed=48, heads=3, head_dim=16, ffn=192, vocab=70, positions=64), 4, 64),
    "wordy": (Spec(2, embed=32, heads=2, head_dim=16, ffn=64, vocab=1200, positions=64), 5, 64),
    "long": (Spec(3, embed=32, heads=2, head_dim=16, ffn=128, vocab=200, positions=260), 3, 260),
}
PRICED = EXACT_LEVERS | {
    "none": Levers(),
    "frozen 16": Levers(frozen_bits=16),
    "frozen 8": Levers(frozen_bits=8),
    "cache 16": Levers(prefix_cache="ram", cache_bits=16),
    "cache 16 on disk": Levers(prefix_cache="disk", cache_bits=16),
    "adamw8": Levers(optimizer="adamw8"),
    "adafactor": Levers(optimizer="adafactor"),
    "chunked, frozen 8": Levers(chunked_loss=True, frozen_bits=8),
    "recompute, frozen 16": Levers(recompute=True, frozen_bits=16),
    "fused, adafactor": Levers(fused_update=True, optimizer="adafactor"),
    "fused, adamw8": Levers(fused_update=True, optimizer="adamw8"),
    "everything": replace(ALL_EXACT, cache_bits=16, frozen_bits=8, optimizer="adafactor"),
}
for needless in ("micro 1", "micro 9", "all but micro", "ram, recompute", "chunked, micro 2", "fused, micro 3"):
    del PRICED[needless]
HALF = (
    *("micro 2", "micro 3", "fused, recompute", "fused, recompute, ram", "all", "all, micro 3", "everything"),
    *("recompute, frozen 16", "chunked, frozen 8", "fused, adamw8", "fused, adafactor"),
)
MIXED: tuple[Method, ...] = (
    FedAvg(),
    Caff(),
    Caff(train_head=False),
    Caff(train_head=False, train_embeddings=False),
    FedLora(depth="budget"),
    FedLora(depth="budget", targets="qv", train_head=False),
)


@pytest.mark.parametrize("name", PRICED)
def test_the_price_of_a_lever_is_what_is_measured(name: str) -> None:
    """Within half a percent, category by category; a packed head in the chunked loss is the one that is not exact."""
    turn = list(PRICED).index(name)
    for i, method in enumerate(MIXED[turn % 2 :: 2] if name in HALF else MIXED):
        network, batch, tokens = list(SHAPES.values())[(i + turn) % len(SHAPES)]
        network = method.adapt(network)
        plans = list(method.plans(network, TURN, {}))
        plan = replace(plans[(i + turn // 3) % len(plans)], levers=PRICED[name])
        local = Local(lr=0.1, batch_size=batch, steps=2, clip=float(i % 2))
        predicted = cost(network, plan, local, tokens, 2).memory
        measured = measure.watch(network, plan, local, tokens).peak()[0]
        for category, size in asdict(predicted).items():
            where = (category, plan.label, network)
            assert abs(size - measured.get(category, 0)) <= 0.005 * predicted.total, where


@pytest.mark.parametrize("name", ["ram", "cache 16", "cache 16 on disk"])
@pytest.mark.parametrize(("batch", "steps", "tokens"), [(1, 20, 16), (3, 4, 40), (2, 3, 64)])
def test_the_prefix_is_priced_over_all_examples_of_a_round(batch: int, steps: int, tokens: int, name: str) -> None:
    """It takes as many at a time as fit a slice, however small a batch is, and there the peak may be."""
    network, local = replace(SHAPES["wide"][0], embed=24, head_dim=8), Local(batch_size=batch, steps=steps)
    plan = replace(list(Caff().plans(network, TURN, {}))[-1], levers=PRICED[name])
    measured, moment = measure.watch(network, plan, local, tokens).peak()
    predicted = cost(network, plan, local, tokens, steps)
    assert predicted.memory_bytes == pytest.approx(sum(measured.values()), rel=0.005)
    assert predicted.moment == moment == ("prefix" if batch == 1 else "backward")


@pytest.mark.parametrize("lever", [PRICED["frozen 8"], PRICED["frozen 16"]], ids=["8 bits", "16 bits"])
@pytest.mark.parametrize("name", ["norm.bias", "h.0.norm1.bias", "h.1.norm2.bias"])
def test_an_unpacked_matrix_is_in_the_price(name: str, lever: Levers) -> None:
    """Where a batch is small and little trains, it counts."""
    network, local = SHAPES["wide"][0], Local(batch_size=1, steps=2)
    plan = Plan(frozenset(model.layout(network).params), frozenset({name}), levers=lever)
    measured = sum(measure.watch(network, plan, local, 24).peak()[0].values())
    assert cost(network, plan, local, 24, 2).memory_bytes == pytest.approx(measured, rel=0.002)


@pytest.mark.parametrize("lever", ["chunked", "chunked, frozen 8", "all"])
@pytest.mark.parametrize("method", [Caff(), Caff(train_head=False)], ids=["head trains", "head frozen"])
def test_a_loss_in_many_chunks_is_in_the_price(method: Method, lever: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 32 tokens each, the last of less; the matrices of the slabs are smaller than the head."""
    monkeypatch.setattr(ops, "_CHUNK_ELEMENTS", 1)
    monkeypatch.setattr(packed, "SLAB_ROWS", 500)
    monkeypatch.setattr(ledger, "SLAB_ROWS", 500)
    network, local = replace(SHAPES["wordy"][0], embed=16, head_dim=8), Local(lr=0.123, batch_size=5, steps=2)
    plan = replace(list(method.plans(network, TURN, {}))[-1], levers=PRICED[lever])
    measured = sum(measure.watch(network, plan, local, 57).peak()[0].values())
    assert 0.998 * measured < cost(network, plan, local, 57, 2).memory_bytes < 1.01 * measured


@pytest.mark.parametrize("micro_batch", [1, 2])
def test_gradients_that_add_up_are_in_the_price(micro_batch: int) -> None:
    """Where weights are all that counts: a part of a gradient beside the sum, which stays where it is."""
    network, local = SHAPES["wide"][0], Local(optimizer="sgd", batch_size=3, steps=2)
    plan = replace(next(Caff().plans(network, TURN, {})), levers=Levers(micro_batch=micro_batch))
    measured = sum(measure.watch(network, plan, local, 2).peak()[0].values())
    assert cost(network, plan, local, 2, 2).memory_bytes == pytest.approx(measured, rel=0.002)


BIG = Spec(8, embed=64, heads=4, head_dim=16, ffn=256, vocab=100, positions=256)
WORDY = replace(BIG, blocks=1, vocab=8000)
SITUATIONS: dict[str, tuple[Spec, int, Levers, Local, int]] = {  # network, blocks trained, other levers, local, tokens
    "chunked_loss": (WORDY, 1, Levers(), Local(batch_size=16, steps=2), 64),
    "fused_update": (BIG, 8, Levers(), Local(batch_size=1, steps=2), 8),
    "cache_ram": (BIG, 1, Levers(), Local(batch_size=8, steps=2), 32),
    "cache_disk": (BIG, 1, Levers(prefix_cache="ram"), Local(batch_size=8, steps=50), 32),
    "micro_batch": (BIG, 4, Levers(), Local(batch_size=16, steps=2), 64),
    "recompute": (BIG, 8, Levers(), Local(batch_size=8, steps=2), 256),
    "frozen16": (BIG, 1, Levers(), Local(batch_size=1, steps=2), 8),
    "cache16": (BIG, 1, Levers(prefix_cache="ram"), Local(batch_size=8, steps=50), 32),
    "frozen8": (BIG, 1, Levers(frozen_bits=16), Local(batch_size=1, steps=2), 8),
    "adamw8": (BIG, 8, Levers(), Local(batch_size=1, steps=2), 8),
    "adafactor": (BIG, 8, Levers(optimizer="adamw8"), Local(batch_size=1, steps=2), 8),
}


@pytest.mark.parametrize("rung", LADDER, ids=NAMES)
def test_each_lever_saves_where_it_should(rung: levers.Rung) -> None:
    network, trained, others, local, tokens = SITUATIONS[rung.name]
    plan = replace(list(Caff().plans(network, TURN, {}))[-trained], levers=others)
    before = cost(network, plan, local, tokens, local.steps)
    after = cost(network, replace(plan, levers=replace(others, **rung.sets)), local, tokens, local.steps)
    assert after.memory_bytes < 0.9 * before.memory_bytes
    assert (after.up_bytes, after.down_bytes) == (before.up_bytes, before.down_bytes)


@pytest.mark.parametrize(("trained", "batch", "tokens"), [(8, 64, 64), (1, 64, 64), (1, 1, 256)])
def test_recomputing_keeps_the_inputs_of_blocks_alone(trained: int, batch: int, tokens: int) -> None:
    """A larger batch takes them and a few more of their size; a block that runs takes 16 and more, of a few sequences.

    A few are one where sequences are long.
    """
    plan = list(Caff().plans(BIG, TURN, {}))[-trained]
    plan = replace(plan, levers=Levers(chunked_loss=True, recompute=True))
    one, two = (cost(BIG, plan, Local(batch_size=size, steps=2), tokens, 2).memory_bytes for size in (batch, 2 * batch))
    assert trained < (two - one) / (4 * batch * tokens * BIG.embed) < trained + 6


def flops(lever: Levers, local: Local, steps: int, network: Spec = SPEC, trained: int = 2, tokens: int = 12) -> int:
    plan = list(Caff().plans(network, TURN, {}))[-trained]
    return cost(network, replace(plan, levers=lever), local, tokens, steps).flops


def counted(lever: Levers, local: Local, shard: Sequences) -> int:
    """Operations of a round, as torch counts them, with attention as the plain formula."""
    plan = replace(GRADIENT_PLANS["last 2 of 3"], levers=lever)
    with counting() as counter:
        client.train(Job(TURN, plan, local, PARAMS).owned(), shard, SPEC)
    return int(counter.get_total_flops())


@pytest.mark.parametrize(
    "name",
    ["none", "fused", "ram", "cache 16 on disk", "micro 3", "recompute, micro 3", "frozen 8", "fused, adafactor"],
)
def test_operations_are_those_torch_counts(name: str) -> None:
    """The shard divides into batches, so that no example comes twice in an epoch, and all come."""
    local = Local(batch_size=4, epochs=3, clip=float(len(name) % 2))
    assert flops(PRICED[name], local, 6) == counted(PRICED[name], local, Sequences(8, 12))


def test_prices_of_levers_in_operations() -> None:
    local = Local(batch_size=4, steps=5)
    plain = flops(Levers(), local, 5)
    for free in (Levers(chunked_loss=True), Levers(fused_update=True), Levers(micro_batch=3), Levers(frozen_bits=8)):
        assert flops(free, local, 5) == plain
    clipped = replace(local, clip=1.0)
    assert flops(Levers(), clipped, 5) == plain
    assert flops(Levers(fused_update=True), clipped, 5) == 2 * plain  # a pass for the norm before that for the update
    block = 4 * 12 * (24 * 16**2 + 4 * 12 * 16)  # forward of a block, by hand
    assert flops(Levers(recompute=True), local, 5) == plain + 5 * 2 * block
    epochs = Local(batch_size=4, epochs=3)
    assert flops(Levers(), epochs, 6) - flops(Levers(prefix_cache="ram"), epochs, 6) == (6 - 2) * block


@pytest.mark.parametrize("plan", GRADIENT_PLANS.values(), ids=list(GRADIENT_PLANS))
def test_no_gradient_is_computed_that_nothing_needs(plan: Plan) -> None:
    """Cutting a step at its blocks costs no operations, whatever trains; recomputing, the blocks above the prefix."""
    local, block = Local(batch_size=4, steps=1), 4 * 12 * (24 * 16**2 + 4 * 12 * 16)
    plain, fused, recompute = (
        cost(SPEC, replace(plan, levers=lever), local, 12, 1).flops
        for lever in (Levers(), Levers(fused_update=True), Levers(recompute=True))
    )
    assert fused == plain
    assert recompute == plain + (SPEC.blocks - plan.first_trained(LAYOUT)) * block


@pytest.mark.parametrize("place", ["ram", "disk"])
@pytest.mark.parametrize("trained", [1, 2])
def test_of_a_cached_prefix_one_block_at_a_time_is_in_memory(trained: int, place: Any) -> None:
    network, batch, tokens = SHAPES["wide"]
    layout = model.layout(network)
    plan = replace(list(Caff().plans(network, TURN, {}))[-trained], levers=Levers(prefix_cache=place))
    local = Local(batch_size=batch, steps=2)
    timeline = measure.watch(network, plan, local, tokens)
    above = {name for name in plan.holds if name not in plan.below(layout)}
    assert above < plan.holds
    assert resident(timeline, "weights", but="prefix") == 4 * sum(map(layout.numel, above))
    assert cost(network, plan, local, tokens, 2).memory.weights == 4 * sum(map(layout.numel, above))
    block = sum(layout.numel(name) for name, row in layout.params.items() if row.block == 0)
    assert 0 < resident(timeline, "weights", only="prefix") == 4 * block
    assert resident(measure.watch(network, replace(plan, levers=Levers()), local, tokens), "weights") == 4 * sum(
        map(layout.numel, plan.holds)
    )


def resident(timeline: Timeline, category: str, only: str = "", but: str = "") -> int:
    """Most bytes of a category that are alive at any time of the given moments."""
    alive = accumulate(delta if storage.category == category else 0 for delta, storage, _ in timeline.events)
    moments = (moment for _, _, moment in timeline.events)
    return max(size for size, moment in zip(alive, moments, strict=True) if moment != but and only in ("", moment))


@dataclass
class Asked:
    """A shard that remembers what it was asked for."""

    shard: Sequences
    rows: set[int]

    def __len__(self) -> int:
        return len(self.shard)

    def batch(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        self.rows |= set(rows.tolist())
        return self.shard.batch(rows)

    def at(self, turn: Turn) -> Asked:
        return self


class Counting(Ops):
    """Kernels that remember what they were asked to cache."""

    def __init__(self) -> None:
        super().__init__()
        self.cached: list[tuple[int, tuple[int, ...], str, int]] = []

    def cache(self, rows: int, shape: tuple[int, ...], place: str, bits: int) -> Any:
        self.cached.append((rows, shape, place, bits))
        return super().cache(rows, shape, place, bits)


@pytest.mark.parametrize(("examples", "steps", "used"), [(50, 3, 12), (7, 3, 7), (12, 3, 12), (9, 0, 9)])
@pytest.mark.parametrize("place", ["ram", "disk"])
def test_only_the_examples_of_the_round_are_cached(place: Any, examples: int, steps: int, used: int) -> None:
    plan = replace(GRADIENT_PLANS["last 1 of 3"], levers=Levers(prefix_cache=place, cache_bits=16))
    local, shard, counting = (
        Local(batch_size=4, steps=steps, epochs=2),
        Asked(Sequences(examples, 9), set()),
        Counting(),
    )
    client.train(Job(TURN, plan, local, PARAMS).owned(), shard, SPEC, counting)
    assert counting.cached == [(used, (9, SPEC.embed), place, 16)]
    assert shard.rows == set(np.concatenate(local.batches(TURN, examples)).tolist())


def test_nothing_is_cached_where_the_embedding_trains() -> None:
    for plan in (GRADIENT_PLANS["all 3"], GRADIENT_PLANS["embed.positions"], only("embed.tokens", "h.2.")):
        counting = Counting()
        cached = replace(plan, levers=Levers(prefix_cache="ram"))
        client.train(Job(TURN, cached, LOCALS["sgd"], PARAMS).owned(), Sequences(10, 9), SPEC, counting)
        assert counting.cached == []


@pytest.mark.parametrize("bits_", [16, 32])
@pytest.mark.parametrize("place", ["ram", "disk"])
@pytest.mark.parametrize("plan", ["last 2 of 3", "head.", "h.0. h.2."])
def test_the_cache_holds_what_the_prefix_makes_of_each_example(plan: str, place: Any, bits_: Any) -> None:
    asked = replace(GRADIENT_PLANS[plan], levers=Levers(prefix_cache=place, cache_bits=bits_))
    shard, rows = Sequences(30, 9), np.array([2, 3, 5, 7, 11, 13, 17, 19, 23])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ops, "SLICE_TOKENS", 40)  # four sequences at a time
        source = run_prefix(Job(TURN, asked, LOCALS["sgd"], PARAMS), shard, SPEC, rows, TORCH)
    for picked in ([5, 2, 23], [13], [19, 19, 3], rows.tolist()):
        ids, targets = shard.batch(np.array(picked))
        expected = model.embed(SPEC, PARAMS, torch.from_numpy(ids))
        expected = model.run_blocks(SPEC, PARAMS, expected, range(asked.first_trained(LAYOUT)))
        for _ in range(2):
            given, got_targets = source.batch(np.array(picked))
            got = given.x
            assert torch.equal(got_targets, torch.from_numpy(targets))
            assert got.dtype == torch.float32 and not got.requires_grad
            assert near(got, expected, 1e-6 if bits_ == 32 else 2**-10)
            assert bits_ == 32 or not near(got, expected, 2**-15)
            got.zero_()  # new memory each time


def test_a_cache_of_16_bits_trains_nearly_alike() -> None:
    plan, shard = GRADIENT_PLANS["last 1 of 3"], Sequences(18, 12)
    local = Local(lr=3e-3, steps=20, batch_size=4)
    losses, _ = without(SPEC, plan, local, shard)
    for lever in (PRICED["cache 16"], PRICED["cache 16 on disk"]):
        half = replace(plan, levers=lever)
        got, _ = run(SPEC, half, local, shard, PARAMS)
        assert got == pytest.approx(losses, rel=1e-4)
        assert got != pytest.approx(losses, rel=1e-7)


def test_the_ladder_names_every_lever_once_exact_ones_first() -> None:
    assert len(set(NAMES)) == len(LADDER)
    assert [rung.exact for rung in LADDER] == sorted((rung.exact for rung in LADDER), reverse=True)
    assert EXACT == NAMES[: len(EXACT)] == ("chunked_loss", "fused_update", "cache_ram", "cache_disk", *NAMES[4:6])
    assert NAMES[6:] == ("frozen16", "cache16", "frozen8", "adamw8", "adafactor")
    for rung in LADDER:
        changed = replace(Levers(), **rung.sets)
        assert changed != Levers()
        assert [name.split()[0] for name in changed.names()] == [rung.name]


def test_names_of_levers() -> None:
    assert Levers().names() == []
    assert Levers(micro_batch=4).names() == ["micro_batch 4"]
    assert Levers(optimizer="adamw8", recompute=True, prefix_cache="ram", micro_batch=2).names() == [
        "cache_ram",
        "micro_batch 2",
        "recompute",
        "adamw8",
    ]
    names = replace(ALL_EXACT, frozen_bits=8, cache_bits=16, micro_batch=3).names()
    off = ("cache_ram", "frozen16", "adamw8", "adafactor")
    assert [name.removesuffix(" 3") for name in names] == [name for name in NAMES if name not in off]


@pytest.mark.parametrize(
    ("allowed", "names"),
    [
        ("none", ()),
        ("exact", EXACT),
        ("all", NAMES),
        ((), ()),
        (("recompute", "adamw8", "chunked_loss"), ("chunked_loss", "recompute", "adamw8")),
    ],
    ids=str,
)
def test_allowed_levers_come_in_the_order_of_the_ladder(allowed: levers.Allowed, names: Sequence[str]) -> None:
    assert tuple(rung.name for rung in levers.rungs(allowed)) == tuple(names)


def test_an_unknown_lever_is_refused() -> None:
    for allowed in (("recompute", "cache_tape"), "cache_tape"):
        with pytest.raises(ValueError, match=r"^levers: unknown 'cache_tape'; .*chunked_loss, fused_update, cache_ram"):
            levers.rungs(allowed)


@pytest.mark.parametrize("lever", [*PRICED.values(), Levers(micro_batch=7)])
def test_levers_and_plans_survive_json(lever: Levers) -> None:
    plan = replace(GRADIENT_PLANS["last 2 of 3"], levers=lever, keep={Axis("embed"): Keep(3, units=(1, 2, 5))})
    back = Plan.from_json(json.loads(json.dumps(plan.to_json())))
    assert back == plan
    assert back.levers == lever


@dataclass(frozen=True)
class Counted:
    """Sequences in which each token decides the next: t -> 5 t + 3 modulo the vocabulary."""

    examples: int
    tokens: int
    vocab: int

    def __len__(self) -> int:
        return self.examples

    def batch(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        ids = [np.random.default_rng(2).integers(0, self.vocab, self.examples)[rows]]
        for _ in range(self.tokens):
            ids.append((5 * ids[-1] + 3) % self.vocab)
        whole = np.stack(ids, 1)
        return whole[:, :-1].copy(), whole[:, 1:].copy()

    def at(self, turn: Turn) -> Counted:
        return self


LEARNER = Spec(2, embed=32, heads=2, head_dim=16, ffn=128, vocab=128, positions=12)


@cache
def learnt(lever: Levers, optimizer: Any = "adamw") -> list[float]:
    """Loss of each step of a round that goes from nothing to nearly everything."""
    plan = replace(list(Caff().plans(LEARNER, TURN, {}))[-1], levers=lever)
    local = Local(lr=1e-2, optimizer=optimizer, batch_size=8, steps=60)
    return run(LEARNER, plan, local, Counted(64, 12, LEARNER.vocab), weights(LEARNER))[0]


@pytest.mark.parametrize(
    ("lever", "tolerance"),
    [
        (Levers(frozen_bits=16), 0.01),
        (Levers(prefix_cache="disk", cache_bits=16), 0.01),
        (Levers(frozen_bits=8), 0.04),
        (Levers(frozen_bits=8, chunked_loss=True, fused_update=True, recompute=True), 0.04),
    ],
    ids=str,
)
def test_a_coarse_frozen_part_trains_nearly_alike(lever: Levers, tolerance: float) -> None:
    """Errors of half precision are 2^-11 and those of 8 bits up to 1/254 of a row's largest, all in frozen matrices."""
    plain, got = learnt(Levers()), learnt(lever)
    assert got == pytest.approx(plain, rel=tolerance)
    assert got != pytest.approx(plain, rel=1e-6)


@pytest.mark.parametrize(
    ("lever", "share"),
    [
        (Levers(optimizer="adamw8"), 0.95),
        (replace(ALL_EXACT, frozen_bits=8, cache_bits=16, optimizer="adamw8"), 0.95),
        (Levers(optimizer="adafactor"), 0.85),
    ],
    ids=str,
)
def test_small_optimizers_learn_most_of_what_adamw_learns(lever: Levers, share: float) -> None:
    """Of AdamW's fall of the loss: AdamW8's second moments are a little too large, Adafactor has no momentum."""
    plain, got = learnt(Levers()), learnt(lever)
    fall, got_fall = (each[0] - np.mean(each[-10:]) for each in (plain, got))
    assert fall > 0.9 * plain[0]
    assert share * fall < got_fall < (2 - share) * fall
    assert got != pytest.approx(plain, rel=1e-3)


def test_the_optimizer_lever_takes_the_place_of_adamw_alone() -> None:
    assert learnt(Levers(optimizer="adafactor")) == learnt(Levers(), "adafactor")
    assert learnt(Levers(optimizer="adamw8")) == learnt(Levers(), "adamw8")
    assert learnt(Levers(optimizer="adafactor"), "sgd") == learnt(Levers(), "sgd")
    plan, asked = next(Caff().plans(LEARNER, TURN, {})), Local(batch_size=8, steps=2)
    for lever, instead in (
        (Levers(optimizer="adafactor"), replace(asked, optimizer="adafactor")),
        (Levers(optimizer="adamw8"), replace(asked, optimizer="adamw8")),
    ):
        price = cost(LEARNER, replace(plan, levers=lever), asked, 12, 2)
        assert price == cost(LEARNER, plan, instead, 12, 2) != cost(LEARNER, plan, asked, 12, 2)
