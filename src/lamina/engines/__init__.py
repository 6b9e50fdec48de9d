"""The one seam between the server and its devices: jobs in, updates out."""

from collections.abc import Iterable, Iterator
from typing import Protocol

from lamina.job import Failure, Job, Update


class Engine(Protocol):
    """Carries jobs to devices and updates back. Methods, planner and server cannot tell which engine it is."""

    def run(self, jobs: Iterable[Job]) -> Iterator[Update | Failure]:
        """Answers as they come, in any order; a device that is lost gives none."""
