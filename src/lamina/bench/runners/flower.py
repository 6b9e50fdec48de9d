"""Flower's simulation with Ray: stock FedAvg, one CPU for each client, as many at a time as there are workers.

Only what some device trains is sent, and a worker builds its network once: what a careful user does.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation
from torch import Tensor

from .gpt2 import Gpt2
from .request import Request, read
from .rounds import Rounds
from .training import load, train

client_app = ClientApp()


@cache
def _loaded(folder: str) -> tuple[Request, Gpt2]:
    torch.set_num_threads(1)
    request = read(Path(folder))
    return request, Gpt2(request.network)


def _moving(request: Request, network: Gpt2) -> dict[str, Tensor]:
    """What travels: the tensors that any device trains."""
    return {name: network.tensors[name] for name in sorted(network.trained(request.most_blocks))}


@client_app.train()
def _train(message: Any, context: Any) -> Any:
    task = message.content["config"]
    request, network = _loaded(task["folder"])
    client, moving = request.client(task["server-round"] - 1, task["index"]), _moving(request, network)
    load(moving, message.content["arrays"].to_torch_state_dict())
    train(network, client, request.lr, request.weight_decay)
    arrays = ArrayRecord({name: tensor.detach() for name, tensor in moving.items()})
    metrics = MetricRecord({"num-examples": len(client.ids)})
    return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)


class _Cohorts(FedAvg):
    """Federated averaging that tells each node which device it is to be."""

    def __init__(self, request: Request) -> None:
        super().__init__(fraction_train=request.cohort / request.devices, fraction_evaluate=0.0)
        self._request = request

    def configure_train(self, *asked: Any) -> Iterable[Any]:
        for index, message in enumerate(super().configure_train(*asked)):
            own: Any = {"folder": str(self._request.folder), "index": index}
            given: Any = message.content
            config = ConfigRecord({**given["config"], **own})
            message.content = RecordDict({"arrays": given["arrays"], "config": config})
            yield message


def play(request: Request, rounds: Rounds) -> None:
    """All rounds."""
    server_app = ServerApp()

    @server_app.main()
    def main(grid: Any, context: Any) -> None:
        network = Gpt2(request.network)
        moving = _moving(request, network)

        def on_round(number: int, arrays: Any) -> None:
            """Called before the first round, and after each."""
            if number:

                def save(folder: Path) -> None:
                    load(moving, arrays.to_torch_state_dict())
                    network.save(folder)

                rounds.end(save)
            rounds.begin()

        first = ArrayRecord({name: tensor.detach() for name, tensor in moving.items()})
        _Cohorts(request).start(grid, first, request.rounds, evaluate_fn=on_round)

    resources: Any = {"init_args": {"num_cpus": request.workers}, "client_resources": {"num_cpus": 1, "num_gpus": 0.0}}
    run_simulation(server_app, client_app, request.devices, backend_config=resources)
