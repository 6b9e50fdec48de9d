"""Forward mode: kernels on dual numbers, each the tangent rule of one of `lamina.ops`.

A `Dual` is a value with its derivative along one direction. What has no tangent stays a plain tensor and costs what it
always costs, so a frozen prefix runs as it is. Nothing is kept for later: a kernel's inputs are free when their names
go. The rules are made of the kernels of an inner `Ops`, or stand beside the memory that they take, so the same code is
priced by `lamina.ledger`.

Shape legend: as in `lamina.model`; d.. is the tangent of ...
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import numpy as np
import torch
from torch import Tensor

from lamina import tangents
from lamina.kernels import Mix
from lamina.ops import Ops
from lamina.spec import Act, Pool

T = TypeVar("T")


@dataclass(frozen=True, eq=False, slots=True)
class Dual:
    """A tensor and its tangent, of the same shape, with as much of a tensor's interface as the model uses."""

    value: Tensor
    tangent: Tensor

    @property
    def shape(self) -> Sequence[int]:
        """Sizes."""
        return self.value.shape

    def numel(self) -> int:
        """Number of elements."""
        return self.value.numel()

    def reshape(self, *shape: int) -> Dual:
        """Both, reshaped."""
        return Dual(self.value.reshape(*shape), self.tangent.reshape(*shape))

    def flatten(self, start: int) -> Dual:
        """Both, flattened."""
        return Dual(self.value.flatten(start), self.tangent.flatten(start))

    def detach(self) -> Tensor:
        """The value alone."""
        return self.value.detach()


def parts(x: Tensor) -> tuple[Tensor, Tensor | None]:
    """Value and tangent of what is a dual number or a plain tensor, which has none."""
    return (x.value, x.tangent) if isinstance(x, Dual) else (x, None)


def maybe(x: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """The same of what may not be there."""
    return (None, None) if x is None else parts(x)


def _dual(value: Tensor, tangent: Tensor | None) -> Tensor:
    return value if tangent is None else cast(Tensor, Dual(value, tangent))


class Duals(Ops):
    """Those kernels that a forward pass is made of, on plain tensors and dual numbers alike."""

    def __init__(self, ops: Ops) -> None:
        """Compute with the kernels of `ops`."""
        super().__init__(ops.device)
        self._ops = ops

    def embed(
        self, ids: Tensor, tokens: Tensor, positions: Tensor | None, types: Tensor | None = None, first: int = 0
    ) -> Tensor:
        """The same lookup."""
        (tokens, dt), (positions, dp), (types, dy) = parts(tokens), maybe(positions), maybe(types)
        width = tokens.shape[1]
        tangent: Tensor | None = None
        if not (dt is None and dp is None and dy is None):
            tangent = self._ops.compute(lambda: tangents.embed(ids, width, dt, dp, dy, first), (*ids.shape, width))
        return _dual(self._ops.embed(ids, tokens, positions, types, first), tangent)

    def patches(
        self,
        pixels_BCYX: Tensor,
        weight: Tensor,
        bias: Tensor,
        positions: Tensor,
        leads: Tensor | None,
        registers: Tensor | None,
    ) -> Tensor:
        """The same map of what has a tangent."""
        duals = [maybe(each) for each in (weight, bias, positions, leads, registers)]
        tables, moved = zip(*duals, strict=True)
        value = self._ops.patches(pixels_BCYX, *tables)
        if all(each is None for each in moved):
            return value
        batch, length, width = value.shape
        leading, others = (0 if each is None else each.shape[0] for each in tables[3:])
        number, inputs = length - leading - others, weight.numel() // width
        maps = moved[0] is not None
        tangent = self._ops.compute(
            lambda: tangents.patches(pixels_BCYX, value.shape, (leading, others), moved),
            value.shape,
            maps * number * inputs,
            maps * 2 * batch * number * inputs * width,
        )
        return _dual(value, tangent)

    def norm(self, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        """With n the normalised input: w dn + n dw + db; see `tangents.norm`."""
        (x, dx), (weight, dw), (bias, db) = parts(x), parts(weight), parts(bias)
        tangent: Tensor | None = None
        if not (dx is None and dw is None and db is None):
            besides = 2 * (x.numel() // x.shape[-1]) + (x.numel() if dx is not None and dw is not None else 0)
            tangent = self._ops.compute(lambda: tangents.norm(x, weight, dx, dw, db, eps), x.shape, besides)
        return _dual(self._ops.norm(x, weight, bias, eps), tangent)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """With r the inverse root: r [w (dx - x r^2 mean(x dx)) + x dw]."""
        (x, dx), (weight, dw) = parts(x), parts(weight)
        tangent: Tensor | None = None
        if not (dx is None and dw is None):
            besides = (1 + (dx is not None)) * (x.numel() // x.shape[-1])
            tangent = self._ops.compute(lambda: tangents.rms_norm(x, weight, dx, dw, eps), x.shape, besides)
        return _dual(self._ops.rms_norm(x, weight, eps), tangent)

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """DX W^T + x dW^T + db."""
        (x, dx), (weight, dw), (bias, db) = parts(x), parts(weight), maybe(bias)
        tangent: Tensor | None = None
        if dx is not None:
            tangent = self._ops.linear(dx, weight, db)
            if dw is not None:
                self._ops.add_linear(tangent, x, dw)
        elif dw is not None:
            tangent = self._ops.linear(x, dw, db)
        elif db is not None:
            tangent = self._spread(db, (*x.shape[:-1], len(db)))
        return _dual(self._ops.linear(x, weight, bias), tangent)

    def lora_linear(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, a_RI: Tensor, b_OR: Tensor, scale: float
    ) -> Tensor:
        """As three linear layers."""
        return self.three_linears(x, weight, bias, a_RI, b_OR, scale)

    def group_linear(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, units: Sequence[int], by_rows: bool
    ) -> Tensor:
        """As `linear`, in terms of their own."""
        (x, dx), (weight, dw), (bias, db) = parts(x), parts(weight), maybe(bias)
        tangent: Tensor | None = None
        if dx is not None:
            tangent = self._ops.group_linear(dx, weight, db, units, by_rows)
        if dw is not None:
            term = self._ops.group_linear(x, dw, db if dx is None else None, units, by_rows)
            tangent = term if tangent is None else self._ops.add(tangent, term)
        if tangent is None and db is not None:
            copies = 1 if by_rows else len(units)
            shape = (*x.shape[:-1], copies * len(db))
            tangent = self._ops.compute(lambda: db.repeat(copies).expand(shape).clone(), shape, shape[-1])
        return _dual(self._ops.group_linear(x, weight, bias, units, by_rows), tangent)

    def fork(self, x: Tensor, streams: int) -> Tensor:
        """Both alike."""
        x, dx = parts(x)
        return _dual(self._ops.fork(x, streams), None if dx is None else self._ops.fork(dx, streams))

    def spread(self, p_RkD: Tensor, places: Sequence[tuple[int, int]], rows: int, streams: int) -> Tensor:
        """Both alike."""
        p, dp = parts(p_RkD)
        tangent = None if dp is None else self._ops.spread(dp, places, rows, streams)
        return _dual(self._ops.spread(p, places, rows, streams), tangent)

    def sparse_linear(self, x: Tensor, weight: Tensor, values: Tensor, indices: Tensor, bias: Tensor | None) -> Tensor:
        """DX (W + S)^T + x dS^T + db."""
        (x, dx), (values, ds), (bias, db) = parts(x), parts(values), maybe(bias)
        tangent: Tensor | None = None
        if not (dx is None and ds is None):
            each = 2 * (x.numel() // x.shape[-1]) * weight.numel()
            tangent = self._ops.compute(
                lambda: tangents.sparse(x, weight, values, indices, dx, ds, db),
                (*x.shape[:-1], weight.shape[0]),
                weight.numel(),
                each * ((dx is not None) + (ds is not None)),
            )
        elif db is not None:
            tangent = self._spread(db, (*x.shape[:-1], len(db)))
        return _dual(self._ops.sparse_linear(x, weight, values, indices, bias), tangent)

    def _spread(self, db: Tensor, shape: tuple[int, ...]) -> Tensor:
        return self._ops.compute(lambda: db.expand(shape).clone(), shape)

    def act(self, x: Tensor, kind: Act) -> Tensor:
        """Act'(x) dx."""
        x, dx = parts(x)
        value = self._ops.act(x, kind)
        if dx is None:
            return value
        return _dual(value, self._ops.compute(lambda: tangents.act(x, value, dx, kind), x.shape))

    def gate(self, gate: Tensor, up: Tensor) -> Tensor:
        """Silu'(gate) dgate up + silu(gate) dup."""
        (gate, dg), (up, du) = parts(gate), parts(up)
        tangent: Tensor | None = None
        if not (dg is None and du is None):
            besides = up.numel() if dg is not None and du is not None else 0
            tangent = self._ops.compute(lambda: tangents.gate(gate, up, dg, du), up.shape, besides)
        return _dual(self._ops.gate(gate, up), tangent)

    def multiply(self, x: Tensor, vector: Tensor) -> Tensor:
        """Vector dx + x dvector."""
        (x, dx), (vector, dv) = parts(x), parts(vector)
        tangent: Tensor | None = None
        if not (dx is None and dv is None):
            tangent = self._ops.compute(lambda: tangents.multiply(x, vector, dx, dv), x.shape)
        return _dual(self._ops.multiply(x, vector), tangent)

    def rotate(self, x_BSE: Tensor, heads: int, theta: float) -> Tensor:
        """Both alike."""
        x, dx = parts(x_BSE)
        tangent = None if dx is None else self._ops.rotate(dx, heads, theta)
        return _dual(self._ops.rotate(x, heads, theta), tangent)

    def hides(self, lengths_B: Tensor, tokens: int) -> Tensor:
        """As it is."""
        return self._ops.hides(lengths_B, tokens)

    def pool(self, x_BSD: Tensor, kind: Pool, start: int, lengths_B: Tensor | None) -> Tensor:
        """Both alike."""
        x, dx = parts(x_BSD)
        tangent = None if dx is None else self._ops.pool(dx, kind, start, lengths_B)
        return _dual(self._ops.pool(x, kind, start, lengths_B), tangent)

    def attention(
        self, q_BSE: Tensor, k_BSE: Tensor, v_BSE: Tensor, heads: int, causal: bool = True, hides: Tensor | None = None
    ) -> Tensor:
        """With P = softmax(Z), Z = q k^T / sqrt(K): dP = P (dZ - rowsum(P dZ)), and dP v + P dv; head by head."""
        (q, dq), (k, dk), (v, dv) = parts(q_BSE), parts(k_BSE), parts(v_BSE)
        tangent: Tensor | None = None
        if not (dq is None and dk is None and dv is None):
            batch, tokens, width = q.shape
            square, moved = tokens * tokens, dq is not None or dk is not None
            mask = -(-square // 4) if causal else 0
            products = 1 + (dq is not None) + (dk is not None) + moved + (dv is not None)
            tangent = self._ops.compute(
                lambda: tangents.attention((q, k, v), (dq, dk, dv), heads, causal, hides),
                q.shape,
                (1 + moved) * batch * square + batch * tokens * width // heads + mask,
                products * 2 * batch * square * width,
            )
        return _dual(self._ops.attention(q, k, v, heads, causal, hides), tangent)

    def add(self, x: Tensor, y: Tensor, scale: float = 1.0) -> Tensor:
        """DX + scale * dy; where only y has a tangent, it is scaled in its own memory."""
        (x, dx), (y, dy) = parts(x), parts(y)
        if dx is not None and dy is not None:
            dx = self._ops.add(dx, dy, scale)
        elif dy is not None:
            dx = dy if scale == 1.0 else self._ops.scale(dy, scale)
        return _dual(self._ops.add(x, y, scale), dx)

    def scale(self, x: Tensor, factor: float) -> Tensor:
        """Both alike."""
        x, dx = parts(x)
        return _dual(self._ops.scale(x, factor), None if dx is None else self._ops.scale(dx, factor))

    def leading(self, p: Tensor, sizes: Sequence[int]) -> Tensor:
        """Both alike."""
        p, dp = parts(p)
        return _dual(self._ops.leading(p, sizes), None if dp is None else self._ops.leading(dp, sizes))

    def cross_entropy(self, logits_BSV: Tensor, targets_BS: Tensor) -> Tensor:
        """Mean over tokens of p . dl - dl_target, with p the probabilities and l the logits."""
        logits, dl = parts(logits_BSV)
        tangent: Tensor | None = None
        if dl is not None:
            tangent = self._ops.compute(lambda: tangents.cross_entropy(logits, dl, targets_BS), (1,), logits.numel())
        return _dual(self._ops.cross_entropy(logits, targets_BS), tangent)

    def head_loss(
        self,
        xs_BSD: Sequence[Tensor],
        weights_VD: Sequence[Tensor],
        biases_V: Sequence[Tensor | None],
        targets_BS: Tensor,
        mix: Mix,
        labels_V: Tensor | None,
        chunked: bool,
    ) -> Tensor:
        """The kernel finds the gradients of its inputs in closed form; the tangent is their product with dx, dW, db."""
        duals = [maybe(each) for each in (*xs_BSD, *weights_VD, *biases_V)]
        inputs: list[Any] = [p if p is None or dp is None else p.detach().requires_grad_() for p, dp in duals]
        xs, weights, biases = (inputs[i * len(xs_BSD) : (i + 1) * len(xs_BSD)] for i in range(3))
        with torch.enable_grad():
            loss = self._ops.head_loss(xs, weights, biases, targets_BS, mix, labels_V, chunked)
        moving = [(p, dp) for p, (_, dp) in zip(inputs, duals, strict=True) if dp is not None]
        if not moving:
            return loss
        loss.backward()  # type: ignore[no-untyped-call]
        tangent = self._ops.compute(
            lambda: torch.stack([torch.dot(cast(Tensor, p.grad).flatten(), dp.flatten()) for p, dp in moving]).sum(),
            (1,),
        )
        return _dual(loss.detach(), tangent)

    def moment(self, name: str) -> None:
        """As it is."""
        self._ops.moment(name)

    def slices(self, count: int, size: int) -> Iterator[slice]:
        """As it is."""
        return self._ops.slices(count, size)

    def drawn(self, networks: Sequence[T], index: int) -> Iterator[T]:
        """As it is."""
        return self._ops.drawn(networks, index)

    def tensor(self, array: np.ndarray) -> Tensor:
        """As it is."""
        return self._ops.tensor(array)
