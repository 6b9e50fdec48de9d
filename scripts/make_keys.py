"""Write docs/keys.md, all keys of the TOML files, from the dataclasses that they become.

python scripts/make_keys.py docs/keys.md
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import re
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from lamina.config import Experiment
from lamina.data import TASKS
from lamina.fleet import DeviceClass
from lamina.job import Local
from lamina.methods import METHODS
from lamina.pretrain import Pretrain

INTRO = """# Keys of the TOML files

Made by `python scripts/make_keys.py docs/keys.md` from the docstrings. Every key can also be set on the command line:
`--set local.lr=0.003`, `--set fleet.weak.memory="48 MiB"`; `--set task.devices=` unsets one.
"""


def page() -> str:
    """The whole page."""
    tables = ("task", "method", "local", "fleet")
    parts = [INTRO, section("Top level of an experiment", Experiment, leave_out=tables)]
    parts += [section(f'`[task]` with `name = "{name}"`', cls) for name, cls in TASKS.items()]
    parts += [section(f'`[method]` with `name = "{name}"`', cls) for name, cls in METHODS.items()]
    parts += [section("`[local]`", Local), section("`[[fleet]]`, one per device class", DeviceClass)]
    parts += [section("`lamina pretrain`", Pretrain)]
    return "\n".join(parts)


def section(title: str, cls: type, leave_out: tuple[str, ...] = ()) -> str:
    """One table of keys: what is accepted, the default, and what it is for."""
    hints, words = get_type_hints(cls), {}
    for base in reversed(cls.__mro__):
        words |= attributes(inspect.getdoc(base) or "") if dataclasses.is_dataclass(base) else {}
    lines = [f"## {title}", "", "| key | accepts | default | |", "|---|---|---|---|"]
    for field in dataclasses.fields(cls):
        if field.name not in leave_out:
            accepts = readable(hints[field.name]).replace("|", "\\|")
            text = words.get(field.name, "").replace("|", "\\|")
            lines.append(f"| `{field.name}` | {accepts} | {default(field)} | {text} |")
    return "\n".join([*lines, ""])


def attributes(doc: str) -> dict[str, str]:
    """Name -> text of the Attributes part of a docstring."""
    part = re.search(r"^Attributes:\n(.*?)(?=^\S|\Z)", doc, re.DOTALL | re.MULTILINE)
    found = re.findall(r"^    (\w+): (.*?)(?=^    \w+: |\Z)", part[1] if part else "", re.DOTALL | re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in found}


def readable(hint: Any) -> str:
    """A type as people write it in TOML."""
    if get_origin(hint) is Literal:
        return " | ".join(f'"{value}"' for value in get_args(hint))
    if get_origin(hint) is tuple:
        return f"list of {readable(get_args(hint)[0])}"
    names = {str: "text", int: "integer", float: "number", bool: "true | false"}
    parts = [readable(part) for part in get_args(hint) if part is not type(None)]
    return " | ".join(parts) or names[hint]


def default(field: Any) -> str:
    """A default as it stands in TOML; nothing for a key that must be given or may be absent."""
    if field.default is dataclasses.MISSING:
        return "must be given"
    if field.default is None:
        return ""
    value = list(field.default) if isinstance(field.default, tuple) else field.default
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def main() -> None:
    """Write the page."""
    parser = argparse.ArgumentParser(description="Write docs/keys.md.")
    parser.add_argument("path", type=Path)
    parser.parse_args().path.write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
