"""This machine and the versions on it: what the last bits of a run may depend on."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lamina import __version__

_BITS = ("lamina", "commit", "torch", "machine")


def usable_cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def threads(workers: int) -> ThreadPoolExecutor:
    """Threads that compute with as many threads each as the one that asks.

    torch's number of threads is a thread's own where kernels ask OpenMP, and in a new thread it is that of all cores.
    """
    return ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(torch.get_num_threads(),))


def changes_since(folder: Path) -> list[str]:
    """What differs between the machine a run began on and this one, in what its last bits may depend on."""
    path = folder / "env.json"
    then = json.loads(path.read_text()) if path.exists() else {}
    now = environment()
    return [f"{key} was {then[key]}, is {now[key]}" for key in _BITS if then.get(key, now[key]) != now[key]]


@lru_cache(maxsize=1)
def commit(root: Path = Path(__file__).parents[2]) -> str | None:
    """Of the checkout that lamina runs from, with "-dirty" where files have changed since; None where it is none."""
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--abbrev=12", "--dirty", "--exclude=*"]
    plain = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10, env=plain).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def environment() -> dict[str, Any]:
    """Versions and machine: what a run's last bits may depend on."""
    return {
        "lamina": __version__,
        "commit": commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "system": platform.system(),
        "machine": platform.machine(),
        "cores": usable_cores(),
    }
