"""Derivatives of kernels along a direction, in closed form, each with little more memory than it returns.

`lamina.duals` says which kernel each belongs to, and what it takes besides.

Shape legend: as in `lamina.model`; d.. is the tangent of ..., None where there is none.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from lamina.kernels import plus_sparse, unfolded
from lamina.packed import Packed
from lamina.spec import Act


def embed(
    ids_BS: Tensor, width: int, dtokens: Tensor | None, dpositions: Tensor | None, dtypes: Tensor | None, first: int
) -> Tensor:
    """The same lookup."""
    out_BSD = _zeros((*ids_BS.shape, width), dpositions, dtypes) if dtokens is None else F.embedding(ids_BS, dtokens)
    if dpositions is not None:
        out_BSD.add_(dpositions[first : first + ids_BS.shape[1]])
    return out_BSD if dtypes is None else out_BSD.add_(dtypes[0])


def patches(
    pixels_BCYX: Tensor, shape: Sequence[int], counts: tuple[int, int], dtables: Sequence[Tensor | None]
) -> Tensor:
    """The same map, of this shape, one image after another.

    Args:
        pixels_BCYX: Images.
        shape: Of the result.
        counts: Of leads and of registers.
        dtables: Tangents of weight, bias, positions, leads and registers.
    """
    dweight, dbias, dpositions, dleads, dregisters = dtables
    out_BSD = _zeros(shape, *dtables)
    at_leads, at_registers, at_patches = out_BSD.tensor_split([counts[0], sum(counts)], 1)
    if dweight is not None:
        for pixels_CYX, at_SD in zip(pixels_BCYX, at_patches, strict=True):
            torch.addmm(at_SD, unfolded(pixels_CYX, dweight.shape[-1]), dweight.flatten(1).T, out=at_SD)
    if dbias is not None:
        at_patches.add_(dbias)
    if dpositions is not None:
        at_patches.add_(dpositions[counts[0] :])
        at_leads.add_(dpositions[: counts[0]])
    if dleads is not None:
        at_leads.add_(dleads)
    if dregisters is not None:
        at_registers.add_(dregisters)
    return out_BSD


def _zeros(shape: Sequence[int], *like: Tensor | None) -> Tensor:
    """Of the type of the first tensor there is."""
    return next(each for each in like if each is not None).new_zeros(tuple(shape))


def norm(x: Tensor, weight: Tensor, dx: Tensor | None, dw: Tensor | None, db: Tensor | None, eps: float) -> Tensor:
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


def rms_norm(x: Tensor, weight: Tensor, dx: Tensor | None, dw: Tensor | None, eps: float) -> Tensor:
    """With r the inverse root: r [w (dx - x r^2 mean(x dx)) + x dw]."""
    width = x.shape[-1]
    rstd = torch.linalg.vecdot(x, x)[..., None].div_(width).add_(eps).rsqrt_()
    if dx is None:
        assert dw is not None
        out: Tensor = x * rstd
        return out.mul_(dw)
    inner = torch.linalg.vecdot(x, dx)[..., None].div_(-width).mul_(rstd).mul_(rstd)
    out = (x * inner).add_(dx).mul_(weight)
    return (out if dw is None else out.addcmul_(x, dw)).mul_(rstd)


def act(x: Tensor, y: Tensor, dx: Tensor, kind: Act) -> Tensor:
    """The slope at x, where y is, times dx: by the kernels that torch has for backward."""
    aten = torch.ops.aten
    match kind:
        case "gelu_tanh":
            found = aten.gelu_backward(dx, x, approximate="tanh")
        case "gelu":
            found = aten.gelu_backward(dx, x)
        case "relu":
            found = aten.threshold_backward(dx, x, 0)
        case "silu":
            found = aten.silu_backward(dx, x)
        case "tanh":
            found = aten.tanh_backward(dx, y)
    return cast(Tensor, found)


def gate(gate: Tensor, up: Tensor, dgate: Tensor | None, dup: Tensor | None) -> Tensor:
    """Silu'(gate) dgate up + silu(gate) dup."""
    if dgate is None:
        out: Tensor = F.silu(gate)
        assert dup is not None
        return out.mul_(dup)
    through: Tensor = torch.ops.aten.silu_backward(dgate, gate).mul_(up)
    return through if dup is None else through.addcmul_(F.silu(gate), dup)


def multiply(x: Tensor, vector: Tensor, dx: Tensor | None, dvector: Tensor | None) -> Tensor:
    """Vector dx + x dvector."""
    if dx is None:
        assert dvector is not None
        return x * dvector
    out = dx * vector
    return out if dvector is None else out.addcmul_(x, dvector)


def sparse(
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
        moved = x.new_zeros(rows, columns)
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


def attention(
    values: tuple[Tensor, Tensor, Tensor],
    tangents: tuple[Tensor | None, Tensor | None, Tensor | None],
    heads: int,
    causal: bool,
    hides: Tensor | None,
) -> Tensor:
    """All heads; of one at a time there are matrices of tokens by tokens."""
    out_BSE = torch.empty_like(values[0])
    tokens, width = out_BSE.shape[1:]
    dim = width // heads
    shared = width // values[1].shape[2]
    future = torch.ones(tokens, tokens, dtype=torch.bool, device=out_BSE.device).triu_(1) if causal else None
    for head in range(heads):
        parts = [slice(each * dim, (each + 1) * dim) for each in (head, head // shared, head // shared)]
        q, k, v = (each[..., part] for each, part in zip(values, parts, strict=True))
        dq, dk, dv = (None if d is None else d[..., part] for d, part in zip(tangents, parts, strict=True))
        out_BSE[..., parts[0]] = _head(q, k, v, dq, dk, dv, future, hides)
    return out_BSE


def _head(
    q_BSK: Tensor,
    k_BSK: Tensor,
    v_BSK: Tensor,
    dq_BSK: Tensor | None,
    dk_BSK: Tensor | None,
    dv_BSK: Tensor | None,
    future_SS: Tensor | None,
    hides: Tensor | None,
) -> Tensor:
    scale = q_BSK.shape[-1] ** -0.5
    p_BSS = torch.bmm(q_BSK, k_BSK.mT).mul_(scale)
    if future_SS is not None:
        p_BSS.masked_fill_(future_SS, -torch.inf)
    if hides is not None:
        p_BSS.add_(hides[:, 0])
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


def cross_entropy(logits_BSV: Tensor, dl_BSV: Tensor, targets_BS: Tensor) -> Tensor:
    """Mean over tokens of p . dl - dl_target."""
    p_BSV, count = torch.softmax(logits_BSV, -1), targets_BS.numel()
    slope = torch.dot(p_BSV.view(-1), dl_BSV.reshape(-1))
    del p_BSV
    return (slope - dl_BSV.gather(-1, targets_BS[..., None]).sum()) / count
