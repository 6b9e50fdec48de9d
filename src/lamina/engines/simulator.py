"""The engine that an experiment is simulated with."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lamina.config import Experiment
from lamina.data.task import Shard
from lamina.engines import Engine
from lamina.engines.local import LocalEngine
from lamina.engines.prefix import Prefixes
from lamina.engines.stacked import StackedEngine
from lamina.experiment import Outlook
from lamina.fleet import quantity
from lamina.limits import keep_freed
from lamina.ops import Ops
from lamina.placement import place
from lamina.stack import Stacked

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def simulator(experiment: Experiment, outlook: Outlook, shards: Sequence[Shard], workers: int) -> Engine:
    """What simulates the devices of an experiment, whose examples are `shards`, `workers` at a time."""
    spec, device = outlook.chosen.spec, place(experiment.device)
    if experiment.enforce:
        from lamina.engines.enforced import EnforcedEngine

        return EnforcedEngine(spec, shards, outlook.budget_in, min(workers, experiment.cohort))
    keep_freed()
    if experiment.engine == "serial":
        return LocalEngine(spec, shards, workers, device)
    ram, disk = (value and quantity("", value) for value in (experiment.prefix_ram, experiment.prefix_disk))
    prefixes, dtype = Prefixes(int(ram), int(disk)), _DTYPES[experiment.precision]
    return StackedEngine(spec, shards, workers, prefixes, dtype, device)


def kernels(experiment: Experiment) -> Ops:
    """What an experiment's networks are evaluated with."""
    device = place(experiment.device)
    if experiment.enforce or experiment.engine == "serial":
        return Ops(device)
    return Stacked(_DTYPES[experiment.precision], device)
