"""What a plan costs a device: memory by category at the peak, bytes up and down, operations.

The code that trains (`client.loss`, `lamina.model`) is run once more, on shapes instead of numbers. `Ledger`
implements the same kernels as `model.Ops`, but each one writes down what its real counterpart allocates, keeps for the
backward pass, and computes. A shape lives exactly as long as the tensor it stands for, since the same Python names hold
it; the backward pass is replayed from the tape. Nothing is measured, no weights are needed, and a change of the model
changes its price.

Conventions: fp32; a multiply-add counts as two operations; only matrix products are counted, and attention as the plain
formula has it, whatever the fused kernel skips (the future) or recomputes (scores, in backward). Memory is that of
tensors, batch included; what the kernels use inside while they run, and the interpreter, are not in it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from typing import Any, cast

from torch import Tensor

from lamina import client, model
from lamina.job import Local
from lamina.layout import Params
from lamina.model import Ops, Spec
from lamina.plan import Plan
from lamina.timeline import Storage, Timeline

FLOAT_BYTES, INDEX_BYTES = 4, 8


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes on the device at the peak, by category.

    Attributes:
        weights: All tensors held.
        gradients: Of trained tensors, those that exist by then.
        optimizer: Its state.
        activations: Kept between forward and backward.
        temporary: Everything else that is alive.
    """

    weights: int = 0
    gradients: int = 0
    optimizer: int = 0
    activations: int = 0
    temporary: int = 0

    @property
    def total(self) -> int:
        """Sum of all categories."""
        return sum(asdict(self).values())


@dataclass(frozen=True, slots=True)
class Cost:
    """Demands of a plan on its device, per round.

    Attributes:
        memory: At the peak, by category, in bytes.
        moment: When the peak is: "prefix", "forward", "loss", "backward" or "update".
        saved_bytes: Kept for the backward pass of a step, all together.
        up_bytes: What the device sends: the trained tensors, fp32, nothing else.
        down_bytes: What it must have received: all it holds. A device that took part before needs only what changed.
        flops: Operations of all local steps.
    """

    memory: Memory
    moment: str
    saved_bytes: int
    up_bytes: int
    down_bytes: int
    flops: int

    @property
    def memory_bytes(self) -> int:
        """Peak of live tensor bytes."""
        return self.memory.total

    def to_json(self) -> dict[str, Any]:
        """Totals and the split of memory."""
        return {
            "memory_bytes": self.memory_bytes,
            "up_bytes": self.up_bytes,
            "down_bytes": self.down_bytes,
            "flops": self.flops,
            **peak_json(self.memory, self.moment),
        }


def peak_json(memory: Memory, moment: str) -> dict[str, Any]:
    """The peak, its split and its moment, predicted or measured."""
    split = {f"{category}_bytes": value for category, value in asdict(memory).items()}
    return {"memory": split, "peak_bytes": memory.total, "peak_moment": moment}


@lru_cache(maxsize=4096)
def cost(spec: Spec, plan: Plan, local: Local, tokens: int, steps: int) -> Cost:
    """Price of one local round.

    Args:
        spec: The network, with whatever the method added to it.
        plan: What the device holds and trains.
        local: Batch size and optimizer.
        tokens: Sequence length.
        steps: Optimizer steps in the round, at least one.

    Returns:
        The price, from shapes alone.
    """
    layout = model.layout(spec)
    ledger = Ledger()
    params = {name: ledger.parameter(plan.shape(layout, name), name in plan.trains) for name in plan.holds}
    held = sum(shape.numel() for shape in params.values())
    trained = sum(params[name].numel() for name in plan.trains)
    boundary = plan.first_trained(layout)
    states = []
    simulated = min(steps, 2)  # all further steps are like the second
    for step in range(simulated):
        ledger.step(spec, params, local.batch_size, tokens, boundary)
        if step == 0:
            ledger.timeline.moment = "update"
            per_element, per_tensor = local.states
            numbers = per_element * trained + per_tensor * len(plan.trains)
            states = [ledger.new(FLOAT_BYTES * numbers, "optimizer")]
        ledger.gradients.clear()
    flops, saved_bytes = ledger.flops // simulated, ledger.saved_bytes // simulated
    peak, moment = ledger.timeline.peak()
    del states
    return Cost(Memory(**peak), moment, saved_bytes, FLOAT_BYTES * trained, FLOAT_BYTES * held, steps * flops)


class Allocation:
    """Memory in a timeline, from when this is made until nothing refers to it."""

    def __init__(self, timeline: Timeline, size_bytes: int, category: str) -> None:
        """Be born."""
        self.timeline, self.storage = timeline, Storage(size_bytes, category)
        timeline.born(self.storage)

    def __del__(self) -> None:
        """Be freed."""
        self.timeline.died(self.storage)


@dataclass(eq=False)
class Node:
    """A step of the backward pass, or, without a kernel, a trained parameter.

    Attributes:
        saved: Kept until the step is done.
        inputs: Where gradients go, and their size in bytes; None for the very memory of the gradient that came in.
        scratch_bytes: Needed while the step runs.
    """

    saved: list[Allocation] = field(default_factory=list)
    inputs: list[tuple[Node, int | None]] = field(default_factory=list)
    scratch_bytes: int = 0
    leaf: bool = False


@dataclass(eq=False)
class Shape:
    """Stands for a tensor.

    Attributes:
        shape: Its sizes.
        memory: What it lives in; views share it.
        node: Where its gradient goes; None if it needs none.
    """

    shape: tuple[int, ...]
    memory: Allocation
    node: Node | None

    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    def reshape(self, *shape: int) -> Shape:
        """A view."""
        known = math.prod(size for size in shape if size != -1)
        sizes = tuple(self.numel() // known if size == -1 else size for size in shape)
        return Shape(sizes, self.memory, self.node)

    def flatten(self, start: int) -> Shape:
        """A view with the dimensions from `start` on as one."""
        return self.reshape(*self.shape[:start], math.prod(self.shape[start:]))


class Ledger(Ops):
    """Kernels that keep accounts instead of computing; each follows what torch's kernel allocates and keeps.

    Attributes:
        timeline: What lives when.
        saved_bytes: Kept between forward and backward, over all steps so far. A storage kept twice counts once.
        flops: Of forward and backward, over all steps so far.
        gradients: Of trained parameters.
    """

    def __init__(self) -> None:
        """Open empty accounts."""
        self.timeline = Timeline()
        self.saved_bytes = 0
        self.flops = 0
        self.gradients: dict[Node, Allocation] = {}
        self._tape: list[Node] = []

    def new(self, size_bytes: int, category: str = "temporary") -> Allocation:
        """Allocate."""
        return Allocation(self.timeline, size_bytes, category)

    def parameter(self, shape: Sequence[int], trains: bool) -> Shape:
        """A tensor that the device holds."""
        memory = self.new(FLOAT_BYTES * math.prod(shape), "weights")
        return Shape(tuple(shape), memory, Node(leaf=True) if trains else None)

    def step(self, spec: Spec, params: dict[str, Shape], batch: int, tokens: int, boundary: int) -> None:
        """Forward and backward of one batch."""
        self.timeline.moment = "prefix" if boundary else "forward"
        ids, targets = (Shape((batch, tokens), self.new(INDEX_BYTES * batch * tokens), None) for _ in range(2))
        real_ids, real_targets, real_params = cast(Tensor, ids), cast(Tensor, targets), cast(Params, params)
        loss = client.loss(spec, real_params, real_ids, real_targets, boundary, self)
        self._backward(_shape(loss))

    def embed(self, ids: Tensor, tokens: Tensor, positions: Tensor) -> Tensor:
        """The lookup keeps the ids when the table trains; table gradients are dense."""
        found = self._out((*ids.shape, tokens.shape[1]), [tokens], [ids] if _shape(tokens).node else [])
        width, length = positions.shape[1], ids.shape[1]
        return self._out(found.shape, [found, positions], [], scratch=FLOAT_BYTES * width * length, aliases=1)

    def norm(self, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        """Keeps its input, and mean and inverse deviation per row."""
        statistics = Shape((2, *x.shape[:-1]), self.new(2 * FLOAT_BYTES * math.prod(x.shape[:-1])), None)
        return self._out(x.shape, [x, weight, bias], [x, statistics])

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """Keeps its input when the weight trains; one product forward, one more per gradient."""
        products = 1 + (_shape(x).node is not None) + (_shape(weight).node is not None)
        self.flops += products * 2 * math.prod(x.shape[:-1]) * weight.numel()
        sources = [x, weight] if bias is None else [x, weight, bias]
        return self._out((*x.shape[:-1], weight.shape[0]), sources, [x] if _shape(weight).node else [])

    def gelu(self, x: Tensor) -> Tensor:
        """Keeps its input."""
        return self._out(x.shape, [x], [x])

    def attention(self, q_BSE: Tensor, k_BSE: Tensor, v_BSE: Tensor, heads: int) -> Tensor:
        """Keeps query, key, value, output and the log of the normaliser per head and token."""
        batch, tokens, width = q_BSE.shape
        normaliser = Shape((batch, heads, tokens), self.new(FLOAT_BYTES * batch * heads * tokens), None)
        out = self._out((batch, tokens, v_BSE.shape[-1]), [q_BSE, k_BSE, v_BSE], [q_BSE, k_BSE, v_BSE, normaliser])
        if _shape(out).node:
            self._keep([out])
        self.flops += (6 if _shape(out).node else 2) * 2 * batch * tokens * tokens * width
        return out

    def add(self, x: Tensor, y: Tensor, scale: float = 1.0) -> Tensor:
        """Keeps nothing; both sides get the gradient itself, y a scaled copy where there is a scale."""
        return self._out(x.shape, [x, y], [], aliases=2 if scale == 1.0 else 1)

    def cross_entropy(self, logits_BSV: Tensor, targets_BS: Tensor) -> Tensor:
        """Keeps the log-probabilities, the targets, and the divisor of the mean."""
        self.timeline.moment = "loss"
        size = FLOAT_BYTES * logits_BSV.numel()
        log_probs = Shape(logits_BSV.shape, self.new(size), None)
        divisor = Shape((1,), self.new(FLOAT_BYTES), None)
        return self._out((1,), [logits_BSV], [log_probs, targets_BS, divisor], scratch=size)

    def _out(
        self,
        shape: Sequence[int],
        sources: Sequence[Tensor],
        kept: Sequence[Tensor | Shape],
        scratch: int = 0,
        aliases: int = 0,
    ) -> Tensor:
        """A new tensor; the gradients of the first `aliases` sources are the memory of its own gradient."""
        memory = self.new(FLOAT_BYTES * math.prod(shape))
        edges = [(_shape(s).node, FLOAT_BYTES * s.numel() if i >= aliases else None) for i, s in enumerate(sources)]
        inputs = [(node, size) for node, size in edges if node]
        if not inputs:
            return cast(Tensor, Shape(tuple(shape), memory, None))
        node = Node(inputs=inputs, scratch_bytes=scratch)
        self._tape.append(node)
        self._keep(kept)
        return cast(Tensor, Shape(tuple(shape), memory, node))

    def _keep(self, kept: Sequence[Tensor | Shape]) -> None:
        """Let the last node of the tape hold on to what it needs; parameters are there anyway."""
        for each in kept:
            memory = _shape(each).memory
            if memory.storage.category == "weights":
                continue
            if memory.storage.category == "temporary":
                memory.storage.category = "activations"
                self.saved_bytes += memory.storage.size_bytes
            self._tape[-1].saved.append(memory)

    def _backward(self, loss: Shape) -> None:
        """Replay the tape from its end: gradients are born and merged, and what was kept for them is freed."""
        self.timeline.moment = "backward"
        arrived: dict[Node, Allocation] = {}
        if loss.node:
            arrived[loss.node] = self.new(FLOAT_BYTES)
        while self._tape:
            node = self._tape.pop()
            incoming = arrived.pop(node)
            scratch = self.new(node.scratch_bytes) if node.scratch_bytes else None
            outgoing = [(to, incoming if size is None else self.new(size)) for to, size in node.inputs]
            del scratch
            node.saved.clear()
            del incoming
            while outgoing:
                to, gradient = outgoing.pop()
                self._arrive(arrived, to, gradient)
                del gradient

    def _arrive(self, arrived: dict[Node, Allocation], to: Node, gradient: Allocation) -> None:
        where = self.gradients if to.leaf else arrived
        if to.leaf:
            gradient.storage.category = "gradients"
        if to in where:
            where[to] = self.new(gradient.storage.size_bytes, gradient.storage.category)
        else:
            where[to] = gradient


def _shape(tensor: object) -> Shape:
    return cast(Shape, tensor)
