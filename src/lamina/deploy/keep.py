"""A device's SuperNode, watched: `python -m lamina.deploy.keep DIR`, which `lamina deploy join` turns into.

Flower finds out after up to a minute that a SuperNode, or the process of a job, has died, and lets a device that was
killed come back no sooner. A SuperNode that is ended in order says so at once. Therefore it is ended when the process
of its job was killed, and by the system when this process is killed; when it was killed itself, `lamina deploy join`
begins again and takes its place back. This process stays, so it loads neither torch nor Flower.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from lamina import files
from lamina.deploy import processes
from lamina.deploy.kit import CACHE, Device, load_device
from lamina.errors import UserError

LOOK_SECONDS, SHORT_SECONDS = 1.0, 20.0


def keep(device: Device) -> str:
    """Be a SuperNode's parent until it has ended, or has been ended; returns why.

    Raises:
        UserError: It gave up soon after it was started, and would again, or another process keeps this device.
    """
    cache = device.folder / CACHE
    cache.mkdir(exist_ok=True)
    with files.lock(device.folder):
        files.was_killed(cache)  # what was before
        command, env = processes.supernode_command(device), processes.environment(device.folder / "flower")
        begun = time.monotonic()
        with processes.child(command, env, device.folder, None) as node:
            while node.poll() is None:
                if files.was_killed(cache):
                    return "the process of a job was killed"
                if _lost_a_child(node.pid):
                    return "the SuperExec was killed or ended"
                time.sleep(LOOK_SECONDS)
    if node.returncode >= 0 and time.monotonic() - begun < SHORT_SECONDS:
        raise UserError(f"the SuperNode ended with code {node.returncode}; what it said is above")
    return f"the SuperNode was killed or ended (code {node.returncode})"


def _lost_a_child(pid: int) -> bool:
    """Whether a child of a process has ended, which that did not notice: a SuperNode does not look after its SuperExec.

    Without one it takes jobs and never answers. Known on Linux alone.
    """
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        return any(Path(f"/proc/{each}/stat").read_text().rpartition(")")[2].split()[0] == "Z" for each in children)
    except OSError:
        return False


def main() -> None:
    """Keep the device in the folder that is named, and then join again."""
    folder = Path(sys.argv[1])
    try:
        with processes.stopped_by_signals():
            why = keep(load_device(folder))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    print(f"note: {why}; joining again", flush=True)
    lamina = processes.program("lamina")
    os.execv(lamina, [lamina, "deploy", "join", str(folder)])


if __name__ == "__main__":
    main()
