"""A process and all that it started, as Linux tells of them in /proc."""

from __future__ import annotations

import ctypes
import os
import resource
import signal
from typing import NamedTuple

_ADOPT, _END = 36, 1  # PR_SET_CHILD_SUBREAPER and PR_SET_PDEATHSIG of prctl(2)
_TICK_SECONDS = 1 / os.sysconf("SC_CLK_TCK")
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


class Process(NamedTuple):
    """One of a tree.

    Attributes:
        number: Its id.
        parent: Id of its parent.
        cpu_seconds: Used by it and by those of its children that it has waited for.
        begun: When it was started, in ticks since the machine was; with its id it names it for good.
        resident_bytes: Its resident memory; what it shares with others is counted in full.
    """

    number: int
    parent: int
    cpu_seconds: float
    begun: int
    resident_bytes: int


def adopt() -> None:
    """Become the parent of processes started by this one's children that lose theirs, and end when its own parent does.

    So `tree` has them all, and none is left when `lamina bench` is killed.
    """
    prctl = ctypes.CDLL(None).prctl
    prctl(_ADOPT, 1, 0, 0, 0)
    prctl(_END, signal.SIGTERM, 0, 0, 0)


def tree(root: int) -> list[Process]:
    """The process `root`, if it is alive, and all that descend from it."""
    alive = table()
    children: dict[int, list[Process]] = {}
    for process in alive.values():
        children.setdefault(process.parent, []).append(process)
    found = [alive[root]] if root in alive else []
    for process in found:  # which grows meanwhile
        found += children.get(process.number, [])
    return found


def cpu_seconds() -> float:
    """User and system time of this process and all that it started, those that are gone included."""
    own = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    others = tree(os.getpid())[1:]
    return sum(usage.ru_utime + usage.ru_stime for usage in own) + sum(each.cpu_seconds for each in others)


def table() -> dict[int, Process]:
    """All processes that are alive, by id."""
    found = {}
    for entry in os.listdir("/proc"):
        if entry.isdecimal():
            try:
                with open(f"/proc/{entry}/stat", encoding="utf-8", errors="replace") as file:
                    # what is before the bracket is the id and the name, which may hold anything
                    fields = file.read().rpartition(")")[2].split()
            except OSError:  # it has ended
                continue
            number, cpu_seconds = int(entry), sum(map(int, fields[11:15])) * _TICK_SECONDS
            found[number] = Process(number, int(fields[1]), cpu_seconds, int(fields[19]), int(fields[21]) * _PAGE_BYTES)
    return found
