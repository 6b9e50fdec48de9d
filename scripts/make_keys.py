"""Write docs/keys.md, all keys of the TOML files, from the dataclasses that they become.

python scripts/make_keys.py docs/keys.md
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any, get_type_hints

from lamina.clock import Clock
from lamina.config import Experiment
from lamina.data import TASKS
from lamina.fleet import DeviceClass
from lamina.job import Local
from lamina.methods import METHODS, Method
from lamina.methods.about import meanings, readable, written
from lamina.pretrain import PretrainImages, PretrainText
from lamina.traces import Traces

INTRO = """# Keys of the TOML files

Made by `python scripts/make_keys.py docs/keys.md` from the docstrings. Every key can also be set on the command line:
`--set local.lr=0.003`, `--set fleet.weak.memory="48 MiB"`; `--set task.devices=` unsets one.
"""

COMPARISON = """## Top level of a comparison

`lamina compare` takes the same file with these keys in the place of `seed` and `[method]`:

| key | accepts | default | |
|---|---|---|---|
| `seeds` | list of integers | `[0]` | Every method runs with each of them. |
| `target` | number | | An accuracy (mean over devices) of which is told what it cost to reach it. |
| `[[methods]]` | tables | must be given | `[method]` tables, which may have the keys below as well. |
| `label` | text | name of the method | Its name in tables and pictures. |
| `local` | table | `[local]` | Keys that go before those of `[local]`. A list is a grid: one entry per value. |
| `networks` | list of text | as above | In the place of those at the top. |
| `on_infeasible` | as in `[method]` | `"drop"` | Of the methods that do not say. |
"""
_AS_ALL = "Only the keys that every method has."


def page() -> str:
    """The whole page."""
    tables = ("task", "method", "local", "fleet", "clock")
    parts = [INTRO, section("Top level of an experiment", Experiment, leave_out=tables)]
    parts += [COMPARISON]
    parts += [section(f'`[task]` with `name = "{name}"`', cls) for name, cls in TASKS.items()]
    parts += [section("`[method]`, whatever its name", Method)]
    parts += [
        section(f'`[method]` with `name = "{name}"`', cls, leave_out=_common(cls), note=_AS_ALL)
        for name, cls in METHODS.items()
    ]
    parts += [section("`[local]`", Local), section("`[[fleet]]`, one per device class", DeviceClass)]
    parts += [section('`[fleet]` with `name = "traces"`', Traces), section("`[clock]`", Clock)]
    parts += [section(f"`lamina pretrain` from {cls.source}", cls) for cls in (PretrainText, PretrainImages)]
    return "\n".join(parts)


def _common(cls: type[Method]) -> tuple[str, ...]:
    """Keys that a method shares with all others, default included."""
    base = {field.name: field.default for field in dataclasses.fields(Method)}
    shared = (field for field in dataclasses.fields(cls) if field.name in base)
    return tuple(field.name for field in shared if field.default == base[field.name])


def section(title: str, cls: type, leave_out: tuple[str, ...] = (), note: str = "") -> str:
    """One table of keys, or the note if there are none: what is accepted, the default, and what it is for."""
    hints, words = get_type_hints(cls), meanings(cls)
    lines = [f"## {title}", "", "| key | accepts | default | |", "|---|---|---|---|"]
    for field in dataclasses.fields(cls):
        if field.name not in leave_out:
            accepts = readable(hints[field.name]).replace("|", "\\|")
            text = words.get(field.name, "").replace("|", "\\|")
            lines.append(f"| `{field.name}` | {accepts} | {default(field)} | {text} |")
    return "\n".join([*(lines if len(lines) > 4 else [lines[0], "", note]), ""])


def default(field: Any) -> str:
    """A default; nothing for a key that may be absent."""
    if field.default is dataclasses.MISSING:
        return "must be given"
    return "" if field.default is None else f"`{written(field.default)}`"


def main() -> None:
    """Write the page."""
    parser = argparse.ArgumentParser(description="Write docs/keys.md.")
    parser.add_argument("path", type=Path)
    parser.parse_args().path.write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
