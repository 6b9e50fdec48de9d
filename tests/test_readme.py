"""The method that the README shows is one: it is run here as it stands there."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
from support import begin, moved, write_world

from lamina.methods import METHODS

README = Path(__file__).parents[1] / "README.md"


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
