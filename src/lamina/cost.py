"""What a plan costs a device: memory by category, bytes up and down, operations.

The forward in `lamina.model` is run once more, on shapes instead of numbers: `Ledger` implements the same kernels as
`model.Ops`, but each one writes down what its real counterpart keeps for the backward pass and how much it computes.
Nothing is measured, no weights are needed, and a change of the model changes its price.

Conventions: fp32; a multiply-add counts as two operations; only matrix products are counted, and
attention as the plain formula has it, whatever the fused kernel skips (the future) or recomputes (scores, in backward).
Memory is the sum over categories, an upper bound on the peak since gradients are born while activations die;
`temporary` is the largest input plus output of one kernel.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, cast

from torch import Tensor

from lamina import model
from lamina.job import Local
from lamina.layout import Layout, Params
from lamina.model import Ops, Spec
from lamina.plan import Plan

FLOAT_BYTES, INDEX_BYTES = 4, 8


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes on the device by category."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    temporary: int

    @property
    def total(self) -> int:
        """Sum of all categories."""
        return sum(asdict(self).values())


@dataclass(frozen=True, slots=True)
class Cost:
    """Demands of a plan on its device, per round.

    Attributes:
        memory: By category, in bytes.
        up_bytes: What the device sends: the trained tensors, fp32, nothing else.
        down_bytes: What it must have received: all it holds. A device that took part before needs only what changed.
        flops: Operations of all local steps.
    """

    memory: Memory
    up_bytes: int
    down_bytes: int
    flops: int

    @property
    def memory_bytes(self) -> int:
        """Sum of the memory categories."""
        return self.memory.total

    def to_json(self) -> dict[str, Any]:
        """Totals and the split of memory."""
        return {
            "memory_bytes": self.memory_bytes,
            "up_bytes": self.up_bytes,
            "down_bytes": self.down_bytes,
            "flops": self.flops,
            "memory": {f"{category}_bytes": value for category, value in asdict(self.memory).items()},
        }


def cost(spec: Spec, plan: Plan, local: Local, tokens: int, steps: int) -> Cost:
    """Price of one local round.

    Args:
        spec: The network, with whatever the method added to it.
        plan: What the device holds and trains.
        local: Batch size and optimizer.
        tokens: Sequence length.
        steps: Optimizer steps in the round.

    Returns:
        The price, from shapes alone.
    """
    layout = model.layout(spec)
    held = sum(math.prod(plan.shape(layout, name)) for name in plan.holds)
    trained = sum(math.prod(plan.shape(layout, name)) for name in plan.trains)
    ledger = Ledger()
    _step(spec, layout, plan, local.batch_size, tokens, ledger)
    memory = Memory(
        weights=FLOAT_BYTES * held,
        gradients=FLOAT_BYTES * trained,
        optimizer=FLOAT_BYTES * local.states * trained,
        activations=sum(ledger.saved_bytes.values()),
        temporary=ledger.largest_bytes,
    )
    return Cost(memory, FLOAT_BYTES * trained, FLOAT_BYTES * held, steps * ledger.flops)


class Shape:
    """Stands for a tensor: its shape, whether a gradient reaches it, and whether it is a parameter."""

    def __init__(self, shape: Sequence[int], grad: bool, parameter: bool = False) -> None:
        """Make a new storage of the given shape."""
        self.shape, self.grad, self.parameter = tuple(shape), grad, parameter

    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    def reshape(self, *shape: int) -> Shape:
        """A view of a parameter."""
        known = math.prod(size for size in shape if size != -1)
        sizes = [self.numel() // known if size == -1 else size for size in shape]
        return Shape(sizes, self.grad, self.parameter)

    def flatten(self, start: int) -> Shape:
        """A view with the dimensions from `start` on as one."""
        return self.reshape(*self.shape[:start], math.prod(self.shape[start:]))


class Ledger(Ops):
    """Kernels that keep accounts instead of computing; each follows what torch's kernel saves for backward.

    Attributes:
        saved_bytes: Storage -> bytes kept between forward and backward. A storage kept twice is there once.
        largest_bytes: Largest input plus output of one kernel.
        flops: Of forward and backward of one step.
    """

    def __init__(self) -> None:
        """Open empty accounts."""
        self.saved_bytes: dict[object, int] = {}
        self.largest_bytes = 0
        self.flops = 0

    def embed(self, ids: Tensor, tokens: Tensor, positions: Tensor) -> Tensor:
        """The lookup keeps the ids when the table trains."""
        table = _shape(tokens)
        if table.grad:
            self._save(ids, size=INDEX_BYTES)
        out = self._out((*ids.shape, table.shape[1]), table, positions)
        return self._note(out, out)

    def norm(self, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        """Keeps its input, and mean and inverse deviation per row."""
        out = self._out(x.shape, x, weight, bias)
        if _shape(out).grad:
            self._save(x)
            self._save(Shape((2, *x.shape[:-1]), False))
        return self._note(out, x)

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """Keeps its input when the weight trains; one product forward, one more per gradient."""
        rows = math.prod(x.shape[:-1])
        out = self._out((*x.shape[:-1], weight.shape[0]), x, weight, *([] if bias is None else [bias]))
        if _shape(weight).grad:
            self._save(x)
        products = 1 + _shape(x).grad + _shape(weight).grad
        self.flops += products * 2 * rows * weight.numel()
        return self._note(out, x)

    def gelu(self, x: Tensor) -> Tensor:
        """Keeps its input."""
        out = self._out(x.shape, x)
        if _shape(x).grad:
            self._save(x)
        return self._note(out, x)

    def attention(self, q_BSE: Tensor, k_BSE: Tensor, v_BSE: Tensor, heads: int) -> Tensor:
        """Keeps query, key, value, output and the log of the normaliser per head and token."""
        batch, tokens, width = q_BSE.shape
        out = self._out((batch, tokens, v_BSE.shape[-1]), q_BSE, k_BSE, v_BSE)
        product = 2 * batch * tokens * tokens * width
        self.flops += (6 if _shape(out).grad else 2) * product
        if _shape(out).grad:
            for kept in (q_BSE, k_BSE, v_BSE, out, Shape((batch, heads, tokens), False)):
                self._save(kept)
        return self._note(out, q_BSE, k_BSE, v_BSE)

    def add(self, x: Tensor, y: Tensor, scale: float = 1.0) -> Tensor:
        """Keeps nothing."""
        return self._note(self._out(x.shape, x, y), x, y)

    def cross_entropy(self, logits_BSV: Tensor, targets_BS: Tensor) -> Tensor:
        """Keeps the log-probabilities, the targets, and the divisor of the mean."""
        self._save(Shape(logits_BSV.shape, False))
        self._save(targets_BS, size=INDEX_BYTES)
        self._save(Shape((1,), False))
        return self._note(self._out((1,), logits_BSV), logits_BSV, logits_BSV)

    def _out(self, shape: Sequence[int], *sources: Tensor | Shape) -> Tensor:
        return cast(Tensor, Shape(shape, any(_shape(source).grad for source in sources)))

    def _save(self, kept: Tensor | Shape, size: int = FLOAT_BYTES) -> None:
        if not _shape(kept).parameter:
            self.saved_bytes[kept] = size * kept.numel()

    def _note(self, out: Tensor, *sources: Tensor) -> Tensor:
        size = FLOAT_BYTES * sum(tensor.numel() for tensor in (out, *sources))
        self.largest_bytes = max(self.largest_bytes, size)
        return out


def _shape(tensor: object) -> Shape:
    return cast(Shape, tensor)


def _step(spec: Spec, layout: Layout, plan: Plan, batch: int, tokens: int, ledger: Ledger) -> None:
    """One training step on shapes: forward and loss; backward is accounted for as the forward goes."""
    symbols = {name: Shape(plan.shape(layout, name), name in plan.trains, parameter=True) for name in plan.holds}
    params = cast(Params, symbols)
    ids, targets = (cast(Tensor, Shape((batch, tokens), False)) for _ in range(2))
    ledger.cross_entropy(model.forward(spec, params, ids, ledger), targets)
