"""Prices against what the real client step keeps, computes and sends: `python -m pytest tests/test_cost.py`."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np
import pytest
import torch
from support import counting
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.profiler import ProfilerActivity, profile

from lamina import client, model
from lamina.cost import Cost, cost
from lamina.job import Job, Local, Turn
from lamina.layout import Axis, Params
from lamina.measure import watch
from lamina.ops import TORCH, Ops
from lamina.plan import Keep, Plan, narrow
from lamina.shapes import FLOAT_BYTES, INDEX_BYTES
from lamina.spec import LINEARS, Lora, Spec

Kind = Literal["suffix", "lora all", "lora qv"]
KINDS: tuple[Kind, ...] = ("suffix", "lora all", "lora qv")
WIDTHS = {
    "width 16": Spec(blocks=3, embed=16, heads=2, head_dim=8, ffn=64, vocab=11, positions=10),
    "width 24": Spec(blocks=3, embed=24, heads=3, head_dim=8, ffn=40, vocab=31, positions=6),
}
BATCH, TOKENS = 2, 6
LOCAL = Local(lr=0.1, batch_size=BATCH, steps=1)


@dataclass(frozen=True)
class Noise:
    """Random sequences."""

    spec: Spec
    examples: int = 3

    def __len__(self) -> int:
        return self.examples

    def batch(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        ids = np.random.default_rng(0).integers(0, self.spec.vocab, (self.examples, TOKENS + 1))[rows]
        return ids[:, :-1].copy(), ids[:, 1:].copy()

    def at(self, turn: Turn) -> Noise:
        return self


def adapted(spec: Spec, kind: Kind) -> Spec:
    targets = {"suffix": (), "lora all": LINEARS, "lora qv": ("attn.q", "attn.v")}[kind]
    return replace(spec, lora=Lora(2, 4.0, targets)) if targets else spec


def tail_plan(spec: Spec, trained: int) -> Plan:
    """Train the last blocks and the head; of a network with LoRA only A and B of those blocks, and the head."""
    layout = model.layout(spec)
    added = {name for name, row in layout.params.items() if row.part == "lora"}
    tail = layout.tail(trained)
    if spec.lora:
        tail = frozenset(name for name in tail if name in added or name == "head.weight")
    return Plan(frozenset(layout.params) - (added - tail), tail)


def make_job(spec: Spec, plan: Plan, local: Local = LOCAL) -> Job:
    params = model.init(spec, torch.Generator().manual_seed(0))
    return Job(Turn(0, 0, 1, 0), plan, local, narrow(params, model.layout(spec), plan))


def nbytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@contextmanager
def saved_tensors(job: Job) -> Iterator[dict[int, Tensor]]:
    """Storage -> a tensor kept for backward in it; parameters, also those the client made of the job's, left out."""
    given = {tensor.untyped_storage().data_ptr() for tensor in job.arrays.values()}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        root = tensor if tensor._base is None else tensor._base
        storage = tensor.untyped_storage().data_ptr()
        if storage not in given and not (root.is_leaf and root.requires_grad):
            kept[storage] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield kept


def kept_bytes(spec: Spec, plan: Plan) -> int:
    """Bytes kept between forward and backward of one step of the real client."""
    job = make_job(spec, plan)
    with saved_tensors(job) as kept:
        client.train(job.owned(), Noise(spec), spec)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def counted_flops(spec: Spec, plan: Plan) -> int:
    """Operations of one step of the real client, with attention as the plain formula."""
    with counting() as counter:
        client.train(make_job(spec, plan).owned(), Noise(spec), spec)
    return int(counter.get_total_flops())


def price(spec: Spec, plan: Plan, local: Local = LOCAL, steps: int = 1) -> Cost:
    return cost(spec, plan, local, TOKENS, steps)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("depth", [3, 6, 12])
def test_saved_bytes_are_those_torch_keeps(depth: int, kind: Kind, width: str) -> None:
    """The promise is 2 %; it holds to the byte."""
    spec = adapted(replace(WIDTHS[width], blocks=depth), kind)
    for plan in (tail_plan(spec, trained) for trained in range(depth + 1)):
        assert price(spec, plan).saved_bytes == kept_bytes(spec, plan)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("depth", [3, 6])
def test_flops_are_those_torch_counts(depth: int, kind: Kind, width: str) -> None:
    """To the operation, but for one product: attention is counted with all its gradients wherever it has one.

    With LoRA on query and value only, nothing below the keys of the first trained block has a gradient, and torch does
    not compute the one of the keys: 2 B S S D operations of the whole step.
    """
    spec = adapted(replace(WIDTHS[width], blocks=depth), kind)
    for trained in range(depth + 1):
        plan = tail_plan(spec, trained)
        keys = 2 * BATCH * TOKENS * TOKENS * spec.embed if kind == "lora qv" and trained else 0
        assert price(spec, plan).flops == counted_flops(spec, plan) + keys


@pytest.mark.parametrize("axis", ["h.2.ffn", "h.1.heads", "head_dim", "embed", "rank"])
@pytest.mark.parametrize("trained", [1, 3])
def test_cut_networks_are_priced_as_they_run(axis: str, trained: int) -> None:
    spec = adapted(WIDTHS["width 24"], "lora all")
    for network in (spec, replace(spec, lora=None)):
        plan = replace(tail_plan(network, trained), keep={Axis(axis): Keep(1, start=1)})
        assert price(network, plan).saved_bytes == kept_bytes(network, plan)
        assert price(network, plan).flops == counted_flops(network, plan)


@pytest.mark.parametrize("lonely", ["h.1.norm2.bias", "h.1.ffn.up.bias", "h.1.attn.k.weight", "embed.positions"])
def test_single_tensors_are_priced_as_they_run(lonely: str) -> None:
    """Where little trains, the gradient still passes through all that is above."""
    spec = WIDTHS["width 16"]
    plan = Plan(frozenset(model.layout(spec).params), frozenset({lonely}))
    assert price(spec, plan).saved_bytes == kept_bytes(spec, plan)


def test_a_trained_block_keeps_16_d_per_token_and_costs_three_forwards() -> None:
    """By hand, with ffn = 4 d: 16 d, two norms of mean and deviation, and a normaliser per head.

    Forward per block and token: 24 d^2 + 4 S d.
    """
    spec = replace(WIDTHS["width 16"], blocks=12)
    d, h, s, tokens = spec.embed, spec.heads, TOKENS, BATCH * TOKENS
    two, three, all_but = (price(spec, tail_plan(spec, trained)) for trained in (2, 3, 11))
    assert three.saved_bytes - two.saved_bytes == 4 * tokens * (16 * d + 4 + h)
    assert three.flops - two.flops == tokens * 2 * (24 * d**2 + 4 * s * d)
    assert all_but.flops == tokens * ((12 + 2 * 11) * (24 * d**2 + 4 * s * d) + 6 * d * spec.vocab)


def test_frozen_blocks_cost_their_weights_and_nothing_else() -> None:
    spec = WIDTHS["width 16"]
    shallow, deep = (price(replace(spec, blocks=depth), tail_plan(replace(spec, blocks=depth), 2)) for depth in (3, 12))
    assert shallow.saved_bytes == deep.saved_bytes
    assert replace(shallow.memory, weights=0) == replace(deep.memory, weights=0)
    assert shallow.memory.weights < deep.memory.weights


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("trained", [0, 1, 3, 4])
def test_the_client_keeps_nothing_of_frozen_blocks(kind: Kind, trained: int, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = adapted(replace(WIDTHS["width 16"], blocks=4), kind)
    job = make_job(spec, tail_plan(spec, trained))
    run_blocks, kept_in = model.run_blocks, dict.fromkeys(range(4), 0)

    def watched(
        spec: Spec, params: Params, x_BSD: Tensor, blocks: Iterable[int], ops: Ops = TORCH, hides: Tensor | None = None
    ) -> Tensor:
        for i in blocks:
            before = len(kept)
            x_BSD = run_blocks(spec, params, x_BSD, [i], ops, hides)
            kept_in[i] += len(kept) - before
        return x_BSD

    monkeypatch.setattr(model, "run_blocks", watched)
    with saved_tensors(job) as kept:
        client.train(job.owned(), Noise(spec), spec)
    assert [i for i, count in kept_in.items() if count] == list(range(4 - trained, 4))


@pytest.mark.parametrize(
    ("local", "per_element", "per_tensor"),
    [
        (Local(lr=0.1, optimizer="sgd", steps=1), 0, 0),
        (Local(lr=0.1, optimizer="sgd", momentum=0.9, steps=1), 1, 0),
        (Local(lr=0.1, optimizer="adamw", steps=1), 2, 1),
    ],
    ids=["sgd", "momentum", "adamw"],
)
@pytest.mark.parametrize("kind", KINDS)
def test_the_client_makes_gradients_and_states_of_trained_tensors_alone(
    local: Local, per_element: int, per_tensor: int, kind: Kind
) -> None:
    spec = adapted(WIDTHS["width 24"], kind)
    for trained in range(4):
        plan = tail_plan(spec, trained)
        job = make_job(spec, plan, local)
        before = {name: tensor.clone() for name, tensor in job.arrays.items()}
        seen: list[tuple[int, int]] = []

        def hook(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any, seen: list[tuple[int, int]] = seen) -> None:
            tensors = [p for group in optimizer.param_groups for p in group["params"]]
            states = [s for p in tensors for s in optimizer.state[p].values() if isinstance(s, Tensor)]
            seen.append((nbytes(p.grad for p in tensors), nbytes(states)))

        handle = register_optimizer_step_post_hook(hook)
        client.train(job.owned(), Noise(spec), spec)
        handle.remove()
        spent = price(spec, plan, local, steps=2)
        states_bytes = per_element * spent.up_bytes + per_tensor * FLOAT_BYTES * len(plan.trains)
        assert seen == [(spent.up_bytes, states_bytes)]
        assert spent.memory.optimizer == states_bytes
        for name, tensor in job.arrays.items():
            assert tensor.grad is None and not tensor.requires_grad
            assert torch.equal(tensor, before[name])


@pytest.mark.parametrize("kind", KINDS)
def test_bytes_are_those_of_the_arrays(kind: Kind) -> None:
    spec = adapted(WIDTHS["width 16"], kind)
    for trained in range(4):
        plan = replace(tail_plan(spec, trained), keep={Axis("h.2.ffn"): Keep(5, start=60)})
        job = make_job(spec, plan)
        update = client.train(job.owned(), Noise(spec), spec)
        spent = price(spec, plan)
        assert spent.up_bytes == len(b"".join(array.numpy().tobytes() for array in update.arrays.values()))
        assert spent.down_bytes == len(b"".join(array.numpy().tobytes() for array in job.arrays.values()))
        assert spent.memory.weights == spent.down_bytes


def test_memory_is_the_sum_of_its_categories() -> None:
    spec = WIDTHS["width 16"]
    spent = price(spec, tail_plan(spec, 2))
    parts = asdict(spent.memory)
    assert list(parts) == ["weights", "gradients", "optimizer", "activations", "temporary"]
    assert min(parts.values()) >= 0
    assert spent.memory_bytes == spent.memory.total == sum(parts.values())
    assert spent.to_json() == {
        "memory_bytes": spent.memory_bytes,
        "up_bytes": spent.up_bytes,
        "down_bytes": spent.down_bytes,
        "flops": spent.flops,
        "memory": {f"{category}_bytes": value for category, value in parts.items()},
        "peak_bytes": spent.memory_bytes,
        "peak_moment": spent.moment,
    }


def test_after_the_second_step_only_operations_grow_with_the_steps() -> None:
    spec = WIDTHS["width 16"]
    plan = tail_plan(spec, 2)
    once, twice, often = (price(spec, plan, steps=steps) for steps in (1, 2, 7))
    assert once.memory_bytes < twice.memory_bytes  # the optimizer's state is born at the end of the first
    assert once.saved_bytes == twice.saved_bytes
    assert often == replace(twice, flops=7 * once.flops)


def test_activations_and_operations_grow_with_the_batch() -> None:
    spec = WIDTHS["width 16"]
    plan = tail_plan(spec, 2)
    narrow, wide = (price(spec, plan, replace(LOCAL, batch_size=size * BATCH)) for size in (1, 5))
    assert wide.flops == 5 * narrow.flops
    # The divisor of the mean is the one number that does not grow.
    assert wide.saved_bytes - FLOAT_BYTES == 5 * (narrow.saved_bytes - FLOAT_BYTES)
    assert wide.memory.weights == narrow.memory.weights


def allocated_peak(job: Job, spec: Spec) -> int:
    """Most bytes that torch's allocator has given out at any time, on top of the arrays of the job."""
    client.train(job.owned(), Noise(spec), spec)  # what torch allocates once and for all
    owned = job.owned()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        client.train(owned, Noise(spec), spec)
    assert profiler.profiler is not None
    allocations = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    allocations.sort(key=lambda event: event.start_ns())
    return max(itertools.accumulate(int(event.nbytes()) for event in allocations))


SHAPES = [  # batch, tokens, vocabulary
    (1, 6, 11),
    (16, 10, 31),
    (4, 10, 500),
    (64, 3, 11),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_peak_is_the_one_that_is_measured(
    kind: Kind, optimizer: Literal["sgd", "adamw"], shape: tuple[int, int, int]
) -> None:
    """To a few scalars that Python drops a moment later than the prediction has it; the promise is 2 %."""
    batch, tokens, vocab = shape
    spec = adapted(replace(WIDTHS["width 24"], vocab=vocab, positions=10), kind)
    local = replace(LOCAL, batch_size=batch, optimizer=optimizer, steps=2)
    for trained in range(4):
        plan = tail_plan(spec, trained)
        predicted = cost(spec, plan, local, tokens, 2).memory
        measured = watch(spec, plan, local, tokens).peak()[0]
        for category, size in asdict(predicted).items():
            assert abs(size - measured.get(category, 0)) <= 3 * FLOAT_BYTES, (category, trained)


@pytest.mark.parametrize("batch", [BATCH, 8 * BATCH])
@pytest.mark.parametrize("trained", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_the_allocator_says_the_same(kind: Kind, trained: int, batch: int) -> None:
    """Without the batch, which is numpy's; what kernels take inside while they run comes on top."""
    spec = adapted(WIDTHS["width 24"], kind)
    plan, local = tail_plan(spec, trained), replace(LOCAL, batch_size=batch, steps=2)
    memory = price(spec, plan, local, steps=2).memory
    given = memory.weights + 2 * INDEX_BYTES * batch * TOKENS
    peak = allocated_peak(make_job(spec, plan, local), spec)
    assert 0.98 * (memory.total - given) <= peak <= 1.1 * (memory.total - given)
