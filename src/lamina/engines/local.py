"""Devices simulated in this process, a few at a time."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from typing import TypeVar

import torch

from lamina import client
from lamina.data.task import Shard
from lamina.job import Job, Update
from lamina.machine import threads
from lamina.ops import HOST, Ops
from lamina.placement import Placement
from lamina.spec import Spec

J = TypeVar("J")
T = TypeVar("T")


def in_threads(workers: int, train: Callable[[J], T], jobs: Iterable[J]) -> Iterator[T]:
    """What becomes of each job, in their order, `workers` at a time; what was not begun when one fails is dropped.

    Jobs are taken a few ahead of what has been asked for, so that no more are ever at hand.
    """
    with threads(workers) as pool:
        begun = deque[Future[T]]()
        try:
            for job in jobs:
                begun.append(pool.submit(train, job))
                if len(begun) > 2 * workers:
                    yield begun.popleft().result()
            while begun:
                yield begun.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


class LocalEngine:
    """Runs `client.train` in `workers` threads. Each device is computed alone, so their number changes no result."""

    def __init__(self, spec: Spec, shards: Sequence[Shard], workers: int, device: torch.device = HOST) -> None:
        """Serve the given shards, indexed by device, on a network; all is computed on `device`."""
        self._spec, self._shards, self._workers = spec, shards, workers
        self._ops, self._placement = Ops(device), Placement(device)

    def run(self, jobs: Iterable[Job]) -> Iterator[Update]:
        """Updates in the order of the jobs."""
        return in_threads(self._workers, self._train, jobs)

    def _train(self, job: Job) -> Update:
        placed = self._placement.job(job).owned()
        update = client.train(placed, self._shards[job.turn.device], self._spec, self._ops)
        return self._placement.updates([update])[0]
