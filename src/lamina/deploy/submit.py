"""Hand a run to the server, and follow it: by its folder, so that it does not depend on this process."""

from __future__ import annotations

import json
import re
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lamina import checkpoint, files
from lamina.deploy import processes
from lamina.deploy.kit import Kit
from lamina.errors import UserError
from lamina.run import RoundRow, Run
from lamina.server import DeviceRow

APP = Path(__file__).parents[1] / "app"
_POLL_SECONDS, _ASK_SECONDS = 0.5, 10
_STARTED = re.compile(r"Successfully started run (\d+)")
OnRound = Callable[[RoundRow, Sequence[DeviceRow]], None]


def demand_server(kit: Kit) -> None:
    """Refuse to go on where the kit's server does not run on this machine.

    Raises:
        UserError: It does not.
    """
    if not is_locked(kit.state):
        raise UserError(f"no server of {kit.folder} runs here; start it with: lamina deploy serve {kit.folder}")


def run_command(folder: Path) -> list[str]:
    """Hands the run in a folder to the server, and shows its log until it ends."""
    return [processes.program("flwr"), "run", str(APP), processes.LINK, "--stream", "-c", f"resume={_quoted(folder)}"]


def play(kit: Kit, run: Run, on_round: OnRound) -> dict[str, Any]:
    """Have a run played by the kit's server on its devices.

    Args:
        kit: Its server runs on this machine.
        run: Begun, or to be resumed; nobody works in its folder.
        on_round: Told about each finished round.

    Returns:
        What summary.json holds.

    Raises:
        UserError: The run did not finish, and why.
        KeyboardInterrupt: It was stopped, on the server too.
    """
    committed = Committed(run)
    with submitted(kit, run.folder) as there:
        while there.going():
            committed.tell(on_round)
            time.sleep(_POLL_SECONDS)
        committed.tell(on_round)
        return _summary(run.folder, there.reason())


class Committed:
    """The rounds of a run that another process plays, read from its folder once their state is written."""

    def __init__(self, run: Run) -> None:
        """Begin after the rounds that the run has now."""
        self._folder, self._groups = run.folder, [group.name for group in run.outlook.groups]
        self._read = self._lengths()

    def tell(self, on_round: OnRound) -> None:
        """Pass on those that are new since the last call."""
        before, self._read = self._read, self._lengths()
        if before == self._read:
            return
        rounds, devices = (self._between(name, before.get(name, 0), end) for name, end in self._read.items())
        for row in rounds:
            members = [self._device(each) for each in devices if each["round"] == row["round"]]
            on_round(RoundRow(**row), members)

    def _lengths(self) -> dict[str, int]:
        """Bytes of the files of lines that belong to rounds that are over."""
        path = self._folder / "state.safetensors"
        found = checkpoint.read_manifest(path)["lengths"] if path.exists() else {}
        return {name: found[name] for name in ("rounds.jsonl", "devices.jsonl") if name in found}

    def _between(self, name: str, start: int, end: int) -> list[dict[str, Any]]:
        if end <= start:
            return []
        with open(self._folder / name, "rb") as file:
            file.seek(start)
            return [json.loads(line) for line in file.read(end - start).splitlines()]

    def _device(self, line: dict[str, Any]) -> DeviceRow:
        known = {key: value for key, value in line.items() if key not in ("round", "name", "class")}
        return DeviceRow(**known, group=self._groups.index(line["class"]))


class Submitted:
    """A run that the server was given."""

    def __init__(self, kit: Kit, process: subprocess.Popen[str]) -> None:
        """Read what `flwr run` says, in a thread."""
        self._kit, self._process = kit, process
        self._tail = deque[str](maxlen=200)
        self.number = ""
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self._asked = 0.0

    def _read(self) -> None:
        assert self._process.stdout
        for line in self._process.stdout:
            self._tail.append(line.rstrip())
            if found := _STARTED.search(line):
                self.number = found[1]

    def going(self) -> bool:
        """Whether it still runs: the stream says so, or, when that broke, the server."""
        if self._process.poll() is None:
            return True
        self._reader.join()
        if not self.number:
            return False
        if time.monotonic() - self._asked < _ASK_SECONDS:
            return True
        self._asked = time.monotonic()
        return not self._status().startswith("finished")

    def _status(self) -> str:
        said = _flwr(self._kit, "list", "--run-id", self.number, processes.LINK, "--format", "json")
        try:
            (run,) = json.loads(said)["runs"]
            return f"{run['status']}"
        except (ValueError, KeyError, TypeError):
            return "unknown"

    def stop(self) -> None:
        """Stop it on the server."""
        if self.number:
            _flwr(self._kit, "stop", self.number, processes.LINK)

    def reason(self) -> str:
        """Why it ended, in a line."""
        told = [line.partition("error: ")[2] for line in self._tail if "error: " in line]
        last = next((line for line in reversed(self._tail) if line.strip()), "nothing was said")
        return told[-1] if told else last


@contextmanager
def submitted(kit: Kit, folder: Path) -> Iterator[Submitted]:
    """A run on the server; what leaves the context by an exception stops it."""
    env = processes.environment(processes.home(kit))
    with processes.child(run_command(folder), env, folder, subprocess.PIPE) as process:
        run = Submitted(kit, process)
        try:
            yield run
        except KeyboardInterrupt:
            run.stop()
            raise


def _flwr(kit: Kit, *arguments: str) -> str:
    """What Flower's command line says."""
    env = processes.environment(processes.home(kit))
    command = [processes.program("flwr"), *arguments]
    return subprocess.run(command, env=env, capture_output=True, text=True, check=False).stdout


def _summary(folder: Path, reason: str) -> dict[str, Any]:
    path = folder / "summary.json"
    if not path.exists():
        raise UserError(f"the run in {folder} did not finish: {reason}")
    summary: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return summary


def is_locked(folder: Path) -> bool:
    """Whether another process works in a folder."""
    if not folder.is_dir():
        return False
    try:
        with files.lock(folder):
            return False
    except UserError:
        return True


def _quoted(path: Path) -> str:
    return json.dumps(str(path), ensure_ascii=False)
