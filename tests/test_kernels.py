"""Kernels of the families against plain formulas in double precision, and what each alone takes against its price."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support import counting
from torch import Tensor

from lamina import ops as operations
from lamina.kernels import Mix
from lamina.ledger import Ledger
from lamina.ops import HOST, TORCH, Ops
from lamina.packed import Packed, pack
from lamina.timeline import Timeline
from lamina.watch import Watch

BATCH, TOKENS, WIDTH = 3, 12, 16
IDS = np.random.default_rng(0).integers(0, 7, (BATCH, TOKENS))
IMAGES = np.random.default_rng(0).standard_normal((BATCH, 2, 6, 6), dtype=np.float32)
LENGTHS = np.array([12, 7, 8])
INSIDE = torch.arange(TOKENS) < torch.from_numpy(LENGTHS)[:, None]
THETA = 50.0
NUMPY = {torch.float32: np.float32, torch.float64: np.float64}

Call = Callable[..., Tensor]


@dataclass(frozen=True)
class Kernel:
    """A kernel as a function of tensors, and the plain formula.

    Attributes:
        call: Of kernels and tensors.
        formula: Of the tensors alone.
        shapes: Of the tensors.
        weights: Which of them, from this one on, are weights.
    """

    call: Call
    formula: Call
    shapes: Sequence[tuple[int, ...]]
    weights: int


def rms_formula(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-3).sqrt() * weight


def rotate_formula(x_BSE: Tensor, heads: int) -> Tensor:
    """As a product of complex numbers."""
    halves = x_BSE.view(BATCH, TOKENS, heads, 2, -1)
    turning = torch.complex(halves[..., 0, :], halves[..., 1, :])
    half = turning.shape[-1]
    angles = torch.arange(TOKENS).double()[:, None] * THETA ** (-torch.arange(half).double() / half)
    turned = turning * torch.polar(torch.ones_like(angles), angles)[:, None]
    return torch.stack([turned.real, turned.imag], -2).flatten(2)


def attention_formula(
    q_BSE: Tensor, k_BSE: Tensor, v_BSE: Tensor, heads: int, causal: bool, inside: Tensor | None
) -> Tensor:
    """Head by head and text by text."""
    dim = q_BSE.shape[-1] // heads
    served = heads * dim // k_BSE.shape[-1]
    texts = []
    for text, (q, k, v) in enumerate(zip(q_BSE, k_BSE, v_BSE, strict=True)):
        found = []
        for head in range(heads):
            mine, its = (slice(i * dim, (i + 1) * dim) for i in (head, head // served))
            scores = q[:, mine] @ k[:, its].T / math.sqrt(dim)
            seen = torch.ones(TOKENS, TOKENS).tril() if causal else torch.ones(TOKENS, TOKENS)
            seen = seen if inside is None else seen * inside[text]
            found.append(scores.masked_fill(seen == 0, -torch.inf).softmax(-1) @ v[:, its])
        texts.append(torch.cat(found, -1))
    return torch.stack(texts)


def attention(heads: int, key_heads: int, causal: bool = True, ragged: bool = False) -> Kernel:
    def call(ops: Ops, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        hides = ops.hides(ops.tensor(LENGTHS), TOKENS) if ragged else None
        return ops.attention(q, k, v, heads, causal, hides)

    def formula(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention_formula(q, k, v, heads, causal, INSIDE if ragged else None)

    q, kv = (BATCH, TOKENS, 4 * heads), (BATCH, TOKENS, 4 * key_heads)
    return Kernel(call, formula, [q, kv, kv], 3)


def pool(kind: Any, start: int, ragged: bool) -> Kernel:
    ends = LENGTHS if ragged else np.full(BATCH, TOKENS)

    def formula(x_BSD: Tensor) -> Tensor:
        found = []
        for x_SD, end in zip(x_BSD, ends.tolist(), strict=True):
            mean = x_SD[start:end].mean(0)
            parts = {"first": [x_SD[0]], "last": [x_SD[end - 1]], "mean": [mean], "first_mean": [x_SD[0], mean]}[kind]
            found.append(torch.cat(parts))
        return torch.stack(found)[:, None]

    def call(ops: Ops, x: Tensor) -> Tensor:
        return ops.pool(x, kind, start, ops.tensor(LENGTHS) if ragged else None)

    return Kernel(call, formula, [(BATCH, TOKENS, WIDTH)], 1)


def embed(types: bool, first: int, positions: bool = True) -> Kernel:
    """Seven tokens, two types, and positions for two tokens more than there are."""
    shapes = [(7, WIDTH), *[(TOKENS + 2, WIDTH)] * positions, *[(2, WIDTH)] * types]

    def pick(tables: Sequence[Any]) -> tuple[Any, Any, Any]:
        rest = list(tables[1:])
        return tables[0], rest.pop(0) if positions else None, rest.pop(0) if types else None

    def formula(*tables: Tensor) -> Tensor:
        tokens, places, kinds = pick(tables)
        found: Tensor = tokens[torch.from_numpy(IDS)]
        found = found + places[first : first + TOKENS] if positions else found
        return found + kinds[0] if types else found

    return Kernel(lambda ops, *tables: ops.embed(ops.tensor(IDS), *pick(tables), first), formula, shapes, 0)


def patches(leads: int, registers: int) -> Kernel:
    """Six pixels a side, in patches of two."""
    shapes = [(WIDTH, 2, 2, 2), (WIDTH,), (9 + leads, WIDTH), *[(leads, WIDTH)] * bool(leads)]
    shapes += [(registers, WIDTH)] * bool(registers)

    def pick(rest: Sequence[Any]) -> tuple[Any, Any]:
        return rest[0] if leads else None, rest[-1] if registers else None

    def call(ops: Ops, weight: Tensor, bias: Tensor, positions: Tensor, *rest: Tensor) -> Tensor:
        images = ops.tensor(IMAGES.astype(NUMPY[torch.get_default_dtype()]))
        return ops.patches(images, weight, bias, positions, *pick(rest))

    def formula(weight: Tensor, bias: Tensor, positions: Tensor, *rest: Tensor) -> Tensor:
        images = torch.from_numpy(IMAGES).to(weight)
        found = F.conv2d(images, weight, bias, stride=2).flatten(2).transpose(1, 2) + positions[leads:]
        before, after = pick(rest)
        parts = [before + positions[:leads]] if leads else []
        parts += [after] if registers else []
        return torch.cat([*(part.expand(BATCH, -1, -1) for part in parts), found], 1)

    return Kernel(call, formula, shapes, 0)


def group_linear(by_rows: bool, biased: bool) -> Kernel:
    """Three streams with two, four and three units."""
    units = (2, 4, 3)

    def formula(x: Tensor, weight: Tensor, *rest: Tensor) -> Tensor:
        y: Tensor = x @ torch.block_diag(*weight.split(units, 0 if by_rows else 1)).T  # type: ignore[no-untyped-call]
        return y + rest[0].repeat(1 if by_rows else 3) if biased else y

    def call(ops: Ops, x: Tensor, weight: Tensor, *rest: Tensor) -> Tensor:
        return ops.group_linear(x, weight, rest[0] if biased else None, units, by_rows)

    x, weight = (3 * WIDTH, (9, WIDTH)) if by_rows else (9, (WIDTH, 9))
    return Kernel(call, formula, [(BATCH, TOKENS, x), weight, *[weight[:1]] * biased], 1)


def lora_linear(biased: bool, rank: int = 2) -> Kernel:
    """From 12 units to 5, and to 9 where no bias is added."""
    outputs = 5 if biased else 9

    def formula(x: Tensor, weight: Tensor, a: Tensor, b: Tensor, *rest: Tensor) -> Tensor:
        y: Tensor = x @ (weight + 1.5 * b @ a).T
        return y + rest[0] if biased else y

    def call(ops: Ops, x: Tensor, weight: Tensor, a: Tensor, b: Tensor, *rest: Tensor) -> Tensor:
        return ops.lora_linear(x, weight, rest[0] if biased else None, a, b, 1.5)

    x, weight = (BATCH, TOKENS, WIDTH), (outputs, WIDTH)
    return Kernel(call, formula, [x, weight, (rank, WIDTH), (outputs, rank), *[(outputs,)] * biased], 1)


def spread_formula(p: Tensor) -> Tensor:
    out = torch.zeros(5, 2, 3, WIDTH, dtype=p.dtype)
    out[1, :, 0], out[4, :, 2], out[2, :, 2] = p
    return out.flatten(1)


KERNELS = {
    "rms_norm": Kernel(lambda ops, x, w: ops.rms_norm(x, w, 1e-3), rms_formula, [(BATCH, TOKENS, WIDTH), (WIDTH,)], 1),
    "rms_norm of heads": Kernel(
        lambda ops, x, w: ops.rms_norm(x, w, 1e-3), rms_formula, [(BATCH, TOKENS, 3, WIDTH), (WIDTH,)], 1
    ),
    "gate": Kernel(
        lambda ops, x, y: ops.gate(x, y), lambda x, y: x * torch.sigmoid(x) * y, [(BATCH, TOKENS, WIDTH)] * 2, 2
    ),
    "multiply": Kernel(lambda ops, x, v: ops.multiply(x, v), lambda x, v: x * v, [(BATCH, TOKENS, WIDTH), (WIDTH,)], 1),
    "rotate": Kernel(
        lambda ops, x: ops.rotate(x, 3, THETA), lambda x: rotate_formula(x, 3), [(BATCH, TOKENS, 3 * WIDTH)], 1
    ),
    "gelu_tanh": Kernel(
        lambda ops, x: ops.act(x, "gelu_tanh"),
        lambda x: 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
        [(BATCH, TOKENS, WIDTH)],
        1,
    ),
    "gelu": Kernel(
        lambda ops, x: ops.act(x, "gelu"),
        lambda x: 0.5 * x * (1 + torch.erf(x / math.sqrt(2))),
        [(BATCH, TOKENS, WIDTH)],
        1,
    ),
    "relu": Kernel(lambda ops, x: ops.act(x, "relu"), lambda x: x * (x > 0), [(BATCH, TOKENS, WIDTH)], 1),
    "silu": Kernel(lambda ops, x: ops.act(x, "silu"), lambda x: x / (1 + (-x).exp()), [(BATCH, TOKENS, WIDTH)], 1),
    "tanh": Kernel(
        lambda ops, x: ops.act(x, "tanh"), lambda x: 1 - 2 / ((2 * x).exp() + 1), [(BATCH, TOKENS, WIDTH)], 1
    ),
    "attention": attention(4, 4),
    "attention, all seen": attention(4, 4, causal=False),
    "attention, fewer keys": attention(6, 2),
    "attention, fewer keys, all seen": attention(6, 3, causal=False),
    "attention, ragged": attention(4, 4, causal=False, ragged=True),
    "attention, one key, ragged": attention(4, 1, causal=False, ragged=True),
    "embed": embed(types=False, first=0),
    "embed, rotary": embed(types=False, first=0, positions=False),
    "embed, types": embed(types=True, first=0),
    "embed, second position": embed(types=True, first=2),
    "group_linear": group_linear(by_rows=True, biased=True),
    "group_linear without bias": group_linear(by_rows=True, biased=False),
    "group_linear that ends": group_linear(by_rows=False, biased=True),
    "group_linear that ends, without bias": group_linear(by_rows=False, biased=False),
    "lora_linear": lora_linear(biased=True),
    "lora_linear without bias": lora_linear(biased=False),
    "fork": Kernel(lambda ops, x: ops.fork(x, 3), lambda x: x.repeat(1, 1, 3), [(BATCH, TOKENS, WIDTH)], 1),
    "spread": Kernel(lambda ops, p: ops.spread(p, ((1, 0), (4, 2), (2, 2)), 5, 3), spread_formula, [(3, 2, WIDTH)], 0),
    "patches": patches(0, 0),
    "patches, lead": patches(1, 0),
    "patches, leads and registers": patches(2, 3),
    "patches, registers": patches(0, 3),
} | {
    f"pool {kind}{', ragged' * ragged}": pool(kind, start, ragged)
    for kind, start in (("first", 0), ("last", 0), ("mean", 0), ("mean", 2), ("first_mean", 3))
    for ragged in (False, True)
}
every_kernel = pytest.mark.parametrize("name", KERNELS)


def drawn(kernel: Kernel, dtype: torch.dtype) -> list[Tensor]:
    rng = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=rng, dtype=dtype) for shape in kernel.shapes]


def subsets(count: int) -> Iterator[tuple[bool, ...]]:
    """Who needs a gradient."""
    return itertools.product((False, True), repeat=count)


@pytest.fixture
def double() -> Iterator[None]:
    """Numbers are of double precision unless something else is said."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@every_kernel
@pytest.mark.usefixtures("double")
def test_a_kernel_is_its_formula(name: str) -> None:
    """Value, and gradients of whoever needs one, and of nobody else; angles are of single precision."""
    kernel = KERNELS[name]
    tensors = drawn(kernel, torch.float64)
    for needs in subsets(len(tensors)):
        given = [p.clone().requires_grad_(need) for p, need in zip(tensors, needs, strict=True)]
        out, expected = kernel.call(TORCH, *given), kernel.formula(*given)
        torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-6)
        assert out.requires_grad == any(needs)
        if any(needs):
            upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
            asked = [p for p in given if p.requires_grad]
            wanted = torch.autograd.grad(expected, asked, upstream)
            out.backward(upstream)  # type: ignore[no-untyped-call]
            for p, gradient in zip(asked, wanted, strict=True):
                torch.testing.assert_close(p.grad, gradient, rtol=1e-6, atol=1e-6)
                assert gradient.abs().max() > 1e-3
        assert all(p.grad is None for p in given if not p.requires_grad)


def peaks(timeline: Timeline) -> dict[str, int]:
    """Most bytes alive, by moment."""
    found: dict[str, int] = {}
    alive = itertools.accumulate(delta for delta, _, _ in timeline.events)
    for size, (_, _, moment) in zip(alive, timeline.events, strict=True):
        found[moment] = max(size, found.get(moment, 0))
    return found


def measured(kernel: Kernel, needs: Sequence[bool]) -> tuple[dict[str, int], int]:
    """Peaks of a kernel alone, forward and backward, and what it keeps."""
    given, kept = drawn(kernel, torch.float32), {}

    def note(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
        return tensor

    with Watch() as watched:
        for place, p in enumerate(given):
            watched.see(p.requires_grad_(needs[place]), "weights" if place >= kernel.weights else "temporary")
        watched.timeline.moment = "forward"
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            out = kernel.call(TORCH, *given)
        if any(needs):
            gradient = torch.ones(out.shape)
            watched.timeline.moment = "backward"
            out.backward(gradient)  # type: ignore[no-untyped-call]
    held = {p.untyped_storage()._cdata for p in given[kernel.weights :]}
    return peaks(watched.timeline), sum(size for key, size in kept.items() if key not in held)


def predicted(kernel: Kernel, needs: Sequence[bool]) -> tuple[dict[str, int], Ledger]:
    """The same from shapes."""
    ledger = Ledger(1)
    given = [
        ledger.blank(shape, category="weights" if place >= kernel.weights else "temporary").requires_grad_(needs[place])
        for place, shape in enumerate(kernel.shapes)
    ]
    ledger.moment("forward")
    out = kernel.call(ledger, *given)
    if any(needs):
        gradient = ledger.blank(out.shape)
        ledger.moment("backward")
        out.backward(gradient)  # type: ignore[no-untyped-call]
    return peaks(ledger.timeline), ledger


@every_kernel
def test_a_kernel_alone_takes_what_it_is_said_to(name: str) -> None:
    """The peak of its forward and of its backward pass, what it keeps, and its products, whoever needs a gradient."""
    kernel = KERNELS[name]
    for needs in subsets(len(kernel.shapes)):
        found, kept = measured(kernel, needs)
        expected, ledger = predicted(kernel, needs)
        assert set(found) == set(expected)
        assert ledger.saved_bytes == kept
        for moment, size in found.items():  # but for which rows are before the end of a text, a byte for each
            assert -16 * name.startswith("pool") <= expected[moment] - size <= 0, (needs, moment)


@every_kernel
def test_products_of_a_kernel_are_those_torch_counts(name: str) -> None:
    """To the operation, attention as the plain formula."""
    kernel = KERNELS[name]
    for needs in ((False,) * len(kernel.shapes), (True,) * len(kernel.shapes)):
        given = [p.requires_grad_(need) for p, need in zip(drawn(kernel, torch.float32), needs, strict=True)]
        with counting() as counter:
            out = kernel.call(TORCH, *given)
            if any(needs):
                out.sum().backward()  # type: ignore[no-untyped-call]
        assert sum(predicted(kernel, needs)[1].flops.values()) == counter.get_total_flops()


@pytest.mark.parametrize("name", ["rms_norm", "gate", "rotate", "lora_linear", "patches, leads and registers"])
@pytest.mark.usefixtures("double")
def test_backward_passes_of_our_own_are_those_of_differences(name: str) -> None:
    kernel = KERNELS[name]
    given = [p.requires_grad_() for p in drawn(kernel, torch.float64)]
    assert torch.autograd.gradcheck(lambda *tensors: kernel.call(TORCH, *tensors), given)


@pytest.mark.parametrize("name", ["rms_norm", "gate", "patches, lead", "multiply", "rotate", "lora_linear"])
def test_gradients_add_up_and_leave_what_came_in_as_it_was(name: str) -> None:
    """A kernel may write into memory of its own alone: not its inputs', not the gradient's, nor what it gave before."""
    kernel = KERNELS[name]
    given = [p.requires_grad_() for p in drawn(kernel, torch.float32)]
    out = kernel.call(TORCH, *given)
    upstream = torch.randn(out.shape)
    kept = [each.detach().clone() for each in (*given, upstream, out)]
    for _ in range(2):
        out.backward(upstream, retain_graph=True)  # type: ignore[no-untyped-call]
    assert all(map(torch.equal, kept, (*given, upstream, out)))
    once = torch.autograd.grad(out, given, upstream)
    for p, gradient in zip(given, once, strict=True):
        torch.testing.assert_close(p.grad, 2 * gradient)


def test_what_hides_is_the_end_of_each_text() -> None:
    hides = TORCH.hides(torch.from_numpy(LENGTHS), TOKENS)
    assert hides.shape == (BATCH, 1, 1, TOKENS)
    assert torch.equal(hides[:, 0, 0] == 0, INSIDE) and torch.equal(hides[:, 0, 0] == -torch.inf, ~INSIDE)


def test_rows_that_are_hidden_get_no_gradient_and_give_none() -> None:
    """Whatever stands there."""
    q, k, v = (p.requires_grad_() for p in drawn(KERNELS["attention, ragged"], torch.float32))
    hides = TORCH.hides(torch.from_numpy(LENGTHS), TOKENS)
    out = TORCH.attention(q, k, v, 4, False, hides)
    other_k, other_v = (torch.where(INSIDE[..., None], p, 1e3) for p in (k, v))
    torch.testing.assert_close(TORCH.attention(q, other_k, other_v, 4, False, hides), out)
    out.square().sum().backward()  # type: ignore[no-untyped-call]
    for p in (k, v):
        assert p.grad is not None and p.grad.isfinite().all()
        assert not p.grad[~INSIDE].any() and p.grad[INSIDE].all()


@pytest.mark.parametrize("labels", [None, torch.arange(7) < 5], ids=["all", "own"])
@pytest.mark.parametrize("mask", range(8))
@pytest.mark.usefixtures("double")
def test_the_loss_of_a_head_with_a_bias_is_the_formula(mask: int, labels: Tensor | None) -> None:
    rng = torch.Generator().manual_seed(mask)
    given = [torch.randn(shape, generator=rng) for shape in ((BATCH, 4, 6), (7, 6), (7,))]
    x, weight, bias = (p.requires_grad_(bool(mask >> i & 1)) for i, p in enumerate(given))
    targets = torch.randint(5, (BATCH, 4), generator=rng)
    logits = F.linear(x, weight, bias)
    logits = logits if labels is None else logits.masked_fill(~labels, 0)
    expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    for chunked in (False, True):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(operations, "_CHUNK_ELEMENTS", 1)
            patch.setattr(operations, "_CHUNK_TOKENS", 5)
            got = TORCH.head_loss([x], [weight], [bias], targets, Mix.plain(1), labels, chunked)
        assert got.item() == pytest.approx(expected.item(), rel=1e-12)
        asked = [p for p in given if p.requires_grad]
        assert got.requires_grad == bool(asked)
        if asked:
            wanted = torch.autograd.grad(expected, asked, retain_graph=True)
            for gradient, other in zip(torch.autograd.grad(got, asked), wanted, strict=True):
                torch.testing.assert_close(gradient, other, rtol=1e-10, atol=1e-13)


def packed(p: Tensor, bits: int) -> Packed:
    return pack(p.shape, bits, lambda rows: p[rows.start : rows.stop].clone(), HOST)


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("name", ["embed, second position", "embed, rotary", "patches", "patches, leads and registers"])
def test_packed_tables_are_those_they_unpack_to(name: str, bits: int) -> None:
    kernel = KERNELS[name]
    tensors = drawn(kernel, torch.float32)
    small: list[Any] = [p if p.dim() == 1 else packed(p, bits) for p in tensors]
    whole = [each.unpack() if isinstance(each, Packed) else each for each in small]
    assert torch.equal(kernel.call(TORCH, *small), kernel.call(TORCH, *whole))
