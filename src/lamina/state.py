"""All that a run is between two rounds, and the tensors it is stored as."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from lamina.layout import Params

TOTALS = ("up_bytes", "down_bytes", "flops", "updates", "rejected_updates", "abandoned_rounds", "clock_seconds")


@dataclass(frozen=True, eq=False)
class Copies:
    """Which version of the server's tensors each device has received.

    Devices that have received the same share a row: how much there is to keep depends on how they differ, and hardly on
    how many they are.

    Attributes:
        rows: The last version received of each tensor, in the order of `State.changed`, int32 [rows, tensors]; -1:
            none. Tensors that came to the server later may be missing at the end.
        row_of: Row of each device, int32 [devices].
    """

    rows: np.ndarray
    row_of: np.ndarray

    @staticmethod
    def none(devices: int) -> Copies:
        """Before the first round."""
        return Copies(np.empty((1, 0), np.int32), np.zeros(devices, np.int32))

    def of(self, device: int, tensors: int) -> np.ndarray:
        """Versions that a device has received of so many tensors, int32 [tensors]."""
        found = np.full(tensors, -1, np.int32)
        found[: self.rows.shape[1]] = self.rows[self.row_of[device]]
        return found

    def after(self, received: Mapping[int, np.ndarray], versions: np.ndarray) -> Copies:
        """Once devices have received tensors.

        Args:
            received: Device -> indices of the tensors.
            versions: Of all tensors on the server, int32 [tensors].
        """
        row_of, made = self.row_of.copy(), dict[bytes, int]()
        for device, tensors in received.items():
            row = self.of(device, len(versions))
            row[tensors] = versions[tensors]
            row_of[device] = made.setdefault(row.tobytes(), len(self.rows) + len(made))
        new = np.frombuffer(b"".join(made), np.int32).reshape(len(made), len(versions))
        old = np.pad(self.rows, ((0, 0), (0, len(versions) - self.rows.shape[1])), constant_values=-1)
        used, row_of = np.unique(row_of, return_inverse=True)  # rows that nobody has any more are dropped
        return Copies(np.concatenate([old, new])[used], row_of.astype(np.int32))


@dataclass(frozen=True)
class State:
    """All that a run is after some rounds; the same state gives the same future, bit for bit.

    Attributes:
        round: Rounds done.
        params: Global tensors.
        changed: Tensor -> its version: the round after which it last changed; 0 at first. "memory:name" of what is in
            memory.
        copies: What devices have received.
        memory: What the server keeps for the method besides the network.
        devices: What devices keep for the method between rounds: on their own disks, but for the simulation.
        totals: What the run has cost so far.
    """

    round: int
    params: Params
    changed: Mapping[str, int]
    copies: Copies
    memory: Params = field(default_factory=dict)
    devices: Mapping[int, Params] = field(default_factory=dict)
    totals: Mapping[str, float] = field(default_factory=lambda: dict.fromkeys(TOTALS, 0))

    def pack(self) -> tuple[dict[str, Any], Params]:
        """Plain data and tensors that make up the state; `unpack` gives the same state back."""
        tensors = dict(self.params) | {f"memory:{name}": tensor for name, tensor in self.memory.items()}
        for device, kept in self.devices.items():
            tensors |= {f"device:{device}:{name}": tensor for name, tensor in kept.items()}
        tensors |= {f"copies:{key}": torch.from_numpy(getattr(self.copies, key)) for key in ("rows", "row_of")}
        data = {
            "round": self.round,
            "changed": self.changed,
            "tensors": list(tensors),
            "totals": self.totals,
        }
        return data, {name: tensor.contiguous() for name, tensor in tensors.items()}

    @staticmethod
    def unpack(data: Mapping[str, Any], tensors: Params) -> State:
        """The state written by `pack`."""
        ordered = {name: tensors[name] for name in data["tensors"]}  # safetensors sorts names its own way
        copies = Copies(*(ordered.pop(f"copies:{key}").numpy() for key in ("rows", "row_of")))
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
        return State(data["round"], params, dict(data["changed"]), copies, memory, devices, dict(data["totals"]))
