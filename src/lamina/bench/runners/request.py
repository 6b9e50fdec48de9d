"""What a system is asked to do: the same rounds, devices, batches and weights for all of them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

NETWORK, EXPERIMENT = "network", "experiment.toml"
_REQUEST, _ARRAYS = "request.json", ("ids", "places", "rows", "blocks")


@dataclass(frozen=True)
class Client:
    """A device in a round.

    Attributes:
        ids: Its sequences, [sequences, tokens + 1].
        rows: Those of each step, [steps, sequences of a batch].
        blocks: The last so many blocks are trained, with the final norm and the head.
        device: Where it computes.
    """

    ids: np.ndarray
    rows: np.ndarray
    blocks: int
    device: str

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Inputs and targets of each step, int64 [sequences, tokens]."""
        for rows in self.rows:
            yield self.examples(rows)

    def examples(self, rows: np.ndarray) -> tuple[Tensor, Tensor]:
        """Inputs and targets of some sequences, int64 [sequences, tokens]."""
        ids = torch.from_numpy(self.ids[rows].astype(np.int64)).to(self.device)
        return ids[:, :-1], ids[:, 1:]


@dataclass(frozen=True)
class Request:
    """A number of rounds.

    Attributes:
        folder: Where the files are: the pretrained network, the experiment as lamina's runner takes it, the arrays.
        devices: Number of devices there are.
        workers: Devices computed at a time.
        device: Where they compute, as torch calls it.
        lr: Learning rate of AdamW.
        weight_decay: Of AdamW.
        ids: Tokens of the devices that are drawn in any round, [devices, sequences, tokens + 1], mapped.
        places: Which of them each round has, [rounds, cohort].
        rows: Sequences of each step, [rounds, cohort, steps, sequences].
        blocks: Last blocks that each device trains, [rounds, cohort].
    """

    folder: Path
    devices: int
    workers: int
    device: str
    lr: float
    weight_decay: float
    ids: np.ndarray
    places: np.ndarray
    rows: np.ndarray
    blocks: np.ndarray

    @property
    def rounds(self) -> int:
        """Number of rounds."""
        return len(self.places)

    @property
    def cohort(self) -> int:
        """Devices of a round."""
        return int(self.places.shape[1])

    @property
    def most_blocks(self) -> int:
        """Most blocks that any device trains."""
        return int(self.blocks.max())

    @property
    def network(self) -> Path:
        """Folder of the pretrained network."""
        return self.folder / NETWORK

    def client(self, round_: int, index: int) -> Client:
        """A device of the cohort of a round, both counted from 0."""
        place = round_, index
        return Client(self.ids[self.places[place]], self.rows[place], int(self.blocks[place]), self.device)

    def clients(self, round_: int) -> Iterator[Client]:
        """The cohort of a round."""
        return (self.client(round_, index) for index in range(self.cohort))


def write(request: Request) -> None:
    """Put a request into its folder."""
    plain = asdict(request)
    for name in _ARRAYS:
        np.save(request.folder / f"{name}.npy", plain.pop(name))
    del plain["folder"]
    (request.folder / _REQUEST).write_text(json.dumps(plain), encoding="utf-8")


def read(folder: Path) -> Request:
    """The request in a folder."""
    arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in _ARRAYS}
    return Request(folder, **json.loads((folder / _REQUEST).read_text(encoding="utf-8")), **arrays)
