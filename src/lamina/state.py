"""All that a run is between two rounds, and the tensors it is stored as."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from lamina.layout import Params

TOTALS = ("up_bytes", "down_bytes", "flops", "updates", "rejected_updates", "abandoned_rounds", "clock_seconds")


@dataclass(frozen=True)
class State:
    """All that a run is after some rounds; the same state gives the same future, bit for bit.

    Attributes:
        round: Rounds done.
        params: Global tensors.
        changed: Tensor -> the round after which it last changed; 0 at first. "memory:name" of what is in memory.
        seen: Device -> tensor -> the round before which it last received it.
        memory: What the server keeps for the method besides the network.
        devices: What devices keep for the method between rounds: on their own disks, but for the simulation.
        totals: What the run has cost so far.
    """

    round: int
    params: Params
    changed: Mapping[str, int]
    seen: Mapping[int, Mapping[str, int]]
    memory: Params = field(default_factory=dict)
    devices: Mapping[int, Params] = field(default_factory=dict)
    totals: Mapping[str, float] = field(default_factory=lambda: dict.fromkeys(TOTALS, 0))

    def pack(self) -> tuple[dict[str, Any], Params]:
        """Plain data and tensors that make up the state; `unpack` gives the same state back."""
        keys = list(self.changed)
        rows = [[seen.get(key, -1) for key in keys] for seen in self.seen.values()]
        tensors = dict(self.params) | {f"memory:{name}": tensor for name, tensor in self.memory.items()}
        for device, kept in self.devices.items():
            tensors |= {f"device:{device}:{name}": tensor for name, tensor in kept.items()}
        tensors["seen:"] = torch.tensor(rows, dtype=torch.int32).reshape(len(rows), len(keys))
        data = {
            "round": self.round,
            "changed": self.changed,
            "seen": list(self.seen),
            "tensors": list(tensors),
            "totals": self.totals,
        }
        return data, {name: tensor.contiguous() for name, tensor in tensors.items()}

    @staticmethod
    def unpack(data: Mapping[str, Any], tensors: Params) -> State:
        """The state written by `pack`."""
        ordered = {name: tensors[name] for name in data["tensors"]}  # safetensors sorts names its own way
        rows = ordered.pop("seen:").tolist()
        params, memory, devices = {}, {}, dict[int, Params]()
        for name, tensor in ordered.items():
            kind, colon, rest = name.partition(":")
            if not colon:
                params[name] = tensor
            elif kind == "memory":
                memory[rest] = tensor
            else:
                device, _, of_device = rest.partition(":")
                devices.setdefault(int(device), {})[of_device] = tensor
        seen = {
            device: {key: when for key, when in zip(data["changed"], row, strict=True) if when >= 0}
            for device, row in zip(data["seen"], rows, strict=True)
        }
        return State(data["round"], params, dict(data["changed"]), seen, memory, devices, dict(data["totals"]))
