"""Where simulated devices compute: on the host, or on one of its CUDA cards."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from lamina.errors import UserError, nearest
from lamina.job import Job, Update
from lamina.layout import Params
from lamina.ops import HOST


def check(name: str) -> None:
    """Refuse what names no place, whether or not this machine has it.

    Raises:
        ValueError: Saying what is accepted.
    """
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", name):
        raise ValueError(f"device: unknown {name!r}; {nearest(name, ('auto', 'cpu', 'cuda', 'cuda:1'))}")


def place(name: str) -> torch.device:
    """The device that is meant by "cpu", "cuda", the first card, "cuda:1" and so on, or "auto", "cuda" if there is one.

    Raises:
        UserError: There is no such card.
    """
    cards = torch.cuda.device_count() if name != "cpu" and torch.cuda.is_available() else 0
    if name == "cpu" or (name == "auto" and not cards):
        return HOST
    index = int(name.partition(":")[2] or 0)
    if index >= cards:
        seen = f'the last card that torch sees is "cuda:{cards - 1}"' if cards else "torch sees no CUDA device"
        raise UserError(f'device is "{name}", but {seen}; use "cpu" or "auto"')
    return torch.device("cuda", index)


def card(device: torch.device) -> str | None:
    """What a card calls itself; nothing on the host."""
    return None if device == HOST else torch.cuda.get_device_name(device)


class Placement:
    """Brings jobs to a device, and updates back.

    A tensor of the server is copied once and stays on the device for as long as the server has it; it is the same
    object in every job, as the server's own is.
    """

    def __init__(self, device: torch.device) -> None:
        """Bring them to `device`; on the host, everything is in its place."""
        self.device = device
        self._copies = WeakTensorKeyDictionary()

    def job(self, job: Job) -> Job:
        """The same job with its tensors on the device."""
        arrays = {name: self._copy(p) for name, p in job.arrays.items()}
        state = {name: p.to(self.device) for name, p in job.state.items()}
        return replace(job, arrays=arrays, state=state)

    def updates(self, updates: Sequence[Update]) -> list[Update]:
        """The same updates of devices that train alike, with their tensors on the host."""
        arrays: list[Params] = [{} for _ in updates]
        for name in updates[0].arrays:
            moved = _moved([update.arrays[name] for update in updates])
            for each, p in zip(arrays, moved, strict=True):
                each[name] = p
        states = ({name: p.to(HOST) for name, p in update.state.items()} for update in updates)
        return [replace(u, arrays=a, state=s) for u, a, s in zip(updates, arrays, states, strict=True)]

    def _copy(self, p: Tensor) -> Tensor:
        if p.device == self.device:
            return p
        if p not in self._copies:
            self._copies[p] = p.to(self.device)
        found: Tensor = self._copies[p]
        return found


def _moved(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    """Tensors on the host; those of a card in one transfer, if they are of one shape."""
    if len(tensors) == 1 or tensors[0].device == HOST or len({p.shape for p in tensors}) > 1:
        return [p.to(HOST) for p in tensors]
    return torch.stack(list(tensors)).to(HOST).unbind()
