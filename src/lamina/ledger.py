"""The client's kernels on shapes instead of numbers: a rule for each.

A `Shape` lives exactly as long as the tensor it stands for, since the same Python names hold it. Each kernel writes
down what its real counterpart allocates, keeps and computes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
from torch import Tensor

from lamina.accounts import Accounts
from lamina.coding import Coding
from lamina.data.task import Shard
from lamina.job import Turn
from lamina.kernels import Mix
from lamina.layout import Params
from lamina.ops import DRAWN, Draw, chunk_tokens
from lamina.packed import SLAB_ROWS, packable
from lamina.shapes import FLOAT_BYTES, INDEX_BYTES, Node, Shape, as_shape
from lamina.stand_ins import Held

if TYPE_CHECKING:
    from lamina.spec import Act, Pool


class Ledger(Accounts):
    """A rule for each kernel, which follows what torch's allocates and keeps."""

    def embed(
        self, ids: Tensor, tokens: Tensor, positions: Tensor | None, types: Tensor | None = None, first: int = 0
    ) -> Tensor:
        """The lookup keeps the ids when the table trains; table gradients are dense."""
        out = self._out((*ids.shape, tokens.shape[1]), [tokens], [ids] if as_shape(tokens).node else [])
        for table, rows in ((positions, ids.shape[1]), (types, 1)):
            if table is not None:
                unpacked = self._unpacked(table)
                scratch = FLOAT_BYTES * table.shape[1] * rows * (as_shape(table).node is not None)
                out = self._out(out.shape, [out, table], [], scratch, aliases=1)
                del unpacked
        return out

    def patches(
        self,
        pixels_BCYX: Tensor,
        weight: Tensor,
        bias: Tensor,
        positions: Tensor,
        leads: Tensor | None,
        registers: Tensor | None,
    ) -> Tensor:
        """Keeps the images; one of them is in patches at a time, and positions with the bias beside.

        Backward sums gradients over images, and cuts patches once more where the weight trains.
        """
        tables = [each for each in (weight, bias, positions, leads, registers) if each is not None]
        unpacked = [self._unpacked(each) for each in tables]
        (batch, *pixels), width = pixels_BCYX.shape, weight.shape[0]
        number = positions.shape[0] - (0 if leads is None else leads.shape[0])
        places = positions.shape[0] + (0 if registers is None else registers.shape[0])
        patches_bytes = FLOAT_BYTES * math.prod(pixels)
        others = FLOAT_BYTES * sum(each.numel() for each in tables[1:] if as_shape(each).node)
        cut_bytes = patches_bytes - others if as_shape(weight).node else 0
        scratch = max(FLOAT_BYTES * places * width, cut_bytes)
        out = self._out((batch, places, width), tables, [pixels_BCYX], scratch)
        besides = self.blank((number, width)), self.new(patches_bytes)
        self._products(self.blank((batch, number, weight.numel() // width), 0), weight)
        del besides, unpacked
        return out

    def norm(self, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        """Keeps its input, and mean and inverse deviation per row."""
        statistics = self.blank((2, *x.shape[:-1]))
        return self._out(x.shape, [x, weight, bias], [x, statistics])

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """Keeps each of input and weight where the other has a gradient; one product forward, one more per gradient."""
        self._products(x, weight)
        sources = [x, weight] if bias is None else [x, weight, bias]
        scratch = FLOAT_BYTES * weight.numel() if as_shape(weight).packed else 0
        unpacked = self._unpacked(weight)
        shape = (*x.shape[:-1], weight.shape[0])
        out = self._out(shape, sources, _factors(x, weight), scratch)
        del unpacked
        return out

    def lora_linear(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, a_RI: Tensor, b_OR: Tensor, scale: float
    ) -> Tensor:
        """Keeps what its three products do; backward has the gradient of x A^T besides, for x and A."""
        if as_shape(a_RI).packed or as_shape(b_OR).packed:
            return self.three_linears(x, weight, bias, a_RI, b_OR, scale)
        z = self._out((*x.shape[:-1], len(a_RI)), [x, a_RI], [])  # its node is but for the count
        for factors in ((x, weight), (x, a_RI), (z, b_OR)):
            self._products(*factors)
        sources = [x, weight, *([] if bias is None else [bias]), a_RI, b_OR]
        kept = [*_factors(x, weight), *_factors(x, a_RI), *_factors(z, b_OR)]
        scratch = FLOAT_BYTES * z.numel() if as_shape(z).node else 0
        scratch += FLOAT_BYTES * weight.numel() if as_shape(weight).packed and as_shape(x).node else 0
        unpacked = self._unpacked(weight)
        out = self._out((*x.shape[:-1], weight.shape[0]), sources, kept, scratch)
        del unpacked
        return out

    def group_linear(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, units: Sequence[int], by_rows: bool
    ) -> Tensor:
        """As `linear`."""
        self._products(x, weight)
        sources = [x, weight] if bias is None else [x, weight, bias]
        width = sum(units) if by_rows else len(units) * weight.shape[0]
        return self._out((*x.shape[:-1], width), sources, _factors(x, weight))

    def fork(self, x: Tensor, streams: int) -> Tensor:
        """Keeps nothing."""
        return self._out((*x.shape[:-1], streams * x.shape[-1]), [x], [])

    def spread(self, p_RkD: Tensor, places: Sequence[tuple[int, int]], rows: int, streams: int) -> Tensor:
        """Keeps nothing; places are made again."""
        count = p_RkD.shape[0]
        out = self._out((rows, streams * (p_RkD.numel() // count)), [p_RkD], [], scratch=2 * INDEX_BYTES * count)
        self.blank((2, count), INDEX_BYTES)
        return out

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """Keeps its input and the inverse root per row; the weight's gradient alone takes as much as x besides."""
        rows = self.blank((*x.shape[:-1], 1))
        scratch = FLOAT_BYTES * (rows.numel() if as_shape(x).node else x.numel())
        return self._out(x.shape, [x, weight], [x, rows], scratch)

    def act(self, x: Tensor, kind: Act) -> Tensor:
        """Keeps its input, or, where that is enough, its output."""
        out = self._out(x.shape, [x], [] if kind in ("relu", "tanh") else [x])
        if kind in ("relu", "tanh") and (node := as_shape(out).node):
            self._keep(node, [out])
        return out

    def gate(self, gate: Tensor, up: Tensor) -> Tensor:
        """Keeps both."""
        return self._out(up.shape, [gate, up], [gate, up])

    def multiply(self, x: Tensor, vector: Tensor) -> Tensor:
        """Keeps its input where the vector trains, whose gradient is a sum over rows."""
        trains = as_shape(vector).node is not None
        return self._out(x.shape, [x, vector], [x] if trains else [], FLOAT_BYTES * x.numel() * trains)

    def rotate(self, x_BSE: Tensor, heads: int, theta: float) -> Tensor:
        """Keeps nothing; sines and cosines are made again."""
        angles = (x_BSE.shape[1], x_BSE.shape[2] // heads // 2)
        tables = [self.blank(angles) for _ in range(3)]
        del tables[0]
        return self._out(x_BSE.shape, [x_BSE], [], scratch=2 * FLOAT_BYTES * math.prod(angles))

    def attention(
        self, q_BSE: Tensor, k_BSE: Tensor, v_BSE: Tensor, heads: int, causal: bool = True, hides: Tensor | None = None
    ) -> Tensor:
        """Keeps query, key, value, output, what hides, and the log of the normaliser per head and token.

        Backward makes the gradients of query, key and value, whoever needs one.
        """
        batch, tokens, width = q_BSE.shape
        kept = [q_BSE, k_BSE, v_BSE, self.blank((batch, heads, tokens)), *([] if hides is None else [hides])]
        needless = sum(each.numel() for each in kept[:3] if not as_shape(each).node)
        out = self._out(q_BSE.shape, kept[:3], kept, FLOAT_BYTES * needless)
        if node := as_shape(out).node:
            self._keep(node, [out])
        self._count((6 if as_shape(out).node else 2) * 2 * batch * tokens * tokens * width)
        return out

    def hides(self, lengths_B: Tensor, tokens: int) -> Tensor:
        """Numbers, and for a moment which of them."""
        out = self.blank((lengths_B.shape[0], tokens))
        self.blank((tokens,), INDEX_BYTES), self.blank(out.shape, 1)
        return out

    def pool(self, x_BSD: Tensor, kind: Pool, start: int, lengths_B: Tensor | None) -> Tensor:
        """A product with few rows, which are kept."""
        batch, tokens, width = x_BSD.shape
        parts = 2 if kind == "first_mean" else 1
        weights = self.blank((batch, parts, tokens))
        self._count((2 if as_shape(x_BSD).node else 1) * 2 * parts * x_BSD.numel())
        return self._out((batch, 1, parts * width), [x_BSD], [weights])

    def add(self, x: Tensor, y: Tensor, scale: float = 1.0) -> Tensor:
        """Keeps nothing; both sides get the gradient itself, y a scaled copy where there is a scale."""
        return self._out(x.shape, [x, y], [], aliases=2 if scale == 1.0 else 1)

    def cross_entropy(self, logits_BSV: Tensor, targets_BS: Tensor) -> Tensor:
        """Keeps the log-probabilities, the targets, and the divisor of the mean."""
        log_probs, divisor = self.blank(logits_BSV.shape), self.blank((1,))
        scratch = FLOAT_BYTES * logits_BSV.numel()
        return self._out((1,), [logits_BSV], [log_probs, targets_BS, divisor], scratch)

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
        """Keeps the gradients that it finds, which are then the gradients; probabilities of one chunk meanwhile.

        Beside them there are up to three numbers per token: the target's logit, the largest, and the sum.
        """
        for x, weight in zip(xs_BSD, weights_VD, strict=True):
            self._products(x, weight)
        given = [as_shape(each) for each in (*xs_BSD, *weights_VD, *biases_V) if each is not None]
        trained = [each for each in given if each.node]
        found = [as_shape(self.blank(each.shape)) for each in trained]
        vocabulary, width = weights_VD[0].shape
        tokens = targets_BS.numel()
        size = chunk_tokens(tokens, vocabulary) if chunked else tokens
        planes = len(xs_BSD) + 2 * any(map(any, mix.soft))
        space = self.blank((size, planes * vocabulary + 3))
        slab = self.blank((min(SLAB_ROWS, vocabulary), width)) if as_shape(weights_VD[0]).packed else None
        del space, slab
        out = self._out((1,), [], [])
        node = Node(inputs=[(each.node, made.memory) for each, made in zip(trained, found, strict=True) if each.node])
        if trained and torch.is_grad_enabled():
            self._keep(node, cast(list[Tensor], found))
            as_shape(out).node = node
        return out

    def sparse_linear(self, x: Tensor, weight: Tensor, values: Tensor, indices: Tensor, bias: Tensor | None) -> Tensor:
        """Keeps its input and the indices; makes the sum of the weights, and a dense gradient, while it runs."""
        self._products(x, values, weight.numel())
        sources = [x, values] if bias is None else [x, values, bias]
        whole = self.blank(weight.shape)
        out = self._out((*x.shape[:-1], weight.shape[0]), sources, [x, indices], scratch=FLOAT_BYTES * weight.numel())
        del whole
        return out

    def scale(self, x: Tensor, factor: float) -> Tensor:
        """Keeps nothing."""
        return self._out(x.shape, [x], [])

    def leading(self, p: Tensor, sizes: Sequence[int]) -> Tensor:
        """A view; its gradient is made whole."""
        source = as_shape(p)
        if tuple(sizes) == source.shape:
            return p
        out = Shape(tuple(sizes), source.memory, packed=source.packed)
        if source.node and torch.is_grad_enabled():
            out.node = Node(inputs=[(source.node, FLOAT_BYTES * p.numel())])
        return cast(Tensor, out)

    def copy(self, x: Tensor) -> Tensor:
        """New memory, as long as the round lasts."""
        return self.blank(x.shape, category="weights")

    def pull(self, p: Tensor, *terms: tuple[Tensor, float]) -> None:
        """In place."""

    def tail(self, p: Tensor, dim: int, first: int) -> Tensor:
        """A view."""
        sizes = list(p.shape)
        sizes[dim] -= first
        return cast(Tensor, Shape(tuple(sizes), as_shape(p).memory))

    def pull_tail(self, p: Tensor, dim: int, first: int, factor: float) -> None:
        """In place."""

    def gram(self, x: Tensor, rows: bool) -> Tensor:
        """A square."""
        size = x.shape[0] if rows else x.shape[1]
        self._count(2 * x.numel() * size)
        return self.blank((size, size))

    def pull_product(self, p: Tensor, x: Tensor, y: Tensor, factor: float) -> None:
        """In place."""
        self._count(2 * x.numel() * y.shape[1])

    def code(self, coding: Coding, name: str, new: Tensor, old: Tensor, turn: Turn) -> Params:
        """The change; what rotates it, half of it at a time; an order of all elements; noise; a byte for each level."""
        padded, sent = coding.lengths(new.numel())
        alive = [self.blank((padded,))]
        if coding.rotate:
            for scratch in (coding.block(new.numel()), padded // 2):
                self.blank((scratch,))
        if sent < padded:
            alive += [self.blank((padded,), INDEX_BYTES), self.blank((sent,))]
            del alive[:2]
        if not coding.bits:
            return {name: alive[0]}
        alive += [self.blank((sent,))]
        del alive[0]
        alive += [self.blank((sent,), 1)]
        sends = coding.sends(name, new.numel())
        made = {part: self.blank(shape, dtype.itemsize) for part, (shape, dtype) in sends.items()}
        if coding.bits < 8:
            self.blank(made[name].shape, 1)
        return made

    def direction(self, p: Tensor, draw: Draw) -> Tensor:
        """New memory."""
        return self.blank(p.shape)

    def shift(self, p: Tensor, draw: Draw, factor: float) -> None:
        """A part of the direction at a time."""
        self.blank((min(DRAWN, p.numel()),))

    def steer(self, p: Tensor, terms: Sequence[tuple[Draw, float]]) -> None:
        """A gradient is born."""
        node = as_shape(p).node
        assert node
        node.grad = self.new(FLOAT_BYTES * p.numel(), "gradients")
        for draw, factor in terms:
            self.shift(p, draw, factor)

    def add_linear(self, out: Tensor, x: Tensor, weight: Tensor) -> None:
        """In place; one product."""
        self._count(2 * x.numel() * weight.shape[0])

    def labels(self, shard: Shard, vocabulary: int) -> Tensor:
        """A byte for each."""
        return self.blank((vocabulary,), 1)

    def tensor(self, array: np.ndarray) -> Tensor:
        """A shape with the array's memory."""
        return cast(Tensor, Shape(array.shape, self.new(array.nbytes)))

    def empty_like(self, x: Tensor) -> Tensor:
        """New memory."""
        return self.blank(x.shape)

    def rows(self, arrays: Mapping[str, Tensor], name: str, indices: np.ndarray) -> Tensor:
        """New memory for the rows alone."""
        return self.blank((len(indices), *cast(Held, arrays).shape(name)[1:]))

    def hold(self, arrays: Mapping[str, Tensor], name: str, bits: int) -> Tensor:
        """As `lamina.packed.pack`."""
        shape = cast(Held, arrays).shape(name)
        if not packable(shape, bits):
            return arrays[name]
        scales = math.prod(shape[:-1]) * FLOAT_BYTES if bits == 8 else 0
        memory = self.new(math.prod(shape) * bits // 8 + scales, "weights")
        slab = (min(SLAB_ROWS, shape[0]), *shape[1:])
        work = [self.blank(slab) for _ in range(1 + (bits == 8))]
        del work
        return cast(Tensor, Shape(shape, memory, None, packed=True))

    def norm_of(self, tensors: Sequence[Tensor]) -> Tensor:
        """A number."""
        return self.blank((1,))

    def clip(self, params: Sequence[Tensor], limit: float, norm: Tensor) -> None:
        """In place."""


def _factors(x: Tensor, weight: Tensor) -> list[Tensor]:
    """What a product keeps: each factor where the other has a gradient."""
    return [each for each, other in ((x, weight), (weight, x)) if as_shape(other).node]
