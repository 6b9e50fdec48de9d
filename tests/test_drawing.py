"""How the spread of the data is told and drawn, at any width: `python -m pytest tests/test_drawing.py`."""

import io
import json
import re
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console

from lamina import drawing, tables
from lamina.cli import main
from lamina.data.task import Pairs, Task
from lamina.drawing import SHADES, drawn, spread
from lamina.table import Table
from lamina.view import View


def make_task(mix: Any, names: tuple[str, ...] = (), kinds: tuple[str, ...] = ()) -> Task:
    """A task of the mix, [devices, kinds], with half as many test examples."""
    counts = np.array(mix, np.int64)
    names = names or tuple(f"device {row}" for row in range(len(counts)))
    kinds = kinds or tuple(f"kind {column}" for column in range(counts.shape[1]))
    empty = np.empty((0, 1), np.int64)
    test = [Pairs(np.zeros((n // 2, 1), np.int64), np.zeros((n // 2, 1), np.int64)) for n in counts.sum(axis=1)]
    return Task([Pairs(empty, empty)] * len(counts), test, names, 1, "", kinds, counts)


def shown(tables: list[Table], width: int) -> list[str]:
    """The lines that a terminal of this width shows."""
    view = View()
    text = io.StringIO()
    view.console = Console(file=text, width=width, highlight=False, color_system=None)
    for table in tables:
        view.table(table)
    return text.getvalue().splitlines()


def maps(lines: list[str]) -> list[str]:
    """What stands between the ends of the rows of the map."""
    return [found[1] for line in lines if (found := re.search("▏([ ░▒▓█]*)▕", line))]


def test_spread_counts_and_compares() -> None:
    found = spread(make_task([[4, 0], [1, 1], [0, 2]]), [0, 1, 1], ["strong", "weak", "none"])
    assert found["kinds"] == ["kind 0", "kind 1"]
    assert (found["examples"], found["test_examples"]) == (8, 4)
    assert found["devices"][1] == {
        **{"name": "device 1", "class": "weak", "examples": 2, "test_examples": 1},
        **{"overlap": 0.875, "mix": {"kind 0": 1, "kind 1": 1}},
    }
    assert found["devices"][0]["mix"] == {"kind 0": 4}
    assert [device["overlap"] for device in found["devices"]] == [0.625, 0.875, 0.375]
    strong, weak, none = found["classes"]
    same = {"overlap": 0.625, "pooled_overlap": 0.625}
    assert strong == {"name": "strong", "devices": 1, "examples": 4, "kinds": 1} | same
    assert weak == {"name": "weak", "devices": 2, "examples": 4, "kinds": 2} | same
    assert none == {"name": "none", "devices": 0, "examples": 0, "kinds": 0} | dict.fromkeys(same)
    assert json.loads(json.dumps(found)) == found


def test_a_drawing_as_it_is() -> None:
    task = make_task([[50, 0], [40, 20], [1, 99]], names=("anna", "ben", "cleo"), kinds=("cat", "dog"))
    lines = shown(drawn(spread(task, [1, 0, 0], ["strong", "weak"]), 80), 80)
    assert (
        [line.rstrip() for line in lines[:-1]]
        == """\
Data: 3 devices, 2 kinds

 examples   all   smallest device   median   largest
 ───────────────────────────────────────────────────
 training   210                50       60       100
 test       105                25       30        50

Devices by number of training examples

  examples   devices
 ──────────────────────────────────────────────────────────────
  50 to 56         1   ████████████████████████████████████████
  57 to 62         1   ████████████████████████████████████████
  63 to 69         0
  70 to 75         0
  76 to 81         0
  82 to 88         0
  89 to 94         0
 95 to 100         1   ████████████████████████████████████████

Classes, and the overlap of their mix of kinds with that of all devices

 class    devices   examples   kinds   each device   together
 ────────────────────────────────────────────────────────────
 strong         2        160       2           67%        82%
 weak           1         50       1           43%        43%

Share of each kind in the examples of a device; kinds from cat to dog

                               ░ ≤25% ▒ ≤63% ▓ ≤79% █ >79%
 device   class    examples    cat         dog
 ─────────────────────────────────────────────────────────
 ben      strong         60   ▏▓▓▓▓▓▓▓▓▓▓▓▓▒▒▒▒▒▒▒▒▒▒▒▒▕
 cleo     strong        100   ▏░░░░░░░░░░░░████████████▕
 anna     weak           50   ▏████████████            ▕
""".splitlines()
    )


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 60), st.integers(1, 150), st.sampled_from([60, 80, 120, 200]), st.integers(0, 2**32))
def test_any_drawing_fits(devices: int, kinds: int, width: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    mix = rng.integers(0, 9, (devices, kinds)) * (rng.random((devices, kinds)) < 0.3)
    mix[:, 0] += 1
    names = tuple("名\n前" * int(n) + str(row) for row, n in enumerate(rng.integers(0, 30, devices)))
    class_of = rng.integers(0, 3, devices).tolist()
    found = spread(make_task(mix, names), class_of, ["strong", "a class with a long name indeed", "weak"])
    lines = shown(drawn(found, width), width)
    assert max(map(cell_len, lines)) <= width
    rows = maps(lines)
    assert len(rows) == min(devices, 20)
    assert len({len(row) for row in rows}) == 1
    text = " ".join(" ".join(lines).split())
    assert ("evenly picked" in text) == (devices > 20)
    assert (" to a column" in text) == (len(rows[0]) < kinds)
    bars = [line.rstrip(" █▏▎▍▌▋▊▉") for line in lines[lines.index("Devices by number of training examples") + 4 :]]
    assert sum(int(line.split()[-1]) for line in bars[: bars.index("")]) == devices


def test_names_do_not_command_the_terminal() -> None:
    lines = shown([Table("a\x1b[31m", ("b\x9b", "[bold]"), [("c\x07\x00", "d")])], 80)
    assert [line.split() for line in (lines[0], lines[2], lines[4])] == [
        *(["a\ufffd[31m"], ["b\ufffd", "[bold]"], ["c\ufffd\ufffd", "d"])
    ]


def test_errors_do_not_command_the_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["lamina", "report", "no\x1b[31m"])
    with pytest.raises(SystemExit):
        main()
    assert capsys.readouterr().err == "error: there is no folder no\ufffd[31m\n"


def test_markdown_shows_names_as_they_are() -> None:
    name = "a|b\nc\\<img src=x>`[x](y)"
    title, _, heading, _, head, _, row = tables.page(name, [Table(name, (name, "n"), [(name, "1")])]).splitlines()
    safe = r"a\|b c\\\<img src=x>\`\[x](y)"
    assert (title, heading) == (f"# {safe}", f"## {safe}")
    assert (head, row) == (f"| {safe} | n |", f"| {safe} | 1 |")


def test_wider_terminals_show_more_kinds() -> None:
    found = spread(make_task(np.ones((4, 90), int)), [0] * 4, ["all"])
    narrow, wide = (maps(shown(drawn(found, width), width)) for width in (80, 140))
    assert narrow == ["▒" * 45] * 4
    assert wide == ["▒" * 90] * 4


def test_shades_go_with_the_share() -> None:
    """A tenth each is even: half of it, and its cube roots, part the shades."""
    shares = [0, 1, 5, 6, 10, 21, 22, 46, 47, 100]
    bounds = drawing._bounds(10)
    assert "".join(SHADES[np.searchsorted(bounds, share / 100)] for share in shares) == " ░░▒▒▒▓▓██"
    mix = [[100 - sum(range(1, 10)), *range(1, 10)], [10] * 10]
    top, even = (row[:: len(row) // 10] for row in maps(shown(drawn(spread(make_task(mix), [0, 0], ["all"]), 80), 80)))
    assert (top, even) == ("█░░░░░▒▒▒▒", "▒▒▒▒▒▒▒▒▒▒")


@pytest.mark.parametrize(
    ("sizes", "edges"),
    [
        ([7, 7], [7, 8]),
        ([1, 3], [1, 2, 3, 4]),
        ([10, 25], [10, 12, 14, 16, 18, 20, 22, 24, 26]),
        ([1, 255], [1, 2, 4, 8, 16, 32, 64, 128, 256]),
    ],
)
def test_bins(sizes: list[int], edges: list[int]) -> None:
    assert drawing._edges(np.array(sizes)) == edges


@settings(deadline=None)
@given(st.lists(st.integers(1, 5000), min_size=1, max_size=30))
def test_bins_hold_everyone(sizes: list[int]) -> None:
    edges = drawing._edges(np.array(sizes))
    assert edges == sorted(set(edges)) and 2 <= len(edges) <= 9
    assert (edges[0], edges[-1]) == (min(sizes), max(sizes) + 1)


@pytest.mark.parametrize(("length", "bar"), [(0, ""), (0.01, "▏"), (0.5, "▌"), (2, "██"), (2.99, "███"), (1.25, "█▎")])
def test_bars(length: float, bar: str) -> None:
    assert drawing._bar(length) == bar
