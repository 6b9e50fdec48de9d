"""The kernels that the model and the client are made of.

`Ops` computes. `lamina.ledger` interprets the very same functions with kernels that count bytes and operations instead,
so prices cannot drift from what a device does. Besides these kernels, those functions use of a tensor only what
`ledger.Shape` has too.

Shape legend: as in `lamina.model`, and N tokens.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, TypeVar, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lamina import optim
from lamina.flash import Flash, Kept, Pages
from lamina.kernels import (
    Gate,
    GroupLinear,
    HeadLoss,
    Leading,
    LoraLinear,
    Mix,
    Patches,
    RmsNorm,
    Rotate,
    SparseLinear,
    Spread,
)
from lamina.packed import Packed, PackedLinear, pack, packable, unpacked

if TYPE_CHECKING:
    from lamina.coding import Coding
    from lamina.data.task import Shard
    from lamina.job import Local, Turn
    from lamina.layout import Params
    from lamina.spec import Act, Pool

T = TypeVar("T")
HOST = torch.device("cpu")
Draw = Callable[[], np.random.Generator]
"""Gives a generator at the start of the stream that a direction is read from."""

DRAWN = 2**14
"""Numbers of a direction that exist at a time where it is only added to something."""
_LABEL_ROWS = 64
SLICE_TOKENS = 256
"""Tokens that run through a block at a time where nothing else asks for more: as few as keep the kernels busy."""


class Ops:
    """The kernels. Fused where torch has it, so that nothing needless is kept for backward.

    Attributes:
        device: Where they compute: what is made of arrays and of numbers drawn on the host goes there.
    """

    def __init__(self, device: torch.device = HOST) -> None:
        """Compute there."""
        self.device = device

    def embed(
        self, ids: Tensor, tokens: Tensor, positions: Tensor | None, types: Tensor | None = None, first: int = 0
    ) -> Tensor:
        """Token vectors BSD of ids BS, plus those of their positions, from row `first` on, plus the first type's."""
        found = tokens.rows(ids) if isinstance(tokens, Packed) else F.embedding(ids, tokens)
        if positions is not None:
            found = found + unpacked(positions)[first : first + ids.shape[1]]
        return found if types is None else found + unpacked(types)[0]

    def patches(
        self,
        pixels_BCYX: Tensor,
        weight: Tensor,
        bias: Tensor,
        positions: Tensor,
        leads: Tensor | None,
        registers: Tensor | None,
    ) -> Tensor:
        """Leads with their positions, registers, and patches of images, mapped linearly, with theirs, BSD."""
        tables = (None if each is None else unpacked(each) for each in (weight, bias, positions, leads, registers))
        return cast(Tensor, Patches.apply(pixels_BCYX, *tables))  # type: ignore[no-untyped-call]

    def norm(self, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        """Layer norm over the last dimension."""
        return F.layer_norm(x, weight.shape, weight, bias, eps)

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """X W^T + b over the last dimension."""
        if isinstance(weight, Packed):
            return cast(Tensor, PackedLinear.apply(x, weight, bias))
        return F.linear(x, weight, bias)

    def lora_linear(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, a_RI: Tensor, b_OR: Tensor, scale: float
    ) -> Tensor:
        """X W^T + b + scale (x A^T) B^T."""
        if isinstance(a_RI, Packed) or isinstance(b_OR, Packed):
            return self.three_linears(x, weight, bias, a_RI, b_OR, scale)
        out, _ = LoraLinear.apply(x, weight, bias, a_RI, b_OR, scale)  # type: ignore[no-untyped-call]
        return cast(Tensor, out)

    def three_linears(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, a_RI: Tensor, b_OR: Tensor, scale: float
    ) -> Tensor:
        """The same of kernels that there are."""
        return self.add(self.linear(x, weight, bias), self.linear(self.linear(x, a_RI), b_OR), scale)

    def group_linear(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, units: Sequence[int], by_rows: bool
    ) -> Tensor:
        """A linear layer on streams side by side, each with its part of the weight; see `kernels.GroupLinear`."""
        return cast(Tensor, GroupLinear.apply(x, weight, bias, tuple(units), by_rows))  # type: ignore[no-untyped-call]

    def fork(self, x: Tensor, streams: int) -> Tensor:
        """So many copies of each vector side by side."""
        return x.unsqueeze(-2).expand(*x.shape[:-1], streams, -1).flatten(-2)

    def spread(self, p_RkD: Tensor, places: Sequence[tuple[int, int]], rows: int, streams: int) -> Tensor:
        """A matrix [rows, k streams D] that is zero but for the rows of p: (row, stream) of each is in `places`."""
        return cast(Tensor, Spread.apply(p_RkD, tuple(places), rows, streams))  # type: ignore[no-untyped-call]

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """RMS norm over the last dimension."""
        return cast(Tensor, RmsNorm.apply(x, weight, eps))  # type: ignore[no-untyped-call]

    def act(self, x: Tensor, kind: Act) -> Tensor:
        """An activation, in one kernel."""
        match kind:
            case "gelu_tanh":
                return F.gelu(x, approximate="tanh")
            case "gelu":
                return F.gelu(x)
            case "relu":
                return F.relu(x)
            case "silu":
                return F.silu(x)
            case "tanh":
                return torch.tanh(x)

    def gate(self, gate: Tensor, up: Tensor) -> Tensor:
        """Silu(gate) * up."""
        return cast(Tensor, Gate.apply(gate, up))  # type: ignore[no-untyped-call]

    def multiply(self, x: Tensor, vector: Tensor) -> Tensor:
        """Each row of X times a vector, element by element."""
        return x * vector

    def rotate(self, x_BSE: Tensor, heads: int, theta: float) -> Tensor:
        """Rotary positions on heads laid side by side; see `kernels.Rotate`."""
        return cast(Tensor, Rotate.apply(x_BSE, heads, theta))  # type: ignore[no-untyped-call]

    def attention(
        self, q_BSE: Tensor, k_BSE: Tensor, v_BSE: Tensor, heads: int, causal: bool = True, hides: Tensor | None = None
    ) -> Tensor:
        """Softmax attention on heads laid side by side, E = H K; fused, so no S x S matrix is stored.

        Keys and values may have fewer heads, of which each serves several of the queries, one after another. What
        `hides`, [B, 1, 1, S], is added to the scores.
        """
        dim = q_BSE.shape[-1] // heads
        q_BHSK, k_BHSK, v_BHSK = (x.view(*x.shape[:2], -1, dim).transpose(1, 2) for x in (q_BSE, k_BSE, v_BSE))
        out_BHSK = F.scaled_dot_product_attention(
            q_BHSK, k_BHSK, v_BHSK, hides, is_causal=causal, enable_gqa=k_BHSK.shape[1] < heads
        )
        return out_BHSK.transpose(1, 2).flatten(2)

    def hides(self, lengths_B: Tensor, tokens: int) -> Tensor:
        """What hides, in attention, the tokens after the end of each text: 0, and there -inf, [B, 1, 1, S]."""
        out_BS = torch.zeros(len(lengths_B), tokens, device=lengths_B.device)
        beyond_BS = torch.arange(tokens, device=lengths_B.device) >= lengths_B[:, None]
        return out_BS.masked_fill_(beyond_BS, -torch.inf)[:, None, None]

    def pool(self, x_BSD: Tensor, kind: Pool, start: int, lengths_B: Tensor | None) -> Tensor:
        """What a classification head sees of sequences, [B, 1, D], or [B, 1, 2 D]: two parts side by side.

        The "mean" is over what is from `start` on and before the end.
        """
        batch, tokens = x_BSD.shape[:2]
        weights_BkS = pool_weights(kind, start, lengths_B, batch, tokens, x_BSD.device).to(x_BSD)
        return torch.bmm(weights_BkS, x_BSD).reshape(batch, 1, -1)

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
        biases_V: Sequence[Tensor | None],
        targets_BS: Tensor,
        mix: Mix,
        labels_V: Tensor | None,
        chunked: bool,
    ) -> Tensor:
        """Mean loss per token of outputs x W^T + b that learn from targets and from one another.

        sum_i [ hard_i CE(y, p_i) + sum_j soft_ij KL(p_j || p_i) ] with p_j constant where it teaches; with `chunked`,
        the logits of only a few tokens exist at a time.
        """
        tokens = targets_BS.numel()
        size = chunk_tokens(tokens, weights_VD[0].shape[0]) if chunked else tokens
        flat = [x.flatten(0, 1) for x in xs_BSD]
        tensors = (*flat, *weights_VD, *biases_V)
        loss = HeadLoss.apply(targets_BS.flatten(), mix, labels_V, size, *tensors)  # type: ignore[no-untyped-call]
        return cast(Tensor, loss)

    def sparse_linear(self, x: Tensor, weight: Tensor, values: Tensor, indices: Tensor, bias: Tensor | None) -> Tensor:
        """X (W + S)^T + b with S zero but for `values` at `indices` of the flattened weight; W is frozen."""
        return cast(Tensor, SparseLinear.apply(x, weight, values, indices, bias))  # type: ignore[no-untyped-call]

    def scale(self, x: Tensor, factor: float) -> Tensor:
        """X * factor."""
        return x * factor

    def leading(self, p: Tensor, sizes: Sequence[int]) -> Tensor:
        """The first so many indices of every dimension, in the memory of p."""
        if tuple(sizes) == tuple(p.shape):
            return p
        if isinstance(p, Packed):
            return cast(Tensor, p.leading(sizes))
        return cast(Tensor, Leading.apply(p, tuple(sizes)))  # type: ignore[no-untyped-call]

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
        """What is sent of `new` to where `old` is known, on the host."""
        return coding.encode(name, new.detach().to(HOST), old.to(HOST), turn)

    def direction(self, p: Tensor, draw: Draw) -> Tensor:
        """Standard normal numbers of the shape of p."""
        out = torch.empty(p.shape)
        draw().standard_normal(dtype=np.float32, out=out.numpy())
        return out.to(p.device)

    @torch.no_grad()
    def shift(self, p: Tensor, draw: Draw, factor: float) -> None:
        """Add factor * the direction of the same draw to p, of which only a part exists at a time."""
        flat, rng = p.view(-1), draw()
        space = torch.empty(min(DRAWN, p.numel()))
        for rows in self.slices(p.numel(), len(space)):
            part = space[: rows.stop - rows.start]
            rng.standard_normal(dtype=np.float32, out=part.numpy())
            flat[rows].add_(part.to(p.device), alpha=factor)

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
        return found.to(self.device)

    def tensor(self, array: np.ndarray) -> Tensor:
        """A numpy array as a tensor: in its memory on the host, a copy elsewhere."""
        return torch.from_numpy(array).to(self.device)

    def empty_like(self, x: Tensor) -> Tensor:
        """A tensor to be filled."""
        return torch.empty_like(x)

    def rows(self, arrays: Mapping[str, Tensor], name: str, indices: np.ndarray) -> Tensor:
        """Some rows of a tensor, of which the others need not be in memory."""
        return arrays.rows(name, indices.tolist()) if isinstance(arrays, Flash) else arrays[name][self.tensor(indices)]

    def hold(self, arrays: Mapping[str, Tensor], name: str, bits: int) -> Tensor:
        """A frozen tensor in memory, in fewer bits where asked; see `lamina.packed`."""
        if bits == 32:
            return arrays[name]
        shape = tuple(arrays.shape(name) if isinstance(arrays, Flash) else arrays[name].shape)
        if not packable(shape, bits):
            return arrays[name]
        return cast(Tensor, pack(shape, bits, lambda rows: self.rows(arrays, name, np.array(rows)), self.device))

    def cache(self, rows: int, shape: tuple[int, ...], place: str, bits: int) -> Kept | Pages:
        """Room for so many rows of `shape` in "ram" or on "disk", in 32 or 16 bits."""
        dtype = torch.float32 if bits == 32 else torch.float16
        if place == "ram":
            return Kept(rows, shape, dtype, self.device)
        return Pages(tempfile.TemporaryFile(), shape, dtype, self.device)

    def optimizer(
        self, rated: Mapping[float, Sequence[Tensor]], local: Local, kind: optim.Kind
    ) -> torch.optim.Optimizer:
        """An optimizer over some of the trained tensors, given by their learning rates."""
        return optim.build(rated, local, kind)

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


def pool_weights(
    kind: Pool, start: int, lengths_B: Tensor | None, batch: int, tokens: int, device: torch.device
) -> Tensor:
    """How much of each row of a sequence goes into each part of what its head sees, [B, k, S]."""
    places = torch.arange(tokens, device=device)
    ends_B = torch.full((batch,), tokens, device=device) if lengths_B is None else lengths_B
    first_BS = (places == 0).float().expand(batch, tokens)
    if kind == "first":
        return first_BS[:, None].contiguous()
    if kind == "last":
        return (places == ends_B[:, None] - 1).float()[:, None]
    within_BS = ((places >= start) & (places < ends_B[:, None])).float()
    mean_BS = within_BS.div_(within_BS.sum(1, keepdim=True))
    return mean_BS[:, None] if kind == "mean" else torch.stack([first_BS, mean_BS], 1)
