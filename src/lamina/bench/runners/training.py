"""Training as people write it by hand: a loop over clients, each with an optimizer of its own, then the mean."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from .request import Client, Request
from .rounds import Rounds


class Network(Protocol):
    """A network that can be trained from its end.

    Attributes:
        tensors: All its tensors by name; they stay the same objects.
    """

    tensors: Mapping[str, Tensor]

    def trained(self, blocks: int) -> frozenset[str]:
        """Names of the tensors of the last blocks, the final norm and the head; with all blocks, all there are."""

    def logits(self, inputs_BS: Tensor) -> Tensor:
        """Ids BS -> logits BSV."""

    def save(self, folder: Path) -> None:
        """Write the weights into a folder, as transformers names them."""


def loss(network: Network, inputs_BS: Tensor, targets_BS: Tensor) -> Tensor:
    """Mean cross-entropy per token."""
    return F.cross_entropy(network.logits(inputs_BS).flatten(0, 1), targets_BS.flatten())


def thaw(network: Network, blocks: int) -> None:
    """Let gradients reach the last blocks, the final norm and the head, and nothing else."""
    names = network.trained(blocks)
    for name, tensor in network.tensors.items():
        tensor.requires_grad_(name in names)


def train(network: Network, client: Client, lr: float, weight_decay: float) -> None:
    """The steps of a device, from the weights that the network has."""
    thaw(network, client.blocks)
    trained = [tensor for tensor in network.tensors.values() if tensor.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=weight_decay)
    for inputs_BS, targets_BS in client.batches():
        optimizer.zero_grad()
        loss(network, inputs_BS, targets_BS).backward()  # type: ignore[no-untyped-call]
        optimizer.step()


def play(request: Request, rounds: Rounds, network: Network) -> None:
    """Federated averaging in a plain loop; devices count the same, as they have as many sequences."""
    moving = {name: network.tensors[name] for name in sorted(network.trained(request.most_blocks))}
    for round_ in range(request.rounds):
        rounds.begin()
        start = {name: tensor.detach().clone() for name, tensor in moving.items()}
        mean = {name: torch.zeros_like(tensor) for name, tensor in start.items()}
        for client in request.clients(round_):
            load(moving, start)
            train(network, client, request.lr, request.weight_decay)
            for name, tensor in moving.items():
                mean[name].add_(tensor.detach(), alpha=1 / request.cohort)
        load(moving, mean)
        rounds.end(network.save)


@torch.no_grad()
def load(tensors: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    """Set tensors to values of the same names."""
    for name, tensor in tensors.items():
        tensor.copy_(values[name])
