"""The kernels that the model and the client are made of.

`Ops` computes. `lamina.ledger` interprets the very same functions with kernels that count bytes and operations instead,
so prices cannot drift from what a device does. Besides these kernels, those functions use of a tensor only what
`ledger.Shape` has too.

Shape legend: as in `lamina.model`, and N tokens.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lamina import optim
from lamina.flash import Flash, Kept, Pages
from lamina.packed import Packed, PackedLinear, pack, packable, slabs

if TYPE_CHECKING:
    from lamina.job import Local


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

    def linear_cross_entropy(self, x_BSD: Tensor, weight_VD: Tensor, targets_BS: Tensor) -> Tensor:
        """`cross_entropy` of logits X W^T, of which only those of a few tokens exist at a time."""
        loss = _LinearCrossEntropy.apply(x_BSD.flatten(0, 1), weight_VD, targets_BS.flatten())  # type: ignore[no-untyped-call]
        return cast(Tensor, loss)

    def moment(self, name: str) -> None:
        """Told what the device is at: "prefix", "load", "forward", "loss", "backward" or "update"."""

    def examples(self, rows: np.ndarray) -> np.ndarray:
        """The rows of the shard that are used in a round."""
        return rows

    def slices(self, count: int, size: int) -> Iterator[slice]:
        """Consecutive slices of at most `size` that make up `count`."""
        return (slice(start, min(start + size, count)) for start in range(0, count, size))

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


class _LinearCrossEntropy(torch.autograd.Function):
    """Cross-entropy of a linear layer, a few tokens at a time; forward finds the gradients as well.

    With p = softmax(W x), d loss / d logits = (p - onehot(target)) / N, which overwrites the logits of the chunk. The
    products are those of the plain computation, no more.
    """

    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, weight_VD: Tensor, targets_N: Tensor) -> Tensor:
        """Mean negative log-likelihood."""
        tokens, vocabulary = len(x_ND), weight_VD.shape[0]
        of_x = torch.zeros_like(x_ND) if ctx.needs_input_grad[0] else None
        of_weight = torch.zeros_like(weight_VD) if ctx.needs_input_grad[1] else None
        total = x_ND.new_zeros(())
        size = chunk_tokens(tokens, vocabulary)
        space = x_ND.new_empty(size, vocabulary)
        for start in range(0, tokens, size):
            x, targets = x_ND[start : start + size], targets_N[start : start + size, None]
            logits = space[: len(x)]
            for rows, part in slabs(weight_VD):
                torch.mm(x, part.T, out=logits[:, rows])
                del part
            picked, largest = logits.gather(1, targets), logits.amax(1, keepdim=True)
            sums = logits.sub_(largest).exp_().sum(1, keepdim=True)
            total += (sums.log() + largest - picked).sum()
            if of_x is None and of_weight is None:
                continue
            logits.mul_(1 / (tokens * sums)).scatter_add_(1, targets, torch.full_like(picked, -1 / tokens))
            if of_x is not None:
                for rows, part in slabs(weight_VD):
                    of_x[start : start + size].addmm_(logits[:, rows], part)
                    del part
            if of_weight is not None:
                of_weight.addmm_(logits.T, x)
        ctx.save_for_backward(of_x, of_weight)
        return total / tokens

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        """The gradients that forward found, scaled where they stand."""
        of_x, of_weight = (None if each is None else each.mul_(gradient) for each in ctx.saved_tensors)
        return of_x, of_weight, None
