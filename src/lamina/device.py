"""Devices in processes of their own, which get no more memory than their budget.

`Devices` starts `python -m lamina.worker`, which imports and warms up once and then forks a child per job. The child
takes the job from a folder (safetensors, npy and JSON, as on a device's disk), limits itself, trains and answers.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from safetensors.torch import load_file, save_file

from lamina import files, wire
from lamina.data.task import Shard
from lamina.errors import UserError
from lamina.job import Failure, Job, Update
from lamina.spec import Spec

_ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
_ENVIRONMENT = _ONE_THREAD | {"CUDA_VISIBLE_DEVICES": ""}

Look = Literal["", "tensors", "allocator"]


@dataclass(frozen=True)
class Outcome:
    """What a child did.

    Attributes:
        answer: The update, or why there is none.
        rss_bytes: Growth of its resident memory over what it was before the job; 0 where the system does not tell.
        watched: With look = "tensors": live tensor bytes by category and the moment, both at the peak.
        allocator_bytes: With look = "allocator": most that torch's allocator had given out at a time.
    """

    answer: Update | Failure
    rss_bytes: int = 0
    watched: tuple[dict[str, int], str] | None = None
    allocator_bytes: int = 0


class Devices:
    """A process that forks a child for each job; one job at a time. To be closed, or dropped."""

    def __init__(self) -> None:
        """Start it; it warms up meanwhile."""
        self._answered = False
        self._start()

    def _start(self) -> None:
        env = os.environ | _ENVIRONMENT
        command = [sys.executable, "-P", "-m", "lamina.worker"]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env, start_new_session=True
        )
        self.close = weakref.finalize(self, _stop, self._process)

    def run(self, job: Job, shard: Shard, spec: Spec, limit_bytes: int | None = None, look: Look = "") -> Outcome:
        """Train a job in a child.

        Args:
            job: As for `client.train`.
            shard: The device's examples.
            spec: The network.
            limit_bytes: Of memory; None does not limit.
            look: What to look at meanwhile, see `lamina.measure`; it costs memory itself.

        Raises:
            RuntimeError: The child met an error that is no lack of memory.
            UserError: The process could not start.
        """
        with tempfile.TemporaryDirectory(prefix="lamina-device-") as name:
            folder = Path(name)
            _write(folder, job, shard, spec, limit_bytes, look)
            code = self._ask(folder)
            if code is None or code < 0:
                ended = f" by {signal.Signals(-code).name}" if code else ""
                return Outcome(Failure(job.turn, f"its process was ended{ended}"))
            if code:
                raise RuntimeError(f"the process of device {job.turn.device} failed; see what it wrote above")
            return _read(folder, job)

    def _ask(self, folder: Path) -> int | None:
        """Exit code of the child; None if the process that should fork it is gone, and a new one takes its place."""
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin and stdout
        with contextlib.suppress(BrokenPipeError):
            print(folder, file=stdin, flush=True)
        line = stdout.readline()
        if line:
            self._answered = True
            return int(line)
        self.close()
        if not self._answered:
            raise UserError("the process that runs the devices did not start; see what it wrote above")
        self._start()
        return None


def _stop(process: subprocess.Popen[str]) -> None:
    """End the process and the child that it may have, at once."""
    with contextlib.suppress(BrokenPipeError), process:
        if hasattr(os, "killpg"):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # it leads a session of its own
        else:
            process.kill()


def _write(folder: Path, job: Job, shard: Shard, spec: Spec, limit_bytes: int | None, look: Look) -> None:
    inputs, targets = shard.at(job.turn).batch(np.arange(len(shard)))
    np.save(folder / "inputs.npy", inputs)
    np.save(folder / "targets.npy", targets)
    for kind, arrays in (("arrays", job.arrays), ("state", job.state)):
        save_file({name: array.contiguous() for name, array in arrays.items()}, folder / f"{kind}.safetensors")
    request = wire.job_to_json(job, spec) | {"limit_bytes": limit_bytes, "look": look}
    files.write_json(folder / "request.json", request)


def _read(folder: Path, job: Job) -> Outcome:
    answer = json.loads((folder / "answer.json").read_text(encoding="utf-8"))
    if answer["reason"]:
        return Outcome(Failure(job.turn, answer["reason"]), answer["rss_bytes"])
    arrays, state = (load_file(folder / f"{kind}.safetensors") for kind in ("update", "state"))
    update = Update(job.turn, arrays, **answer["update"], state=state)
    return Outcome(update, answer["rss_bytes"], answer["watched"], answer["allocator_bytes"])
