"""Comparisons: what their files may say, cells that are done once, what is collected."""

import json
from collections.abc import Callable
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import pytest
from support import Table, memory, outcome, write_world

from lamina import compare, config, files, tables, toml
from lamina.cli import main
from lamina.compare import cells, collect, run_cell
from lamina.config import Comparison
from lamina.errors import UserError
from lamina.run import Run

Call = Callable[..., tuple[int | str | None, str, str]]
DAMAGES: dict[str, tuple[str, Callable[[str], str] | None, bool]] = {
    "half a result": ("summary.json", lambda text: text[: len(text) // 2], False),
    "no result": ("summary.json", lambda text: "{}", False),
    "null": ("summary.json", lambda text: "null", False),
    "a part missing": ("summary.json", lambda text: text.replace('"accuracy"', '"accurate"'), False),
    "half a line": ("rounds.jsonl", lambda text: text[:-9], False),
    "a line missing": ("rounds.jsonl", lambda text: text.splitlines()[0], True),
    "no lines": ("rounds.jsonl", None, True),
}
"""What is the matter -> file of a cell, what becomes of its text (None: it is gone), whether there is a target."""


@pytest.fixture
def table(tmp_path: Path) -> Table:
    """Three methods and two seeds on tiny-3; LoRA fits no class, full training the strong one alone."""
    made = write_world(tmp_path, rounds=2)
    del made["method"]
    made["networks"] = made["networks"][1:]
    made["fleet"] = [{"name": "strong", "memory": memory(3, 3)}, {"name": "weak", "memory": memory(3, 1)}]
    made["seeds"] = [3, 1]
    made["methods"] = [
        {"name": "caff"},
        {"name": "fedavg", "label": "full, drop"},
        {"name": "lora", "rank": 64, "on_infeasible": "reject", "local": {"lr": 0.05}},
    ]
    return made


def written(table: Table, folder: Path) -> Path:
    path = folder / "compare.toml"
    path.write_text(toml.dump(table), encoding="utf-8")
    return path


def load(table: Table, folder: Path, *overrides: str) -> Comparison:
    return config.load_comparison(written(table, folder), overrides)


def content(folder: Path) -> dict[Path, bytes]:
    """All files below a folder."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def finish(run: Run) -> None:
    run.play()


@pytest.fixture
def lamina(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """The command line: code, standard output, standard error."""

    def call(*arguments: object) -> tuple[int | str | None, str, str]:
        monkeypatch.setattr("sys.argv", ["lamina", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            main()
        return stop.value.code or 0, *capsys.readouterr()

    return call


def test_a_file_gives_an_experiment_per_method(table: Table, tmp_path: Path) -> None:
    made = load(table, tmp_path)
    assert (made.name, made.seeds) == ("tiny", (3, 1))
    (a, caff), (b, full), (c, lora) = made.experiments
    assert (a, b, c) == ("caff", "full, drop", "lora")
    assert [each.method.on_infeasible for each in (caff, full, lora)] == ["drop", "drop", "reject"]
    assert (caff.local.lr, lora.local.lr, lora.local.steps) == (0.02, 0.05, caff.local.steps)
    assert caff.fleet == full.fleet == lora.fleet
    changed = load(table | {"on_infeasible": "ignore"}, tmp_path, "methods.lora.rank=2", "local.lr=0.1")
    (_, caff), _, (_, lora) = changed.experiments
    assert (caff.method.on_infeasible, lora.method.on_infeasible) == ("ignore", "reject")
    assert (vars(lora.method)["rank"], caff.local.lr, lora.local.lr) == (2, 0.1, 0.05)


@pytest.mark.parametrize(
    ("change", "message"),
    {
        "seed": ({"seed": 3}, r"unknown key 'seed'; did you mean 'seeds'\? accepted: "),
        "method": ({"method": {"name": "caff"}}, r"unknown key 'method'; did you mean 'methods'\?"),
        "no seeds": ({"seeds": []}, r"seeds must be a list of integers from 0 on, at least one, got \[\]"),
        "odd seeds": ({"seeds": [1, -1]}, r"seeds must be .*got \[1, -1\]"),
        "one seed": ({"seeds": 3}, r"seeds must be .*got 3"),
        "no methods": ({"methods": []}, r"methods must be written as \[\[methods\]\] tables"),
        "words": ({"methods": ["caff"]}, r"methods must be written as \[\[methods\]\] tables"),
        "twice": (
            {"methods": [{"name": "caff"}, {"name": "caff", "train_head": False}]},
            r"\[\[methods\]\] 2: there is another 'caff'; give one of them a label",
        ),
        "no such": (
            {"methods": [{"name": "caf"}]},
            r"\[\[methods\]\] 1: \[method\]: unknown name 'caf'; did you mean 'caff'",
        ),
        "share": ({"target": 50}, "target must be an accuracy between 0 and 1, such as 0.5, got 50"),
        "unseen": ({"target": 0.5}, "target needs rounds that are evaluated on the way: set eval_every, such as 1"),
        "key": ({"methods": [{"name": "caff", "rnk": 2}]}, r"\[\[methods\]\] 1: caff: unknown key 'rnk'; accepted: "),
        "lable": (
            {"methods": [{"name": "caff", "lable": "mine"}]},
            r"1: caff: unknown key 'lable'; did you mean 'label'\? .*train_embeddings, label, networks, local$",
        ),
        "no name": ({"methods": [{"label": "mine"}]}, r"\[\[methods\]\] 1: name is missing, the method's; accepted: f"),
        "odd name": ({"methods": [{"name": ["caff"]}]}, r"1: \[method\]: unknown name \['caff'\]; "),
        "no label": (
            {"methods": [{"name": "caff", "label": " "}]},
            "1: label must be a text that is not empty, got ' '",
        ),
        "number": ({"methods": [{"name": "caff", "label": 3}]}, "1: label must be a text that is not empty, got 3"),
        "none of them": (
            {"methods": [{"name": "caff", "local": {"lr": []}}]},
            r"1: local\.lr is an empty list; give a value, or a list of those to compare",
        ),
        "local of all": ({"local": 3}, r"\[\[methods\]\] 1: local must be a table, got 3"),
        "local": ({"methods": [{"name": "caff", "local": 3}]}, r"\[\[methods\]\] 1: local must be a table, got 3"),
    }.values(),
)
def test_bad_files_are_refused(change: Table, message: str, table: Table, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        load(table | change, tmp_path)


def test_the_whole_of_it(table: Table, tmp_path: Path, lamina: Call) -> None:
    file, out = written(table, tmp_path), tmp_path / "out"
    code, text, err = lamina("compare", file, "--out", out, "--json")
    said = json.loads(text)
    assert code == 0 and said == json.loads((out / "tiny" / "compare.json").read_text())
    assert err.count("caff, seed") == 2 and err.count("lora, seed 3: does not fit") == 1
    assert (said["schema"], said["name"], said["seeds"]) == ("lamina.compare/1", "tiny", [3, 1])
    caff, full, lora = said["methods"]
    assert (lora["label"], lora["seeds"]) == ("lora", []) and "fits no plan of tiny-3" in lora["misfit"]
    folders = sorted((out / "tiny").glob("caff-*-*/summary.json"), reverse=True)  # by seed as in the file: 3, 1
    results = [json.loads(path.read_text()) for path in folders]
    means = [each["accuracy"]["after"]["mean_over_devices"] for each in results]
    assert caff["accuracy"]["after"]["mean_over_devices"] == {
        **{"mean": pytest.approx(fmean(means)), "std": pytest.approx(stdev(means)), "values": means}
    }
    assert caff["totals"]["up_bytes"] == fmean(each["totals"]["up_bytes"] for each in results)
    assert (caff["took_part"], full["took_part"]) == (1.0, 0.5)
    assert [each["plan"] for each in caff["classes"]] == ["all 3", "last 1 of 3"]
    assert [each["plan"] for each in full["classes"]] == ["all 3", None]
    weak = [each["classes"][1]["accuracy"]["after"]["mean_over_devices"] for each in results]
    assert caff["classes"][1]["accuracy"]["mean"] == pytest.approx(fmean(weak))
    worst = [min(row["accuracy"]["after"]["mean_over_devices"] for row in each["classes"]) for each in results]
    assert caff["worst_class"] == {
        **{"mean": pytest.approx(fmean(worst)), "std": pytest.approx(stdev(worst)), "values": worst}
    }
    assert said["settings"]["local.steps"] and said["settings"]["task.name"] == "shakespeare"
    assert caff["settings"]["method.name"] == "caff" and lora["settings"]["method.rank"] == 64
    assert not set(said["settings"]) & ({"seed", "name", "workers", "track"} | set(caff["settings"]))
    code, text, _ = lamina("compare", file, "--out", out)
    assert code == 0 and text.count("done before") == 4
    assert "caff" in text and "lora does not fit: class 'strong' fits no plan" in text
    assert "is the most accurate within the budgets" in text
    page = (out / "tiny" / "compare.md").read_text()
    assert "| full, drop |  | " not in page and "does not fit" in page and "50%" in page
    assert caff["runs"] == [next((out / "tiny").glob(f"caff-{seed}-*")).name for seed in (3, 1)]
    shown = (out / "tiny" / "report.html").read_text()
    assert 'id="ranking"' in shown and 'id="learning-round"' not in shown  # nothing is evaluated on the way
    assert "lora, seed" not in shown and "Have no plan within the budgets: lora." in shown


def test_a_cell_that_was_stopped_goes_on_as_if_it_was_not(table: Table, tmp_path: Path) -> None:
    comparison, misfits = load(table, tmp_path), dict[str, str]()
    whole = next(cells(comparison, tmp_path / "whole"))
    run_cell(whole, misfits, finish)
    cell = next(cells(comparison, tmp_path / "stopped"))

    def stop(run: Run) -> None:
        def once(row: Any, devices: Any) -> None:
            raise KeyboardInterrupt

        run.play(once)

    with pytest.raises(KeyboardInterrupt):
        run_cell(cell, misfits, stop)
    assert cell.result() is None
    collected = collect(comparison, [cell], misfits)
    assert [row["seeds"] for row in collected["methods"]] == [[], [], []]
    assert "not run" in str(tables.comparison(collected)[0].rows)
    run_cell(cell, misfits, finish)
    assert outcome(cell.folder) == outcome(whole.folder)


def test_a_cell_that_another_process_holds_is_left_alone(table: Table, tmp_path: Path, lamina: Call) -> None:
    """Between the lines of a round and its state, a second process would cut the lines off."""
    out = tmp_path / "out"
    cell = next(cells(load(table, tmp_path), out))

    def crash(run: Run) -> None:
        run.play()
        (cell.folder / "summary.json").unlink()
        with open(cell.folder / "rounds.jsonl", "a", encoding="utf-8") as file:
            file.write("a round under way\n")

    run_cell(cell, {}, crash)
    (cell.folder / ".state.safetensors.abc").touch()
    before = content(out)
    with files.lock(cell.folder):
        code, _, err = lamina("compare", tmp_path / "compare.toml", "--out", out)
    assert (code, err) == (2, f"error: another process is working in {cell.folder}\n")
    assert content(out) == before


def test_a_cell_that_another_process_begins_or_ends_is_not_played_twice(table: Table, tmp_path: Path) -> None:
    cell = next(cells(load(table, tmp_path), tmp_path / "out"))

    def second(run: Run) -> None:
        with pytest.raises(UserError, match="another process is working in"):
            run_cell(cell, {}, lambda run: pytest.fail("played twice"))
        run.play()

    run_cell(cell, {}, second)
    run_cell(cell, {}, lambda run: pytest.fail("played twice"))
    assert list(cell.folder.parent.iterdir()) == [cell.folder]


def test_an_empty_folder_is_that_of_its_cell(table: Table, tmp_path: Path) -> None:
    """As a kill leaves it between the folder and its first file."""
    cell = next(cells(load(table, tmp_path), tmp_path / "out"))
    cell.folder.mkdir(parents=True)
    run_cell(cell, {}, finish)
    assert cell.result() and list(cell.folder.parent.iterdir()) == [cell.folder]


def test_a_method_that_does_not_fit_leaves_no_folder(table: Table, tmp_path: Path) -> None:
    misfits: dict[str, str] = {}
    run_cell(list(cells(load(table, tmp_path), tmp_path / "out"))[2], misfits, finish)
    assert list(misfits) == ["lora"] and not (tmp_path / "out").exists()
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be made: "):
        run_cell(next(cells(load(table, tmp_path), tmp_path / "file")), misfits, finish)


@pytest.mark.parametrize(("name", "damage", "target"), DAMAGES.values(), ids=list(DAMAGES))
def test_a_damaged_cell_is_named_and_nothing_is_written(
    name: str, damage: Callable[[str], str] | None, target: bool, table: Table, tmp_path: Path, lamina: Call
) -> None:
    table |= {"methods": table["methods"][:1], "seeds": [3], "rounds": 2, "eval_every": 1}
    if target:
        table["target"] = 0.5
    file, out = written(table, tmp_path), tmp_path / "out"
    assert lamina("compare", file, "--out", out)[0] == 0
    cell = next(cells(load(table, tmp_path), out))
    path = cell.folder / name
    if damage:
        path.write_text(damage(path.read_text(encoding="utf-8")), encoding="utf-8")
    else:
        path.unlink()
    before = content(out)
    code, text, err = lamina("compare", file, "--out", out)
    assert (code, text, content(out)) == (2, "", before)
    assert err.startswith(f"error: {path} is damaged: ") and err.endswith(f"; delete {cell.folder} to run it again\n")
    assert err.count("\n") == 1


def test_rounds_may_be_gone_where_nothing_needs_them(table: Table, tmp_path: Path, lamina: Call) -> None:
    table |= {"methods": table["methods"][:1], "seeds": [3]}
    file, out = written(table, tmp_path), tmp_path / "out"
    lamina("compare", file, "--out", out)
    (next(cells(load(table, tmp_path), out)).folder / "rounds.jsonl").unlink()
    assert lamina("compare", file, "--out", out)[0] == 0


def test_a_method_that_cannot_do_the_task_is_found_before_any_is_trained(
    table: Table, tmp_path: Path, lamina: Call
) -> None:
    table["methods"] = [{"name": "caff"}, {"name": "fed2", "label": "grouped"}]
    out = tmp_path / "out"
    code, _, err = lamina("compare", written(table, tmp_path), "--out", out)
    said = "error: grouped: method 'fed2' is for classification only; the task is language\n"
    assert (code, err, out.exists()) == (2, said, False)
    table["methods"] = [{"name": "caff"}, {"name": "caff", "label": "other", "networks": ["nowhere"]}]
    code, _, err = lamina("compare", written(table, tmp_path), "--out", out)
    assert code == 2 and err.startswith("error: other: no network 'nowhere'") and not out.exists()


def test_where_no_method_fits_there_is_no_result(table: Table, tmp_path: Path, lamina: Call) -> None:
    table["methods"] = [table["methods"][2], {"name": "fedavg", "on_infeasible": "reject"}]
    out = tmp_path / "out"
    code, _, err = lamina("compare", written(table, tmp_path), "--out", out)
    assert code == 2 and err.startswith("error: no method fits the budgets: lora: ") and "; fedavg: " in err
    assert not out.exists()


def test_cells_are_known_by_their_settings(table: Table, tmp_path: Path) -> None:
    """Another method or seed in the file leaves the others' cells where they are; another setting does not."""
    before = {cell.folder for cell in cells(load(table, tmp_path), tmp_path)}
    assert len(before) == 6
    more = table | {"methods": [*table["methods"], {"name": "caff", "label": "cold", "train_head": False}]}
    assert before < {cell.folder for cell in cells(load(more | {"seeds": [3, 1, 4]}, tmp_path), tmp_path)}
    assert before == {cell.folder for cell in cells(load(table | {"workers": 2}, tmp_path), tmp_path)}
    assert before.isdisjoint(cell.folder for cell in cells(load(table | {"rounds": 5}, tmp_path), tmp_path))
    seeds = [cell.experiment.seed for cell in cells(load(table, tmp_path), tmp_path)]
    assert seeds == [3, 3, 3, 1, 1, 1]


def test_folders_of_long_labels_are_cut_between_letters(table: Table, tmp_path: Path) -> None:
    table["methods"] = [
        {"name": "caff", "label": 80 * "長"},
        {"name": "caff", "label": 300 * "長", "train_head": False},
    ]
    first, second, *_ = (cell.folder for cell in cells(load(table, tmp_path), tmp_path))
    assert first.name[:66] == second.name[:66] == 66 * "長" and first.name[66] == second.name[66] == "-"
    for folder in (first, second):
        folder.mkdir(parents=True)


def test_one_seed_has_no_spread(table: Table, tmp_path: Path) -> None:
    alone = {"seeds": [3], "methods": [{"name": "caff"}], "fleet": table["fleet"][:1]}
    comparison = load(table | alone, tmp_path)
    found = list(cells(comparison, tmp_path))
    run_cell(found[0], {}, finish)
    (row,) = compare.collect(comparison, found, {})["methods"]
    assert row["accuracy"]["after"]["p10"]["std"] is None and row["worst_class"] is None
    assert "±" not in str(tables.comparison({"seeds": [3], "methods": [row]})[0].rows)


def test_what_it_cost_to_reach_a_target(table: Table, tmp_path: Path) -> None:
    """The target lies where one seed of the first method gets in its second round, and no seed of the second ever."""
    table |= {"rounds": 4, "eval_every": 1, "seeds": [3, 1]}
    table["methods"] = [{"name": "caff"}, {"name": "caff", "label": "slow", "local": {"lr": 1e-9}}]
    found = list(cells(load(table, tmp_path), tmp_path))
    for cell in found:
        run_cell(cell, {}, finish)
    lines = {
        seed: [json.loads(line) for line in (cell.folder / "rounds.jsonl").read_text().splitlines()]
        for cell in found
        if cell.label == "caff"
        for seed in [cell.experiment.seed]
    }
    curve = {seed: [row["accuracy"]["mean_over_devices"] for row in rows] for seed, rows in lines.items()}
    assert max(curve[3]) != max(curve[1])
    better = max(curve, key=lambda seed: max(curve[seed]))
    target = max(curve[better])
    comparison = load(table | {"target": target}, tmp_path)
    collected = collect(comparison, found, {})
    first, slow = collected["methods"]
    place = curve[better].index(target) + 1
    assert first["to_target"] == {
        "seeds": [better],
        "round": place,
        "up_bytes": sum(row["up_bytes"] for row in lines[better][:place]),
        "flops": sum(row["flops"] for row in lines[better][:place]),
        "clock_seconds": 0,
    }
    assert slow["to_target"] is None and collected["target"] == target
    race = tables.comparison(collected)[1]
    assert race.rows[0][:3] == ("caff", "1 of 2", f"{place:.1f}") and race.rows[1][:2] == ("slow", "0 of 2")
    assert [row[0] for row in tables.comparison(collected | {"methods": [slow, first]})[1].rows] == ["caff", "slow"]
    seldom, often = (first | {"to_target": first["to_target"] | change} for change in ({"round": 1}, {"seeds": [3, 1]}))
    ordered = tables.comparison(collected | {"methods": [seldom | {"label": "seldom"}, often]})[1]
    assert [row[0] for row in ordered.rows] == ["caff", "seldom"]
    low = min(map(max, curve.values()))
    both = collect(load(table | {"target": low}, tmp_path), found, {})["methods"][0]["to_target"]
    firsts = [next(n for n, each in enumerate(curve[seed], 1) if each >= low) for seed in (3, 1)]
    assert (both["seeds"], both["round"]) == ([3, 1], fmean(firsts))
    compare.save(tmp_path / "tiny", collected)
    assert "The dashed line is the target" in (tmp_path / "tiny" / "report.html").read_text()
    assert collect(load(table, tmp_path), found, {})["methods"][0]["to_target"] is None


def test_files_of_the_other_kind_are_told_apart(table: Table, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"compare\.toml has \[\[methods\]\]: it is for `lamina compare`$"):
        config.load_experiment(written(table, tmp_path))
    del table["methods"]
    with pytest.raises(UserError, match=r"compare\.toml has no \[\[methods\]\], the methods to .* is for `run`$"):
        load(table, tmp_path)


def test_methods_go_by_label_on_the_command_line(table: Table, tmp_path: Path) -> None:
    made = load(table, tmp_path, "methods.full, drop.weighting=uniform")
    assert [each.method.weighting for _, each in made.experiments] == ["examples", "uniform", "examples"]
    with pytest.raises(
        UserError, match=r"methods has no 'cafff'; did you mean 'caff'\? accepted: caff, full, drop, lora"
    ):
        load(table, tmp_path, "methods.cafff.weighting=uniform")


def test_lists_of_local_are_a_grid(table: Table, tmp_path: Path) -> None:
    table["methods"] = [{"name": "caff", "local": {"lr": [0.02, 1], "steps": [1, 2]}}, {"name": "fedavg"}]
    made = load(table, tmp_path)
    assert [label for label, _ in made.experiments] == [
        *("caff, lr 0.02, steps 1", "caff, lr 0.02, steps 2", "caff, lr 1, steps 1", "caff, lr 1, steps 2"),
        "fedavg",
    ]
    assert [(each.local.lr, each.local.steps) for _, each in made.experiments][1:4] == [(0.02, 2), (1, 1), (1, 2)]
    of_all = load(table | {"local": table["local"] | {"lr": [0.1, 0.3]}}, tmp_path)
    assert [label for label, _ in of_all.experiments][4:] == ["fedavg, lr 0.1", "fedavg, lr 0.3"]
    with pytest.raises(UserError, match=r"\[\[methods\]\] 1: \[local\]: lr = 'x' is not accepted"):
        load(table | {"methods": [{"name": "caff", "local": {"lr": [0.1, "x"]}}]}, tmp_path)
    table["methods"] = [{"name": "caff"}, {"name": "caff", "label": "other", "networks": ["novels-6"]}]
    assert [each.networks for _, each in load(table, tmp_path).experiments] == [tuple(table["networks"]), ("novels-6",)]
    with pytest.raises(UserError, match=r"there is another 'fedavg, lr 0.1'"):
        load(table | {"methods": [{"name": "fedavg", "local": {"lr": [0.1, 0.1]}}]}, tmp_path)
