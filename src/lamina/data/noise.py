"""Random tokens, for measuring speed and memory with any number of devices: there is nothing in them to learn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from lamina.data.dealing import demand
from lamina.data.task import Made, Task
from lamina.errors import UserError
from lamina.files import digest
from lamina.hf import read_spec
from lamina.spec import Spec
from lamina.turn import generator

if TYPE_CHECKING:
    from lamina.job import Turn


@dataclass(frozen=True, slots=True)
class Static:
    """The windows of one device, drawn anew each time they are asked for.

    Attributes:
        seed: Of the run.
        device: Index of the device.
        purpose: "train" or "test".
        windows: How many there are.
        window: Tokens of a window; the target of the last one is a token more.
        vocab: Ids are below this.
    """

    seed: int
    device: int
    purpose: str
    windows: int
    window: int
    vocab: int

    def __len__(self) -> int:
        """Number of windows."""
        return self.windows

    def batch(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Inputs and targets, the same one token on, of the windows `rows`; int64 [rows, window] each."""
        rng = generator(self.seed, "task", self.purpose, self.device)
        ids = rng.integers(self.vocab, size=(self.windows, self.window + 1), dtype=np.int32)[rows].astype(np.int64)
        return ids[:, :-1], ids[:, 1:]

    def at(self, turn: Turn) -> Static:
        """The same in every turn."""
        return self


@dataclass(frozen=True)
class Noise:
    """Windows of random tokens, every id of the network's vocabulary as likely; the fields are the keys of [task].

    Nothing is stored: a device's windows are a function of the seed and the device. The last token of a test window
    counts.

    Attributes:
        devices: Number of devices.
        examples: Training windows of each device.
        tests: Test windows of each device.
        window: Tokens of a window.

    Raises:
        UserError: A field is out of range.
    """

    path: ClassVar[None] = None  # it is drawn

    devices: int = 100
    examples: int = 64
    tests: int = 1
    window: int = 80

    def __post_init__(self) -> None:
        """Refuse fields that are out of range."""
        for field in ("devices", "examples", "tests", "window"):
            demand(field, getattr(self, field), getattr(self, field) >= 1, "at least 1")

    def device_count(self) -> int:
        """Number of devices."""
        return self.devices

    def fit(self, spec: Spec, folder: Path) -> Spec:
        """The network as it is.

        Args:
            spec: Of the network in `folder`.
            folder: Of the network.

        Raises:
            UserError: It does not predict the next token, or not as far as `window`.
        """
        if spec.patch or not spec.causal or spec.labels:
            raise UserError(f"network {folder.name} does not predict tokens; name a causal one for text")
        if not spec.rotary and spec.positions < self.window:
            raise UserError(
                f"network {folder.name} has {spec.positions} positions; task.window = {self.window} needs as many"
            )
        return spec

    def reads(self, folder: Path) -> str:
        """Digest of the ids that a network's folder accepts.

        Raises:
            UserError: The folder holds no network.
        """
        return digest(f"noise/{read_spec(folder).vocab}".encode())

    def load(self, seed: int, groups: Sequence[int] | None, folder: Path) -> Task:
        """The windows of every device, none of which is drawn yet.

        Args:
            seed: Decides the ids.
            groups: Resource classes; of no account.
            folder: Of a network, whose vocabulary is used.
        """
        vocab, devices = read_spec(folder).vocab, self.devices
        return Task(
            train=Made(devices, lambda device: Static(seed, device, "train", self.examples, self.window, vocab)),
            test=Made(devices, lambda device: Static(seed, device, "test", self.tests, self.window, vocab)),
            names=Made(devices, lambda device: f"device {device}"),
            scored=1,
            digest=digest(f"{self}/{seed}/{vocab}".encode()),
            kinds=("noise",),
            mix=np.broadcast_to(np.int64(self.examples), (devices, 1)),
        )
