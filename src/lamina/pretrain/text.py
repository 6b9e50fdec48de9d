"""Pretraining on text: character-level decoders that learn what comes next."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from lamina import checkpoint
from lamina.data.text import ALPHABET, encode, normalise, read_text
from lamina.errors import UserError
from lamina.layout import Params
from lamina.ops import TORCH
from lamina.pretrain.job import Material, Pretrain, Progress, logits
from lamina.spec import Spec
from lamina.turn import generator

_SLICES, _HELD_OUT_EVERY = 1000, 100
_QUICK_WINDOWS = 1024


@dataclass(frozen=True, kw_only=True)
class PretrainText(Pretrain):
    """A family of character-level decoders; see `Pretrain` for the other keys.

    Attributes:
        text: Plain text, .txt or .txt.xz. One slice of a thousandth in every hundred is held out for validation.
        positions: Characters per sequence.
    """

    source: ClassVar[str] = "text"
    counts: ClassVar[tuple[str, ...]] = (*Pretrain.counts, "positions")

    text: str
    positions: int = 128

    def read(self, device: torch.device) -> Text:
        """The text, as ids."""
        ids = encode(normalise(read_text(Path(self.text))))
        found = Text(self, ids, device)
        if len(found.val_ids) <= self.positions:
            raise UserError(f"{self.text}: {len(ids)} characters are too few; a hundredth must exceed {self.positions}")
        return found


@dataclass(frozen=True)
class TextProgress(Progress):
    """One validation point.

    Attributes:
        characters_per_second: Of training.
    """

    characters_per_second: float

    def told(self) -> str:
        """What else was measured, in words."""
        return f"{self.characters_per_second:,.0f} characters/s"


class Text(Material):
    """Text as ids; the device gets a batch at a time."""

    point, unit = TextProgress, "characters"

    def __init__(self, job: PretrainText, ids: np.ndarray, device: torch.device) -> None:
        """Hold a part of it out."""
        self.job, self.device = job, device
        self.facts = {"text_sha256": hashlib.sha256(ids.tobytes()).hexdigest(), "characters": len(ids)}
        self.train_ids, self.val_ids = held_out(ids)
        self.batch_units, self.val_units = job.batch_size * job.positions, len(self.val_ids)

    def spec(self, depth: int) -> Spec:
        """Sizes of the network of one depth."""
        job = self.job
        return Spec(
            blocks=depth,
            embed=job.embed,
            heads=job.heads,
            head_dim=job.embed // job.heads,
            ffn=4 * job.embed,
            vocab=len(ALPHABET),
            positions=job.positions,
        )

    def batch(self, depth: int, step: int) -> tuple[Tensor, Tensor]:
        """Windows from anywhere in the training text, BS, and what follows each character, BS."""
        job = self.job
        rng = generator(job.seed, "pretrain", depth, step)
        starts = rng.integers(0, len(self.train_ids) - job.positions, job.batch_size)
        return _windows(self.train_ids, starts, job.positions, self.device)

    def validate(self, spec: Spec, params: Params, whole: bool) -> dict[str, float]:
        """Mean loss in nats per character, of evenly spaced windows or of all."""
        windows = None if whole else _QUICK_WINDOWS
        return {"val_loss": validate(spec, params, self.val_ids, self.job.positions, windows)}

    def write(self, folder: Path, spec: Spec, half: Params) -> None:
        """Write the network with its alphabet."""
        checkpoint.write(folder, spec, half, torch.float16, {"alphabet": ALPHABET})


def held_out(ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Split text into training and validation: of 1000 equal slices, every hundredth is held out."""
    slices = np.array_split(ids, _SLICES)
    val = [piece for i, piece in enumerate(slices) if i % _HELD_OUT_EVERY == _HELD_OUT_EVERY // 2]
    train = [piece for i, piece in enumerate(slices) if i % _HELD_OUT_EVERY != _HELD_OUT_EVERY // 2]
    return np.concatenate(train), np.concatenate(val)


@torch.no_grad()
def validate(
    spec: Spec, params: Params, ids: np.ndarray, positions: int, windows: int | None = None, batch: int = 64
) -> float:
    """Mean loss in nats per character over evenly spaced windows of held-out text (None: all, one after another)."""
    count = (len(ids) - 1) // positions
    starts = np.arange(count) * positions
    if windows is not None and windows < count:
        starts = starts[np.linspace(0, count - 1, windows).astype(int)]
    device = params["head.weight"].device
    total = 0.0
    for chunk in np.array_split(starts, math.ceil(len(starts) / batch)):
        inputs, targets = _windows(ids, chunk, positions, device)
        total += TORCH.cross_entropy(logits(spec, params, inputs, "fp32"), targets).item() * len(chunk)
    return total / len(starts)


def _windows(ids: np.ndarray, starts: np.ndarray, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Windows of characters and of those that follow them, int64 [len(starts), length] each."""
    found = torch.from_numpy(ids[starts[:, None] + np.arange(length + 1)].astype(np.int64)).to(device)
    return found[:, :-1], found[:, 1:]
