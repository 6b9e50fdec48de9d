"""What a plan costs a device: memory by category at the peak, bytes up and down, operations.

The code that trains (`client.train`) is run once more, on shapes instead of numbers, with the kernels of
`lamina.ledger`. Nothing is measured, no weights are needed, and a change of the client or the model changes its price.

Conventions: fp32; a multiply-add counts as two operations; only matrix products are counted, and attention as the plain
formula has it, whatever the fused kernel skips (the future) or recomputes (scores, in backward). Memory is that of
tensors, batch included; what the kernels use inside while they run, and the interpreter, are not in it.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from typing import Any

import torch

from lamina import client, model
from lamina.job import Job, Local, Turn
from lamina.ledger import Ledger
from lamina.methods.base import Method
from lamina.plan import Plan
from lamina.shapes import FLOAT_BYTES
from lamina.spec import Spec
from lamina.stand_ins import Blank, Held

_PLAIN = Method()


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
        moment: When the peak is: "prefix", "load", "forward", "loss", "backward" or "update".
        saved_bytes: Kept for the backward pass of a step, all together.
        up_bytes: What the device sends: by default the trained tensors, fp32, and nothing else.
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
def cost(spec: Spec, plan: Plan, local: Local, tokens: int, steps: int, method: Method = _PLAIN) -> Cost:
    """Price of one local round.

    Args:
        spec: The network, with whatever the method added to it.
        plan: What the device holds and trains.
        local: Batch size and optimizer.
        tokens: Sequence length, or that of the longest; of no account for images.
        steps: Optimizer steps in the round, at least one.
        method: Whose rules the device follows while it trains.

    Returns:
        The price, from shapes alone. With `local.steps`, a cached prefix is priced as if no example came twice.
    """
    sent = method.sends(spec, plan, steps)
    spec = plan.runs(spec)
    epochs = 1 if local.steps else local.epochs
    examples = max(local.batch_size, -(-steps * local.batch_size // epochs))
    ledger = Ledger(examples, warm=steps > 1)  # one step stands for all: none takes more than the second
    layout = model.layout(spec)
    held = Held(ledger, layout, plan, plan.holds)
    state = Held(ledger, layout, plan, method.kept(spec, plan))
    job = Job(Turn(0, 0, 1), plan, replace(local, steps=1), held, method, state)
    shard = Blank(spec, local.batch_size, tokens)
    with torch.enable_grad():
        client.train(job, shard, spec, ledger)
    once = ledger.flops.pop("prefix", 0) if ledger.cached else 0
    peak, moment = ledger.timeline.peak()
    return Cost(
        Memory(**peak),
        moment,
        ledger.saved_bytes,
        sum(math.prod(shape) * dtype.itemsize for shape, dtype in sent.values()),
        FLOAT_BYTES * sum(math.prod(held.shape(name)) for name in plan.holds),
        round(once + steps * sum(ledger.flops.values())),
    )
