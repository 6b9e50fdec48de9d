"""The plain loop of `training` around lamina's model: what is gained by the model alone, without an engine."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from lamina import checkpoint, model

from . import training
from .request import Request
from .rounds import Rounds


class Lean:
    """The network in a folder, as a `training.Network`."""

    def __init__(self, folder: Path, device: str) -> None:
        """Load it."""
        self._spec, tensors = checkpoint.load(folder)
        self.tensors: Mapping[str, Tensor] = {name: tensor.to(device) for name, tensor in tensors.items()}

    def trained(self, blocks: int) -> frozenset[str]:
        """Names of the tensors of the last blocks, the final norm and the head; with all blocks, all there are."""
        return model.layout(self._spec).tail(blocks)

    def logits(self, inputs_BS: Tensor) -> Tensor:
        """Ids BS -> logits BSV."""
        return model.forward(self._spec, self.tensors, inputs_BS)

    def save(self, folder: Path) -> None:
        """Write the weights into a folder."""
        checkpoint.write(folder, self._spec, {n: t.detach().cpu() for n, t in self.tensors.items()}, torch.float32, {})


def play(request: Request, rounds: Rounds) -> None:
    """All rounds."""
    training.play(request, rounds, Lean(request.network, request.device))
