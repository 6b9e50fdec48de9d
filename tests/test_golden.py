"""Every method trains, and as it did: losses over ten rounds of the demo's task against a committed file."""

import json
import runpy
from pathlib import Path
from typing import Any

import pytest

from lamina.methods import METHODS

ROOT = Path(__file__).parents[1]
GOLDEN: dict[str, dict[str, float]] = json.loads((ROOT / "tests" / "golden" / "losses.json").read_text())


WORSE = ("depthfl",)
"""After so few rounds still worse than the pretrained network: exits have a say that it did not learn to read."""


@pytest.fixture(scope="module")
def made() -> dict[str, Any]:
    """The script that writes the file, and the task, read once."""
    script = runpy.run_path(str(ROOT / "scripts" / "make_golden.py"))
    return {"losses": script["losses"], "task": script["experiment"]("fedavg").task}


def test_every_method_has_its_line() -> None:
    assert list(GOLDEN) == list(METHODS)


@pytest.mark.parametrize("name", METHODS)
def test_a_method_trains_as_it_did(name: str, made: dict[str, Any]) -> None:
    """`python scripts/make_golden.py tests/golden/losses.json NAME` makes its line anew."""
    found = made["losses"](name, made["task"])
    after, before = ("last", "first") if name in WORSE else ("held_out_after", "held_out_before")
    assert found[after] < found[before]
    assert found == pytest.approx(GOLDEN[name], rel=2e-3)
