"""Packed matrices: how far from the original, and that everything else is that of the unpacked matrix."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from lamina import packed
from lamina.flash import Flash
from lamina.ops import HOST, TORCH
from lamina.packed import SMALLEST, Packed, pack, packable, slabs
from lamina.watch import Watch

SIZES = [(1, 1), (7, 5), (3, 2, 6), (2, 3, 2, 4)]


def matrix(*shape: int, seed: int = 0) -> Tensor:
    """Rows of very different sizes, one of them zero."""
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=rng) * 10 ** (2 * torch.randn(*shape[:-1], 1, generator=rng)).clamp(-6, 3)
    if math.prod(shape[:-1]) > 1:
        x.view(-1, shape[-1])[1] = 0
    return x


def packed_of(x: Tensor, bits: int) -> Packed:
    return pack(x.shape, bits, lambda rows: x[rows.start : rows.stop].clone(), HOST)


@given(
    shape=st.lists(st.integers(1, 9), min_size=2, max_size=4),
    bits=st.sampled_from([8, 16]),
    slab=st.integers(1, 10),
    seed=st.integers(0, 99),
)
@settings(max_examples=60)
def test_errors_are_half_a_step_at_most(shape: list[int], bits: int, slab: int, seed: int) -> None:
    """8 bits: half the scale, 1/127 of the row's largest; 16 bits: 2^-11 of the number, or half the smallest step."""
    x = matrix(*shape, seed=seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packed, "SLAB_ROWS", slab)
        small = packed_of(x, bits)
    back = small.unpack()
    assert back.dtype == torch.float32 and back.shape == x.shape
    if bits == 8:
        assert small.scale is not None and small.data.dtype == torch.int8
        largest = x.abs().amax(-1, keepdim=True)
        assert torch.allclose(small.scale, largest / 127, rtol=1e-6, atol=2e-38)
        assert bool(((x - back).abs() <= small.scale * (0.5 + 1e-4)).all())
        assert torch.allclose(back.abs().amax(-1, keepdim=True), largest, rtol=1e-6, atol=0)
        assert small.data.int().abs().max() <= 127
        assert bool((small.scale > 0).all())  # nothing is divided by zero
    else:
        assert small.scale is None and small.data.dtype == torch.float16
        assert torch.equal(back, x.half().float())
        assert bool(((x - back).abs() <= (2**-11 * x.abs()).clamp(min=2**-25)).all())


@pytest.mark.parametrize("bits", [8, 16])
def test_rows_of_zeros_stay_zeros(bits: int) -> None:
    x = matrix(6, 5)
    x[3:] = 0
    back = packed_of(x, bits).unpack()
    assert torch.equal(back[3:], torch.zeros(3, 5))
    assert torch.equal(packed_of(torch.zeros(4, 4), bits).unpack(), torch.zeros(4, 4))


@pytest.mark.parametrize("bits", [8, 16])
def test_memory_is_that_of_the_bits(bits: int) -> None:
    small = packed_of(matrix(5, 2, 64), bits)
    assert small.data.nbytes == 5 * 2 * 64 * bits // 8
    assert (small.scale.nbytes if small.scale is not None else 0) == (4 * 5 * 2 if bits == 8 else 0)


@pytest.mark.parametrize(("rows", "expected"), [(1, [1]), (4, [4]), (5, [4, 1]), (12, [4, 4, 4])])
def test_a_few_rows_are_read_at_a_time(rows: int, expected: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed, "SLAB_ROWS", 4)
    x, asked = matrix(rows, 3), []

    def read(part: range) -> Tensor:
        asked.append(part)
        return x[part.start : part.stop]

    small = pack(x.shape, 8, read, HOST)
    assert [len(part) for part in asked] == expected
    assert [i for part in asked for i in part] == list(range(rows))
    pieces = list(slabs(small))
    assert [len(piece) for _, piece in pieces] == expected
    assert torch.equal(torch.cat([piece for _, piece in pieces]), small.unpack())
    assert [i for part, _ in pieces for i in range(rows)[part]] == list(range(rows))


def test_a_tensor_is_a_slab_of_its_own() -> None:
    x = torch.randn(3000, 2)
    [(rows, piece)] = slabs(x)
    assert piece is x
    assert rows == slice(0, 3000)


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("shape", SIZES, ids=str)
def test_views_are_those_of_the_unpacked_tensor(shape: tuple[int, ...], bits: int) -> None:
    small = packed_of(matrix(*shape), bits)
    whole = small.unpack()
    assert small.shape == whole.shape
    assert small.numel() == whole.numel()
    views: list[Callable[[Any], Any]] = [
        lambda each: each.flatten(1),
        lambda each: each.reshape(shape[0], -1),
        lambda each: each.reshape(-1, shape[-1]),
        lambda each: each.reshape(math.prod(shape[:-1]), shape[-1]),
        lambda each: each.reshape(math.prod(shape[:-1]), -1).reshape(shape[0], -1),
    ]
    for view in views:
        assert view(small).shape == view(whole).shape
        assert torch.equal(view(small).unpack(), view(whole))
        assert view(small).numel() == whole.numel()
        assert view(small).data is small.data  # the same memory
    if len(shape) > 2:
        assert torch.equal(small.flatten(2).unpack(), whole.reshape(math.prod(shape[:2]), -1))


@pytest.mark.parametrize("bits", [8, 16])
def test_embeddings_look_rows_up(bits: int) -> None:
    tokens, positions = packed_of(matrix(11, 6), bits), packed_of(matrix(9, 6, seed=1), bits)
    ids = torch.tensor([[3, 0, 10, 3], [1, 1, 1, 2]])
    assert torch.equal(tokens.rows(ids), F.embedding(ids, tokens.unpack()))
    expected = tokens.unpack()[ids] + positions.unpack()[:4]
    for first, second in ((tokens, positions), (tokens.unpack(), positions), (tokens, positions.unpack())):
        assert torch.equal(TORCH.embed(ids, first, second), expected)  # type: ignore[arg-type]


def test_new_memory_each_time() -> None:
    small = packed_of(matrix(4, 4), 16)
    expected = small.unpack().clone()
    small.unpack().zero_()
    small.rows(torch.tensor([0, 1])).zero_()
    assert torch.equal(small.unpack(), expected)


@pytest.mark.parametrize("bias", ["", "frozen", "trained"])
@pytest.mark.parametrize("frozen_input", [False, True])
@pytest.mark.parametrize("sizes", [(4, 5), (2, 3, 5)], ids=str)
@pytest.mark.parametrize("bits", [8, 16])
def test_a_packed_linear_is_the_linear_of_the_unpacked_matrix(
    bits: int, sizes: tuple[int, ...], frozen_input: bool, bias: str
) -> None:
    weight = packed_of(torch.randn(4, 2, 5, generator=torch.Generator().manual_seed(0)), bits).reshape(8, -1)
    x, b = torch.randn(sizes), torch.randn(8) if bias else None
    results = []
    for each in (weight, weight.unpack()):
        own = x.clone().requires_grad_(not frozen_input)
        own_b = None if b is None else b.clone().requires_grad_(bias == "trained")
        y = TORCH.linear(own, each, own_b)  # type: ignore[arg-type]
        if y.requires_grad:
            (y * torch.linspace(-1, 1, 8)).square().sum().backward()  # type: ignore[no-untyped-call]
        results.append((y.detach(), own.grad, None if own_b is None else own_b.grad))
    for got, expected in zip(*results, strict=True):
        assert (got is None) == (expected is None)
        if got is not None and expected is not None:
            assert torch.allclose(got, expected, rtol=1e-5, atol=1e-5)
    assert (results[0][1] is None) == frozen_input
    assert (results[0][2] is None) == (bias != "trained")


@pytest.mark.parametrize("bits", [8, 16])
def test_nothing_unpacked_waits_for_backward(bits: int) -> None:
    """After the forward pass the output is all that is new, and afterwards the gradient."""
    weight, x = packed_of(torch.randn(64, 96), bits), torch.randn(3, 96).requires_grad_()
    with Watch() as watched:
        y = TORCH.linear(x, weight)  # type: ignore[arg-type]
        assert sum(delta for delta, _, _ in watched.timeline.events) == y.nbytes
        assert max(storage.size_bytes for _, storage, _ in watched.timeline.events) == 4 * 64 * 96
        y.backward(torch.ones_like(y))  # type: ignore[no-untyped-call]
    assert x.grad is not None
    kept: list[int] = []

    def note(each: Tensor) -> Tensor:
        kept.append(each.nbytes)
        return each

    with torch.autograd.graph.saved_tensors_hooks(note, lambda each: each):
        TORCH.linear(x, weight)  # type: ignore[arg-type]
    assert kept == []


@pytest.mark.parametrize(
    ("shape", "bits", "expected"),
    [
        ((64, 64), 8, True),
        ((64, 64), 16, True),
        ((64, 64), 32, False),
        ((63, 65), 8, False),
        ((SMALLEST,), 8, False),
        ((1, SMALLEST), 8, True),
        ((16, 16, 16), 16, True),
        ((16, 16, 15), 16, False),
    ],
    ids=str,
)
def test_small_ones_and_vectors_stay_as_they_are(
    shape: tuple[int, ...], bits: int, expected: bool, tmp_path: Path
) -> None:
    assert packable(shape, bits) == expected
    x = torch.randn(shape)
    held = TORCH.hold({"x": x}, "x", bits)
    save_file({"x": x}, tmp_path / "x")
    flash = Flash(tmp_path / "x")
    from_disk = TORCH.hold(flash, "x", bits)
    assert isinstance(held, Packed) == isinstance(from_disk, Packed) == expected
    if isinstance(held, Packed) and isinstance(from_disk, Packed):
        assert torch.equal(held.data, from_disk.data)
        assert torch.equal(held.unpack(), packed_of(x, bits).unpack())
        assert (held.scale is None) == (from_disk.scale is None) == (bits == 16)
        if held.scale is not None and from_disk.scale is not None:
            assert torch.equal(held.scale, from_disk.scale)
    else:
        assert held is x
        assert torch.equal(from_disk, x)
