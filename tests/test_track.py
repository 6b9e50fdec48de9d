"""Trackers are told each round, offline, and a run does not depend on them. The packages are stood in for."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support import begin, write_world

from lamina import track
from lamina.errors import UserError


class Calls:
    """Anything that can be called and asked for, and remembers the calls."""

    def __init__(self, **known: Any) -> None:
        self.calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []
        self.known = known

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any, **named: Any) -> Any:
            self.calls.append((name, arguments, named))
            return self.known.get(name, self)

        return call

    def named(self, name: str) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
        return [(arguments, named) for called, arguments, named in self.calls if called == name]


@pytest.fixture
def packages(monkeypatch: pytest.MonkeyPatch) -> dict[str, Calls]:
    """Stand-ins of the packages."""
    made = SimpleNamespace(info=SimpleNamespace(run_id="r1"))
    found = {
        "torch.utils.tensorboard": Calls(),
        "mlflow": Calls(get_experiment_by_name=None, create_experiment="e1", create_run=made),
        "wandb": Calls(),
    }
    for name, module in found.items():
        monkeypatch.setitem(sys.modules, name, module)
    for name in ("WANDB_MODE", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    return found


def test_a_run_tells_its_rounds(packages: dict[str, Calls], tmp_path: Path) -> None:
    table = write_world(tmp_path, rounds=3, eval_every=2, track=["tensorboard", "mlflow", "wandb", "wandb"])
    run = begin(table, tmp_path / "runs")
    summary = run.play()
    rows = [json.loads(line) for line in (run.folder / "rounds.jsonl").read_text().splitlines()]
    board, mlflow, wandb = packages.values()
    losses = [arguments[1:] for arguments, _ in board.named("add_scalar") if arguments[0] == "loss"]
    assert losses == [(row["loss"], row["round"]) for row in rows]
    found = [
        arguments[1:] for arguments, _ in board.named("add_scalar") if arguments[0] == "accuracy/mean_over_devices"
    ]
    before, after = (summary["accuracy"][when]["mean_over_devices"] for when in ("before", "after"))
    assert found == [(before, 0), (rows[1]["accuracy"]["mean_over_devices"], 2), (after, 3)]
    assert board.named("SummaryWriter") == [((str(run.folder / "tensorboard"),), {})] and len(board.named("close")) == 1

    sent = [(arguments, named) for arguments, named in mlflow.named("log_metric") if arguments[1] == "up_bytes"]
    assert sent == [(("r1", "up_bytes", row["up_bytes"]), {"step": row["round"]}) for row in rows]
    assert (("r1", "local.lr", "0.02"), {}) in mlflow.named("log_param")
    assert mlflow.named("MlflowClient") == [((), {"tracking_uri": f"sqlite:///{run.folder.resolve() / 'mlflow.db'}"})]
    assert mlflow.named("set_terminated") == [(("r1",), {})]

    ((_, named),) = wandb.named("init")
    assert (named["mode"], named["dir"], named["name"]) == ("offline", str(run.folder), run.folder.name)
    assert named["config"]["method.name"] == "caff"
    assert [named["step"] for _, named in wandb.named("log")] == [0, 1, 2, 3]
    assert wandb.named("log")[2][0][0]["rejected"] == 0.0 and len(wandb.named("finish")) == 1


def test_the_result_is_the_same_without(packages: dict[str, Calls], tmp_path: Path) -> None:
    table = write_world(tmp_path, rounds=1)
    one, other = (begin(table | {"track": names}, tmp_path / "runs") for names in ([], ["wandb"]))
    assert one.play()["accuracy"] == other.play()["accuracy"]
    assert {path.name for path in one.folder.iterdir()} == {path.name for path in other.folder.iterdir()}
    assert len(packages["wandb"].named("init")) == 1


def test_trackers_are_closed_after_an_error(packages: dict[str, Calls], tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), track.trackers(["tensorboard", "wandb"], tmp_path, {}):
        raise ZeroDivisionError
    assert packages["torch.utils.tensorboard"].named("close") and packages["wandb"].named("finish")


def test_what_the_environment_says_goes_first(
    packages: dict[str, Calls], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///elsewhere.db")
    with track.trackers(["mlflow", "wandb"], tmp_path, {}):
        pass
    assert packages["wandb"].named("init")[0][1]["mode"] == "disabled"
    assert packages["mlflow"].named("MlflowClient")[0][1] == {"tracking_uri": "sqlite:///elsewhere.db"}


def test_a_tracker_that_is_not_there_is_refused_before_a_folder_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "mlflow", None)
    with pytest.raises(UserError, match=r"track = \['mlflow'\] needs a package that is not here: pip install mlflow"):
        begin(write_world(tmp_path, track=["mlflow"]), tmp_path / "runs")
    assert not (tmp_path / "runs").exists()
    with pytest.raises(
        UserError, match=r"track = \['comet'\] is not accepted: Input should be 'tensorboard', 'mlflow'"
    ):
        begin(write_world(tmp_path, track=["comet"]), tmp_path / "runs")
