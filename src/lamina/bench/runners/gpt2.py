"""GPT-2 of transformers, as its users train it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor
from transformers import GPT2LMHeadModel

from .rounds import WEIGHTS


class Gpt2:
    """The network in a folder, as a `training.Network`."""

    def __init__(self, folder: Path, device: str = "cpu") -> None:
        """Load it."""
        self.module: Any = GPT2LMHeadModel.from_pretrained(folder).train().to(device)
        self.tensors: Mapping[str, Tensor] = dict(self.module.named_parameters())
        self._blocks: int = self.module.config.n_layer

    def trained(self, blocks: int) -> frozenset[str]:
        """Names of the parameters of the last blocks, the final norm and the head; with all blocks, all there are."""
        if blocks == self._blocks:
            return frozenset(self.tensors)
        tail = tuple(f"transformer.h.{i}." for i in range(self._blocks - blocks, self._blocks))
        return frozenset(name for name in self.tensors if name.startswith((*tail, "transformer.ln_f.", "lm_head.")))

    def logits(self, inputs_BS: Tensor) -> Tensor:
        """Ids BS -> logits BSV."""
        found: Tensor = self.module(input_ids=inputs_BS).logits
        return found

    def save(self, folder: Path) -> None:
        """Write the weights into a folder."""
        save_file({name: tensor.detach().cpu() for name, tensor in self.tensors.items()}, folder / WEIGHTS)
