"""How soon a round goes on without a device that was lost, and how soon the device is back.

    python benchmarks/lost_devices.py records/deploy/lost.json
    python benchmarks/lost_devices.py records/deploy/cut.json --network --repeats 1

A server and one device of `lamina deploy` on this machine. In each round, once the device trains, one of its processes
gets SIGKILL, or once it sends its update, its network is cut. A round of one device ends when the server knows; the
device is back when it trains again.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from proxy import Proxy, proxied

from lamina import files
from lamina.deploy.processes import free_port, program, stopped_by_signals
from lamina.machine import environment

EXPERIMENT = """
name = "lost"
rounds = 20
cohort = 1
eval_every = 20
networks = ["novels-3"]
method = {name = "caff"}
fleet = [{name = "all"}]
[task]
name = "shakespeare"
devices = 1
[local]
steps = 400
lr = 0.0001
batch_size = 16
"""
VICTIMS = {
    "process of a job": ("flwr-clientapp",),
    "SuperNode": ("flower-supernode",),
    "SuperExec": ("flower-superexec",),
    "lamina deploy join": ("lamina.deploy.keep",),
    "all of them at once": ("lamina.deploy.keep", "flower-supernode", "flower-superexec", "flwr-clientapp"),
}
CUTS = {"all of the network": 1, "every upload": 10**9}


def main() -> None:
    """Kill each process in turn, and write what came of it."""
    parser = argparse.ArgumentParser(description="Seconds until the loss of a device is noticed.")
    parser.add_argument("path", type=Path)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--network", action="store_true", help="Cut the network instead of killing processes.")
    options = parser.parse_args()
    faults = CUTS if options.network else VICTIMS
    with stopped_by_signals(), tempfile.TemporaryDirectory() as folder:
        rows = list(measure(Path(folder), list(faults) * options.repeats))
    files.write_json(options.path, {"seconds": rows, "environment": environment()})


def measure(folder: Path, faults: list[str]) -> Iterator[dict[str, Any]]:
    """A row per fault."""
    port, kit, device, out = free_port(), folder / "kit", folder / "kit" / "devices" / "0", folder / "runs"
    (folder / "x.toml").write_text(EXPERIMENT)
    lamina(folder, "init", kit, "--server", "127.0.0.1", "--port", port, "--devices", 1).wait()
    (device / "experiment.toml").write_text(EXPERIMENT)
    cache = device / "cache"
    with (
        proxied(port, cut_at=100_000) as proxy,
        running(folder, "serve", kit),
        Joined(folder, device, proxy.port) as joined,
        running(folder, "run", kit, "x.toml", "--out", out),
    ):
        for what in faults:
            until(lambda: files.is_locked(cache), 180)
            time.sleep(2)
            yield death(what, joined, cache, out) if what in VICTIMS else cut(what, proxy, cache, out)


def death(what: str, joined: Joined, cache: Path, out: Path) -> dict[str, Any]:
    """Kill what is named, and see how soon that is known and how soon the device trains again."""
    workers, before, tick = joined.pids("flwr-clientapp"), rounds(out), time.monotonic()
    for pid in [pid for name in VICTIMS[what] for pid in joined.pids(name)]:
        os.kill(pid, signal.SIGKILL)
    until(lambda: rounds(out) > before, 120)
    noticed = time.monotonic() - tick
    until(lambda: joined.again().pids("flwr-clientapp") - workers and files.is_locked(cache), 180)
    row = {"killed": what, "round_over": round(noticed, 1), "trains_again": round(time.monotonic() - tick, 1)}
    print(row, flush=True)
    return row


def cut(what: str, proxy: Proxy, cache: Path, out: Path) -> dict[str, Any]:
    """Cut the network while an update is sent, until the round is over; see how soon that is."""
    before, proxy.cuts = rounds(out), CUTS[what]
    until(lambda: proxy.cuts < CUTS[what], 180)
    tick, proxy.away = time.monotonic(), CUTS[what] == 1
    until(lambda: rounds(out) > before, 400)
    noticed, proxy.away, proxy.cuts = time.monotonic() - tick, False, 0
    time.sleep(1)
    until(lambda: files.is_locked(cache), 300)
    row = {"cut": what, "round_over": round(noticed, 1), "trains_again": round(time.monotonic() - tick, 1)}
    print(row, flush=True)
    return row


def lamina(folder: Path, *arguments: object, log: str = "log") -> subprocess.Popen[bytes]:
    """`lamina deploy`, in a session of its own."""
    command = [program("lamina"), "deploy", *map(str, arguments)]
    with open(folder / log, "ab") as out:
        return subprocess.Popen(command, cwd=folder, stdout=out, stderr=out, start_new_session=True)


@contextmanager
def running(folder: Path, *arguments: object) -> Iterator[None]:
    """`lamina deploy` meanwhile."""
    process = lamina(folder, *arguments)
    if arguments[0] == "serve":
        until(lambda: b"serving on" in (folder / "log").read_bytes(), 90)
    try:
        yield
    finally:
        process.terminate()
        process.wait(60)


class Joined:
    """A device, started again when it has ended."""

    def __init__(self, folder: Path, device: Path, port: int) -> None:
        """Join on that port."""
        table = json.loads((device / "device.json").read_text())
        files.write_json(device / "device.json", table | {"port": port})
        self._folder, self._device = folder, device
        self._process = lamina(folder, "join", device, log="joined")

    def again(self) -> Joined:
        """Join again if nobody keeps the device any more, as systemd would."""
        if self._process.poll() is not None:
            self._process = lamina(self._folder, "join", self._device, log="joined")
        return self

    def pids(self, name: str) -> set[int]:
        """Its processes of that name."""
        mark, found = f"FLWR_HOME={self._device / 'flower'}".encode(), set[int]()
        for path in Path("/proc").glob("[0-9]*"):
            try:
                ours = int(path.name) == self._process.pid or mark in (path / "environ").read_bytes().split(b"\0")
                if ours and name.encode() in (path / "cmdline").read_bytes():
                    found.add(int(path.name))
            except OSError:
                continue
        return found

    def __enter__(self) -> Joined:
        """Itself."""
        return self

    def __exit__(self, *error: object) -> None:
        """Leave."""
        self._process.terminate()
        self._process.wait(60)


def rounds(out: Path) -> int:
    """How many are over."""
    return sum(len(path.read_bytes().splitlines()) for path in out.glob("*/rounds.jsonl"))


def until(true: Callable[[], object], seconds: float) -> None:
    """Wait for something, but not for ever."""
    end = time.monotonic() + seconds
    while not true():
        if time.monotonic() > end:
            sys.exit(f"nothing happened for {seconds} s")
        time.sleep(0.05)


if __name__ == "__main__":
    main()
