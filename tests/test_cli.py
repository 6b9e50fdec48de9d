"""The command line: exit codes, one line for bad input, JSON alone where JSON was asked for."""

import builtins
import errno
import json
import os
import re
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from inspect import signature
from pathlib import Path
from typing import Any

import pytest
from support import Table, begin, lines, memory, outcome, write_world

from lamina import __version__, cli, config, files, machine, run, server, tables, toml
from lamina.deploy.cli import deploy
from lamina.errors import UserError
from lamina.experiment import load_task, look_ahead
from lamina.explain import explain
from lamina.levers import EXACT, NAMES
from lamina.methods import METHODS
from lamina.units import human

Call = Callable[..., tuple[int | str | None, str, str]]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Table:
    return write_world(tmp_path_factory.mktemp("cli"))


@pytest.fixture
def file(world: Table, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The experiment as a file, with the networks by relative, short names."""
    monkeypatch.chdir(Path(world["task"]["path"]).parent)
    path = tmp_path / "tiny.toml"
    path.write_text(toml.dump(world | {"networks": ["tiny-2", "tiny-3"]}), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def done(world: Table, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run."""
    made = begin(world | {"rounds": 1}, tmp_path_factory.mktemp("done"))
    made.play()
    return made.folder


@pytest.fixture
def lamina(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """Exit code, standard output and standard error of the command with some arguments."""

    def call(*arguments: object) -> tuple[int | str | None, str, str]:
        monkeypatch.setattr(sys, "argv", ["lamina", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        return stop.value.code, *capsys.readouterr()

    return call


def takes_json(command: Any) -> bool:
    return "as_json" in signature(command.callback).parameters


def short_text(table: Table, folder: Path) -> None:
    path = folder / "short.json"
    path.write_text('{"PLAY|MUTE": "to be or"}', encoding="utf-8")
    table["task"]["path"] = str(path)


def truncated(table: Table, folder: Path) -> None:
    write_world(folder)
    path = folder / "tiny-3" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    table["networks"] = [str(folder / "tiny-3")]


def broken_config(table: Table, folder: Path) -> None:
    write_world(folder)
    (folder / "tiny-3" / "config.json").write_text("{", encoding="utf-8")
    table["networks"] = [str(folder / "tiny-3")]


def short_network(table: Table, folder: Path) -> None:
    write_world(folder)
    path = folder / "tiny-3" / "config.json"
    path.write_text(path.read_text().replace('"n_positions": 32', '"n_positions": 8'), encoding="utf-8")
    table["networks"] = [str(folder / "tiny-3")]


def put(key: str, value: object, part: str | None = None) -> Callable[[Table, Path], None]:
    def change(table: Table, folder: Path) -> None:
        (table[part] if part else table)[key] = value

    return change


def ignored(table: Table, folder: Path) -> None:
    table["enforce"], table["method"]["on_infeasible"] = True, "ignore"


BAD: dict[str, tuple[Callable[[Table, Path], None], str]] = {
    "unknown key": (put("round", 3), "unknown key 'round'; did you mean 'rounds'?"),
    "misspelt method": (put("name", "caf", "method"), "unknown name 'caf'; did you mean 'caff'?"),
    "zero budget": (put("fleet", [{"name": "weak", "memory": 0}]), "memory must be a quantity above 0"),
    "nan": (put("lr", float("nan"), "local"), "lr = nan is not accepted: Input should be a finite number"),
    "nothing fits": (put("fleet", [{"name": "weak", "memory": 1000}]), "class 'weak' fits no plan of tiny-2"),
    "no network": (put("networks", ["tiny-9"]), "no network 'tiny-9': it is neither a folder"),
    "misspelt network": (
        put("networks", ["novel-3"]),
        "nor one of the package's; did you mean 'novels-3'? accepted: nov",
    ),
    "too short a network": (short_network, "has 96 symbols and 8 positions; the task needs"),
    "too large a cohort": (put("cohort", 7), "cohort = 7 is more than the 6 devices there are"),
    "devices beyond memory": (
        put("task", {"name": "noise", "devices": 10**11, "window": 16}),
        "task.devices must be at most 10000000, got 100000000000: each has its place in memory",
    ),
    "no text": (put("path", "nowhere.json", "task"), "nowhere.json does not exist"),
    "too many devices": (put("devices", 8, "task"), "task.devices must be at most 7"),
    "text too short": (short_text, "is long enough: the longest has 8 characters"),
    "truncated checkpoint": (truncated, "model.safetensors is truncated or not a safetensors file"),
    "broken config": (broken_config, "config.json is not JSON"),
    "no such lever": (
        put("levers", ["recompute", "recompte"]),
        "levers: unknown 'recompte'; did you mean 'recompute'? accepted: " + ", ".join(NAMES),
    ),
    "no such set of levers": (put("levers", "exakt"), "levers: unknown 'exakt'; did you mean 'exact'? accepted: "),
    "a set in a list": (
        put("levers", ["recompute", "exact"]),
        'levers: "exact" stands alone, as levers = "exact"; a list takes chunked_loss, ',
    ),
    "no name in a list": (put("levers", [""]), "levers: unknown ''; accepted: chunked_loss, "),
    "neither set nor lever": (put("levers", "some"), "levers: unknown 'some'; accepted: "),
    "levers as a number": (put("levers", 3), "levers = 3 is not accepted"),
    "levers in a list": (put("levers", [["recompute"]]), "levers = [['recompute']] is not accepted"),
    "enforce as a word": (put("enforce", "yes"), "enforce = 'yes' is not accepted"),
    "nothing to enforce": (ignored, 'enforce = true cannot go with method.on_infeasible = "ignore"'),
}


def one_line(said: tuple[int | str | None, str, str], message: str) -> None:
    code, out, err = said
    assert (code, out) == (2, "")
    assert err.startswith("error: ") and err.count("\n") == 1 and err.endswith("\n"), err
    assert message in err


@pytest.mark.parametrize("flags", [[], ["--json"]], ids=["", "json"])
@pytest.mark.parametrize(("change", "message"), BAD.values(), ids=list(BAD))
def test_bad_input_gives_one_line_and_leaves_nothing(
    change: Callable[[Table, Path], None], message: str, flags: list[str], file: Path, lamina: Call, tmp_path: Path
) -> None:
    table = json.loads(json.dumps(config.load_experiment(file).to_table()))
    change(table, tmp_path)
    text = toml.dump(table).replace("NaN", "nan")
    file.write_text(text, encoding="utf-8")
    out = tmp_path / "out"
    one_line(lamina("run", file, "--out", out, *flags), message)
    assert not out.exists()


@pytest.mark.parametrize("verb", ["run", "plan", "pretrain"])
def test_a_missing_file_is_named(verb: str, file: Path, lamina: Call, tmp_path: Path) -> None:
    one_line(lamina(verb, file.with_name("tinny.toml")), f"tinny.toml is not a file; did you mean {file}?")
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.toml"]


@pytest.mark.parametrize("override", ["round=3", "rounds", "method.name=caf", "fleet.weka.memory=1"])
@pytest.mark.parametrize("verb", ["run", "plan"])
def test_bad_settings_give_one_line(verb: str, override: str, file: Path, lamina: Call) -> None:
    one_line(lamina(verb, file, "--set", override), override.partition("=")[0].split(".")[-1])


@pytest.mark.parametrize(
    "arguments",
    [[], ["tiny.toml", "--resume", "folder"], ["--resume", "folder", "--set", "seed=1"]],
    ids=["none", "both", "settings"],
)
def test_run_takes_a_file_or_a_folder(arguments: list[str], lamina: Call) -> None:
    one_line(lamina("run", *arguments), "lamina run takes a TOML file, or --resume FOLDER alone")


def test_an_out_folder_that_is_a_file_is_refused(file: Path, lamina: Call) -> None:
    one_line(lamina("run", file, "--out", file), "tiny.toml")


PLACES: dict[str, tuple[list[str], str]] = {
    "run below a file": (
        ["run", "FILE", "--out", "FILE/runs"],
        "FILE/runs is below a file, which is no folder; name an",
    ),
    "page in a folder": (["report", "RUN", "--out", "DIR"], "DIR is a folder, not a file; name a file"),
    "page below a file": (
        ["report", "RUN", "--out", "FILE/x.html"],
        "FILE is in the way: it is no folder; name another",
    ),
    "figures in a file": (
        ["report", "RUN", "--out", "OUT/x.html", "--figures", "FILE"],
        "FILE is in the way: it is no",
    ),
    "export below a file": (
        ["export", "RUN", "--out", "FILE/x"],
        "FILE is in the way: it is no folder; name another pl",
    ),
    "import below a file": (
        ["import", "DIR/tiny-2", "--out", "FILE"],
        "FILE is in the way: it is no folder; name anoth",
    ),
}


@pytest.mark.parametrize(("arguments", "message"), PLACES.values(), ids=list(PLACES))
def test_places_that_cannot_be_written_to(
    arguments: list[str], message: str, done: Path, file: Path, world: Table, lamina: Call, tmp_path: Path
) -> None:
    """One line with the path that was given; nothing else is written either."""
    names = {"FILE": file, "RUN": done, "DIR": Path(world["task"]["path"]).parent, "OUT": tmp_path / "out"}

    def named(text: str) -> str:
        return re.sub("|".join(names), lambda found: str(names[found[0]]), text)

    one_line(lamina(*map(named, arguments)), named(message))
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path != file]


@pytest.mark.parametrize(
    ("place", "name", "arguments"),
    [
        (tempfile, "mkstemp", ["report", "RUN"]),
        (tempfile, "mkdtemp", ["export", "RUN"]),
        (Path, "read_text", ["report", "RUN"]),
        (Path, "mkdir", ["run", "FILE", "--out", "OUT"]),
        (builtins, "open", ["run", "--resume", "STOPPED"]),
    ],
    ids=["report", "export", "unreadable", "run", "resume"],
)
@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS], ids=["denied", "read-only"])
def test_places_that_are_read_only(
    place: Any,
    name: str,
    arguments: list[str],
    code: int,
    done: Path,
    file: Path,
    lamina: Call,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stopped, out = begin(config.load_experiment(file).to_table(), tmp_path).folder, tmp_path / "out"
    out.mkdir()
    names, real = {"RUN": done, "FILE": file, "STOPPED": stopped, "OUT": out}, getattr(place, name)

    def refuse(*args: Any, **kwargs: Any) -> Any:
        within = Path(kwargs["dir"]) if "dir" in kwargs else Path(str(args[0])).parent
        if within in names.values():
            raise OSError(code, os.strerror(code), f"{within}/.temporary" if "dir" in kwargs else str(args[0]))
        return real(*args, **kwargs)

    monkeypatch.setattr(place, name, refuse)
    said = lamina(*(str(names.get(each, each)) for each in arguments))
    monkeypatch.undo()
    one_line(said, "permission is denied; allow it" if code == errno.EACCES else "is on a file system that cannot be")
    assert ".temporary" not in said[2]


def test_a_full_disk_is_no_mistake_of_the_user(done: Path, lamina: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fail)
    code, out, err = lamina("report", done)
    assert (code, out) == (1, "") and err.count("\n") == 1 and f"No space left on device: '{done}/report.html'" in err


def test_short_text_for_pretraining_is_refused(lamina: Call, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("to be or not", encoding="utf-8")
    path = tmp_path / "pretrain.toml"
    out = tmp_path / "out"
    table = {"text": str(tmp_path / "text.txt"), "out": str(out), "name": "n", "steps": [1], "lr": [0.1], "depths": [1]}
    path.write_text(toml.dump(table), encoding="utf-8")
    one_line(lamina("pretrain", path), "characters are too few")
    assert not out.exists()


def test_run_shows_tables_and_leaves_a_folder(file: Path, lamina: Call, tmp_path: Path) -> None:
    code, out, err = lamina("run", file, "--out", tmp_path / "runs", "--set", "rounds=2")
    (folder,) = (tmp_path / "runs").iterdir()
    assert (code, err) == (0, "")
    assert {path.name for path in folder.iterdir()} == {
        *("config.toml", "env.json", "rounds.jsonl", "devices.jsonl"),
        *("state.safetensors", "model", "summary.json", "report.md", "report.html", ".lock"),
    }
    for text in (
        "tiny-3 *",
        "strong",
        "weak",
        "last 1 of 3",
        "round   1: loss ",
        "round   2: loss ",
        "points",
        "Totals",
    ):
        assert text in out
    made, asked = config.load_experiment(folder / "config.toml"), config.load_experiment(file, ["rounds=2"])
    assert made.networks == tuple(str(Path(name).absolute()) for name in asked.networks)
    assert made.task.path == str(Path(str(asked.task.path)).absolute())
    assert replace(made, networks=asked.networks, task=asked.task) == asked


def test_run_json_is_the_summary_alone(file: Path, lamina: Call, tmp_path: Path) -> None:
    code, out, err = lamina("run", file, "--out", tmp_path / "runs", "--json")
    (folder,) = (tmp_path / "runs").iterdir()
    assert code == 0
    assert json.loads(out) == json.loads((folder / "summary.json").read_text())
    assert "round   3: loss " in err and str(folder.name) in err


def test_plan_json_is_what_the_run_will_do(file: Path, lamina: Call, tmp_path: Path) -> None:
    code, out, err = lamina("plan", file, "--json")
    plan = json.loads(out)
    assert (code, err, plan["schema"]) == (0, "", "lamina.plan/1")
    assert list(plan) == ["schema", "network", "classes"]
    assert plan["network"] == {
        "chosen": "tiny-3",
        "prefer": "trained",
        "candidates": [
            {"name": "tiny-2", "blocks": 2, "mean_trained_blocks": 1.5, "feasible": True},
            {"name": "tiny-3", "blocks": 3, "mean_trained_blocks": 2.0, "feasible": True},
        ],
    }
    strong, weak = plan["classes"]
    assert strong["budget"] == dict.fromkeys(("memory_bytes", "up_bytes", "down_bytes", "flops"))
    assert weak["budget"] == strong["budget"] | {"memory_bytes": memory(3, 1)}
    assert weak["predicted"]["memory_bytes"] == memory(3, 1)
    assert weak["predicted"]["up_bytes"] == 4 * (3280 + 1568)
    assert (strong["accuracy"], weak["accuracy"]) == (None, None)
    _, out, _ = lamina("run", file, "--out", tmp_path, "--json", "--set", "rounds=1")
    summary = json.loads(out)
    assert summary["network"] == plan["network"]
    assert [row | {"accuracy": None} for row in summary["classes"]] == plan["classes"]


@pytest.mark.parametrize("budgets", [[], ["--set", "fleet.weak.downlink=99 KiB"]], ids=["", "downlink"])
def test_plan_shows_the_numbers_of_its_json(budgets: list[str], file: Path, lamina: Call) -> None:
    _, out, _ = lamina("plan", file, "--json", *budgets)
    plan = json.loads(out)
    code, text, err = lamina("plan", file, *budgets)
    assert (code, err) == (0, "")
    shown = [" ".join(line.split()) for line in text.splitlines()]
    for each in plan["network"]["candidates"]:
        mark = " *" if each["name"] == plan["network"]["chosen"] else ""
        assert f"{each['name']}{mark} {each['blocks']} {each['mean_trained_blocks']:.2f} yes" in shown
    for row in plan["classes"]:
        resources = ["memory_bytes", "up_bytes", *(["down_bytes"] if budgets else []), "flops"]
        numbers = [human(name, row["predicted"][name], row["budget"][name]) for name in resources]
        limits = " and ".join(name.removesuffix("_bytes") for name in row["binding"]) or "nothing"
        assert " ".join([row["name"], row["plan"], str(row["devices"]), *numbers, limits]) in shown
        peak = row["predicted"]
        sizes = [human("bytes", size) for size in (*peak["memory"].values(), peak["peak_bytes"])]
        assert " ".join([row["name"], *sizes, peak["peak_moment"]]) in shown


def test_plan_measures_beside_what_it_predicts(file: Path, lamina: Call) -> None:
    code, out, _ = lamina("plan", file, "--measure", "--json")
    assert code == 0
    for row in json.loads(out)["classes"]:
        assert row["measured"]["peak_bytes"] == pytest.approx(row["predicted"]["peak_bytes"], abs=12)
        assert row["measured"]["memory"].keys() == row["predicted"]["memory"].keys()
        assert row["measured"]["rss_bytes"] > 0


@pytest.mark.parametrize(
    ("given", "accepted"),
    [
        ("none", "none"),
        ("exact", "exact"),
        ("all", "all"),
        ('["recompute", "chunked_loss"]', ("recompute", "chunked_loss")),
        ("micro_batch", "micro_batch"),
        ("[]", ()),
    ],
)
def test_levers_are_a_word_or_a_list(given: str, accepted: Any, file: Path, lamina: Call, tmp_path: Path) -> None:
    """They come back from a file as they went into it, and the plan keeps to them."""
    settings = [f"levers={given}", "enforce=true", "fleet.weak.memory=200 KB", "method.on_infeasible=drop"]
    experiment = config.load_experiment(file, settings)
    assert (experiment.levers, experiment.enforce) == (accepted, True)
    again = tmp_path / "again.toml"
    again.write_text(toml.dump(experiment.to_table()), encoding="utf-8")
    assert config.load_experiment(again) == experiment
    code, out, _ = lamina("plan", again, "--json")
    (weak,) = (row for row in json.loads(out)["classes"] if row["name"] == "weak")
    names = {"none": (), "exact": EXACT, "all": NAMES, "micro_batch": ("micro_batch",)}.get(accepted, accepted)
    assert code == 0
    assert {name.split()[0] for name in weak["levers"]} <= set(names)
    assert bool(weak["levers"]) == bool(names) and (weak["plan"] is None) == (not names)


def test_why_json_is_the_explanation(file: Path, lamina: Call) -> None:
    for levers in ("none", "exact"):
        code, out, err = lamina("plan", file, "--why", "weak", "--json", "--set", f"levers={levers}")
        experiment = config.load_experiment(file, [f"levers={levers}"])
        assert (code, err) == (0, "")
        assert json.loads(out) == explain(experiment, look_ahead(experiment), "weak")


@pytest.mark.parametrize("levers", ["none", "exact", "all"])
@pytest.mark.parametrize("name", ["weak", "strong"])
def test_why_shows_the_numbers_of_its_json(name: str, levers: str, file: Path, lamina: Call) -> None:
    settings = ("--set", f"levers={levers}")
    found = json.loads(lamina("plan", file, "--why", name, "--json", *settings)[1])
    code, text, err = lamina("plan", file, "--why", name, *settings)
    assert (code, err) == (0, "")
    assert all(len(line) <= 120 for line in text.splitlines())
    bars = [line.strip() for line in text.splitlines() if line.strip().endswith(" x")]
    assert len(bars) == len(found["waterfall"])
    for bar, step in zip(bars, found["waterfall"], strict=True):
        assert bar.startswith(f"{step['step']} ")
        assert human("bytes", step["peak_bytes"]) in bar and step["peak_moment"] in bar
        assert ("|" in bar) == (name == "weak")
        assert "AAA" in bar.removeprefix(step["step"])
        assert bar.endswith(f" {step['flops'] / found['waterfall'][0]['flops']:.2f} x")
    shown = "".join(text.split("\n")).replace(" ", "")
    for reason in tables.reasons(found):
        assert reason.replace(" ", "") in shown
    assert (found["richer"] is None) == ((name, levers) in (("strong", levers), ("weak", "all")))
    if richer := found["richer"]:
        missing = human("memory_bytes", richer["missing"]["memory_bytes"], up=True)
        assert f"with {missing} of memory more it would train blocks: {richer['plan']}" in " ".join(text.split())


def test_why_of_a_class_that_sits_out_or_ignores_its_budget(file: Path, lamina: Call) -> None:
    settings = ("--set", "fleet.weak.memory=1 KiB", "--set", "method.on_infeasible=drop")
    code, text, err = lamina("plan", file, "--why", "weak", *settings)
    assert (code, err) == (0, "")
    missing = human("memory_bytes", memory(3, 1) - 1024, up=True)
    assert f"sits out; its cheapest plan, shown above, lacks {missing} of memory" in " ".join(text.split())
    settings = ("--set", "fleet.weak.memory=1 KiB", "--set", "method.on_infeasible=ignore")
    code, text, err = lamina("plan", file, "--why", "weak", *settings)
    assert (code, err) == (0, "")
    assert "trains blocks: all 3" in text


@pytest.mark.parametrize("flags", [[], ["--json"]], ids=["", "json"])
def test_what_cannot_be_explained(flags: list[str], file: Path, lamina: Call) -> None:
    one_line(
        lamina("plan", file, "--why", "waek", *flags),
        "no fleet class 'waek'; did you mean 'weak'? accepted: strong, weak",
    )
    one_line(lamina("plan", file, "--why", "zzz", *flags), "no fleet class 'zzz'; accepted: strong, weak")
    one_line(lamina("plan", file, "--why", "weak", "--measure", *flags), "take one of them")
    one_line(lamina("plan", file, "--why", "weak", "--data", *flags), "take one of them")
    one_line(lamina("plan", file, "--why", "", *flags), "no fleet class ''; accepted: strong, weak")


@pytest.mark.parametrize("split", ["role", "dirichlet"])
def test_plan_shows_the_data(split: str, file: Path, lamina: Call) -> None:
    settings = ("--set", f"task.split={split}")
    code, out, err = lamina("plan", file, "--data", "--json", *settings)
    found = json.loads(out)
    assert (code, err) == (0, "")
    assert list(found) == ["schema", "network", "classes", "data"]
    data, experiment = found["data"], config.load_experiment(file, [f"task.split={split}"])
    task = load_task(experiment)
    assert list(data) == ["kinds", "examples", "test_examples", "classes", "devices"]
    assert [device["name"] for device in data["devices"]] == list(task.names)
    assert [device["examples"] for device in data["devices"]] == list(map(len, task.train))
    assert [device["test_examples"] for device in data["devices"]] == list(map(len, task.test))
    assert [sum(device["mix"].values()) for device in data["devices"]] == list(map(len, task.train))
    if split == "role":
        assert [list(device["mix"]) for device in data["devices"]] == [[name] for name in task.names]
    assert [each["devices"] for each in data["classes"]] == [each["devices"] for each in found["classes"]]
    code, out, err = lamina("plan", file, "--data", *settings)
    assert (code, err) == (0, "")
    assert f"Data: 6 devices, {len(data['kinds'])} kinds" in out
    assert out.count("▏") >= out.count("▕") == 6
    assert "data" not in json.loads(lamina("plan", file, "--json", *settings)[1])


@pytest.mark.parametrize("name", ["[red]weak", "[/weak]"])
def test_names_are_shown_as_they_are(name: str, file: Path, lamina: Call) -> None:
    _, out, _ = lamina("plan", file, "--set", f'fleet.weak.name="{name}"')
    assert name in out
    _, out, _ = lamina("plan", file, "--set", f'fleet.weak.name="{name}"', "--why", name)
    assert f"Memory of {name} at the peak" in out and f"class {name}, 3 devices, on tiny-3: " in out


def test_methods_lists_every_row(lamina: Call) -> None:
    code, out, err = lamina("methods", "--json")
    listed = json.loads(out)
    assert (code, err, listed["schema"]) == (0, "", "lamina.methods/1")
    assert [row["name"] for row in listed["methods"]] == list(METHODS)
    for row, method in zip(listed["methods"], METHODS.values(), strict=True):
        keys = ["name", "group", "summary", "source", "cuts", "note", "tasks", "stateful", "lossy", "fields"]
        assert list(row) == keys
        defaults = {key: getattr(method(), key) for key in vars(method())}
        assert {key: field["default"] for key, field in row["fields"].items()} == json.loads(json.dumps(defaults))
        assert all(field["accepts"] and field["meaning"] for field in row["fields"].values())
    code, out, _ = lamina("methods")
    assert code == 0
    words = out.split()
    for row in listed["methods"]:
        assert f"{row['name']} ({row['group']}):" in out
        assert row["fields"].keys() <= set(words)
    code, out, _ = lamina("methods", "lora", "--json")
    (lora,) = json.loads(out)["methods"]
    assert lora["fields"]["depth"]["accepts"] == '"all" | "budget" | integer'
    assert lora["fields"]["train_head"] | {"meaning": ""} == {"accepts": "true | false", "default": True, "meaning": ""}
    one_line(lamina("methods", "lorra"), "no method 'lorra'; did you mean 'lora'? accepted: fedavg, ")


def test_pretrain_json_is_a_line_per_point(lamina: Call, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("so it goes, and so it went. " * 200, encoding="utf-8")
    path = tmp_path / "pretrain.toml"
    table = {
        **{"text": str(tmp_path / "text.txt"), "out": str(tmp_path / "out"), "name": "n", "depths": [1, 2]},
        **{"steps": [2, 1], "lr": [0.01, 0.01], "embed": 16, "heads": 2, "positions": 16, "batch_size": 2},
        **{"checkpoint_every": 1, "precision": "fp32", "device": "cpu"},
    }
    path.write_text(toml.dump(table), encoding="utf-8")
    code, out, err = lamina("pretrain", path, "--json")
    points = [json.loads(line) for line in out.splitlines()]
    assert code == 0
    assert [(point["depth"], point["step"], point["steps"]) for point in points] == [(1, 1, 2), (1, 2, 2), (2, 1, 1)]
    keys = "schema depth step steps train_loss val_loss characters_per_second"
    assert all(" ".join(point) == keys and point["schema"] == "lamina.pretrain/1" for point in points)
    assert "n-1, n-2" in err
    code, out, _ = lamina("pretrain", path, "--json")
    assert (code, out) == (0, "")


def stop_in_round(patch: pytest.MonkeyPatch, round_: int, error: BaseException) -> None:
    real = server.play_round

    def interrupted(experiment: Any, outlook: Any, examples: Any, engine: Any, state: Any, progress: Any) -> Any:
        if state.round + 1 == round_:
            raise error
        return real(experiment, outlook, examples, engine, state, progress)

    patch.setattr(run, "play_round", interrupted)


def test_a_stop_says_how_to_go_on(file: Path, lamina: Call, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        stop_in_round(patch, 2, KeyboardInterrupt())
        code, out, _ = lamina("run", file, "--out", tmp_path / "my runs")
    (folder,) = (tmp_path / "my runs").iterdir()
    assert code == 130
    assert f"lamina run --resume '{folder}'" in "".join(out.split("\n")).replace("  ", " ")
    assert [line["round"] for line in lines(folder / "rounds.jsonl")] == [1]
    code, out, err = lamina("run", "--resume", folder)
    assert (code, err) == (0, "")
    assert "warning" not in out
    whole = begin(config.load_experiment(file).to_table(), tmp_path / "whole")
    whole.play()
    assert outcome(folder) == outcome(whole.folder)
    one_line(lamina("run", "--resume", folder), "is finished; its result is in")


def test_a_resume_on_another_machine_is_warned_about(file: Path, lamina: Call, tmp_path: Path) -> None:
    folder = begin(config.load_experiment(file).to_table(), tmp_path).folder
    files.write_json(folder / "env.json", machine.environment() | {"torch": "0.1"})
    code, out, _ = lamina("run", "--resume", folder)
    assert code == 0
    assert "warning: torch was 0.1, is " in out


def test_what_cannot_be_resumed(lamina: Call, tmp_path: Path) -> None:
    one_line(lamina("run", "--resume", tmp_path), "is not a run: it has no config.toml")
    one_line(lamina("run", "--resume", tmp_path / "nowhere"), "nowhere is not a run: it has no config.toml")


def test_a_second_process_is_kept_out_and_changes_nothing(file: Path, lamina: Call, tmp_path: Path) -> None:
    """Not even lines that the first one has written but not yet committed."""
    folder = begin(config.load_experiment(file).to_table(), tmp_path / "runs").folder
    (folder / "rounds.jsonl").write_text('{"round": 1}\n', encoding="utf-8")
    with files.lock(folder):
        one_line(lamina("run", "--resume", folder), f"another process is working in {folder}")
    assert (folder / "rounds.jsonl").read_text() == '{"round": 1}\n'


def test_a_run_holds_the_lock_while_it_plays(
    file: Path, lamina: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused = []

    def play_round(*arguments: Any) -> Any:
        (folder,) = (tmp_path / "runs").iterdir()
        with pytest.raises(UserError, match="another process is working in"), files.lock(folder):
            pass
        refused.append(folder)
        return real(*arguments)

    real = server.play_round
    monkeypatch.setattr(run, "play_round", play_round)
    assert lamina("run", file, "--out", tmp_path / "runs")[0] == 0
    assert len(refused) == 3


def test_a_program_error_is_a_traceback(file: Path, lamina: Call, tmp_path: Path) -> None:
    """Only what the user can put right is shown as one line."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(ZeroDivisionError):
        stop_in_round(patch, 1, ZeroDivisionError())
        lamina("run", file, "--out", tmp_path)


def test_a_class_over_an_ignored_budget_says_so(file: Path, lamina: Call) -> None:
    settings = (
        "--set",
        "method.name=fedavg",
        "--set",
        "method.on_infeasible=ignore",
        "--set",
        "fleet.weak.memory=1 KiB",
    )
    code, out, _ = lamina("plan", file, *settings)
    assert code == 0
    assert "over its memory" in out


def test_version(lamina: Call) -> None:
    assert lamina("--version") == (0, f"lamina {__version__}\n", "")
    assert "Federated finetuning of small pretrained" in lamina("--help")[1]


def test_the_page_on_json_names_the_commands_that_print_it() -> None:
    """All, and of `lamina deploy` only `run`."""
    assert all(map(takes_json, cli.app.registered_commands))
    names = [getattr(each.callback, "__name__", "") for each in deploy.registered_commands if takes_json(each)]
    page = (Path(__file__).parents[1] / "docs" / "json.md").read_text(encoding="utf-8")
    assert names == ["run"] and "Every command takes `--json`; of `lamina deploy` only `run` does" in page


def test_nothing_after_the_sign_unsets_a_key(file: Path, lamina: Call) -> None:
    _, out, _ = lamina("plan", file, "--json", "--set", "fleet.weak.memory=1 MiB", "--set", "fleet.weak.memory=")
    weak = next(row for row in json.loads(out)["classes"] if row["name"] == "weak")
    assert weak["budget"]["memory_bytes"] is None
