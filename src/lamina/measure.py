"""What a local round really takes, in a process of its own, beside what `lamina.cost` predicts."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from lamina import model
from lamina.cost import Memory, peak_json
from lamina.data.task import Pairs
from lamina.device import Devices
from lamina.errors import UserError
from lamina.flash import Flash
from lamina.job import Failure, Job, Local, Turn
from lamina.layout import Params
from lamina.methods.base import Method
from lamina.plan import Plan
from lamina.spec import Spec
from lamina.timeline import Timeline
from lamina.watch import watch_job

_PLAIN = Method()


@dataclass(frozen=True)
class Measured:
    """A local round as it was.

    Attributes:
        memory: Live tensor bytes at the peak, by category.
        moment: When the peak was; see `lamina.cost.Cost`.
        allocator_bytes: Most that torch's allocator had given out at a time, with what kernels take while they run.
        rss_bytes: Growth of the resident memory of the process over what it was before the round; 0 where the system
            does not tell.
    """

    memory: Memory
    moment: str
    allocator_bytes: int
    rss_bytes: int

    def to_json(self) -> dict[str, Any]:
        """Plain data, keys as in `Cost.to_json`."""
        more = {"allocator_bytes": self.allocator_bytes, "rss_bytes": self.rss_bytes}
        return peak_json(self.memory, self.moment) | more


def measure(
    spec: Spec,
    plan: Plan,
    local: Local,
    tokens: int,
    steps: int = 2,
    method: Method = _PLAIN,
    devices: Devices | None = None,
) -> Measured:
    """Run the first local steps of a plan, at most two, on random weights and tokens, in a fresh process.

    Three times over: watched, with the allocations counted, and as it is, for the resident memory. `devices` is where;
    by default one that is started and closed for it.

    Raises:
        UserError: The process was ended, as by a system that has no memory left.
    """
    job, shard = work(spec, plan, replace(local, steps=min(steps, 2)), tokens, method)
    place = devices or Devices()
    try:
        plain, counted, seen = (place.run(job, shard, spec, look=look) for look in ("", "allocator", "tensors"))
    finally:
        if devices is None:
            place.close()
    for outcome in (plain, counted, seen):
        if isinstance(outcome.answer, Failure):
            raise UserError(f"{plan.label!r} could not be measured: {outcome.answer.reason}")
    assert seen.watched
    return Measured(Memory(**seen.watched[0]), seen.watched[1], counted.allocator_bytes, plain.rss_bytes)


def work(spec: Spec, plan: Plan, local: Local, tokens: int, method: Method = _PLAIN) -> tuple[Job, Pairs]:
    """A job with random weights, and random examples for `local.steps` full batches."""
    layout = model.layout(plan.runs(spec))
    generator = torch.Generator().manual_seed(0)

    def draw(names: frozenset[str]) -> Params:
        return {n: torch.randn(plan.shape(layout, n), generator=generator) * 0.02 for n in sorted(names)}

    arrays, state = draw(plan.holds), draw(method.kept(spec, plan))
    return Job(Turn(0, 0, 1, 0), plan, local, arrays, method, state), _drawn(
        plan.runs(spec), local.steps * local.batch_size, tokens
    )


def _drawn(spec: Spec, count: int, tokens: int) -> Pairs:
    """Random examples, as many, as any shard gives them to this network."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, max(1, spec.labels), (count, 1))
    if spec.patch:
        pixels = rng.standard_normal((count, spec.channels, spec.image, spec.image), dtype=np.float32)
        return Pairs(pixels, labels)
    ids = rng.integers(0, spec.vocab, (2, count, tokens))
    return Pairs(ids[0], labels if spec.labels else ids[1])


def watch(spec: Spec, plan: Plan, local: Local, tokens: int, method: Method = _PLAIN) -> Timeline:
    """`local.steps` steps of `work` in this process: when each tensor was born and freed."""
    job, shard = work(spec, plan, local, tokens, method)
    with tempfile.TemporaryDirectory() as folder:
        arrays, state = Path(folder) / "arrays.safetensors", Path(folder) / "state.safetensors"
        save_file(dict(job.arrays), arrays)
        save_file(dict(job.state), state)
        return watch_job(replace(job, arrays=Flash(arrays), state=Flash(state)), shard, spec)[1]
