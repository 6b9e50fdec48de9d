"""Hand a run to the server, and follow it: by its folder, so that it does not depend on this process."""

from __future__ import annotations

import json
import re
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lamina import config, files, saved, toml
from lamina.deploy import processes
from lamina.deploy.kit import Kit
from lamina.deployed import real
from lamina.errors import UserError
from lamina.run import RoundRow, Run, planned, unused_name
from lamina.server import DeviceRow
from lamina.view import View

APP = Path(__file__).parents[1] / "app"
_POLL_SECONDS, _ASK_SECONDS = 0.5, 10
_STARTED = re.compile(r"Successfully started run (\d+)")
OnRound = Callable[[RoundRow, Sequence[DeviceRow]], None]


def demand_server(kit: Kit) -> None:
    """Refuse to go on where the kit's server does not run on this machine.

    Raises:
        UserError: It does not.
    """
    if not files.is_locked(kit.state):
        raise UserError(f"no server of {kit.folder} runs here; start it with: lamina deploy serve {kit.folder}")


def run_command(settings: Path) -> list[str]:
    """Hands a run with the settings in a TOML file to the server, and shows its log until it ends."""
    return [processes.program("flwr"), "run", str(APP), processes.LINK, "--stream", "-c", str(settings)]


def begun(file: Path, overrides: Sequence[str], out: Path) -> tuple[dict[str, str], Path]:
    """Settings of the app for a new run, and the folder that it will be in.

    Raises:
        UserError: The experiment cannot be used on real devices.
    """
    experiment = real(config.load_experiment(file, overrides))
    name = unused_name(experiment, out)
    table = {"experiment": str(file.absolute()), "overrides": json.dumps(list(overrides))}
    return table | {"out": str(out.absolute()), "name": name}, out.absolute() / name


def play(kit: Kit, settings: Mapping[str, str], folder: Path, view: View) -> tuple[Run, dict[str, Any]]:
    """Have a run played by the kit's server on its devices, and show it.

    Args:
        kit: Its server runs on this machine.
        settings: Of the app, see `lamina.deployed.AppTable`.
        folder: Of the run; it need not be there yet.
        view: Where to.

    Returns:
        The run, and what summary.json holds.

    Raises:
        UserError: The run did not finish, and why.
        KeyboardInterrupt: It was stopped, on the server too.
    """
    done = saved.lengths(folder)
    with submitted(kit, settings) as there:
        while not (folder / "config.toml").exists():
            if not there.going():
                raise UserError(f"the run did not begin: {there.reason()}")
            time.sleep(_POLL_SECONDS)
        run = planned(folder)
        return run, view.play(run, play=lambda on_round: _follow(there, Committed(run, done), on_round))


def _follow(there: Submitted, committed: Committed, on_round: OnRound) -> dict[str, Any]:
    while there.going():
        committed.tell(on_round)
        time.sleep(_POLL_SECONDS)
    committed.tell(on_round)
    path = committed.folder / "summary.json"
    if not path.exists():
        raise UserError(f"the run in {committed.folder} did not finish: {there.reason()}")
    summary: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return summary


class Committed:
    """The rounds of a run that another process plays, read from its folder once their state is written."""

    def __init__(self, run: Run, done: dict[str, int]) -> None:
        """Begin after the rounds that are in `done`: see `saved.lengths`."""
        self.folder, self._groups = run.folder, [group.name for group in run.outlook.groups]
        self._read = done

    def tell(self, on_round: OnRound) -> None:
        """Pass on those that are new since the last call."""
        before, self._read = self._read, saved.lengths(self.folder)
        if before == self._read:
            return
        rounds, devices = (self._between(name, before[name], end) for name, end in self._read.items())
        for row in rounds:
            members = [self._device(each) for each in devices if each["round"] == row["round"]]
            on_round(RoundRow(**row), members)

    def _between(self, name: str, start: int, end: int) -> list[dict[str, Any]]:
        if end <= start:
            return []
        with open(self.folder / name, "rb") as file:
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
        if not files.is_locked(self._kit.state):
            self._tail.append("error: the server has ended; start it again and go on with --resume")
            return False
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
def submitted(kit: Kit, settings: Mapping[str, str]) -> Iterator[Submitted]:
    """A run on the server; an interruption stops it there."""
    path = kit.state / "run.toml"
    files.write(path, toml.dump(settings))
    env = processes.environment(processes.home(kit))
    with processes.child(run_command(path), env, kit.state, subprocess.PIPE) as process:
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
