"""Kernels with a backward pass of their own: they keep less for it than torch's would, or what they keep is known.

Shape legend: as in `lamina.model`, and N tokens, k rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from lamina.packed import Packed, slabs, unpacked


@dataclass(frozen=True)
class Mix:
    """How much each of some outputs learns from the targets, and from each other output.

    Attributes:
        hard: Of each, the weight of the cross-entropy with the targets.
        soft: Row i: of each j, the weight of KL(p_j || p_i).
    """

    hard: tuple[float, ...]
    soft: tuple[tuple[float, ...], ...]

    @staticmethod
    def plain(count: int) -> Mix:
        """Each from the targets alone, all the same, weights that add up to one."""
        return Mix((1 / count,) * count, ((0.0,) * count,) * count)


class HeadLoss(torch.autograd.Function):
    """`Ops.head_loss`, a few tokens at a time; forward finds the gradients as well.

    With y the one-hot target, q_i = sum_j soft_ij p_j and s_i = sum_j soft_ij, the gradient with respect to the logits
    of output i is [(hard_i + s_i) p_i - hard_i y - q_i] / N, which for an output alone overwrites its probabilities.
    The products are those of the plain computation, no more.
    """

    @staticmethod
    def forward(
        ctx: Any, targets_N: Tensor, mix: Mix, labels_V: Tensor | None, size: int, *tensors: Tensor | None
    ) -> Tensor:
        """Mean loss; `tensors` are what the heads see, their weights, and their biases or None."""
        count = len(tensors) // 3
        needed = ctx.needs_input_grad[4:]
        found = [
            torch.zeros_like(each) if each is not None and need else None
            for each, need in zip(tensors, needed, strict=True)
        ]
        xs, weights, biases = tensors[:count], tensors[count : 2 * count], tensors[2 * count :]
        assert xs[0] is not None and weights[0] is not None
        tokens, vocabulary = len(targets_N), weights[0].shape[0]
        total, teaching = xs[0].new_zeros(()), any(map(any, mix.soft))
        space = xs[0].new_empty(count, size, vocabulary)
        spare = xs[0].new_empty(2, size, vocabulary) if teaching else None
        for start in range(0, tokens, size):
            rows = slice(start, start + size)
            targets = targets_N[rows, None]
            for i, (x_ND, weight_VD, bias_V) in enumerate(zip(xs, weights, biases, strict=True)):
                assert x_ND is not None and weight_VD is not None
                p = space[i, : len(targets)]
                for part, slab in slabs(weight_VD):
                    torch.mm(x_ND[rows], slab.T, out=p[:, part])
                    del slab
                if bias_V is not None:
                    p.add_(bias_V)
                if labels_V is not None:
                    p.masked_fill_(~labels_V, 0)
                picked, largest = p.gather(1, targets), p.amax(1, keepdim=True)
                sums = p.sub_(largest).exp_().sum(1, keepdim=True)
                p.div_(sums)
                total += mix.hard[i] * (sums.log_().add_(largest).sub_(picked)).sum()
                del picked, largest, sums
            for i in range(count):
                g = p = space[i, : len(targets)]
                if spare is not None:
                    g, logs = spare[:, : len(targets)]
                    total += _divergence(mix.soft[i], space[:, : len(targets)], i, g, logs)
                    g.neg_().add_(p, alpha=mix.hard[i] + sum(mix.soft[i]))
                else:
                    g.mul_(mix.hard[i])
                if all(each is None for each in found[i::count]):
                    continue
                g.scatter_add_(1, targets, torch.full_like(targets, -mix.hard[i], dtype=p.dtype)).div_(tokens)
                if labels_V is not None:
                    g.masked_fill_(~labels_V, 0)
                _head_backward(g, xs[i], weights[i], found[i::count], rows)
        ctx.save_for_backward(*found)
        return total / tokens

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients that forward found, scaled where they stand."""
        return None, None, None, None, *(None if each is None else each.mul_(gradient) for each in ctx.saved_tensors)


def _divergence(soft: Sequence[float], ps: Tensor, i: int, q: Tensor, logs: Tensor) -> Tensor:
    """Sum over tokens of sum_j soft_j KL(p_j || p_i); leaves sum_j soft_j p_j in q."""
    total, least = ps.new_zeros(()), math.log(torch.finfo(ps.dtype).tiny)  # for what is 0 but for rounding
    q.zero_()
    for weight, p in zip(soft, ps, strict=True):
        if weight:
            torch.log(p, out=logs).clamp_(min=least)
            total += weight * torch.dot(p.reshape(-1), logs.reshape(-1))
            q.add_(p, alpha=weight)
    torch.log(ps[i], out=logs).clamp_(min=least)
    return total - torch.dot(q.reshape(-1), logs.reshape(-1))


def _head_backward(
    g_NV: Tensor, x_ND: Tensor | None, weight_VD: Any, found: Sequence[Tensor | None], rows: slice
) -> None:
    """Add to the gradients of x, W and b what comes through the logits' gradient."""
    of_x, of_weight, of_bias = found
    assert x_ND is not None
    if of_x is not None:
        for part, slab in slabs(weight_VD):
            of_x[rows].addmm_(g_NV[:, part], slab)
            del slab
    if of_weight is not None:
        of_weight.addmm_(g_NV.T, x_ND[rows])
    if of_bias is not None:
        of_bias.add_(g_NV.sum(0))


class LoraLinear(torch.autograd.Function):
    """`Ops.lora_linear`, and X A^T; both parts of the gradient of x are summed in one memory, and so are both outputs.

    As three linear layers, backward would have three tensors of the size of x at once: both parts and their sum.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor, weight: Tensor | Packed, bias: Tensor | None, a_RI: Tensor, b_OR: Tensor, scale: float
    ) -> tuple[Tensor, Tensor]:
        """The products."""
        z = F.linear(x, a_RI)
        out = F.linear(x, unpacked(weight), bias)
        out.flatten(0, -2).addmm_(z.flatten(0, -2), b_OR.T, alpha=scale)
        return out, z

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        """Keeps x where W or A has a gradient, and x A^T where B has."""
        x, ctx.weight, _, a_RI, b_OR, ctx.scale = inputs
        _, of_weight, _, of_a, of_b, _ = ctx.needs_input_grad
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x if of_weight or of_a else None, output[1] if of_b else None, a_RI, b_OR)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        """Gradients of x, W, b, A and B."""
        if gradient is None:
            return (None,) * 6
        x, z, a_RI, b_OR = ctx.saved_tensors
        of_x, of_weight, of_bias, of_a, of_b = (None,) * 5
        g_NO, g_NR = gradient.flatten(0, -2), cast(Tensor, None)
        if ctx.needs_input_grad[0] or ctx.needs_input_grad[3]:
            g_NR = (g_NO @ b_OR).mul_(ctx.scale)
        if ctx.needs_input_grad[1]:
            of_weight = g_NO.T @ x.flatten(0, -2)
        if ctx.needs_input_grad[2]:
            of_bias = g_NO.sum(0)
        if ctx.needs_input_grad[3]:
            of_a = g_NR.T @ x.flatten(0, -2)
        if ctx.needs_input_grad[4]:
            of_b = (g_NO.T @ z.flatten(0, -2)).mul_(ctx.scale)
        if ctx.needs_input_grad[0]:
            of_x = gradient @ unpacked(ctx.weight)
            of_x.flatten(0, -2).addmm_(g_NR, a_RI)
        return of_x, of_weight, of_bias, of_a, of_b, None


class SparseLinear(torch.autograd.Function):
    """`Ops.sparse_linear`; the sum of the weights is made anew in backward instead of being kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, values: Tensor, indices: Tensor, bias: Tensor | None) -> Tensor:
        """Keeps x and the indices."""
        ctx.save_for_backward(x, values, indices)
        ctx.weight = weight
        return F.linear(x, plus_sparse(weight, values, indices), bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None, Tensor | None, None, Tensor | None]:
        """Gradients of x, the values and b."""
        x, values, indices = ctx.saved_tensors
        of_x = gradient @ plus_sparse(ctx.weight, values, indices) if ctx.needs_input_grad[0] else None
        of_values = None
        if ctx.needs_input_grad[2]:
            dense = gradient.flatten(0, -2).T @ x.flatten(0, -2)
            of_values = dense.view(-1)[indices]
            del dense
        return of_x, None, of_values, None, gradient.flatten(0, -2).sum(0) if ctx.needs_input_grad[4] else None


def plus_sparse(weight: Tensor | Packed, values: Tensor, indices: Tensor) -> Tensor:
    """W + S, whole."""
    whole = weight.unpack() if isinstance(weight, Packed) else weight.clone()
    whole.view(-1).index_add_(0, indices, values)
    return whole


class GroupLinear(torch.autograd.Function):
    """`Ops.group_linear`: y_g = x_g W_g^T + b_g for each stream g.

    By rows, W [sum of units, D] is cut along its outputs: x_g has D numbers, y_g as many as there are units of g. By
    columns, W [D, sum of units] is cut along its inputs, and all streams get the whole bias.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, units: tuple[int, ...], by_rows: bool
    ) -> Tensor:
        """Keeps the weight, and x where the weight trains."""
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        ctx.units, ctx.by_rows = units, by_rows
        width = sum(units) if by_rows else len(units) * weight.shape[0]
        out = x.new_empty(*x.shape[:-1], width)
        rows, flat = out.view(-1, width), x.reshape(-1, x.shape[-1])
        for into, of, part in _streams(weight, units, by_rows):
            torch.mm(flat[:, into], part.T, out=rows[:, of])
        if bias is not None:
            rows.view(len(rows), -1, len(bias)).add_(bias)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
        """Gradients of x, W and b, where each stream has its part of the first two."""
        x, weight = ctx.saved_tensors
        rows = gradient.reshape(-1, gradient.shape[-1])
        of_x = of_weight = of_bias = None
        if ctx.needs_input_grad[0]:
            width = len(ctx.units) * weight.shape[1] if ctx.by_rows else weight.shape[1]
            of_x = gradient.new_empty(*gradient.shape[:-1], width)
            for into, of, part in _streams(weight, ctx.units, ctx.by_rows):
                torch.mm(rows[:, of], part, out=of_x.view(-1, width)[:, into])
        if ctx.needs_input_grad[1]:
            of_weight = torch.empty_like(weight)
            flat = x.reshape(-1, x.shape[-1])
            for into, of, part in _streams(of_weight, ctx.units, ctx.by_rows):
                torch.mm(rows[:, of].T, flat[:, into], out=part)
        if ctx.needs_input_grad[2]:
            size = rows.shape[1] if ctx.by_rows else weight.shape[0]
            of_bias = rows.view(len(rows), -1, size).sum((0, 1))
        return of_x, of_weight, of_bias, None, None


def _streams(weight: Tensor, units: Sequence[int], by_rows: bool) -> Iterator[tuple[slice, slice, Tensor]]:
    """Of each stream, the columns of its inputs and of its outputs, and its part of the weight."""
    width = weight.shape[1] if by_rows else weight.shape[0]
    starts = accumulate(units, initial=0)
    for place, (start, count) in enumerate(zip(starts, units, strict=False)):
        own, whole = slice(start, start + count), slice(place * width, (place + 1) * width)
        yield (whole, own, weight[own]) if by_rows else (own, whole, weight[:, own])


class Spread(torch.autograd.Function):
    """`Ops.spread`."""

    @staticmethod
    def forward(ctx: Any, p_RkD: Tensor, places: tuple[tuple[int, int], ...], rows: int, streams: int) -> Tensor:
        """Keeps nothing."""
        ctx.places, ctx.shape = places, (rows, p_RkD.shape[1], streams, p_RkD.shape[2])
        out = p_RkD.new_zeros(ctx.shape)
        at, of = map(list, zip(*places, strict=True))
        out[at, :, of] = p_RkD
        return out.flatten(1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        """Of the rows of p alone."""
        at, of = map(list, zip(*ctx.places, strict=True))
        return gradient.reshape(ctx.shape)[at, :, of], None, None, None


class Leading(torch.autograd.Function):
    """`Ops.leading`; the gradient is zero elsewhere."""

    @staticmethod
    def forward(ctx: Any, p: Tensor, sizes: tuple[int, ...]) -> Tensor:
        """A view."""
        ctx.shape = p.shape
        return p[tuple(map(slice, sizes))]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        """Padded with zeros."""
        whole = gradient.new_zeros(ctx.shape)
        whole[tuple(map(slice, gradient.shape))] = gradient
        return whole, None


class RmsNorm(torch.autograd.Function):
    """X / sqrt(mean(x^2) + eps) * w over the last dimension."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """Keeps x, w and the inverse root per row."""
        rstd = _rstd(x, eps)
        ctx.save_for_backward(x, weight, rstd)
        return (x * rstd).mul_(weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        """With r the inverse root: of x, r (g w - x r^2 mean(g w x)); of w, the sum of g x r."""
        x, weight, rstd = ctx.saved_tensors
        product = gradient * x
        of_weight = product.flatten(0, -2).T @ rstd.flatten() if ctx.needs_input_grad[1] else None
        if not ctx.needs_input_grad[0]:
            return None, of_weight, None
        inner = (product @ weight)[..., None].mul_(rstd).mul_(rstd).div_(x.shape[-1])
        of_x = torch.mul(gradient, weight, out=product).addcmul_(x, inner, value=-1).mul_(rstd)
        return of_x, of_weight, None


def _rstd(x: Tensor, eps: float) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return norms.square_().div_(x.shape[-1]).add_(eps).rsqrt_()


class Gate(torch.autograd.Function):
    """Silu(gate) * up."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        """Keeps both, not the activation."""
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """The activation is found again."""
        gate, up = ctx.saved_tensors
        of_up = F.silu(gate).mul_(gradient) if ctx.needs_input_grad[1] else None
        of_gate = None
        if ctx.needs_input_grad[0]:
            of_gate = gradient * up
            torch.ops.aten.silu_backward.grad_input(of_gate, gate, grad_input=of_gate)
        return of_gate, of_up


class Rotate(torch.autograd.Function):
    """Rotary positions: component i of a head and i + K / 2 turn together by the angle S theta^(-2 i / K)."""

    @staticmethod
    def forward(ctx: Any, x_BSE: Tensor, heads: int, theta: float) -> Tensor:
        """Keeps nothing."""
        ctx.heads, ctx.theta = heads, theta
        return turned(x_BSE, heads, theta, 1.0)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        """Turned back."""
        return turned(gradient, ctx.heads, ctx.theta, -1.0), None, None


def turned(x_BSE: Tensor, heads: int, theta: float, sign: float) -> Tensor:
    """Each head of X turned by its positions, or back."""
    tokens, dim = x_BSE.shape[1], x_BSE.shape[2] // heads
    rates = 1.0 / theta ** (torch.arange(0, dim, 2, device=x_BSE.device).float() / dim)
    angles = torch.outer(torch.arange(tokens, device=x_BSE.device).float(), rates)
    cos, sin = angles.cos()[:, None], angles.sin_()[:, None].mul_(sign)
    del angles, rates
    out_BSE = torch.empty_like(x_BSE)
    halves = (each.view(*x_BSE.shape[:2], heads, 2, -1) for each in (x_BSE, out_BSE))
    (a, b), (left, right) = (each.unbind(3) for each in halves)
    torch.mul(a, cos, out=left).addcmul_(b, sin, value=-1)
    torch.mul(b, cos, out=right).addcmul_(a, sin)
    return out_BSE


class Patches(torch.autograd.Function):
    """What a vision Transformer makes of images: leads, registers, and a linear map of each patch, with positions."""

    @staticmethod
    def forward(
        ctx: Any,
        pixels_BCYX: Tensor,
        weight: Tensor,
        bias: Tensor,
        positions: Tensor,
        leads: Tensor | None,
        registers: Tensor | None,
    ) -> Tensor:
        """Keeps the images, which are cut into patches one after another."""
        ctx.save_for_backward(pixels_BCYX)
        ctx.weight_shape = weight.shape
        ctx.counts = counts = [0 if each is None else len(each) for each in (leads, registers)]
        places = len(positions) + counts[1]
        out_BSD = weight.new_empty(len(pixels_BCYX), places, len(weight))
        if leads is not None:
            out_BSD[:, : counts[0]] = leads + positions[: counts[0]]
        if registers is not None:
            out_BSD[:, counts[0] : sum(counts)] = registers
        matrix, placed = weight.flatten(1).T, positions[counts[0] :] + bias
        for pixels_CYX, out_SD in zip(pixels_BCYX, out_BSD, strict=True):
            torch.addmm(placed, unfolded(pixels_CYX, weight.shape[-1]), matrix, out=out_SD[sum(counts) :])
        return out_BSD

    @staticmethod
    def backward(ctx: Any, gradient_BSD: Tensor) -> tuple[Tensor | None, ...]:
        """Images get none; patches are cut out again."""
        (pixels_BCYX,) = ctx.saved_tensors
        leads, registers = ctx.counts
        _, weight, bias, positions, *vectors = ctx.needs_input_grad
        of_weight = None
        if weight:
            of_weight = gradient_BSD.new_zeros(ctx.weight_shape)
            matrix = of_weight.flatten(1)
            for pixels_CYX, gradient_SD in zip(pixels_BCYX, gradient_BSD[:, leads + registers :], strict=True):
                torch.addmm(matrix, gradient_SD.T, unfolded(pixels_CYX, ctx.weight_shape[-1]), out=matrix)
        of_leads, of_registers, rest = gradient_BSD.sum(0).tensor_split([leads, leads + registers])
        return (
            None,
            of_weight,
            rest.sum(0) if bias else None,
            torch.cat([of_leads, rest]) if positions else None,
            *(each.clone() if need else None for each, need in zip((of_leads, of_registers), vectors, strict=True)),
        )


def unfolded(pixels_CYX: Tensor, side: int) -> Tensor:
    """An image -> its patches, row by row, [patches, C side side]."""
    channels, height, width = pixels_CYX.shape
    rows, columns = height // side, width // side
    cut = pixels_CYX.view(channels, rows, side, columns, side)
    return cut.permute(1, 3, 0, 2, 4).reshape(rows * columns, -1)
