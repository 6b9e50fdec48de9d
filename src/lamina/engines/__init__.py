"""The one seam between the server and its devices: jobs in, updates out."""

from collections.abc import Iterable, Iterator
from typing import Protocol

from lamina.job import Failure, Job, Update


class Engine(Protocol):
    """Carries jobs to devices and updates back. Methods, planner and server cannot tell which engine it is."""

    def run(self, jobs: Iterable[Job]) -> Iterator[Update | Failure]:
        """Answers as they come, in any order; a device that is lost gives none.

        Jobs are made when they are asked for, and those with the same plan share their tensors. An answer is held back
        while one of a lower device is out, so that answers in the order of the jobs take the least memory.
        """
