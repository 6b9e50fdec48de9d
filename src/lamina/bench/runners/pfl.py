"""pfl-research, in one process, as its tutorials put it together."""

from __future__ import annotations

from functools import partial
from itertools import count
from typing import Any

import torch
from pfl.aggregate.simulate import SimulatedBackend
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.callback.base import TrainingProcessCallback
from pfl.data.dataset import Dataset
from pfl.data.federated_dataset import FederatedDataset
from pfl.hyperparam.base import NNEvalHyperParams, NNTrainHyperParams
from pfl.metrics import Metrics, Weighted
from pfl.model.pytorch import PyTorchModel
from torch import Tensor

from .gpt2 import Gpt2
from .request import Request
from .rounds import Rounds
from .training import loss, thaw


class _Module(torch.nn.Module):
    """The network with the methods that pfl asks for."""

    def __init__(self, network: Gpt2) -> None:
        super().__init__()
        self.module, self._network = network.module, network

    def loss(self, inputs_BS: Tensor, targets_BS: Tensor) -> Tensor:
        return loss(self._network, inputs_BS, targets_BS)

    def metrics(self, inputs_BS: Tensor, targets_BS: Tensor) -> dict[str, Any]:
        """Of an evaluation, which costs nothing here."""
        return {"none": Weighted(0, 1)}


class _Model(PyTorchModel):  # type: ignore[misc]
    """Devices train from different depths on."""

    def __init__(self, network: Gpt2, **settings: Any) -> None:
        super().__init__(_Module(network), **settings)
        self._network = network

    def do_multiple_epochs_of(self, user_dataset: Any, *given: Any, **named: Any) -> Any:
        thaw(self._network, user_dataset.metadata["blocks"])
        return super().do_multiple_epochs_of(user_dataset, *given, **named)


class _Clock(TrainingProcessCallback):  # type: ignore[misc]
    def __init__(self, rounds: Rounds, network: Gpt2) -> None:
        self._rounds, self._network = rounds, network

    def on_train_begin(self, *, model: Any) -> Any:
        self._rounds.begin()
        return Metrics()

    def after_central_iteration(self, *given: Any, **named: Any) -> tuple[bool, Any]:
        self._rounds.end(self._network.save)
        self._rounds.begin()
        return False, Metrics()


def play(request: Request, rounds: Rounds) -> None:
    """All rounds."""
    network, turns = Gpt2(request.network), count()
    thaw(network, request.most_blocks)
    model = _Model(
        network,
        local_optimizer_create=partial(torch.optim.AdamW, weight_decay=request.weight_decay),
        central_optimizer=torch.optim.SGD(network.module.parameters(), lr=1.0),
    )

    def dataset(turn: int) -> Any:
        client = request.client(*divmod(turn, request.cohort))
        # all steps in a row, which are then read as one epoch
        return Dataset(
            list(client.examples(client.rows.reshape(-1))), user_id=str(turn), metadata={"blocks": client.blocks}
        )

    data = FederatedDataset(dataset, lambda: next(turns))
    train = NNTrainHyperParams(
        local_batch_size=request.rows.shape[-1], local_num_epochs=1, local_learning_rate=request.lr
    )
    rule = NNAlgorithmParams(
        central_num_iterations=request.rounds,
        evaluation_frequency=request.rounds + 1,
        train_cohort_size=request.cohort,
        val_cohort_size=0,
    )
    FederatedAveraging().run(
        rule,
        SimulatedBackend(data, data),
        model,
        train,
        NNEvalHyperParams(local_batch_size=None),
        [_Clock(rounds, network)],
        send_metrics_to_platform=False,
    )
