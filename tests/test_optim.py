"""Optimizers that keep less, against torch's and against their papers written out again."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lamina import optim
from lamina.job import Local
from lamina.optim import Adafactor, AdamW8, Kind
from lamina.watch import Watch

LARGE = [(4096,), (4097,), (70, 60), (3, 7, 300), (300, 64)]
SMALL = [(1,), (3,), (5, 4), (4095,), (2, 3, 4)]


def gradients(shape: tuple[int, ...], steps: int, seed: int = 0) -> Iterator[Tensor]:
    """A direction and a size of its own for each element, and as much noise."""
    rng = torch.Generator().manual_seed(seed)
    size = 10 ** (0.3 * torch.randn(shape, generator=rng))
    direction = torch.randn(shape, generator=rng)
    for _ in range(steps):
        yield size * (direction + torch.randn(shape, generator=rng))


def trained(optimizer: Any, p: Tensor, grads: Iterator[Tensor]) -> Tensor:
    """Where a tensor ends."""
    for grad in grads:
        p.grad = grad.clone()
        optimizer.step()
        optimizer.zero_grad()
    return p.detach()


def start(shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(9)).requires_grad_()


@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
@pytest.mark.parametrize("shape", SMALL, ids=str)
def test_adamw8_is_adamw_for_small_tensors(shape: tuple[int, ...], weight_decay: float) -> None:
    ours, theirs = start(shape), start(shape)
    got = trained(AdamW8([ours], 0.01, weight_decay), ours, gradients(shape, 50))
    adamw = torch.optim.AdamW([theirs], 0.01, weight_decay=weight_decay)
    assert torch.allclose(got, trained(adamw, theirs, gradients(shape, 50)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
@pytest.mark.parametrize("shape", LARGE, ids=str)
def test_adamw8_is_nearly_adamw_for_large_tensors(shape: tuple[int, ...], weight_decay: float) -> None:
    """Fifty steps: where an element ends, as a share of the way it could go.

    Half a code of m at the largest of a block is 1 / 127 of it, and relatively more below; of v one code is 4 / 255 at
    the largest. A single element may lose more where it is small beside the largest of its block.
    """
    lr, steps = 0.01, 50
    ours, theirs = start(shape), start(shape)
    optimizer = AdamW8([ours], lr, weight_decay)
    got = trained(optimizer, ours, gradients(shape, steps))
    adamw = torch.optim.AdamW([theirs], lr, weight_decay=weight_decay)
    expected = trained(adamw, theirs, gradients(shape, steps))
    error = (got - expected).abs() / (lr * steps)
    assert error.mean() < 0.015
    assert error.max() < 0.25
    assert error.mean() > 1e-4  # it is in 8 bits
    assert torch.cosine_similarity((got - start(shape)).flatten(), (expected - start(shape)).flatten(), 0) > 0.999
    assert {value.dtype for value in optimizer.state[ours].values()} == {torch.int8, torch.uint8, torch.float32}


def test_second_moments_in_8_bits_stay_where_they_are() -> None:
    """Coding them again in every step, three hundred times, makes them no larger: rounded up, they would be fivefold.

    Changes of less than half a code are lost, so they are late.
    """
    ours, theirs = start((4096,)), start((4096,))
    optimizer, adamw = AdamW8([ours], 1e-3, 0.0), torch.optim.AdamW([theirs], 1e-3, weight_decay=0)
    trained(optimizer, ours, gradients((4096,), 300))
    trained(adamw, theirs, gradients((4096,), 300))
    v = optim._decode(optimizer.state[ours]["v"], optimizer.state[ours]["v_scale"], 255, 4).view(-1)
    ratio = v / adamw.state[theirs]["exp_avg_sq"]
    assert 0.85 < ratio.median() < 1.15
    assert 0.7 < ratio.quantile(0.05) < ratio.quantile(0.95) < 1.8


@pytest.mark.parametrize("numel", [4096, 5000, 16384, 16385, 40000])
def test_adamw8_does_not_depend_on_where_a_tensor_ends(numel: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit as with zeros up to the end of the block, and for any stretch that is decoded at a time."""
    padded = 256 * -(-numel // 256)
    first, second, third = (torch.zeros(size, requires_grad=True) for size in (numel, padded, numel))
    for p, stretch in ((first, 2**14), (second, 2**14), (third, 512)):
        monkeypatch.setattr(optim, "_STRETCH", stretch)
        more = torch.zeros(len(p) - numel)
        trained(AdamW8([p], 0.1, 0.1), p, (torch.cat([grad, more]) for grad in gradients((numel,), 4)))
    assert torch.equal(first, second[:numel])
    assert torch.equal(second[numel:], torch.zeros(padded - numel))
    assert torch.equal(first, third)


@pytest.mark.parametrize("kind", ["adamw8", "adafactor"])
@pytest.mark.parametrize("shape", [(7,), (5, 4), (70, 60), (4097,)], ids=str)
def test_zero_gradients_leave_only_weight_decay(shape: tuple[int, ...], kind: Kind) -> None:
    for weight_decay in (0.0, 0.5):
        p = start(shape)
        optimizer = optim.build({0.1: [p]}, Local(optimizer="adamw", weight_decay=weight_decay), kind)
        trained(optimizer, p, (torch.zeros(shape) for _ in range(3)))
        assert torch.allclose(p, start(shape) * (1 - 0.1 * weight_decay) ** 3, rtol=1e-6, atol=0)


def test_adamw8_after_a_single_gradient_comes_to_rest() -> None:
    """As AdamW does: the first moment fades and the steps with it, after lr / (1 - 0.9) in all.

    Where m is half a code it becomes one, four times as much, while v is at least one: up to four times as far.
    """
    grads = [next(gradients((70, 60), 1)), *(torch.zeros(70, 60) for _ in range(60))]
    ours, theirs = start((70, 60)), start((70, 60))
    optimizer = AdamW8([ours], 0.01, 0.0)
    trained(optimizer, ours, iter(grads))
    trained(torch.optim.AdamW([theirs], 0.01, weight_decay=0), theirs, iter(grads))
    assert (ours - theirs).abs().max() < 3.1 * 0.01 * 10
    assert (ours - theirs).abs().mean() < 0.02 * 0.01 * 10
    before = ours.detach().clone()
    trained(optimizer, ours, iter(grads[1:]))
    assert (ours - before).abs().max() < 1e-3


@given(power=st.sampled_from([2, 4]), size=st.floats(1e-20, 1e10), seed=st.integers(0, 99))
@settings(max_examples=60)
def test_codes_come_back(power: int, size: float, seed: int) -> None:
    """Within half a code; unsigned ones have a code of one at least, so that nothing is divided by zero."""
    top, dtype = (127, torch.int8) if power == 2 else (255, torch.uint8)
    rng = torch.Generator().manual_seed(seed)
    x = size * torch.randn(3, 256, generator=rng) * 10 ** torch.randn(3, 256, generator=rng)
    x[1, :200], x[2] = 0, 0
    x = x if power == 2 else x.abs()
    code, scale = torch.zeros(3, 256, dtype=dtype), torch.ones(3, 1)
    optim._encode(x.clone(), code, scale, top, power)
    assert torch.equal(scale, x.abs().amax(1, keepdim=True))
    exact = (x.abs() / scale.clamp(min=1e-38)) ** (1 / power) * top
    exact = exact if power == 2 else exact.clamp(min=1)
    assert (code.int().abs() - exact).abs().max() <= 0.5 + 1e-3
    assert bool((code[x == 0] == (0 if power == 2 else 1)).all())
    back = optim._decode(code, scale, top, power)
    assert torch.allclose(back.abs(), (code.float().abs() / top) ** power * scale, rtol=1e-5)
    assert bool(((back.sign() == x.sign()) | (code == 0) | (x == 0)).all())
    largest = x.abs() == scale
    assert torch.allclose(back[largest], x[largest], rtol=1e-6)
    again, scale_again = torch.zeros_like(code), torch.ones(3, 1)
    optim._encode(back.clone(), again, scale_again, top, power)
    assert torch.equal(again[:2], code[:2])  # no drift
    assert torch.equal(back[2], torch.zeros(256))


@pytest.mark.parametrize("kind", ["adamw8", "adafactor"])
def test_tensors_without_a_gradient_stay(kind: Kind) -> None:
    first, second, third = start((70, 60)), start((70, 60)), start((70, 60))
    optimizer = optim.build({0.1: [first, second, third]}, Local(weight_decay=0.5), kind)
    first.grad = torch.ones(70, 60)
    third.grad = torch.ones(70, 60)
    optimizer.step()
    assert torch.equal(second, start((70, 60)))
    assert torch.equal(first, third)
    assert not torch.equal(first, second)
    optimizer.zero_grad()
    assert first.grad is None


def adafactor(p: np.ndarray, grads: Iterator[Tensor], lr: float, weight_decay: float) -> np.ndarray:
    """Shazeer and Stern 2018, Algorithm 4 (matrices) and 5 (vectors), in double precision.

    With beta2_t = 1 - t^-0.8, epsilon_1 = 1e-30, d = 1, and lr in the place of alpha_t. Rows of a tensor of more
    dimensions are all but the last.
    """
    rows: Any = 0.0
    columns: Any = 0.0
    shape, p = p.shape, p.astype(np.float64).reshape(-1, p.shape[-1])
    for t, each in enumerate(grads, 1):
        g = each.numpy().astype(np.float64).reshape(p.shape)
        beta = 1 - t**-0.8
        if len(shape) > 1:
            rows = beta * rows + (1 - beta) * (g**2 + 1e-30).sum(1)
            columns = beta * columns + (1 - beta) * (g**2 + 1e-30).sum(0)
            v = np.outer(rows, columns) / rows.sum()
        else:
            rows = beta * rows + (1 - beta) * (g**2 + 1e-30)
            v = rows
        u = g / np.sqrt(v)
        u = u / max(1.0, np.sqrt((u**2).mean()))
        p = p * (1 - lr * weight_decay) - lr * u
    return p.reshape(shape)


@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
@pytest.mark.parametrize("shape", [(5,), (1, 6), (6, 1), (40, 7), (3, 4, 5), (5000,), (80, 70)], ids=str)
def test_adafactor_is_the_paper_s(shape: tuple[int, ...], weight_decay: float) -> None:
    p = start(shape)
    expected = adafactor(p.detach().numpy().copy(), gradients(shape, 20), 0.05, weight_decay)
    got = trained(Adafactor([p], 0.05, weight_decay), p, gradients(shape, 20))
    assert torch.allclose(got, torch.from_numpy(expected).float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(50,), (9, 8)], ids=str)
def test_adafactor_clips_large_updates_and_leaves_small_ones(shape: tuple[int, ...]) -> None:
    """After small gradients a large one: the root mean square of the step is lr, and below it otherwise."""
    p = start(shape)
    optimizer = Adafactor([p], 0.1, 0.0)
    steps = []
    for size in (1.0, 1.0, 1.0, 100.0, 1e-3):
        before = p.detach().clone()
        trained(optimizer, p, iter([size * torch.ones(shape)]))
        steps.append((p.detach() - before).square().mean().sqrt().item())
    assert steps[:4] == pytest.approx([0.1] * 4, rel=1e-4)
    assert steps[4] < 1e-3


def test_adafactor_learns_the_size_of_rows_and_columns_apart() -> None:
    """A gradient of rank one has second moments of rank one: every element goes its full step."""
    grad = torch.outer(torch.tensor([1.0, -10.0, 100.0]), torch.tensor([0.01, 1.0, -5.0, 2.0]))
    p = torch.zeros(3, 4, requires_grad=True)
    assert torch.allclose(trained(Adafactor([p], 0.1, 0.0), p, iter([grad])), -0.1 * grad.sign(), rtol=1e-4)


KINDS: list[Kind] = ["sgd", "momentum", "adamw", "adamw8", "adafactor"]
SHAPES = [(3,), (5, 4), (5000,), (4095,), (4096,), (100, 50), (3, 5, 300), (60, 256), (200, 300), (16385,)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_what_an_update_takes_is_counted(kind: Kind, shape: tuple[int, ...]) -> None:
    """States to the byte, scratch never too little."""
    local = Local(optimizer="sgd" if kind == "momentum" else kind, momentum=0.5 * (kind == "momentum"))
    p = start(shape)
    optimizer = optim.build({0.1: [p]}, local, kind)
    p.grad = torch.ones(shape)
    optimizer.step()
    with Watch() as watched:
        for each in (p.detach(), p.grad):
            watched.see(each)
        given = sum(delta for delta, _, _ in watched.timeline.events)
        for value in optimizer.state[p].values():
            if isinstance(value, Tensor):
                watched.see(value)
        before = sum(delta for delta, _, _ in watched.timeline.events)
        optimizer.step()
    most = max(accumulate(delta for delta, _, _ in watched.timeline.events))
    assert before - given == optim.state_bytes(kind, shape)
    scratch, counted = most - before, optim.scratch_bytes(kind, shape)
    assert scratch <= counted <= 1.05 * scratch


def test_states_in_8_bits_are_small() -> None:
    """Two bytes an element and two scales a block, a quarter of AdamW's; Adafactor's a few lines."""
    assert optim.state_bytes("adamw8", (64, 256)) == 64 * (2 * 256 + 8)
    assert optim.state_bytes("adamw", (64, 256)) == 64 * 8 * 256 + 4
    assert optim.state_bytes("adafactor", (64, 256)) == 4 * (64 + 256)
    assert optim.state_bytes("adafactor", (4, 16, 256)) == 4 * (64 + 256)
    assert optim.state_bytes("adafactor", (256,)) == optim.state_bytes("momentum", (256,)) == 4 * 256


@pytest.mark.parametrize("kind", KINDS)
def test_settings_reach_the_optimizer(kind: Kind) -> None:
    """Each against the step it must make; the rate is the one given, not the one of `local`."""
    local = Local(
        optimizer="sgd" if kind == "momentum" else kind, lr=9.0, weight_decay=0.5, momentum=0.5 * (kind == "momentum")
    )
    p = torch.full((3,), 2.0, requires_grad=True)
    trained(optim.build({0.1: [p]}, local, kind), p, iter(2 * [torch.full((3,), 4.0)]))
    if kind in ("sgd", "momentum"):
        first = 2 - 0.1 * (4 + 0.5 * 2)
        expected = first - 0.1 * (4 + 0.5 * first + (0.5 * (4 + 0.5 * 2) if kind == "momentum" else 0))
    else:
        expected = (2 * (1 - 0.05) - 0.1) * (1 - 0.05) - 0.1
    assert p.tolist() == pytest.approx(3 * [expected], rel=1e-5)
