"""One system plays its rounds in processes of its own, watched from outside."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lamina.bench.runners import processes
from lamina.bench.runners.processes import Process
from lamina.errors import UserError

_WATCH_SECONDS, _GRACE_SECONDS, _SILENCE_SECONDS = 0.1, 10.0, 1800.0


@dataclass(frozen=True)
class Played:
    """What came of it.

    Attributes:
        cpu_seconds: Of each round: user and system time of all processes.
        wall_seconds: Of each round.
        first_seconds: From the start of the process to the end of the first round.
        peak_rss_bytes: Most resident memory of all processes together; what they share is counted for each.
    """

    cpu_seconds: list[float]
    wall_seconds: list[float]
    first_seconds: float
    peak_rss_bytes: int


class PlayError(Exception):
    """A system did not play its rounds; says why, in a line."""


def demand_linux() -> None:
    """Refuse systems that do not tell what a tree of processes uses.

    Raises:
        UserError: Saying so.
    """
    if not Path("/proc/self/stat").is_file():
        raise UserError("lamina bench measures trees of processes as Linux tells of them in /proc; there is none here")


def play(
    arguments: list[str], variables: dict[str, str], rounds: int, out: Path, on_round: Callable[[], None]
) -> Played:
    """Start a system and follow its rounds.

    Args:
        arguments: What to start.
        variables: Its environment.
        rounds: That it is to play.
        out: A folder; what the system prints goes into a log there.
        on_round: Called after each round.

    Raises:
        PlayError: It failed, or nothing was heard of it for half an hour.
    """
    log, lines = out / "log.txt", list[dict[str, Any]]()
    with open(log, "wb") as errors:
        begun = time.perf_counter()
        process = subprocess.Popen(
            arguments,
            env=variables,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            start_new_session=True,  # Ctrl-C is ours alone
        )
        first, watch = 0.0, _Watch(process)
        try:
            assert process.stdout
            with process.stdout:
                for text in process.stdout:
                    lines.append(json.loads(text))
                    first = first or time.perf_counter() - begun
                    watch.heard()
                    on_round()
            code = process.wait()
        finally:
            watch.stop()
    if watch.silent:
        raise PlayError(f"nothing was heard of it for {_SILENCE_SECONDS:.0f} s")
    if code or len(lines) != rounds:
        said = log.read_text(encoding="utf-8", errors="replace").splitlines()
        last = next((line.strip() for line in reversed(said) if line.strip()), "it said nothing")
        raise PlayError(f"ended with exit code {code} after {len(lines)} of {rounds} rounds: {last}")
    cpu, wall = ([line[key] for line in lines] for key in ("cpu_seconds", "wall_seconds"))
    return Played(cpu, wall, first, watch.peak_bytes)


class _Watch:
    """Looks at the processes of a system again and again, and ends what is left of them."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.peak_bytes, self.silent = 0, False
        self._process, self._last, self._heard = process, list[Process](), time.monotonic()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def heard(self) -> None:
        """A sign of life."""
        self._heard = time.monotonic()

    def stop(self) -> None:
        """The system has ended, or is to end now, with all that it started."""
        self._over.set()
        self._thread.join()
        if self._process.poll() is not None:  # give what it left a moment to go by itself
            patience = time.monotonic() + _GRACE_SECONDS
            while self._left() and time.monotonic() < patience:
                time.sleep(_WATCH_SECONDS)
        for process in self._left():
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.number, signal.SIGKILL)
        self._process.wait()

    def _left(self) -> list[Process]:
        """Those of the last look that are still there."""
        alive = processes.table()
        return [each for each in self._last if each.number in alive and alive[each.number].begun == each.begun]

    def _look(self) -> None:
        while not self._over.wait(_WATCH_SECONDS):
            found = processes.tree(self._process.pid)
            if found:
                self._last = found
            self.peak_bytes = max(self.peak_bytes, sum(each.resident_bytes for each in found))
            if time.monotonic() - self._heard > _SILENCE_SECONDS:
                self.silent = True
                self._process.kill()
