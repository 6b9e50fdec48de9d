"""What a run tells experiment trackers: the numbers of each round, as they come. All work offline.

A tracker is told after the round is safe on disk. The files of the run folder are the record, and nothing is read back:
a run that goes on after a stop begins a new MLflow or W&B run of the same name. A tracker that cannot begin is refused;
one that fails later is left out from then on, and the run goes on.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Protocol

from lamina import toml
from lamina.errors import UserError

Name = Literal["tensorboard", "mlflow", "wandb"]
Ended = Literal["FINISHED", "FAILED", "KILLED"]
_MODULES: dict[Name, str] = {"tensorboard": "torch.utils.tensorboard", "mlflow": "mlflow", "wandb": "wandb"}
_CURES: dict[Name, str] = {
    "tensorboard": "check that the run folder can be written to",
    "mlflow": "check MLFLOW_TRACKING_URI; without it the run folder is written to",
    "wandb": "check WANDB_MODE and `wandb login`; without WANDB_MODE the run folder is written to, offline",
}
_PATIENCE = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",  # seconds; its own default is 120
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",  # its own default is 7, each after a longer pause
    "WANDB_INIT_TIMEOUT": "30",
}
"""How long trackers wait for a server that does not answer, unless the environment says."""

_REASON = 300  # most characters of what a tracker says
_NUMBERS = ("loss", "updates", "up_bytes", "down_bytes", "flops", "seconds", "clock_seconds", "prefix_reused")


class Tracker(Protocol):
    """Where numbers go."""

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Take the numbers of a round; step 0 is before the first."""

    def close(self, ended: Ended) -> None:
        """Write what is left, and say how the run ended."""


class TensorBoard:
    """Event files in RUN/tensorboard; `tensorboard --logdir runs` shows all runs."""

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        """Begin a file of events, with the settings as text."""
        self._writer = import_module(_MODULES["tensorboard"]).SummaryWriter(str(folder / "tensorboard"))
        self._writer.add_text("settings", "\n".join(f"    {key} = {value!r}" for key, value in settings.items()))

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Take the numbers of a round."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self, ended: Ended) -> None:
        """Write what is left."""
        self._writer.close()


class MLflow:
    """A run in RUN/mlflow.db, or where MLFLOW_TRACKING_URI says."""

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        """Begin a run of the experiment `lamina`, with the settings as parameters."""
        file = str(folder.resolve() / "mlflow.db").replace("%", "%25").replace("?", "%3F")
        uri = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{file}"
        self._client = import_module(_MODULES["mlflow"]).MlflowClient(tracking_uri=uri)
        found = self._client.get_experiment_by_name("lamina")
        experiment = found.experiment_id if found else self._client.create_experiment("lamina")
        self._run = self._client.create_run(experiment, run_name=folder.name).info.run_id
        for key, value in settings.items():
            self._client.log_param(self._run, key, str(value)[:500])

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Take the numbers of a round."""
        for name, value in values.items():
            self._client.log_metric(self._run, name, value, step=step)

    def close(self, ended: Ended) -> None:
        """Say that the run is over."""
        self._client.set_terminated(self._run, ended)


class Wandb:
    """A run in RUN/wandb, for `wandb sync`; online where WANDB_MODE says so."""

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        """Begin a run of the project `lamina`, with the settings as its configuration."""
        mode = os.environ.get("WANDB_MODE") or "offline"
        begin = import_module(_MODULES["wandb"]).init
        self._run = begin(project="lamina", name=folder.name, dir=str(folder), mode=mode, config=dict(settings))

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Take the numbers of a round."""
        self._run.log(dict(values), step=step)

    def close(self, ended: Ended) -> None:
        """Write what is left."""
        self._run.finish(exit_code=int(ended != "FINISHED"))


_TRACKERS: dict[Name, type[TensorBoard] | type[MLflow] | type[Wandb]] = {
    "tensorboard": TensorBoard,
    "mlflow": MLflow,
    "wandb": Wandb,
}


def demand(names: Sequence[Name]) -> None:
    """Refuse trackers that are not installed.

    Raises:
        UserError: Saying which, and how to get it.
    """
    for name in names:
        try:
            import_module(_MODULES[name])
        except ImportError as error:
            raise UserError(f"track = [{name!r}] needs a package that is not here: pip install {name}") from error


class Trackers:
    """The trackers of a run while it goes on; on leaving they are told how it ended."""

    def __init__(self, names: Sequence[Name], folder: Path, settings: Mapping[str, Any]) -> None:
        """Begin with each.

        Args:
            names: Which, each once.
            folder: Of the run.
            settings: Tables of the experiment; keys within become `local.lr`.

        Raises:
            UserError: One cannot begin, and why; the others are closed.
        """
        flat = dict(toml.flat(settings))
        self._made: dict[Name, Tracker] = {}
        for key, value in _PATIENCE.items() if names else ():
            os.environ.setdefault(key, value)
        for name in dict.fromkeys(names):
            try:
                self._made[name] = _TRACKERS[name](folder, flat)
            except Exception as error:  # a tracker raises what it likes
                self._close("FAILED")
                cure = f"{_CURES[name]}, or leave {name} out of track"
                raise UserError(f"{name} cannot track the run: {_reason(error)}; {cure}") from error

    def tell(self, step: int, accuracy: Mapping[str, float] | None, row: Mapping[str, Any]) -> None:
        """Log what is known of a round.

        Args:
            step: The round; 0 is before the first.
            accuracy: As in summary.json, if it was evaluated.
            row: As in rounds.jsonl.
        """
        values = {name: float(row[name]) for name in _NUMBERS if row.get(name) is not None}
        values |= {f"accuracy/{kind}": value for kind, value in (accuracy or {}).items()}
        values |= {"rejected": float(len(row["rejected"]))} if "rejected" in row else {}
        self._each(lambda tracker: tracker.log(values, step))

    def __enter__(self) -> Trackers:
        """Nothing more is needed."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Tell each how the run ended: finished, failed, or stopped by who runs it."""
        self._close("FINISHED" if kind is None else "FAILED" if issubclass(kind, Exception) else "KILLED")

    def _close(self, ended: Ended) -> None:
        self._each(lambda tracker: tracker.close(ended))
        self._made.clear()

    def _each(self, do: Callable[[Tracker], None]) -> None:
        """Do that with each; one that fails is left out from then on."""
        for name, tracker in list(self._made.items()):
            try:
                do(tracker)
            except Exception as error:  # a tracker raises what it likes, and no run is worth less for it
                del self._made[name]
                print(
                    f"warning: {name} is not told of the run any more: {_reason(error)}; the run goes on, and its"
                    " folder has all numbers",
                    file=sys.stderr,
                )


def _reason(error: Exception) -> str:
    """What an error says, on one line and not too long; its kind where it says nothing."""
    said = " ".join(str(error).split()) or type(error).__name__
    return said.rstrip(".") if len(said) <= _REASON else f"{said[:_REASON]} ..."
