"""Flower's programs as children that do not outlive this process, and the settings they all get."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from lamina import files
from lamina.deploy.kit import Device, Kit
from lamina.errors import UserError

LINK = "lamina"
"""Name of the kit's SuperLink in Flower's settings."""
_QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
}
_END_SECONDS = 10
_DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG


def program(name: str) -> str:
    """A program of Flower's, of the environment that runs this.

    Raises:
        UserError: It is not installed.
    """
    found = shutil.which(name, path=_path())
    if found is None:
        raise UserError(f"{name} is not installed: pip install 'lamina[flower]'")
    return found


def environment(home: Path) -> dict[str, str]:
    """Of Flower's programs: their settings in `home`, nothing sent to Flower Labs, nothing installed, one thread."""
    return os.environ | _QUIET | {"FLWR_HOME": str(home), "PATH": _path(), "OMP_NUM_THREADS": "1"}


def _path() -> str:
    """Flower finds its other programs by PATH: those of this environment first."""
    return os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])


def superlink_command(kit: Kit, port: int) -> list[str]:
    """A SuperLink on loopback that lets registered devices join, and nobody install anything."""
    return [
        program("flower-superlink"),
        *("--host", "127.0.0.1", "--port", str(port)),
        *("--ssl-ca-certfile", str(kit.folder / "ca.crt")),
        *("--ssl-certfile", str(kit.folder / "server.crt")),
        *("--ssl-keyfile", str(kit.folder / "server.key")),
        "--enable-supernode-auth",
        "--disable-runtime-dependency-installation",
        *("--database", str(kit.state / "state.db")),
    ]


def supernode_command(device: Device) -> list[str]:
    """A SuperNode that trusts the kit's CA alone; its own interface is on loopback."""
    return [
        program("flower-supernode"),
        *("--superlink", device.address),
        *("--root-certificates", str(device.folder / "ca.crt")),
        *("--auth-supernode-private-key", str(device.folder / "device.key")),
        *("--host", "127.0.0.1", "--port", str(free_port())),
        *("--node-config", str(device.folder / "node.toml")),
    ]


def home(kit: Kit) -> Path:
    """Where Flower keeps the settings of a kit's server."""
    return kit.state / "flower"


def write_link(kit: Kit, port: int) -> None:
    """Tell Flower's command line where the SuperLink is."""
    lines = (
        "[superlink]",
        f'default = "{LINK}"',
        f"[superlink.{LINK}]",
        f'address = "127.0.0.1:{port}"',
        f"root-certificates = {json.dumps(str(kit.folder / 'ca.crt'), ensure_ascii=False)}",
    )
    files.write(home(kit) / "config.toml", "\n".join(lines) + "\n")


def free_port() -> int:
    """A TCP port on loopback that nobody has."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@contextmanager
def child(
    command: Sequence[str], env: dict[str, str], cwd: Path, out: IO[str] | int | None
) -> Iterator[subprocess.Popen[str]]:
    """A process in a session of its own, ended with the context, and by the system if this process is killed."""
    process = subprocess.Popen(
        command,
        env=env,
        cwd=cwd,
        stdin=subprocess.DEVNULL,
        stdout=out,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        preexec_fn=_bound(),
    )
    try:
        yield process
    finally:
        end(process)


def end(process: subprocess.Popen[str]) -> None:
    """Ask a process to end, then make it and those of its session."""
    if process.poll() is None:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_END_SECONDS)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    if process.stdout:
        process.stdout.close()


def _bound() -> Callable[[], None] | None:
    """What a child on Linux does first: ask to be ended with its parent."""
    if sys.platform != "linux":
        return None
    prctl = ctypes.CDLL(None).prctl
    return lambda: prctl(_DIE_WITH_PARENT, signal.SIGTERM)


def end_with_parent() -> None:
    """End this process, at once, when the one that started it is gone.

    Flower's apps go on asking a SuperLink or SuperNode that was killed, and a run would keep its folder meanwhile.
    """
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@contextmanager
def stopped_by_signals() -> Iterator[None]:
    """SIGTERM is taken as Ctrl-C meanwhile, so that contexts are left in order."""

    def stop(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
