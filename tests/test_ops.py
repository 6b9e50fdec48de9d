"""The loss kernel of several outputs against the plain formula in double precision: value and every gradient."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lamina import ops, packed
from lamina.kernels import Mix
from lamina.ops import HOST, TORCH
from lamina.packed import Packed

BATCH, TOKENS, WIDTH, VOCAB = 3, 5, 4, 11
MIXES = {
    "alone": Mix((1.0,), ((0.0,),)),
    "weighted": Mix((0.3,), ((0.0,),)),
    "plain of three": Mix.plain(3),
    "mutual": Mix((1.0, 1.0, 1.0), ((0.0, 0.4, 0.4), (0.4, 0.0, 0.4), (0.4, 0.4, 0.0))),
    "taught": Mix((0.0, 0.0), ((0.0, 1.0), (0.0, 0.0))),
    "uneven": Mix((0.5, 0.0, 1.5), ((0.0, 0.7, 0.0), (0.2, 0.0, 1.1), (0.0, 0.0, 0.0))),
}
every_mix = pytest.mark.parametrize("mix", MIXES.values(), ids=list(MIXES))


def by_formula(
    xs: Sequence[Tensor], heads: Sequence[Tensor], targets: Tensor, mix: Mix, labels: Tensor | None = None
) -> Tensor:
    """Mean over tokens of sum_i [hard_i CE(y, p_i) + sum_j soft_ij sum_v p_jv (log p_jv - log p_iv)], p_j constant."""
    logits = [F.linear(x, head).flatten(0, 1) for x, head in zip(xs, heads, strict=True)]
    if labels is not None:
        logits = [each * labels for each in logits]
    logs = [F.log_softmax(each, -1) for each in logits]
    total = torch.zeros((), dtype=xs[0].dtype)
    for i, (hard, soft) in enumerate(zip(mix.hard, mix.soft, strict=True)):
        total = total + hard * F.nll_loss(logs[i], targets.flatten())
        for j, weight in enumerate(soft):
            teacher = logs[j].detach()
            total = total + weight * (teacher.exp() * (teacher - logs[i])).sum(-1).mean()
    return total


def drawn(count: int, dtype: torch.dtype = torch.float64, scale: float = 1.0) -> tuple[list[Tensor], list[Tensor]]:
    """Inputs and heads of so many outputs, with gradients to come."""
    rng = torch.Generator().manual_seed(count)
    shapes = [(BATCH, TOKENS, WIDTH)] * count + [(VOCAB, WIDTH)] * count
    tensors = [(scale * torch.randn(shape, generator=rng)).to(dtype).requires_grad_() for shape in shapes]
    return tensors[:count], tensors[count:]


TARGETS = torch.randint(VOCAB - 4, (BATCH, TOKENS), generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(VOCAB) < VOCAB - 3


@every_mix
@pytest.mark.parametrize("labels", [None, LABELS], ids=["all tokens", "own tokens"])
@pytest.mark.parametrize("chunk", [0, 1, 4, 100])
def test_the_loss_of_several_outputs_is_the_formula(
    mix: Mix, labels: Tensor | None, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ops, "_CHUNK_ELEMENTS", 1)
    monkeypatch.setattr(ops, "_CHUNK_TOKENS", chunk)
    xs, heads = drawn(len(mix.hard))
    expected = by_formula(xs, heads, TARGETS, mix, labels)
    wanted = torch.autograd.grad(2.5 * expected, [*xs, *heads], allow_unused=True, materialize_grads=True)
    got = TORCH.head_loss(xs, heads, [None] * len(xs), TARGETS, mix, labels, chunked=chunk > 0)
    (2.5 * got).backward()  # type: ignore[no-untyped-call]
    assert got.item() == pytest.approx(expected.item(), rel=1e-12)
    for each, gradient in zip([*xs, *heads], wanted, strict=True):
        assert each.grad is not None
        torch.testing.assert_close(each.grad, gradient, rtol=1e-10, atol=1e-13)
    assert any(gradient.abs().max() > 1e-3 for gradient in wanted)
    if labels is not None:
        assert all((head.grad is not None) and (head.grad[~labels] == 0).all() for head in heads)


@pytest.mark.parametrize("mask", range(2**4))
def test_only_what_needs_a_gradient_gets_one(mask: int) -> None:
    xs, heads = drawn(2)
    for place, each in enumerate([*xs, *heads]):
        each.requires_grad_(bool(mask >> place & 1))
    expected = by_formula(xs, heads, TARGETS, Mix((1.0, 0.5), ((0.0, 2.0), (0.5, 0.0))))
    got = TORCH.head_loss(
        xs, heads, [None] * len(xs), TARGETS, Mix((1.0, 0.5), ((0.0, 2.0), (0.5, 0.0))), None, chunked=False
    )
    assert got.item() == pytest.approx(expected.item(), rel=1e-12)
    assert got.requires_grad == bool(mask)
    asked = [each for each in [*xs, *heads] if each.requires_grad]
    if asked:
        got.backward()  # type: ignore[no-untyped-call]
        for each, gradient in zip(asked, torch.autograd.grad(expected, asked), strict=True):
            torch.testing.assert_close(each.grad, gradient, rtol=1e-10, atol=1e-13)
    assert all(each.grad is None for each in [*xs, *heads] if not each.requires_grad)


@every_mix
@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("slab", [1, 4, 1024])
def test_packed_heads_are_those_they_unpack_to(mix: Mix, bits: int, slab: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed, "SLAB_ROWS", slab)
    xs, heads = drawn(len(mix.hard), torch.float32)
    small: list[Packed] = []
    for head in heads:
        whole = head.detach()
        small.append(packed.pack(whole.shape, bits, lambda rows, whole=whole: whole[rows.start : rows.stop], HOST))  # type: ignore[misc]
    got = TORCH.head_loss(xs, small, [None] * len(xs), TARGETS, mix, LABELS, chunked=True)  # type: ignore[arg-type]
    got.backward()  # type: ignore[no-untyped-call]
    unpacked = [each.unpack().double() for each in small]
    doubles = [x.detach().double().requires_grad_() for x in xs]
    expected = by_formula(doubles, unpacked, TARGETS, mix, LABELS)
    wanted = torch.autograd.grad(expected, doubles, materialize_grads=True, allow_unused=True)
    assert got.item() == pytest.approx(expected.item(), rel=1e-5)
    for x, gradient in zip(xs, wanted, strict=True):
        assert x.grad is not None
        torch.testing.assert_close(x.grad.double(), gradient, rtol=1e-4, atol=1e-7)


def test_outputs_that_are_sure_of_themselves_give_finite_losses_and_the_right_gradients() -> None:
    """Probabilities of 0 in single precision count as the least that there is, about e^-87."""
    x = torch.tensor([[[100.0], [-100.0], [0.0]]])
    xs = [x.clone().requires_grad_(), -x.clone()]
    heads = [torch.tensor([[1.0], [-1.0]]).requires_grad_(), torch.tensor([[1.0], [-1.0]])]
    targets, mix = torch.tensor([[0, 0, 0]]), Mix((0.0, 0.0), ((0.0, 1.0), (0.0, 0.0)))
    got = TORCH.head_loss(xs, heads, [None] * len(xs), targets, mix, None, chunked=False)
    got.backward()  # type: ignore[no-untyped-call]
    assert got.item() == pytest.approx(2 * -math.log(torch.finfo(torch.float32).tiny) / 3, rel=1e-6)
    assert xs[0].grad is not None
    torch.testing.assert_close(xs[0].grad.flatten(), torch.tensor([2.0, -2.0, 0.0]) / 3)


def test_an_output_learns_nothing_from_itself_and_is_not_changed_by_those_it_teaches() -> None:
    xs, heads = drawn(2)
    same = TORCH.head_loss(
        [xs[0], xs[0].detach()], [heads[0], heads[0].detach()], [None, None], TARGETS, MIXES["taught"], None, False
    )
    same.backward()  # type: ignore[no-untyped-call]
    assert same.item() == pytest.approx(0, abs=1e-15)
    assert xs[0].grad is not None and xs[0].grad.abs().max() < 1e-15
    TORCH.head_loss(xs, heads, [None] * len(xs), TARGETS, MIXES["taught"], None, False).backward()  # type: ignore[no-untyped-call]
    assert xs[1].grad is not None and not xs[1].grad.any()
