"""What an experiment begins with: data that its networks read alike, a head that fits, devices that can be measured."""

from __future__ import annotations

import csv
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support import CLASSES, WINDOW, Table, begin, bits, moved, spec, weights, write_texts, write_world
from tokenizers import Tokenizer, models

from lamina import checkpoint, cli, config, model, tables, toml
from lamina.data.text import ALPHABET
from lamina.errors import UserError
from lamina.experiment import load_task, look_ahead

USERS = tuple(f"user {i}" for i in range(6))


def write_users(path: Path, users: tuple[str, ...], texts: int = 30) -> str:
    """Texts of all classes, of each user as many."""
    with path.open("w", encoding="utf-8", newline="") as file:
        lines = csv.writer(file)
        lines.writerow(("text", "label", "user"))
        for i in range(texts * len(users)):
            label = CLASSES[i % len(CLASSES)]
            lines.writerow((f"the {label} of number {i}", label, users[i % len(users)]))
    return str(path)


@pytest.fixture
def table(tmp_path: Path) -> Table:
    """An experiment on tiny-2 with texts of five classes; the devices are users."""
    task = {"name": "text-classification", "window": WINDOW, "split": "natural"}
    paths = {"path": write_users(tmp_path / "train.csv", USERS), "test_path": write_users(tmp_path / "test.csv", USERS)}
    return write_world(tmp_path, rounds=1, networks=[str(tmp_path / "tiny-2")], task=task | paths)


TEXT: list[Table] = [{"name": "text", "scored": 1}, {"name": "text-classification"}]


@pytest.mark.parametrize("more", TEXT, ids=lambda more: more["name"])
def test_text_is_not_for_a_network_that_takes_images(more: Table, tmp_path: Path) -> None:
    """Which is said before anybody looks for its tokenizer."""
    task = {"path": str(write_texts(tmp_path)), "window": WINDOW, "devices": 6, "split": "iid"}
    table = write_world(tmp_path, networks=["tinyvit-3"], task=task | more)
    with pytest.raises(UserError, match=r"^network tinyvit-3 takes images, the task gives text; name a network for"):
        load_task(config.experiment(table, "test"))


def test_networks_that_read_data_differently_cannot_stand_for_each_other(table: Table, tmp_path: Path) -> None:
    folders = [tmp_path / f"tiny-{blocks}" for blocks in (2, 3)]
    both = table | {"networks": [str(folder) for folder in folders]}
    assert load_task(config.experiment(both, "test")).labels == CLASSES
    checkpoint.write(folders[1], spec(3), weights(spec(3)), torch.float32, {})
    words = Tokenizer(models.WordLevel({"the": 0, "of": 1, "[UNK]": 2}, unk_token="[UNK]"))
    words.save(str(folders[1] / "tokenizer.json"))
    with pytest.raises(UserError, match=r"^networks tiny-2 and tiny-3 do not read data alike \(another tokenizer, or"):
        load_task(config.experiment(both, "test"))


def test_a_run_that_cannot_be_measured_is_refused(table: Table, tmp_path: Path) -> None:
    """Where no test example is of a user who is a device."""
    table["task"]["test_path"] = write_users(tmp_path / "others.csv", ("somebody else",))
    with pytest.raises(UserError, match=r"^no device has a test example, so nothing can be measured; see the test set"):
        begin(table, tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


def test_a_class_whose_devices_have_no_test_examples(table: Table, tmp_path: Path, capsys: Any) -> None:
    """Has no accuracy, and all that is printed and written does without; notes of the task are told."""
    class_of = look_ahead(config.experiment(table, "test")).class_of
    tested = [user for user, group in zip(USERS, class_of, strict=True) if group == 0]
    table["task"]["test_path"] = write_users(tmp_path / "strong.csv", tuple(tested))
    (tmp_path / "tiny-2" / "LICENSE").write_text("free", encoding="utf-8")
    (tmp_path / "tiny.toml").write_text(toml.dump(table), encoding="utf-8")
    cli.run(tmp_path / "tiny.toml", out=tmp_path / "runs")
    shown = capsys.readouterr().out
    (folder,) = (tmp_path / "runs").iterdir()
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    strong, weak = summary["classes"]
    assert weak["accuracy"] is None and weak["devices"] == 3
    assert strong["accuracy"] == summary["accuracy"]
    rows = {row[0]: row[1:] for row in tables.outcome(summary).rows}
    assert rows["weak"][-3:] == ("", "", "") and rows["strong"][-1].endswith(" points")
    report = (folder / "report.md").read_text(encoding="utf-8")
    assert f"| {' | '.join(('weak', *rows['weak']))} |" in report
    note = "note: 270 of 270 texts are longer than task.window = 16 tokens and were cut"
    assert note in shown
    cli.plan(tmp_path / "tiny.toml", data=True)
    assert note in capsys.readouterr().out
    assert (folder / "model" / "LICENSE").read_text(encoding="utf-8") == "free"  # what goes along with the network


@pytest.mark.parametrize(
    ("names", "pool", "kept"),
    [(CLASSES, "last", True), (CLASSES[::-1], "last", False), (CLASSES, "mean", False), ((), "last", False)],
    ids=["as it was", "other classes", "sees otherwise", "none"],
)
def test_a_head_is_kept_where_it_was_trained_for_the_same(
    names: tuple[str, ...], pool: Any, kept: bool, table: Table, tmp_path: Path
) -> None:
    """Classes in the same order, told from what it was trained to see; else a new one is drawn by the seed."""
    network = replace(spec(2), labels=len(names), pool="last" if names else "")
    params = weights(network, seed=8)
    keys = checkpoint.label_keys(names) if names else {}
    checkpoint.write(tmp_path / "tiny-2", network, params, torch.float32, {"alphabet": ALPHABET} | keys)
    table["task"]["pool"] = pool
    run, again, other = (begin(table | {"seed": seed}, tmp_path / "runs") for seed in (0, 0, 1))
    begun = run.state.params
    assert run.outlook.chosen.spec == replace(spec(2), labels=len(CLASSES), pool=pool)
    assert moved(params, begun) == (set() if kept else {"head.weight"})
    assert bits(begun) == bits(again.state.params)
    assert moved(begun, other.state.params) == (set() if kept else {"head.weight"})
    assert begun["head.weight"].shape == model.layout(run.outlook.chosen.spec).shape("head.weight")


def test_networks_of_the_same_name_are_told_apart(table: Table, tmp_path: Path) -> None:
    """By the folders they are in, as far up as it takes."""
    folders = [tmp_path / "a" / "x" / "net", tmp_path / "b" / "x" / "net", tmp_path / "tiny-2"]
    for folder, source in zip(folders, ("tiny-2", "tiny-3"), strict=False):
        shutil.copytree(tmp_path / source, folder)
    outlook = look_ahead(config.experiment(table | {"networks": list(map(str, folders))}, "test"))
    shown = outlook.network_json()
    assert [each["name"] for each in shown["candidates"]] == ["a/x/net", "b/x/net", "tiny-2"]
    assert sum(row[0].endswith(" *") for row in tables.networks(shown).rows) == 1
