"""The systems that are timed, and their environments: made once, in a cache, with versions pinned."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import venv
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from lamina import files
from lamina.errors import UserError

_READY = "lamina.json"
_TRANSFORMERS = "transformers==5.23.0"
_HERE = Path(__file__).parent


@dataclass(frozen=True)
class System:
    """One that plays rounds.

    Attributes:
        runner: Module of `lamina.bench.runners`.
        about: For people.
        packages: What its environment holds beside torch; none: it runs where lamina does.
        parallel: Whether it can compute several devices at a time.
        cards: Whether it can compute on a CUDA card, which is asked for by name.
    """

    runner: str
    about: str
    packages: tuple[str, ...] = ()
    parallel: bool = False
    cards: bool = False


OURS = "ours"
SYSTEMS: dict[str, System] = {
    OURS: System("ours", "lamina", parallel=True, cards=True),
    "loop": System("loop", "a plain loop around GPT-2 of transformers", (_TRANSFORMERS,), cards=True),
    "loop-lean": System("lean", "the same loop around lamina's model, without its engine", cards=True),
    "pfl": System("pfl", "pfl-research", (_TRANSFORMERS, "pfl[pytorch]==0.6.0")),
    "flower": System("flower", "Flower's simulation with Ray", (_TRANSFORMERS, "flwr[simulation]==1.41.0"), True),
}
PEERS = tuple(name for name in SYSTEMS if name != OURS)


def cache() -> Path:
    """The folder of the environments: lamina/bench in the user's cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lamina" / "bench"


def missing(name: str) -> bool:
    """Whether the environment of a system is still to be made."""
    return bool(SYSTEMS[name].packages) and not _is_ready(cache() / name, _wanted(SYSTEMS[name]))


def environment(name: str) -> Path:
    """The interpreter of a system, in an environment that is made if there is none.

    torch is of the version that runs here, and is installed first; pip's own settings say from where.

    Raises:
        UserError: It could not be made; says why.
    """
    system, folder = SYSTEMS[name], cache() / name
    if not system.packages:
        return Path(sys.executable)
    wanted, python = _wanted(system), folder / "bin" / "python"
    folder.mkdir(parents=True, exist_ok=True)
    with files.lock(folder):
        if not _is_ready(folder, wanted):
            for each in folder.iterdir():
                if each.is_dir():
                    shutil.rmtree(each)
            try:
                venv.create(folder, symlinks=True, with_pip=True)
                for packages in (wanted[:1], wanted):
                    _install(python, packages)
            except (subprocess.CalledProcessError, OSError) as error:
                raise UserError(f"the environment of {name} could not be made: {_reason(error)}") from error
            files.write_json(folder / _READY, wanted)
    return python


def command(name: str, python: Path, folder: Path, out: Path) -> tuple[list[str], dict[str, str]]:
    """What starts the runner of a system, and its environment variables: one thread, and nothing from a network.

    Args:
        name: Of the system.
        python: Its interpreter.
        folder: Of the request.
        out: Where weights go.
    """
    system, variables = SYSTEMS[name], dict(os.environ)
    offline = ("HF_HUB_OFFLINE", "HF_HUB_DISABLE_TELEMETRY", "HF_HUB_DISABLE_PROGRESS_BARS")
    variables |= dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", *offline), "1")
    variables |= dict.fromkeys(("FLWR_TELEMETRY_ENABLED", "RAY_USAGE_STATS_ENABLED"), "0")
    package = "lamina.bench.runners"
    if system.packages:  # peers see the runners, and nothing of lamina
        package, variables["PYTHONPATH"] = "runners", str(_HERE)
    return [str(python), "-m", package, system.runner, str(folder), str(out)], variables


def _wanted(system: System) -> list[str]:
    return [f"torch=={version('torch').partition('+')[0]}", *system.packages]


def _is_ready(folder: Path, wanted: list[str]) -> bool:
    path = folder / _READY
    return path.is_file() and json.loads(path.read_text(encoding="utf-8")) == wanted


def _install(python: Path, packages: list[str]) -> None:
    subprocess.run(
        [python, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--no-input", *packages],
        check=True,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def _reason(error: subprocess.CalledProcessError | OSError) -> str:
    if isinstance(error, OSError):
        return str(error)
    lines = [line for line in (error.stderr or "").splitlines() if line.startswith("ERROR")]
    return lines[0].removeprefix("ERROR: ") if lines else f"pip ended with exit code {error.returncode}"
