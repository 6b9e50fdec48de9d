"""Forward mode on every family: tangents against autograd, and their prices against what is measured."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import pytest
import torch
from specs import SPECS, TOKENS
from support import taken
from torch import Tensor

from lamina import measure, model
from lamina.cost import cost
from lamina.duals import Dual, Duals, parts
from lamina.job import Local, Turn
from lamina.layout import Params
from lamina.levers import Levers
from lamina.methods import Method
from lamina.model import Batch, Output
from lamina.ops import TORCH, Ops
from lamina.plan import Plan
from lamina.spec import LINEARS, Act, Groups, Lora, Spec

NETWORKS = {
    **SPECS,
    "vit, adapters": replace(SPECS["vit"], adapter=3, exits=(0,), scale=0.7),
    "dinov2, exits": replace(SPECS["dinov2"], exits=(1,)),
    "qwen3, lora": replace(SPECS["qwen3"], lora=Lora(2, 3.0, LINEARS)),
    "vit without leads": replace(SPECS["vit"], leads=0, positions=9, pool="mean"),
}
GROUPED = {
    f"{name}, groups": replace(SPECS[name], groups=Groups(2, 1, (0, 1)))
    for name in ("gpt2, classes", "bert", "dinov2", "qwen3, classes")
}
EVERY = NETWORKS | GROUPED
every_network = pytest.mark.parametrize("name", EVERY)


def drawn(spec: Spec) -> tuple[Params, Params, Batch, Tensor]:
    """Tensors and a direction in double precision, a batch and its targets."""
    rng, shape = torch.Generator().manual_seed(0), model.layout(spec)
    params, direction = (
        {name: torch.randn(shape.shape(name), generator=rng, dtype=torch.double) for name in shape.params}
        for _ in range(2)
    )
    params = {name: (0.4 * p).requires_grad_() for name, p in params.items()}
    if spec.patch:
        size = (3, spec.channels, spec.image, spec.image)
        given = Batch(torch.randn(size, generator=rng, dtype=torch.double))
    else:
        lengths = torch.tensor([TOKENS, 4, 1]) if spec.ragged else None
        given = Batch(torch.randint(spec.vocab, (3, TOKENS), generator=rng), lengths)
    targets = torch.randint(spec.outputs, (3, 1 if spec.labels else TOKENS), generator=rng)
    return params, direction, given, targets


def loss(spec: Spec, params: Params, given: Batch, targets: Tensor, ops: Ops, chunked: bool) -> Tensor:
    """Of all exits, as a device computes it."""
    x_BSD, outputs = model.embed(spec, params, given.x, ops), []
    hides = given.hides(spec, x_BSD.shape[1], ops)
    for block in range(spec.blocks):
        x_BSD = model.run_blocks(spec, params, model.forked(spec, x_BSD, block, ops), [block], ops, hides)
        if block in (*spec.exits, spec.blocks - 1):
            at = block if block in spec.exits else spec.blocks
            outputs.append(Output(x_BSD, at, params, lengths_B=given.lengths_B))
    return model.loss(spec, outputs, targets, chunked=chunked, ops=ops)


def slope(
    spec: Spec, params: Params, direction: Params, moved: set[str], given: Batch, targets: Tensor, chunked: bool
) -> tuple[float, float]:
    """The loss and its derivative along a direction in some tensors, by dual numbers."""
    mixed = {name: Dual(p.detach(), direction[name]) if name in moved else p.detach() for name, p in params.items()}
    with torch.no_grad():
        value, tangent = parts(loss(spec, cast(Params, mixed), given, targets, Duals(TORCH), chunked))
    assert tangent is not None
    return value.item(), tangent.item()


@every_network
def test_a_tangent_is_the_gradient_times_the_direction(name: str) -> None:
    """To ten digits: in any one tensor of the input, the middle block and the head, in each kind, and in all."""
    spec = EVERY[name]
    params, direction, given, targets = drawn(spec)
    rows = model.layout(spec).params
    for chunked in (False, True):
        plain = loss(spec, params, given, targets, TORCH, chunked)
        found = dict(zip(params, torch.autograd.grad(plain, list(params.values()), allow_unused=True), strict=True))
        each = {name: float((g * direction[name]).sum()) for name, g in found.items() if g is not None}
        assert each.keys() == rows.keys()
        kinds = [{n for n, row in rows.items() if row.part == part} for part in {row.part for row in rows.values()}]
        alone = [{n} for n, row in rows.items() if row.block in (None, 1) and not chunked]
        for moved in [*alone, *kinds, set(rows)]:
            value, got = slope(spec, params, direction, moved, given, targets, chunked)
            assert got == pytest.approx(sum(each[n] for n in moved), rel=1e-9, abs=1e-11), moved
            assert value == pytest.approx(plain.item(), rel=1e-12)
    still = [n for n, change in each.items() if abs(change) < 1e-9]
    assert all(n.endswith("attn.k.bias") for n in still), still  # which softmax does not see


@every_network
def test_what_is_frozen_runs_as_it_is(name: str) -> None:
    spec = EVERY[name]
    params, _, given, targets = drawn(spec)
    with torch.no_grad():
        plain = loss(spec, params, given, targets, TORCH, chunked=False)
        got, tangent = parts(loss(spec, params, given, targets, Duals(TORCH), chunked=False))
    assert tangent is None and torch.equal(got, plain)


def dual(t: Any, *shape: int) -> Any:
    return Dual(t(*shape), t(*shape))


def mixed(t: Any, kinds: str, *shapes: Sequence[int]) -> list[Any]:
    """Of each shape what a letter says: a dual number (d), a plain tensor (p), or nothing (-)."""
    pairs = zip(kinds, shapes, strict=True)
    return [None if kind == "-" else dual(t, *shape) if kind == "d" else t(*shape) for kind, shape in pairs]


def _attention(ops: Ops, t: Any, kinds: str, causal: bool, hidden: bool) -> Tensor:
    hides = ops.hides(torch.tensor([40, 11]), 40) if hidden else None
    q, k, v = mixed(t, kinds, (2, 40, 24), (2, 40, 8), (2, 40, 8))
    return ops.attention(q, k, v, 6, causal, hides)


def _patches(ops: Ops, t: Any, kinds: str, leads: int, registers: int) -> Tensor:
    shapes = [(16, 3, 4, 4), (16,), (9 + leads, 16), (leads, 16), (registers, 16)]
    return ops.patches(t(2, 3, 12, 12), *mixed(t, kinds, *shapes))


def _group_linear(ops: Ops, t: Any, kinds: str, by_rows: bool) -> Tensor:
    x, weight = (48, (9, 16)) if by_rows else (9, (16, 9))
    x, weight, bias = mixed(t, kinds, (2, 7, x), weight, weight[:1])
    return ops.group_linear(x, weight, bias, (2, 4, 3), by_rows)


IDS = torch.arange(24).reshape(2, 12) % 5


def _embed(ops: Ops, t: Any, kinds: str) -> Tensor:
    tokens, positions, types = mixed(t, kinds, (30, 16), (20, 16), (2, 16))
    return ops.embed(IDS, tokens, positions, types, 2)


ACTS: list[Act] = ["gelu_tanh", "gelu", "relu", "silu", "tanh"]
KERNELS: dict[str, Any] = {
    **{f"embed {kinds}": lambda ops, t, k=kinds: _embed(ops, t, k) for kinds in ("ddd", "pd-", "d--", "ppd")},
    "patches": lambda ops, t: _patches(ops, t, "ddddd", 1, 2),
    "patches, few": lambda ops, t: _patches(ops, t, "dpp--", 0, 0),
    "patches, leads alone": lambda ops, t: _patches(ops, t, "pppdp", 2, 1),
    **{
        f"rms norm {kinds}": lambda ops, t, k=kinds: ops.rms_norm(*mixed(t, k, (3, 9, 8), (8,)), 1e-6)
        for kinds in ("dd", "dp", "pd")
    },
    "rms norm of heads": lambda ops, t: ops.rms_norm(*mixed(t, "dd", (3, 9, 4, 8), (8,)), 1e-6),
    **{f"act {kind}": lambda ops, t, k=kind: ops.act(dual(t, 3, 9, 8), k) for kind in ACTS},
    **{
        f"gate {kinds}": lambda ops, t, k=kinds: ops.gate(*mixed(t, k, (3, 9, 8), (3, 9, 8)))
        for kinds in ("dd", "dp", "pd")
    },
    **{
        f"multiply {kinds}": lambda ops, t, k=kinds: ops.multiply(*mixed(t, k, (3, 9, 8), (8,)))
        for kinds in ("dd", "dp", "pd")
    },
    **{
        f"group linear {kinds}, by rows {by_rows}": lambda ops, t, k=kinds, r=by_rows: _group_linear(ops, t, k, r)
        for kinds in ("ddd", "pd-", "dpp", "dp-", "pdd", "ppd")
        for by_rows in (True, False)
    },
    "fork": lambda ops, t: ops.fork(dual(t, 2, 9, 8), 3),
    "spread": lambda ops, t: ops.spread(dual(t, 3, 2, 16), ((1, 0), (4, 2), (2, 2)), 5, 3),
    "rotate": lambda ops, t: ops.rotate(dual(t, 2, 9, 24), 3, 1e4),
    "attention, grouped": lambda ops, t: _attention(ops, t, "ddd", causal=True, hidden=False),
    "attention, both ways": lambda ops, t: _attention(ops, t, "dpp", causal=False, hidden=False),
    "attention, hidden": lambda ops, t: _attention(ops, t, "ppd", causal=False, hidden=True),
    "pool": lambda ops, t: ops.pool(dual(t, 2, 9, 40), "first_mean", 1, None),
}


@pytest.mark.parametrize("kernel", KERNELS.values(), ids=list(KERNELS))
def test_what_a_kernel_takes_meanwhile_is_in_its_price(kernel: Any) -> None:
    """To a few numbers, as for masks of bytes. What goes in is not counted."""
    predicted, measured = taken(kernel)
    assert abs(predicted - measured) <= 160 and measured > 500


@dataclass(frozen=True)
class Along(Method):
    """Forward mode in the last blocks, in what LoRA adds there, or in everything."""

    blocks: int = 0
    part: str = ""

    def plans(self, spec: Spec, turn: Turn, memory: Params) -> Iterator[Plan]:
        """One."""
        layout = model.layout(spec)
        tail = layout.tail(self.blocks or spec.blocks)
        trains = frozenset(name for name in tail if self.part in ("", layout.params[name].part))
        yield Plan(frozenset(layout.params), trains, gradient="forward")


MOVES = {
    "all": (Along(), Levers()),
    "last block": (Along(blocks=1), Levers(chunked_loss=True)),
    "cached": (Along(blocks=1), Levers(prefix_cache="ram", micro_batch=2)),
    "lora, packed": (Along(part="lora"), Levers(frozen_bits=8)),
}


@pytest.mark.parametrize("gradient", ["forward", "zeroth"])
@pytest.mark.parametrize("move", MOVES)
@pytest.mark.parametrize("name", NETWORKS)
def test_the_price_is_what_is_measured(name: str, move: str, gradient: Any) -> None:
    """To half a percent, and at the same moment."""
    method, levers = MOVES[move]
    spec = replace(NETWORKS[name], lora=Lora(2, 4.0, LINEARS)) if "lora" in move else NETWORKS[name]
    plan = replace(next(method.plans(spec, Turn(0, 0, 1), {})), levers=levers, gradient=gradient)
    local = Local(lr=0.1, optimizer="sgd", steps=2, batch_size=3)
    price = cost(spec, plan, local, TOKENS, 2, method)
    found, _ = measure.watch(spec, plan, local, TOKENS, method).peak()
    assert sum(found.values()) == pytest.approx(price.memory_bytes, rel=0.005)
