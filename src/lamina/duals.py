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
from typing import TypeVar, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lamina.kernels import Mix, plus_sparse
from lamina.ops import Ops
from lamina.packed import Packed
from lamina.spec import Act

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


def parts(x: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Value and tangent of what is a dual number or a plain tensor, which has none."""
    return (x.value, x.tangent) if isinstance(x, Dual) else (cast(Tensor, x), None)


def _dual(value: Tensor, tangent: Tensor | None) -> Tensor:
    return value if tangent is None else cast(Tensor, Dual(value, tangent))


class Duals(Ops):
    """Those kernels that a forward pass is made of, on plain tensors and dual numbers alike."""

    def __init__(self, ops: Ops) -> None:
        """Compute with the kernels of `ops`."""
        self._ops = ops

    def embed(
        self, ids: Tensor, tokens: Tensor, positions: Tensor | None, types: Tensor | None = None, first: int = 0
    ) -> Tensor:
        """The same lookup."""
        assert positions is not None and types is None and not first
        (tokens, dt), (positions, dp) = parts(tokens), parts(positions)
        shape = (*ids.shape, tokens.shape[1])
        tangent: Tensor | None = None
        if dt is not None and dp is not None:
            tangent = self._ops.embed(ids, dt, dp)
        elif dt is not None:
            tangent = self._ops.compute(lambda: F.embedding(ids, dt), shape)
        elif dp is not None:
            tangent = self._ops.compute(lambda: dp[: shape[1]].expand(shape).clone(), shape)
        return _dual(self._ops.embed(ids, tokens, positions), tangent)

    def norm(self, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        """With n the normalised input: w dn + n dw + db; see `_norm_tangent`."""
        (x, dx), (weight, dw), (bias, db) = parts(x), parts(weight), parts(bias)
        tangent: Tensor | None = None
        if not (dx is None and dw is None and db is None):
            besides = 2 * (x.numel() // x.shape[-1]) + (x.numel() if dx is not None and dw is not None else 0)
            tangent = self._ops.compute(lambda: _norm_tangent(x, weight, dx, dw, db, eps), x.shape, besides)
        return _dual(self._ops.norm(x, weight, bias, eps), tangent)

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """DX W^T + x dW^T + db."""
        (x, dx), (weight, dw), (bias, db) = parts(x), parts(weight), parts(bias)
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

    def sparse_linear(self, x: Tensor, weight: Tensor, values: Tensor, indices: Tensor, bias: Tensor | None) -> Tensor:
        """DX (W + S)^T + x dS^T + db."""
        (x, dx), (values, ds), (bias, db) = parts(x), parts(values), parts(bias)
        tangent: Tensor | None = None
        if not (dx is None and ds is None):
            each = 2 * (x.numel() // x.shape[-1]) * weight.numel()
            tangent = self._ops.compute(
                lambda: _sparse_tangent(x, weight, values, indices, dx, ds, db),
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
        """Gelu'(x) dx: the kernel that torch has for backward."""
        x, dx = parts(x)
        if dx is None:
            return self._ops.act(x, kind)
        assert kind == "gelu_tanh"
        tangent = self._ops.compute(lambda: torch.ops.aten.gelu_backward(dx, x, approximate="tanh"), x.shape)
        return _dual(self._ops.act(x, kind), tangent)

    def attention(
        self, q_BSE: Tensor, k_BSE: Tensor, v_BSE: Tensor, heads: int, causal: bool = True, hides: Tensor | None = None
    ) -> Tensor:
        """With P = softmax(Z), Z = q k^T / sqrt(K): dP = P (dZ - rowsum(P dZ)), and dP v + P dv; head by head."""
        (q, dq), (k, dk), (v, dv) = parts(q_BSE), parts(k_BSE), parts(v_BSE)
        tangent: Tensor | None = None
        if not (dq is None and dk is None and dv is None):
            batch, tokens, width = q.shape
            square, moved = tokens * tokens, dq is not None or dk is not None
            products = 1 + (dq is not None) + (dk is not None) + moved + (dv is not None)
            tangent = self._ops.compute(
                lambda: _attention_tangent((q, k, v), (dq, dk, dv), heads),
                q.shape,
                (1 + moved) * batch * square + batch * tokens * width // heads + -(-square // 4),
                products * 2 * batch * square * width,
            )
        return _dual(self._ops.attention(q, k, v, heads), tangent)

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
            tangent = self._ops.compute(lambda: _cross_entropy_tangent(logits, dl, targets_BS), (1,), logits.numel())
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
        """The kernel finds the gradients of its inputs in closed form; the tangent is their product with dx and dW."""
        duals = [parts(each) for each in (*xs_BSD, *weights_VD)]
        inputs = [p if dp is None else p.detach().requires_grad_() for p, dp in duals]
        count = len(xs_BSD)
        with torch.enable_grad():
            loss = self._ops.head_loss(inputs[:count], inputs[count:], biases_V, targets_BS, mix, labels_V, chunked)
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


def _norm_tangent(
    x: Tensor, weight: Tensor, dx: Tensor | None, dw: Tensor | None, db: Tensor | None, eps: float
) -> Tensor:
    """W J dx + n dw + db; J = (1 - 1 1^T / D - n n^T / D) / deviation is symmetric, so backward's kernel gives J dx."""
    size = list(weight.shape)
    n, mean, rstd = torch.native_layer_norm(x, size, None, None, eps)
    if dx is None:
        out = n.mul_(dw) if dw is not None else n.zero_()
    else:
        if dw is None:
            del n
        needed = [True, False, False]
        out = torch.ops.aten.native_layer_norm_backward(dx, x, size, mean, rstd, None, None, needed)[0].mul_(weight)
        if dw is not None:
            out.addcmul_(n, dw)
    return out if db is None else out.add_(db)


def _sparse_tangent(
    x: Tensor,
    weight: Tensor | Packed,
    values: Tensor,
    indices: Tensor,
    dx: Tensor | None,
    ds: Tensor | None,
    db: Tensor | None,
) -> Tensor:
    """One dense matrix at a time."""
    rows, columns = weight.shape
    out: Tensor | None = None
    if ds is not None:
        moved = torch.zeros(rows, columns, dtype=x.dtype)
        moved.view(-1).index_add_(0, indices, ds)
        out = F.linear(x, moved, db)
        del moved
    if dx is not None:
        whole = plus_sparse(weight, values, indices)
        if out is None:
            return F.linear(dx, whole, db)
        out.view(-1, rows).addmm_(dx.flatten(0, -2), whole.T)
    assert out is not None
    return out


def _attention_tangent(
    values: tuple[Tensor, Tensor, Tensor], tangents: tuple[Tensor | None, Tensor | None, Tensor | None], heads: int
) -> Tensor:
    """All heads; of one at a time there are matrices of tokens by tokens."""
    out_BSE = torch.empty_like(values[0])
    tokens, width = out_BSE.shape[1:]
    future = torch.ones(tokens, tokens, dtype=torch.bool).triu_(1)
    for head in range(heads):
        part = slice(head * width // heads, (head + 1) * width // heads)
        q, k, v = (each[..., part] for each in values)
        dq, dk, dv = (None if each is None else each[..., part] for each in tangents)
        out_BSE[..., part] = _head_tangent(q, k, v, dq, dk, dv, future)
    return out_BSE


def _head_tangent(
    q_BSK: Tensor,
    k_BSK: Tensor,
    v_BSK: Tensor,
    dq_BSK: Tensor | None,
    dk_BSK: Tensor | None,
    dv_BSK: Tensor | None,
    future_SS: Tensor,
) -> Tensor:
    scale = q_BSK.shape[-1] ** -0.5
    p_BSS = torch.bmm(q_BSK, k_BSK.mT).mul_(scale).masked_fill_(future_SS, -torch.inf)
    p_BSS.sub_(p_BSS.amax(-1, keepdim=True)).exp_()
    p_BSS.div_(p_BSS.sum(-1, keepdim=True))
    dp_BSS: Tensor | None = None
    for left, right in ((dq_BSK, k_BSK), (q_BSK, dk_BSK)):
        if left is not None and right is not None:
            dp_BSS = torch.bmm(left, right.mT) if dp_BSS is None else dp_BSS.baddbmm_(left, right.mT)
    out_BSK: Tensor | None = None
    if dp_BSS is not None:
        dp_BSS.mul_(p_BSS).mul_(scale)
        dp_BSS.addcmul_(p_BSS, dp_BSS.sum(-1, keepdim=True), value=-1)
        out_BSK = torch.bmm(dp_BSS, v_BSK)
    if dv_BSK is not None:
        out_BSK = torch.bmm(p_BSS, dv_BSK) if out_BSK is None else out_BSK.baddbmm_(p_BSS, dv_BSK)
    assert out_BSK is not None
    return out_BSK


def _cross_entropy_tangent(logits_BSV: Tensor, dl_BSV: Tensor, targets_BS: Tensor) -> Tensor:
    p_BSV, count = torch.softmax(logits_BSV, -1), targets_BS.numel()
    slope = torch.dot(p_BSV.view(-1), dl_BSV.reshape(-1))
    del p_BSV
    return (slope - dl_BSV.gather(-1, targets_BS[..., None]).sum()) / count
