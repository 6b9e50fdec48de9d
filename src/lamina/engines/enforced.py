"""Devices simulated in processes that get no more memory than their budgets."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from queue import SimpleQueue

from lamina.data.task import Shard
from lamina.device import Devices
from lamina.engines.local import in_threads
from lamina.fleet import Budget
from lamina.job import Failure, Job, Turn, Update
from lamina.spec import Spec


class EnforcedEngine:
    """Runs each job in a child of one of `workers` processes. A device that needs too much costs its own update."""

    def __init__(self, spec: Spec, shards: Sequence[Shard], budget: Callable[[Turn], Budget], workers: int) -> None:
        """Serve the given shards, indexed by device, on a network, each within the budget it has in the round."""
        self._spec, self._shards, self._budget = spec, shards, budget
        self._workers, self._idle = workers, SimpleQueue[Devices]()
        for _ in range(workers):
            self._idle.put(Devices())

    def run(self, jobs: Iterable[Job]) -> Iterator[Update | Failure]:
        """Answers in the order of the jobs."""
        return in_threads(self._workers, self._train, jobs)

    def _train(self, job: Job) -> Update | Failure:
        devices, device = self._idle.get(), job.turn.device
        try:
            return devices.run(job, self._shards[device], self._spec, self._budget(job.turn).memory_bytes).answer
        finally:
            self._idle.put(devices)
