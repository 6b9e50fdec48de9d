"""Devices in processes of their own, which get no more memory than their budget.

`Devices` starts `python -m lamina.device`, which imports and warms up once and then forks a child per job. The child
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
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from lamina import client, files
from lamina.data.task import Pairs, Shard
from lamina.flash import Flash
from lamina.job import Failure, Job, Local, Turn, Update
from lamina.limits import lacks_memory, limited, multiply, resident_peak, settle, start_count, touch
from lamina.model import Lora, Spec
from lamina.plan import Plan
from lamina.units import human

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
        self._start()

    def _start(self) -> None:
        env = os.environ | _ENVIRONMENT
        command = [sys.executable, "-m", "lamina.device"]
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
            return int(line)
        self.close()
        self._start()
        return None


def _stop(process: subprocess.Popen[str]) -> None:
    with process:
        assert process.stdin
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()


def _write(folder: Path, job: Job, shard: Shard, spec: Spec, limit_bytes: int | None, look: Look) -> None:
    ids, targets = shard.batch(np.arange(len(shard)))
    np.save(folder / "ids.npy", ids)
    np.save(folder / "targets.npy", targets)
    save_file({name: array.contiguous() for name, array in job.arrays.items()}, folder / "arrays.safetensors")
    request = {
        "spec": asdict(spec),
        "turn": asdict(job.turn),
        "plan": job.plan.to_json(),
        "local": asdict(job.local),
        "limit_bytes": limit_bytes,
        "look": look,
    }
    files.write_json(folder / "request.json", request)


def _read(folder: Path, job: Job) -> Outcome:
    answer = json.loads((folder / "answer.json").read_text(encoding="utf-8"))
    if answer["reason"]:
        return Outcome(Failure(job.turn, answer["reason"]), answer["rss_bytes"])
    update = Update(job.turn, load_file(folder / "update.safetensors"), **answer["update"])
    return Outcome(update, answer["rss_bytes"], answer["watched"], answer["allocator_bytes"])


def _serve() -> None:
    """A child for each folder named on standard input; its exit code on standard output."""
    torch.set_num_threads(1)
    settle()
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            code = 1
            try:
                _answer(Path(line.strip()))
                code = 0
            except BaseException:
                sys.excepthook(*sys.exc_info())
            finally:
                os._exit(code)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


def _answer(folder: Path) -> None:
    from lamina import measure

    request = json.loads((folder / "request.json").read_text(encoding="utf-8"))
    lora = request["spec"].pop("lora")
    spec = Spec(**request["spec"], lora=Lora(**lora | {"targets": tuple(lora["targets"])}) if lora else None)
    plan, local = Plan.from_json(request["plan"]), Local(**request["local"])
    job = Job(Turn(**request["turn"]), plan, local, Flash(folder / "arrays.safetensors"))
    examples = (np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in ("ids", "targets"))
    shard, limit_bytes = Pairs(*examples), request["limit_bytes"]
    answer: dict[str, Any] = {"reason": None, "watched": None, "allocator_bytes": 0}
    rows = min(local.batch_size * len(shard.inputs[0]), 1024)  # beyond, the buffers are as large as they get
    multiply((rows, spec.embed, spec.ffn), (rows, spec.ffn, spec.embed), (rows, spec.embed, min(spec.vocab, 8192)))
    touch()
    before = start_count()
    update = None
    try:
        with limited(limit_bytes):
            if request["look"] == "tensors":
                update, timeline = measure.watch_job(job, shard, spec)
                answer["watched"] = timeline.peak()
            elif request["look"] == "allocator":
                update, answer["allocator_bytes"] = measure.count_allocations(job, shard, spec)
            else:
                update = client.train(job, shard, spec)
    except (MemoryError, RuntimeError) as error:
        if limit_bytes is None or not lacks_memory(error):
            raise
        answer["reason"] = f"exceeded its memory budget of {human('memory_bytes', limit_bytes)}"
    answer["rss_bytes"] = resident_peak() - before
    if update:
        save_file({name: array.contiguous() for name, array in update.arrays.items()}, folder / "update.safetensors")
        answer["update"] = {"examples": update.examples, "steps": update.steps, "loss": update.loss}
    (folder / "answer.json").write_text(json.dumps(answer), encoding="utf-8")


if __name__ == "__main__":
    _serve()
