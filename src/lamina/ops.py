"""The kernels that the model and the client are made of.

`Ops` computes. `lamina.ledger` interprets the very same functions with kernels that count bytes and operations instead,
so prices cannot drift from what a device does. Besides these kernels, those functions use of a tensor only what
`ledger.Shape` has too.

Shape legend: as in `lamina.model`, and N tokens.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lamina import optim
from lamina.flash import Flash, Kept, Pages
from lamina.packed import Packed, PackedLinear, pack, packable, slabs

if TYPE_CHECKING:
    from lamina.coding import Coding
    from lamina.data.task import Shard
    from lamina.job import Local, Turn
    from lamina.layout import Params

T = TypeVar("T")
Draw = Callable[[], np.random.Generator]
"""Gives a generator at the start of the stream that a direction is read from."""

DRAWN = 2**14
"""Numbers of a direction that exist at a time where it is only added to something."""
_LABEL_ROWS = 64
SLICE_TOKENS = 256
"""Tokens that run through a block at a time where nothing else asks for more: as few as keep the kernels busy."""


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


class Ops:
    """The kernels. Fused where torch has it, so that nothing needless is kept for backward."""

    def embed(self, ids: Tensor, tokens: Tensor, positions: Tensor) -> Tensor:
        """Token plus position vectors, BS -> BSD."""
        found = tokens.rows(ids) if isinstance(tokens, Packed) else F.embedding(ids, tokens)
        length = ids.shape[1]
        return found + (positions.unpack() if isinstance(positions, Packed) else positions)[:length]

    def norm(self, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        """Layer norm over the last dimension."""
        return F.layer_norm(x, weight.shape, weight, bias, eps)

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """X W^T + b over the last dimension."""
        if isinstance(weight, Packed):
            return cast(Tensor, PackedLinear.apply(x, weight, bias))
        return F.linear(x, weight, bias)

    def gelu(self, x: Tensor) -> Tensor:
        """GELU, tanh form, in one kernel."""
        return F.gelu(x, approximate="tanh")

    def attention(self, q_BSE: Tensor, k_BSE: Tensor, v_BSE: Tensor, heads: int) -> Tensor:
        """Causal softmax attention on heads laid side by side, E = H K; fused, so no S x S matrix is stored."""
        q_BHSK, k_BHSK, v_BHSK = (x.view(*x.shape[:2], heads, -1).transpose(1, 2) for x in (q_BSE, k_BSE, v_BSE))
        out_BHSK = F.scaled_dot_product_attention(q_BHSK, k_BHSK, v_BHSK, is_causal=True)
        return out_BHSK.transpose(1, 2).flatten(2)

    def add(self, x: Tensor, y: Tensor, scale: float = 1.0) -> Tensor:
        """X + scale * y."""
        return torch.add(x, y, alpha=scale)

    def cross_entropy(self, logits_BSV: Tensor, targets_BS: Tensor) -> Tensor:
        """Mean negative log-likelihood over all positions."""
        return F.cross_entropy(logits_BSV.flatten(0, 1), targets_BS.flatten())

    def head_loss(
        self,
        xs_BSD: Sequence[Tensor],
        weights_VD: Sequence[Tensor],
        targets_BS: Tensor,
        mix: Mix,
        labels_V: Tensor | None,
        chunked: bool,
    ) -> Tensor:
        """Mean loss per token of outputs x W^T that learn from targets and from one another.

        sum_i [ hard_i CE(y, p_i) + sum_j soft_ij KL(p_j || p_i) ] with p_j constant where it teaches; with `chunked`,
        the logits of only a few tokens exist at a time.
        """
        tokens = targets_BS.numel()
        size = chunk_tokens(tokens, weights_VD[0].shape[0]) if chunked else tokens
        flat = [x.flatten(0, 1) for x in xs_BSD]
        loss = _HeadLoss.apply(targets_BS.flatten(), mix, labels_V, size, *flat, *weights_VD)  # type: ignore[no-untyped-call]
        return cast(Tensor, loss)

    def sparse_linear(self, x: Tensor, weight: Tensor, values: Tensor, indices: Tensor, bias: Tensor) -> Tensor:
        """X (W + S)^T + b with S zero but for `values` at `indices` of the flattened weight; W is frozen."""
        return cast(Tensor, _SparseLinear.apply(x, weight, values, indices, bias))  # type: ignore[no-untyped-call]

    def scale(self, x: Tensor, factor: float) -> Tensor:
        """X * factor."""
        return x * factor

    def leading(self, p: Tensor, sizes: Sequence[int]) -> Tensor:
        """The first so many indices of every dimension, in the memory of p."""
        if tuple(sizes) == tuple(p.shape):
            return p
        if isinstance(p, Packed):
            return cast(Tensor, p.leading(sizes))
        return cast(Tensor, _Leading.apply(p, tuple(sizes)))  # type: ignore[no-untyped-call]

    def copy(self, x: Tensor) -> Tensor:
        """The same numbers in memory of their own, without a graph."""
        return x.detach().clone()

    def pull(self, p: Tensor, *terms: tuple[Tensor, float]) -> None:
        """Add factor * term to the gradient of p for each (term, factor)."""
        assert p.grad is not None
        for term, factor in terms:
            p.grad.add_(term.detach(), alpha=factor)

    def tail(self, p: Tensor, dim: int, first: int) -> Tensor:
        """The indices of a dimension from `first` on, in the memory of p, without a graph."""
        return p.detach().narrow(dim, first, p.shape[dim] - first)

    def pull_tail(self, p: Tensor, dim: int, first: int, factor: float) -> None:
        """Add factor * p to the gradient of p, from `first` on along a dimension."""
        assert p.grad is not None
        self.tail(p.grad, dim, first).add_(self.tail(p, dim, first), alpha=factor)

    def gram(self, x: Tensor, rows: bool) -> Tensor:
        """X X^T, or X^T X, of a matrix."""
        x = x.detach()
        return x @ x.T if rows else x.T @ x

    def pull_product(self, p: Tensor, x: Tensor, y: Tensor, factor: float) -> None:
        """Add factor * x @ y, matrices, to the gradient of p, seen as a matrix."""
        assert p.grad is not None
        p.grad.view(x.shape[0], -1).addmm_(x.detach(), y.detach(), alpha=factor)

    def code(self, coding: Coding, name: str, new: Tensor, old: Tensor, turn: Turn) -> Params:
        """What is sent of `new` to where `old` is known."""
        return coding.encode(name, new.detach(), old, turn)

    def direction(self, p: Tensor, draw: Draw) -> Tensor:
        """Standard normal numbers of the shape of p."""
        out = torch.empty(p.shape)
        draw().standard_normal(dtype=np.float32, out=out.numpy())
        return out

    @torch.no_grad()
    def shift(self, p: Tensor, draw: Draw, factor: float) -> None:
        """Add factor * the direction of the same draw to p, of which only a part exists at a time."""
        flat, rng = p.view(-1), draw()
        space = torch.empty(min(DRAWN, p.numel()))
        for rows in self.slices(p.numel(), len(space)):
            part = space[: rows.stop - rows.start]
            rng.standard_normal(dtype=np.float32, out=part.numpy())
            flat[rows].add_(part, alpha=factor)

    def steer(self, p: Tensor, terms: Sequence[tuple[Draw, float]]) -> None:
        """Let the gradient of p be the sum of factor * direction over (draw, factor)."""
        p.grad = torch.zeros_like(p)
        for draw, factor in terms:
            self.shift(p.grad, draw, factor)

    def add_linear(self, out: Tensor, x: Tensor, weight: Tensor) -> None:
        """Add X W^T to `out`."""
        out.view(-1, len(weight)).addmm_(x.flatten(0, -2), weight.T)

    def compute(self, call: Callable[[], Tensor], shape: Sequence[int], scratch: int = 0, flops: int = 0) -> Tensor:
        """What `call` returns, of this shape, without a graph; it needs so many numbers besides while it runs."""
        return call()

    def moment(self, name: str) -> None:
        """Told what the device is at: "prefix", "load", "forward", "loss", "backward" or "update"."""

    def examples(self, rows: np.ndarray) -> np.ndarray:
        """The rows of the shard that are used in a round."""
        return rows

    def slices(self, count: int, size: int) -> Iterator[slice]:
        """Consecutive slices of at most `size` that make up `count`."""
        return (slice(start, min(start + size, count)) for start in range(0, count, size))

    def few(self, length: int) -> int:
        """Sequences of this length that run at a time where few are to."""
        return max(1, SLICE_TOKENS // length)

    def drawn(self, networks: Sequence[T], index: int) -> Iterator[T]:
        """The one of some networks that a step has drawn."""
        yield networks[index]

    def labels(self, shard: Shard, vocabulary: int) -> Tensor:
        """Which tokens a device ever has to predict, bool [vocabulary]."""
        found = torch.zeros(vocabulary, dtype=torch.bool)
        for rows in self.slices(len(shard), _LABEL_ROWS):
            found[torch.from_numpy(np.unique(shard.batch(np.arange(rows.start, rows.stop))[1]))] = True
        return found

    def tensor(self, array: np.ndarray) -> Tensor:
        """The tensor in a numpy array's memory."""
        return torch.from_numpy(array)

    def empty_like(self, x: Tensor) -> Tensor:
        """A tensor to be filled."""
        return torch.empty_like(x)

    def rows(self, arrays: Mapping[str, Tensor], name: str, indices: np.ndarray) -> Tensor:
        """Some rows of a tensor, of which the others need not be in memory."""
        return (
            arrays.rows(name, indices.tolist())
            if isinstance(arrays, Flash)
            else arrays[name][torch.from_numpy(indices)]
        )

    def hold(self, arrays: Mapping[str, Tensor], name: str, bits: int) -> Tensor:
        """A frozen tensor in memory, in fewer bits where asked; see `lamina.packed`."""
        if bits == 32:
            return arrays[name]
        shape = tuple(arrays.shape(name) if isinstance(arrays, Flash) else arrays[name].shape)
        if not packable(shape, bits):
            return arrays[name]
        return cast(Tensor, pack(shape, bits, lambda rows: self.rows(arrays, name, np.array(rows))))

    def cache(self, rows: int, shape: tuple[int, ...], place: str, bits: int) -> Kept | Pages:
        """Room for so many rows of `shape` in "ram" or on "disk", in 32 or 16 bits."""
        dtype = torch.float32 if bits == 32 else torch.float16
        if place == "ram":
            return Kept(rows, shape, dtype)
        return Pages(tempfile.TemporaryFile(), shape, dtype)

    def optimizer(self, params: Sequence[Tensor], local: Local, kind: optim.Kind, lr: float) -> torch.optim.Optimizer:
        """An optimizer over some of the trained tensors."""
        return optim.build(params, local, kind, lr)

    def norm_of(self, tensors: Sequence[Tensor]) -> Tensor:
        """Euclidean norm of all elements together."""
        return torch.nn.utils.get_total_norm(tensors)

    def clip(self, params: Sequence[Tensor], limit: float, norm: Tensor) -> None:
        """Scale gradients as if `norm` were that of the whole gradient and `limit` the most it may be."""
        torch.nn.utils.clip_grads_with_norm_(params, limit, norm)


TORCH = Ops()

_CHUNK_ELEMENTS, _CHUNK_TOKENS = 2**20, 32


def chunk_tokens(tokens: int, vocabulary: int) -> int:
    """Tokens whose logits exist at a time in `linear_cross_entropy`: about a million logits, at least 32 tokens."""
    return min(tokens, max(_CHUNK_TOKENS, _CHUNK_ELEMENTS // vocabulary))


class _HeadLoss(torch.autograd.Function):
    """`Ops.head_loss`, a few tokens at a time; forward finds the gradients as well.

    With y the one-hot target, q_i = sum_j soft_ij p_j and s_i = sum_j soft_ij, the gradient with respect to the logits
    of output i is [(hard_i + s_i) p_i - hard_i y - q_i] / N, which for an output alone overwrites its probabilities.
    The products are those of the plain computation, no more.
    """

    @staticmethod
    def forward(ctx: Any, targets_N: Tensor, mix: Mix, labels_V: Tensor | None, size: int, *tensors: Tensor) -> Tensor:
        """Mean loss."""
        count = len(tensors) // 2
        xs, weights, needed = tensors[:count], tensors[count:], ctx.needs_input_grad[4:]
        found = [torch.zeros_like(each) if need else None for each, need in zip(tensors, needed, strict=True)]
        tokens, vocabulary = len(targets_N), weights[0].shape[0]
        total, teaching = xs[0].new_zeros(()), any(map(any, mix.soft))
        space = xs[0].new_empty(count, size, vocabulary)
        spare = xs[0].new_empty(2, size, vocabulary) if teaching else None
        for start in range(0, tokens, size):
            rows = slice(start, start + size)
            targets = targets_N[rows, None]
            for i, (x_ND, weight_VD) in enumerate(zip(xs, weights, strict=True)):
                p = space[i, : len(targets)]
                for part, slab in slabs(weight_VD):
                    torch.mm(x_ND[rows], slab.T, out=p[:, part])
                    del slab
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
                if found[i] is None and found[count + i] is None:
                    continue
                g.scatter_add_(1, targets, torch.full_like(targets, -mix.hard[i], dtype=p.dtype)).div_(tokens)
                if labels_V is not None:
                    g.masked_fill_(~labels_V, 0)
                _backward(g, xs[i][rows], weights[i], found[i], found[count + i], rows)
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


def _backward(
    g_NV: Tensor, x_ND: Tensor, weight_VD: Tensor, of_x: Tensor | None, of_weight: Tensor | None, rows: slice
) -> None:
    """Add to the gradients of x and W what comes through the logits' gradient."""
    if of_x is not None:
        for part, slab in slabs(weight_VD):
            of_x[rows].addmm_(g_NV[:, part], slab)
            del slab
    if of_weight is not None:
        of_weight.addmm_(g_NV.T, x_ND)


class _SparseLinear(torch.autograd.Function):
    """`Ops.sparse_linear`; the sum of the weights is made anew in backward instead of being kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, values: Tensor, indices: Tensor, bias: Tensor) -> Tensor:
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


class _Leading(torch.autograd.Function):
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
