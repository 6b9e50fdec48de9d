"""The pages: the method that the README shows is run as it stands there, and the page of keys is up to date."""

from __future__ import annotations

import json
import re
import runpy
import shlex
import sys
from pathlib import Path
from types import ModuleType

import pytest
from support import begin, moved, write_world

from lamina import config, tables, toml
from lamina.cli import main
from lamina.methods import METHODS
from lamina.view import View

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"


def test_the_page_of_keys_is_that_of_the_code() -> None:
    """`python scripts/make_keys.py docs/keys.md` makes it anew."""
    page = runpy.run_path(str(ROOT / "scripts" / "make_keys.py"))["page"]()
    assert (ROOT / "docs" / "keys.md").read_text(encoding="utf-8") == page


def test_the_page_of_methods_is_that_of_the_code() -> None:
    """`python scripts/make_methods.py docs/methods.md` makes it anew."""
    page = runpy.run_path(str(ROOT / "scripts" / "make_methods.py"))["page"]()
    assert (ROOT / "docs" / "methods.md").read_text(encoding="utf-8") == page


def test_methods_stand_by_group() -> None:
    groups = [cls.group for cls in METHODS.values()]
    assert groups == sorted(groups, key=groups.index)


def shown_plans() -> list[tuple[str, list[str]]]:
    """Each `lamina plan` that the pages show, with the lines that they show of it; "..." leaves some out."""
    found: list[tuple[str, list[str]]] = []
    for page in (README, ROOT / "docs" / "levers.md", ROOT / "docs" / "clock.md"):
        for block in re.findall(r"^```\w*\n(.*?)^```$", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE):
            command = None
            for line in block.splitlines():
                if line.startswith("$ "):
                    command = line.removeprefix("$ lamina ") if line.startswith("$ lamina plan ") else None
                    found += [(command, [])] if command else []
                elif command and line.strip() not in ("", "..."):
                    found[-1][1].append(line.rstrip())
    return found


@pytest.mark.parametrize(("command", "lines"), shown_plans(), ids=[command for command, _ in shown_plans()])
def test_a_plan_that_a_page_shows_is_what_is_printed(
    command: str, lines: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["lamina", *shlex.split(command)])
    with pytest.raises(SystemExit):
        main()
    printed = "".join(capsys.readouterr()).splitlines()
    assert len(shown_plans()) >= 4 and lines
    assert [line for line in lines if line not in map(str.rstrip, printed)] == []


def test_the_method_of_the_readme_works_with_its_row_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (source,) = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    module = ModuleType("readme")
    monkeypatch.setitem(sys.modules, "readme", module)
    monkeypatch.setitem(METHODS, "probe", METHODS["caff"])  # so that the row goes again afterwards
    exec(compile(source, str(README), "exec"), module.__dict__)
    run = begin(write_world(tmp_path) | {"method": {"name": "probe"}}, tmp_path / "runs")
    before = {name: p.clone() for name, p in run.state.params.items()}
    summary = run.play()
    assert moved(before, run.state.params) == {"norm.weight", "norm.bias", "head.weight"}
    assert {each["plan"] for each in summary["classes"]} == {"head only"}


def test_the_comparison_that_the_readme_shows_is_the_recorded_one(capsys: pytest.CaptureFixture[str]) -> None:
    """`lamina compare examples/compare.toml` made the record; its tables are drawn anew here."""
    collected = json.loads((ROOT / "records" / "compare" / "compare.json").read_text(encoding="utf-8"))
    shown = re.findall(r"```\n\$ lamina compare examples/compare\.toml\n(.*?)```", README.read_text("utf-8"), re.DOTALL)
    for table in tables.comparison(collected, wide=False):
        View().table(table)
    printed = capsys.readouterr().out.splitlines()
    (lines,) = ([line.rstrip() for line in block.splitlines() if line.strip() not in ("", "...")] for block in shown)
    assert len(lines) > 20 and [line for line in lines if line not in map(str.rstrip, printed)] == []
    experiments = config.load_comparison(ROOT / "examples" / "compare.toml").experiments
    assert [row["label"] for row in collected["methods"]] == [label for label, _ in experiments]


def test_the_tables_of_the_study_are_of_its_records() -> None:
    """Made by `python studies/table.py docs`, as the picture is; what links to a table finds it."""
    script = runpy.run_path(str(ROOT / "studies" / "table.py"))
    made = script["page"]()
    assert (ROOT / "docs" / "study.svg").read_text(encoding="utf-8") == script["overview"]()
    assert (ROOT / "docs" / "study-tables.md").read_text(encoding="utf-8") == made
    page = (ROOT / "docs" / "study.md").read_text(encoding="utf-8")
    names = set(re.findall(r"study-tables\.md#(\S+?)\)", page))
    assert len(names) >= 5 and names <= set(re.findall(r"^### (\S+)$", made, re.MULTILINE))


@pytest.mark.parametrize("task", ["shakespeare", "cifar10", "cifar100"])
def test_settings_of_the_study_are_files_that_lamina_reads(task: str, tmp_path: Path) -> None:
    """With the learning rates that are recorded, where they are; those of CIFAR-100 are those of CIFAR-10."""
    study = runpy.run_path(str(ROOT / "studies" / "run.py"))
    tuned = ROOT / "records" / "study" / task.replace("100", "10")
    settings = {
        name
        for name, change in study["settings"](task).items()
        if tuned.with_name(f"{tuned.name}-{change.get('rates', 'tuning')}").exists()
    }
    assert {"tuning", "half", "one", "three-classes", "eighths", "exact", "uplink"} < settings
    for setting in settings:
        table = study["comparison"](task, setting, [tuned], "data")
        (tmp_path / "study.toml").write_text(toml.dump(table), encoding="utf-8")
        read = config.load_comparison(tmp_path / "study.toml")
        assert read.name == f"{task}-{setting}" and len(read.experiments) > 1
        rates = {label: experiment.local.lr for label, experiment in read.experiments}
        assert len(set(rates.values())) > 1 or len(rates) == 2, setting
