"""What is timed: networks, fleets and rounds, from which all systems get the same devices, batches and weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lamina import checkpoint, config, files, model, toml
from lamina.bench.runners import request as requests
from lamina.bench.runners.request import EXPERIMENT, NETWORK, Request
from lamina.config import Experiment
from lamina.errors import UserError
from lamina.experiment import load_task, look_ahead
from lamina.job import Turn
from lamina.server import draw_cohort
from lamina.shapes import FLOAT_BYTES
from lamina.spec import Spec

VOCAB, WINDOW, LR = 1024, 80, 1e-3
_CAREFUL = {"embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0, "use_cache": False}


@dataclass(frozen=True)
class Workload:
    """Rounds of devices that finetune the last blocks of a GPT-2 with `caff` and AdamW, in fp32.

    Attributes:
        about: For people.
        spec: The network.
        trained: Last blocks that each class of devices trains; the classes are of the same size.
        devices: Number of devices.
        cohort: Of a round.
        examples: Sequences of each device.
        local: Keys of [local].
        against: Systems that it is made for.
    """

    about: str
    spec: Spec
    trained: tuple[int, ...]
    devices: int
    cohort: int
    examples: int
    local: Mapping[str, Any]
    against: tuple[str, ...] = ("loop", "pfl", "flower")

    def table(self, name: str, rounds: int, workers: int, network: Path, device: str = "cpu") -> dict[str, Any]:
        """The experiment, as in a TOML file.

        A class is made to train so many blocks, and not more, by an uplink that just takes them.

        Args:
            name: Of the run.
            rounds: Number of rounds.
            workers: Devices computed at a time.
            network: Folder of the network.
            device: Where they are computed.
        """
        layout = model.layout(self.spec)
        fleet: list[dict[str, Any]] = []
        for blocks in self.trained:
            sent_bytes = FLOAT_BYTES * sum(map(layout.numel, layout.tail(blocks)))
            fleet.append({"name": f"last-{blocks}", "uplink": sent_bytes})
        return {
            "name": name,
            "rounds": rounds,
            "cohort": self.cohort,
            "workers": workers,
            "device": device,
            "eval_devices": 1,
            "networks": [str(network)],
            "task": {"name": "noise", "devices": self.devices, "examples": self.examples, "window": WINDOW},
            "method": {"name": "caff"},
            "local": {"lr": LR, **self.local},
            "fleet": fleet,
        }


def _gpt2(embed: int, blocks: int) -> Spec:
    heads = {256: 8, 64: 4}[embed]
    return Spec(blocks, embed, heads, embed // heads, 4 * embed, VOCAB, WINDOW)


_A = Workload(
    about="d=256, last 2 of 6 blocks, 10 of 100 devices, 1 epoch of 64 sequences of 80, batch 16",
    spec=_gpt2(256, 6),
    trained=(2,),
    devices=100,
    cohort=10,
    examples=64,
    local={"batch_size": 16, "epochs": 1},
)
_C = Workload(
    about="d=64, last 2 of 4 blocks, 100 of 1,000 devices, 4 steps of 8 sequences of 80",
    spec=_gpt2(64, 4),
    trained=(2,),
    devices=1000,
    cohort=100,
    examples=32,
    local={"batch_size": 8, "steps": 4},
)
WORKLOADS: dict[str, Workload] = {
    "A": _A,
    "B": replace(
        _A, about="as A, but last 2 of 12 blocks and 5 epochs", spec=_gpt2(256, 12), local={**_A.local, "epochs": 5}
    ),
    "C": _C,
    "D": replace(
        _A,
        about="as A, but last 1, 3 or 6 of 12 blocks and 30 of 300 devices",
        spec=_gpt2(256, 12),
        trained=(1, 3, 6),
        devices=300,
        cohort=30,
    ),
    "E": replace(_A, about="as A, but full finetuning", trained=(6,)),
    "F": replace(_C, about="as C, but 1,000 of 100,000 devices", devices=100_000, cohort=1000, against=("loop",)),
}


def prepare(
    workload: Workload,
    name: str,
    folder: Path,
    rounds: int,
    workers: int,
    overrides: Sequence[str],
    device: str = "cpu",
) -> Request:
    """What all systems are asked to do, in a folder: the network, the experiment, and the devices of every round.

    Args:
        workload: What is timed.
        name: Of it.
        folder: An empty one.
        rounds: Number of rounds.
        workers: Devices computed at a time.
        overrides: Settings as `--set` takes them, for the experiment.
        device: Where devices are computed.

    Raises:
        UserError: A setting is not accepted, or devices would take steps of different sizes.
    """
    network, path = folder / NETWORK, folder / EXPERIMENT
    params = model.init(workload.spec, torch.Generator().manual_seed(0))
    checkpoint.write(network, workload.spec, params, torch.float32, _CAREFUL)
    files.write(path, toml.dump(workload.table(f"bench-{name}", rounds, workers, network, device)))
    experiment = config.load_experiment(path, overrides)
    if (experiment.rounds, experiment.workers, experiment.device) != (rounds, workers, device):
        raise UserError(
            "--set cannot change rounds, workers and device here: take --rounds, --warmup, --workers and --device"
        )
    files.write(path, toml.dump(experiment.to_table()))
    request = _drawn(experiment, folder, workers)
    requests.write(request)
    return request


def _drawn(experiment: Experiment, folder: Path, workers: int) -> Request:
    task, local = load_task(experiment), experiment.local
    outlook = look_ahead(experiment, task)
    cohorts = [draw_cohort(experiment, outlook, round_) for round_ in range(experiment.rounds)]
    drawn = sorted({device for cohort in cohorts for device in cohort})
    place, ids = {device: index for index, device in enumerate(drawn)}, []
    for device in drawn:
        inputs, targets = task.train[device].batch(np.arange(len(task.train[device])))
        ids.append(np.concatenate([inputs, targets[:, -1:]], axis=1).astype(np.int32))

    def steps(round_: int, device: int) -> list[np.ndarray]:
        return local.batches(Turn(experiment.seed, round_, experiment.rounds, device), len(task.train[device]))

    try:
        rows = np.array([[steps(r, device) for device in cohort] for r, cohort in enumerate(cohorts)])
    except ValueError as error:
        raise UserError("all steps must be of as many sequences: let local.batch_size divide task.examples") from error
    return Request(
        folder=folder,
        devices=len(task.train),
        workers=workers,
        device=experiment.device,
        lr=local.lr,
        weight_decay=local.weight_decay,
        ids=np.array(ids),
        places=np.array([[place[device] for device in cohort] for cohort in cohorts]),
        rows=rows,
        blocks=np.array([[outlook.chosen.trained_blocks(outlook.class_of[d]) for d in cohort] for cohort in cohorts]),
    )
