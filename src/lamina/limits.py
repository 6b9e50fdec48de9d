"""Limits on the memory of this process, and what it takes.

The limit is RLIMIT_DATA: what a process may ask for as private memory, to the byte, whether or not it touches it. It
needs no rights, and asking for more fails with an exception, after which the process goes on; a cgroup kills. For the
limit to be a sharp measure, malloc must give memory back (`traceless`), and what grows at its first use and stays, such
as MKL's buffers, must have grown before (`lamina.worker`).
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import sys
from collections.abc import Iterator

from lamina.errors import UserError

_MAPPED_BYTES, _SMALL_BYTES = 64 * 1024, 1024
_KEPT_BYTES, _LARGEST_MAPPED = 2**31 - 1, 32 * 2**20
"""The most that glibc accepts: of free memory at the end of the heap, and as the size from which tensors are mapped."""


def slack_bytes(budget_bytes: int) -> int:
    """What a process may have on top of its budget: page rounding and kernel buffers, 768 KiB and two percent."""
    return 768 * 1024 + budget_bytes // 50


def demand_limits() -> None:
    """Refuse to go on where memory cannot be limited.

    Raises:
        UserError: The system is not Linux, or does not tell what a process has.
    """
    if sys.platform != "linux" or not _status("VmData"):
        raise UserError(f"enforce limits the memory of processes, which needs Linux with /proc; this is {sys.platform}")


@contextlib.contextmanager
def limited(limit_bytes: int | None) -> Iterator[None]:
    """No more memory than there is now, the limit and the slack."""
    if limit_bytes is None:
        yield
        return
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    most = _status("VmData") + limit_bytes + slack_bytes(limit_bytes)
    resource.setrlimit(resource.RLIMIT_DATA, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def lacks_memory(error: Exception) -> bool:
    """Whether an error says that memory could not be had."""
    text = str(error)  # torch's allocator begins with "[enforce fail"; the rest may be missing, for lack of memory
    return isinstance(error, MemoryError) or text.startswith("[enforce fail") or "bad_alloc" in text


@contextlib.contextmanager
def traceless() -> Iterator[None]:
    """What is done in here leaves no holes in the heap that a device could fill for free."""
    _give_back(_SMALL_BYTES)
    yield
    gc.collect()
    with contextlib.suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)
    _give_back(_MAPPED_BYTES)


def keep_freed() -> None:
    """Let glibc keep what is freed for the next step, which needs as much again.

    By default it gives the memory of a step's activations back when the step is over, and the next step has the system
    clear page after page once more: a tenth to a third of the time of small steps.
    """
    _tune_malloc(_LARGEST_MAPPED, _KEPT_BYTES, 0, 1)


def _give_back(mapped_bytes: int) -> None:
    """Let glibc map everything larger than this by itself, and give it back when it is freed."""
    _tune_malloc(mapped_bytes, mapped_bytes, 0, 1)


def _tune_malloc(*values: int) -> None:
    """Set M_MMAP_THRESHOLD, M_TRIM_THRESHOLD, M_TOP_PAD and M_ARENA_MAX, where there is such a malloc."""
    with contextlib.suppress(OSError, AttributeError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        for option, value in zip((-3, -1, -2, -8), values, strict=True):
            mallopt(option, value)


def _status(key: str) -> int:
    """A size from /proc/self/status in bytes; 0 where there is none."""
    try:
        with open("/proc/self/status") as file:
            line = next(line for line in file if line.startswith(key))
        return int(line.split()[1]) * 1024
    except (OSError, StopIteration):
        return 0


def start_count() -> int:
    """Forget the largest resident memory so far; returns what it is now."""
    with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    return resident_peak()


def resident_peak() -> int:
    """Largest resident memory since `start_count`, in bytes."""
    return _status("VmHWM")
