"""Runs in folders: the same bits twice, from any number of workers, and after any kill."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import Table, begin, bits, lines, memory, moved, outcome, write_world
from transformers import GPT2LMHeadModel  # type: ignore[import-not-found, unused-ignore]

from lamina import checkpoint, config, files, machine, model, run, saved, toml
from lamina.errors import UserError
from lamina.run import resume, start

COMMAND = [sys.executable, "-c", "from lamina.cli import main; main()", "run"]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Table:
    return write_world(tmp_path_factory.mktemp("run"), eval_every=2)


@pytest.fixture(scope="module")
def finished(world: Table, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of three rounds."""
    folder = tmp_path_factory.mktemp("finished")
    begin(world, folder).play()
    return next(folder.iterdir())


def test_twice_is_the_same_bit_for_bit(world: Table, finished: Path, tmp_path: Path) -> None:
    second = begin(world, tmp_path)
    summary = second.play()
    assert second.folder.name == finished.name
    assert outcome(second.folder) == outcome(finished)
    assert json.loads((second.folder / "summary.json").read_text()) == summary
    assert summary["folder"] == str(second.folder)


@pytest.mark.parametrize("workers", [0, 2, 3])
def test_the_number_of_workers_changes_nothing(workers: int, world: Table, finished: Path, tmp_path: Path) -> None:
    table = world | {"workers": workers}
    parallel = begin(table, tmp_path)
    assert parallel.workers == (workers or machine.usable_cores())
    parallel.play()
    assert outcome(parallel.folder) == outcome(finished)


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 1},
        {"local": {"lr": 0.021, "steps": 3, "batch_size": 4}},
        {"method": {"name": "caff", "absent": "skip"}},
    ],
    ids=["seed", "lr", "absent"],
)
def test_other_settings_give_other_weights(change: Table, world: Table, finished: Path, tmp_path: Path) -> None:
    other = begin(world | change, tmp_path)
    other.play()
    assert other.folder.name != finished.name
    assert outcome(other.folder)["model"] != outcome(finished)["model"]


def test_a_folder_is_never_used_twice(world: Table, tmp_path: Path) -> None:
    names = [begin(world, tmp_path).folder.name for _ in range(3)]
    assert names == [names[0], f"{names[0]}-2", f"{names[0]}-3"]


def test_nothing_is_left_behind_when_nothing_fits(world: Table, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="fits no plan"):
        begin(world | {"fleet": [{"name": "weak", "memory": 1000}]}, tmp_path)
    assert not any(tmp_path.iterdir())


class Killed(BaseException):
    """Stands for a kill: no handler of lamina's may survive it."""


def kill_at(patch: pytest.MonkeyPatch, place: Any, name: str, call: int, after: bool) -> None:
    """Die at one call of a function, before or after it did its work."""
    real, calls = getattr(place, name), iter(range(1, 10**6))

    def doomed(*args: Any, **kwargs: Any) -> Any:
        die = next(calls) == call
        if die and not after:
            raise Killed
        result = real(*args, **kwargs)
        if die:
            raise Killed
        return result

    patch.setattr(place, name, doomed)


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("call", range(1, 11))
def test_every_write_is_a_place_to_die(call: int, after: bool, world: Table, finished: Path, tmp_path: Path) -> None:
    """config, env, four states, two files of the network, report and summary; lines are added between the states."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        kill_at(patch, files, "write", call, after)
        begin(world, tmp_path).play()
    (folder,) = tmp_path.iterdir()
    assert not [path for path in folder.rglob(".*") if path.name != ".lock"]
    if call == 1 and not after:
        with pytest.raises(UserError, match=r"is not a run: it has no config\.toml"):
            resume(folder)
    elif call == 10 and after:
        with pytest.raises(UserError, match="is finished"):
            resume(folder)
    else:
        resume(folder).play()
        assert outcome(folder) == outcome(finished)


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("call", range(1, 7))
def test_every_line_is_a_place_to_die(call: int, after: bool, world: Table, finished: Path, tmp_path: Path) -> None:
    """Three rounds append to two files each; half a line may be there, too."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        kill_at(patch, run.Run, "_append", call, after)
        begin(world, tmp_path).play()
    (folder,) = tmp_path.iterdir()
    with open(folder / "rounds.jsonl", "a", encoding="utf-8") as file:
        file.write('{"round": 9')
    resumed = resume(folder)
    resumed.play()
    assert outcome(folder) == outcome(finished)
    assert [line["round"] for line in lines(folder / "rounds.jsonl")] == [1, 2, 3]
    seen = [(line["round"], line["device"]) for line in lines(folder / "devices.jsonl")]
    assert len(seen) == len(set(seen)) == 3 * 4


def test_a_stopped_run_goes_on_elsewhere(world: Table, finished: Path, tmp_path: Path) -> None:
    """After a stop in every round; the folder is moved in between."""
    (tmp_path / "0").mkdir()
    current = begin(world, tmp_path / "0")

    def stop(row: run.RoundRow, devices: Any) -> None:
        raise Killed

    for sitting in range(1, 4):
        with pytest.raises(Killed):
            current.play(stop)
        assert (current.state.round, len(lines(current.folder / "rounds.jsonl"))) == (sitting, sitting)
        moved_to = tmp_path / str(sitting) / finished.name
        shutil.move(current.folder, moved_to)
        current = resume(moved_to)
    current.play(stop)
    assert outcome(current.folder) == outcome(finished)


@pytest.mark.parametrize("levers", ["exact", ["micro_batch", "chunked_loss"]], ids=["exact", "list"])
def test_levers_survive_a_stop(levers: Any, world: Table, tmp_path: Path) -> None:
    """The run that goes on allows what it allowed, plans what it planned, and ends as the one that was not stopped."""
    fleet = [{"name": "strong"}, {"name": "weak", "memory": memory(3, 2) - 1}]
    table = world | {"levers": levers, "fleet": fleet}
    whole = begin(table, tmp_path / "whole")
    (weak,) = (each for each in whole.outlook.classes_json() if each["name"] == "weak")
    assert weak["levers"] and weak["trained_blocks"] > 1
    whole.play()
    used = {tuple(line["levers"]) for line in lines(whole.folder / "devices.jsonl")}
    assert used == {(), tuple(weak["levers"])}

    def stop(row: run.RoundRow, devices: Any) -> None:
        raise Killed

    stopped = begin(table, tmp_path / "stopped")
    with pytest.raises(Killed):
        stopped.play(stop)
    resumed = resume(stopped.folder)
    assert resumed.experiment.levers == stopped.experiment.levers == whole.experiment.levers
    assert resumed.outlook.chosen.choices == whole.outlook.chosen.choices
    resumed.play()
    assert outcome(stopped.folder) == outcome(whole.folder)


def test_enforcement_survives_a_stop(world: Table, tmp_path: Path) -> None:
    for enforce in (False, True):
        assert resume(begin(world | {"enforce": enforce}, tmp_path).folder).experiment.enforce == enforce


def wait_for(path: Path, count: int, process: subprocess.Popen[str]) -> None:
    """Until a file of lines has so many."""
    give_up = time.monotonic() + 60
    while not path.exists() or path.read_bytes().count(b"\n") < count:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < give_up
        time.sleep(0.002)


def test_kill_minus_nine(world: Table, tmp_path: Path) -> None:
    """A process is killed in some round, then the one that goes on, and the third one ends as if nothing had been."""
    fleet = [{"name": "two", "memory": memory(3, 2)}, {"name": "one", "memory": memory(3, 1)}]
    table = world | {"rounds": 30, "cohort": 6, "eval_every": 1, "fleet": fleet}
    whole = begin(table, tmp_path / "whole")
    whole.play()
    file = tmp_path / "experiment.toml"
    file.write_text(toml.dump(whole.experiment.to_table()), encoding="utf-8")
    folder = tmp_path / "killed" / whole.folder.name
    moments = [(random.randint(2, 8), random.random()), (random.randint(10, 16), random.random())]
    arguments = [[str(file), "--out", str(folder.parent)], ["--resume", str(folder)]]
    for (count, delay), each in zip(moments, arguments, strict=True):
        process = subprocess.Popen(
            [*COMMAND, *each], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
        )
        wait_for(folder / "rounds.jsonl", count, process)
        time.sleep(0.03 * delay)
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        assert not (folder / "summary.json").exists()
    resume(folder).play()
    assert outcome(folder) == outcome(whole.folder), moments


def stopped(world: Table, root: Path) -> Path:
    """The folder of a run that died in the middle."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        kill_at(patch, files, "write", 5, after=False)
        begin(world, root).play()
    (folder,) = root.iterdir()
    return folder


def test_truncated_states_are_refused(world: Table, tmp_path: Path) -> None:
    folder = stopped(world, tmp_path)
    path = folder / "state.safetensors"
    whole = path.read_bytes()
    before = (folder / "rounds.jsonl").read_bytes()
    for length in (0, 7, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(UserError, match=r"state\.safetensors is truncated or not a state of lamina"):
            resume(folder)
        assert (folder / "rounds.jsonl").read_bytes() == before
    path.write_bytes(whole)
    resume(folder)


def test_states_of_another_version_or_network_are_refused(world: Table, tmp_path: Path) -> None:
    folder = stopped(world, tmp_path)
    text = (folder / "config.toml").read_text()
    (folder / "config.toml").write_text(text.replace(world["networks"][1], world["networks"][0]))
    with pytest.raises(UserError, match=r"of another network than its config\.toml gives"):
        resume(folder)
    (folder / "config.toml").write_text(text)
    path = folder / "state.safetensors"
    path.write_bytes(path.read_bytes().replace(saved.SCHEMA.encode(), b"lamina.state/9"))
    with pytest.raises(UserError, match=r"has state 'lamina\.state/9'; this version reads 'lamina\.state/3'"):
        resume(folder)


def test_settings_edited_after_a_stop_are_refused(world: Table, tmp_path: Path) -> None:
    """Those that change the result; folders of versions that did not record them still go on."""
    folder = stopped(world, tmp_path)
    path, state = folder / "config.toml", folder / "state.safetensors"
    text = path.read_text()
    path.write_text(text.replace("lr = 0.02", "lr = 0.5"))
    with pytest.raises(UserError) as caught:
        resume(folder)
    assert str(caught.value) == (
        f"{path} was edited after the run had begun: local.lr was 0.02, is 0.5; put it back to go on with the run, or"
        f" begin another with: lamina run {path}"
    )
    path.write_text(text.replace("eval_every = 2\n", "").replace("rounds = 3", "rounds = 4"))
    with pytest.raises(UserError, match="begun: eval_every was 2, is not set; rounds was 3, is 4; put it back"):
        resume(folder)
    path.write_text("# the same\n" + text.replace("workers = 1", "workers = 2"))
    assert resume(folder).experiment.workers == 2
    path.write_text(text.replace("lr = 0.02", "lr = 0.5"))
    manifest, tensors = checkpoint.read_manifest(state), load_file(state)
    del manifest["settings"]
    save_file(tensors, state, {"manifest": json.dumps(manifest)})
    assert resume(folder).experiment.local.lr == 0.5


def test_what_cannot_be_resumed(finished: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"the run in .* is finished; its result is in .*report\.md"):
        resume(finished)
    with pytest.raises(UserError, match=r"is not a run: it has no config\.toml"):
        resume(tmp_path)
    with pytest.raises(UserError, match="is not a run"):
        resume(tmp_path / "nowhere")


def test_other_data_is_refused(world: Table, tmp_path: Path) -> None:
    """Half a run on one text and half on another is no run."""
    path = Path(world["task"]["path"])
    mine = tmp_path / "mine" / path.name
    mine.parent.mkdir()
    mine.write_bytes(path.read_bytes())
    runs = tmp_path / "runs"
    folder = stopped(world | {"task": world["task"] | {"path": str(mine)}}, runs)
    texts = json.loads(mine.read_text())
    mine.write_text(json.dumps({name: text[::-1] for name, text in texts.items()}))
    with pytest.raises(UserError, match="the data is not what it was"):
        resume(folder)
    mine.write_bytes(path.read_bytes())
    resume(folder)


def test_fewer_rounds_than_are_done_are_refused(world: Table, tmp_path: Path) -> None:
    folder = stopped(world, tmp_path)
    path, done = folder / "config.toml", checkpoint.read_manifest(folder / "state.safetensors")["round"]
    text = path.read_text(encoding="utf-8")
    before = (folder / "rounds.jsonl").read_bytes()
    path.write_text(text.replace("rounds = 3", f"rounds = {done}"), encoding="utf-8")
    with pytest.raises(UserError, match=rf"was edited .*: rounds was 3, is {done}; put it back"):
        resume(folder)
    assert (folder / "rounds.jsonl").read_bytes() == before
    path.write_text(text, encoding="utf-8")
    resume(folder)


def test_damaged_state_and_short_lines_are_refused(world: Table, tmp_path: Path) -> None:
    folder = stopped(world, tmp_path)
    path = folder / "state.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(UserError, match="is damaged"):
        resume(folder)
    path.write_bytes(whole)
    lines = (folder / "rounds.jsonl").read_text()
    (folder / "rounds.jsonl").write_text(lines[:10])
    with pytest.raises(UserError, match="fewer than the"):
        resume(folder)
    (folder / "rounds.jsonl").write_text(lines)
    (folder / ".state.safetensors.left").write_bytes(b"half")
    resume(folder)
    assert not list(folder.glob(".state*"))


def test_the_summary_holds_the_contract(finished: Path) -> None:
    """Every key of docs/json.md, with a value of its type."""
    summary = json.loads((finished / "summary.json").read_text())
    kinds = {"mean_over_devices": float, "weighted": float, "p10": float}
    resources = {"memory_bytes": int, "up_bytes": int, "down_bytes": int, "flops": int}
    categories = ("weights", "gradients", "optimizer", "activations", "temporary")

    def demand(value: Any, shape: Any) -> None:
        if isinstance(shape, dict):
            assert list(value) == list(shape)
            for key, each in shape.items():
                demand(value[key], each)
        elif isinstance(shape, list):
            assert value
            for each in value:
                demand(each, shape[0])
        else:
            assert isinstance(value, shape)

    accuracy = {"before": kinds, "after": kinds}
    demand(
        summary,
        {
            "schema": str,
            "name": str,
            "method": str,
            "accuracy": accuracy,
            "tested_devices": int,
            "personalised": type(None),
            "network": {
                "chosen": str,
                "prefer": str,
                "candidates": [{"name": str, "blocks": int, "mean_trained_blocks": float, "feasible": bool}],
            },
            "classes": [
                {
                    "name": str,
                    "devices": int,
                    "budget": {name: int | None for name in resources},
                    "best_memory_bytes": int | None,
                    "predicted": resources
                    | {
                        "memory": {f"{name}_bytes": int for name in categories},
                        "peak_bytes": int,
                        "peak_moment": str,
                    },
                    "seconds": float,
                    "plan": str,
                    "levers": list,
                    "trained_blocks": int,
                    "binding": list,
                    "sat_out": int,
                    "parts": [{"part": str, "held": float, "trained": float}],
                    "accuracy": accuracy,
                }
            ],
            "totals": {
                "rounds": int,
                "up_bytes": int,
                "down_bytes": int,
                "flops": int,
                "updates": int,
                "rejected_updates": int,
                "abandoned_rounds": int,
                "clock_seconds": float,
                "seconds": float,
            },
            "folder": str,
        },
    )
    assert (summary["schema"], summary["name"], summary["method"]) == ("lamina.summary/1", "tiny", "caff")
    assert [each["name"] for each in summary["classes"]] == ["strong", "weak"]
    assert [each["trained_blocks"] for each in summary["classes"]] == [3, 1]
    assert [each["binding"] for each in summary["classes"]] == [[], ["memory_bytes"]]
    assert [each["mean_trained_blocks"] for each in summary["network"]["candidates"]] == [1.5, 2.0]
    for each in summary["classes"]:
        assert sum(each["predicted"]["memory"].values()) == each["predicted"]["memory_bytes"]


def test_the_parts_add_up(finished: Path) -> None:
    """Devices to rounds, rounds to totals, classes to all devices."""
    summary = json.loads((finished / "summary.json").read_text())
    devices, rounds, totals = (
        lines(finished / "devices.jsonl"),
        lines(finished / "rounds.jsonl"),
        summary["totals"],
    )
    for key in ("up_bytes", "down_bytes", "flops"):
        for row in rounds:
            assert row[key] == sum(each[key] for each in devices if each["round"] == row["round"])
        assert totals[key] == sum(each[key] for each in devices) > 0
    assert totals["updates"] == sum(each["loss"] is not None for each in devices) == 3 * 4
    assert totals["rounds"] == len(rounds) == 3
    assert {(each["class"], each["trained_blocks"]) for each in devices} == {("strong", 3), ("weak", 1)}
    for row in rounds:
        losses = [each["loss"] for each in devices if each["round"] == row["round"]]
        assert row["loss"] == pytest.approx(sum(losses) / len(losses))
    assert [row["accuracy"] is not None for row in rounds] == [False, True, True]  # every second, and the last
    assert rounds[-1]["accuracy"] == summary["accuracy"]["after"]
    for when in ("before", "after"):
        means = [each["accuracy"][when]["mean_over_devices"] * each["devices"] for each in summary["classes"]]
        assert sum(means) / 6 == pytest.approx(summary["accuracy"][when]["mean_over_devices"])


def test_the_model_is_a_hugging_face_network_that_computes_as_ours(finished: Path) -> None:
    theirs = GPT2LMHeadModel.from_pretrained(finished / "model").eval()
    spec, params = checkpoint.load(finished / "model")
    ids = torch.arange(40).reshape(2, 20)
    with torch.no_grad():
        torch.testing.assert_close(model.forward(spec, params, ids), theirs(ids).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", [{"name": "fedavg"}, {"name": "lora", "rank": 2}], ids=["fedavg", "lora"])
def test_the_model_is_the_last_state(method: Table, world: Table, tmp_path: Path) -> None:
    """Low-rank matrices are merged into the weights."""
    current = begin(world | {"method": method, "fleet": [{"name": "all"}]}, tmp_path)
    first = current.state.params
    current.play()
    assert moved(first, current.state.params)
    spec, params = model.merged(current.outlook.chosen.spec, current.state.params)
    assert checkpoint.read_spec(current.folder / "model") == spec
    assert bits(checkpoint.load(current.folder / "model")[1]) == bits(params)


def test_the_report_shows_classes_networks_and_blocks(finished: Path) -> None:
    text = (finished / "report.md").read_text()
    summary = json.loads((finished / "summary.json").read_text())
    for name in ("strong", "weak"):
        assert f"| {name} | " in text
    for each in summary["network"]["candidates"]:
        assert f"| {each['name']}" in text
    assert f"{summary['accuracy']['after']['mean_over_devices']:.1%}" in text
    trained = [line["trained_blocks"] for line in lines(finished / "devices.jsonl")]
    for block in range(3):
        share = sum(t >= 3 - block for t in trained) / len(trained)
        assert f"| block {block} | {share:.0%} |" in text


def test_the_commit_is_told_of_a_checkout(tmp_path: Path) -> None:
    def git(*words: str) -> None:
        who = ("-c", "user.name=a", "-c", "user.email=a@b", "-c", "tag.gpgsign=false", "-c", "commit.gpgsign=false")
        subprocess.run(["git", "-C", tmp_path, *who, *words], check=True, capture_output=True)

    commit = machine.commit.__wrapped__
    assert commit(tmp_path) is None
    git("init")
    assert commit(tmp_path) is None  # nothing is committed yet
    (tmp_path / "file").write_text("1")
    git("add", "file")
    git("commit", "-m", "first")
    git("tag", "v1")
    clean = commit(tmp_path)
    assert clean is not None and re.fullmatch("[0-9a-f]{12}", clean)
    (tmp_path / "file").write_text("2")
    assert commit(tmp_path) == f"{clean}-dirty"


def test_changes_of_the_machine_are_told(world: Table, tmp_path: Path) -> None:
    folder = start(config.experiment(world, "test"), tmp_path).folder
    assert machine.changes_since(folder) == []
    old = machine.environment() | {"torch": "1.0", "cores": 7}  # their number changes no bits
    files.write_json(folder / "env.json", old)
    assert machine.changes_since(folder) == [f"torch was 1.0, is {torch.__version__}"]
