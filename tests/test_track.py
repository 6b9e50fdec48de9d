"""Trackers are told each round, offline, and a run does not depend on them. The packages are stood in for."""

from __future__ import annotations

import json
import os
import re
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support import begin, write_world

from lamina import track
from lamina.errors import UserError
from lamina.run import resume


class Calls:
    """Anything that can be called and asked for, and remembers the calls."""

    def __init__(self, **known: Any) -> None:
        self.calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []
        self.known = known

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any, **named: Any) -> Any:
            self.calls.append((name, arguments, named))
            known = self.known.get(name, self)
            if isinstance(known, Exception):
                raise known
            return known

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
    known = [name for name in os.environ if name.startswith(("MLFLOW_", "WANDB_"))]
    monkeypatch.setattr(os, "environ", {name: value for name, value in os.environ.items() if name not in known})
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
    assert mlflow.named("set_terminated") == [(("r1", "FINISHED"), {})]

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
    with pytest.raises(ZeroDivisionError), track.Trackers(["tensorboard", "wandb"], tmp_path, {}):
        raise ZeroDivisionError
    assert packages["torch.utils.tensorboard"].named("close") and packages["wandb"].named("finish")


@pytest.mark.parametrize(
    "name, call", [("mlflow", "create_experiment"), ("wandb", "init"), ("tensorboard", "add_text")]
)
def test_a_tracker_that_cannot_begin_is_refused(
    name: str, call: str, packages: dict[str, Calls], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a line, with its own reason; nothing is left of a new run, a run that goes on is left as it was."""
    table = write_world(tmp_path, rounds=2, track=[])
    (tmp_path / "runs").mkdir()
    stopped = begin(table | {"track": ["tensorboard", name]}, tmp_path / "runs")
    broken = packages.get(name) or packages["torch.utils.tensorboard"]
    broken.known[call] = RuntimeError(f"no server\n  answers {'x' * 999}")
    with pytest.raises(UserError) as caught:
        begin(table | {"track": ["wandb", name]}, tmp_path / "runs")
    said = str(caught.value)
    assert re.fullmatch(
        rf"{name} cannot track the run: no server answers x+ \.\.\.; check .*, or leave {name} out .*", said
    )
    assert len(said) < 600
    assert list((tmp_path / "runs").iterdir()) == [stopped.folder]
    assert packages["wandb"].named("finish") == ([] if name == "wandb" else [((), {"exit_code": 1})])
    with pytest.raises(UserError, match=f"^{name} cannot track"):
        resume(stopped.folder)
    assert (stopped.folder / "config.toml").exists()


def test_a_tracker_that_fails_later_is_left_out(
    packages: dict[str, Calls], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = begin(write_world(tmp_path, rounds=3, track=["mlflow", "wandb"]), tmp_path / "runs")
    summary = run.play(lambda row, devices: packages["mlflow"].known.update(log_metric=OSError("server is gone.\n")))
    assert summary["totals"]["rounds"] == 3 and len(packages["wandb"].named("log")) == 4
    reason = "mlflow is not told of the run any more: server is gone; the run goes on, and its folder has all numbers"
    assert capsys.readouterr().err == f"warning: {reason}\n"
    assert packages["mlflow"].named("set_terminated") == []


@pytest.mark.parametrize(
    "error, ended, code", [(None, "FINISHED", 0), (ValueError(), "FAILED", 1), (KeyboardInterrupt(), "KILLED", 1)]
)
def test_trackers_know_how_a_run_ended(
    error: BaseException | None, ended: str, code: int, packages: dict[str, Calls], tmp_path: Path
) -> None:
    run = begin(write_world(tmp_path, rounds=1, track=["mlflow", "wandb"]), tmp_path / "runs")

    def stop(row: Any, devices: Any) -> None:
        if error:
            raise error

    with pytest.raises(type(error)) if error else nullcontext():
        run.play(stop)
    assert packages["mlflow"].named("set_terminated") == [(("r1", ended), {})]
    assert packages["wandb"].named("finish") == [((), {"exit_code": code})]


def test_trackers_do_not_wait_long_for_a_server(
    packages: dict[str, Calls], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "7")
    track.Trackers(["mlflow"], tmp_path, {})
    assert [os.environ[f"MLFLOW_HTTP_REQUEST_{name}"] for name in ("TIMEOUT", "MAX_RETRIES")] == ["7", "1"]


def test_the_database_is_in_the_run_folder_whatever_its_name(packages: dict[str, Calls], tmp_path: Path) -> None:
    track.Trackers(["mlflow"], tmp_path / "what? 100%41", {})
    ((_, named),) = packages["mlflow"].named("MlflowClient")
    assert named["tracking_uri"] == f"sqlite:///{tmp_path.resolve()}/what%3F 100%2541/mlflow.db"


def test_what_the_environment_says_goes_first(
    packages: dict[str, Calls], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///elsewhere.db")
    with track.Trackers(["mlflow", "wandb"], tmp_path, {}):
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
