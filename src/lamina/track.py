"""What a run tells experiment trackers: the numbers of each round, as they come. All work offline.

A tracker is told after the round is safe on disk. The files of the run folder are the record, and nothing is read back:
a run that goes on after a stop begins a new MLflow or W&B run of the same name.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, Protocol

from lamina.errors import UserError

Name = Literal["tensorboard", "mlflow", "wandb"]
_MODULES: dict[Name, str] = {"tensorboard": "torch.utils.tensorboard", "mlflow": "mlflow", "wandb": "wandb"}
_NUMBERS = ("loss", "updates", "up_bytes", "down_bytes", "flops", "seconds", "clock_seconds", "prefix_reused")


class Tracker(Protocol):
    """Where numbers go."""

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Take the numbers of a round; step 0 is before the first."""

    def close(self) -> None:
        """Write what is left."""


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

    def close(self) -> None:
        """Write what is left."""
        self._writer.close()


class MLflow:
    """A run in RUN/mlflow.db, or where MLFLOW_TRACKING_URI says."""

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        """Begin a run of the experiment `lamina`, with the settings as parameters."""
        uri = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{folder.resolve() / 'mlflow.db'}"
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

    def close(self) -> None:
        """Say that the run is over."""
        self._client.set_terminated(self._run)


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

    def close(self) -> None:
        """Write what is left."""
        self._run.finish()


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


@contextmanager
def trackers(names: Sequence[Name], folder: Path, settings: Mapping[str, Any]) -> Iterator[list[Tracker]]:
    """The trackers of a run while it goes on.

    Args:
        names: Which, each once.
        folder: Of the run.
        settings: Tables of the experiment; keys within become `local.lr`.
    """
    flat = dict(_flat(settings))
    with ExitStack() as held:
        made: list[Tracker] = []
        for name in dict.fromkeys(names):
            made.append(_TRACKERS[name](folder, flat))
            held.callback(made[-1].close)
        yield made


def tell(told: Sequence[Tracker], step: int, accuracy: Mapping[str, float] | None, row: Mapping[str, Any]) -> None:
    """Log what is known of a round.

    Args:
        told: Who is told.
        step: The round; 0 is before the first.
        accuracy: As in summary.json, if it was evaluated.
        row: As in rounds.jsonl.
    """
    values = {name: float(row[name]) for name in _NUMBERS if row.get(name) is not None}
    values |= {f"accuracy/{kind}": value for kind, value in (accuracy or {}).items()}
    values |= {"rejected": float(len(row["rejected"]))} if "rejected" in row else {}
    for each in told:
        each.log(values, step)


def _flat(table: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in table.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{before}{key}.")
        else:
            yield before + key, value
