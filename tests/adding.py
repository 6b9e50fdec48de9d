"""What tests of methods that add tensors share: a server of two blocks, matrices as numpy has them, votes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from support import (
    LOCAL,
    STEPS,
    spec,
)
from torch import Tensor

from lamina.job import Job, Turn, Update
from lamina.layout import Params
from lamina.methods import Method
from lamina.plan import Plan, Vote
from lamina.planner import Fleet
from lamina.spec import Spec

SPEC = spec(2)
SERVER = Turn(seed=0, round=0, rounds=10)
UP, V = "h.1.ffn.up", "h.0.attn.v"


def fleet(devices: int = 4) -> Fleet:
    return Fleet([0] * devices, (None,), lambda group, plan: True)


def on_device(device: int, round_: int = 0) -> Turn:
    return replace(SERVER, device=device, round=round_)


def matrix(p: Tensor, ranks_last: bool = False) -> np.ndarray:
    """Float64, A and weights [first, the rest], B [all but the ranks, ranks]."""
    shape = (-1, p.shape[-1]) if ranks_last else (p.shape[0], -1)
    return p.double().reshape(shape).numpy()


def product(arrays: Params, linear: str) -> np.ndarray:
    """B A."""
    found: np.ndarray = matrix(arrays[f"{linear}.lora_b"], True) @ matrix(arrays[f"{linear}.lora_a"])
    return found


def whole(p: Tensor, outputs: int) -> np.ndarray:
    """A weight as a matrix."""
    return p.double().reshape(outputs, -1).numpy()


def answered(
    method: Method, network: Spec, plan: Plan, params: Params, device: int, examples: int, memory: Params
) -> Vote:
    """The vote of a device that changed all that it trains by random numbers."""
    turn = on_device(device)
    arrays = method.encode(params, network, plan, turn, memory)
    rng = torch.Generator().manual_seed(100 + device)
    sent = {n: arrays[n] + 0.1 * torch.randn(arrays[n].shape, generator=rng) for n in sorted(plan.trains)}
    return method.decode(Update(turn, sent, examples, STEPS, 0.0), Job(turn, plan, LOCAL, arrays, method), network)
