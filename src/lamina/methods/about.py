"""What people and programs are told about the methods, from their classes alone."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Mapping
from typing import Any, Literal, get_args, get_origin, get_type_hints

from lamina.methods import METHODS
from lamina.methods.base import Method


def describe(name: str) -> dict[str, Any]:
    """A method as plain data: group, summary, source, what it cuts, can and cannot do, and its settings."""
    cls = METHODS[name]
    hints, words = get_type_hints(cls), meanings(cls)
    return {
        "name": name,
        "group": cls.group,
        "summary": (inspect.getdoc(cls) or "").splitlines()[0],
        "source": cls.source,
        "cuts": cls.cuts,
        "note": cls.note,
        "tasks": list(cls.tasks),
        "stateful": cls.stateful,
        "lossy": cls.lossy,
        "fields": {
            field.name: {
                "accepts": readable(hints[field.name]),
                "default": field.default,
                "meaning": words.get(field.name, ""),
            }
            for field in dataclasses.fields(cls)
        },
    }


def own_fields(row: Mapping[str, Any]) -> dict[str, Any]:
    """Those settings of a described method that not every method has with the same default."""
    common = {field.name: field.default for field in dataclasses.fields(Method)}
    return {key: each for key, each in row["fields"].items() if key not in common or each["default"] != common[key]}


def meanings(cls: type) -> dict[str, str]:
    """Field of a dataclass -> what its docstring, or that of the base it comes from, says about it."""
    words: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        part = re.search(r"^Attributes:\n(.*?)(?=^\S|\Z)", inspect.getdoc(base) or "", re.DOTALL | re.MULTILINE)
        if part and dataclasses.is_dataclass(base):
            found = re.findall(r"^    (\w+): (.*?)(?=^    \w+: |\Z)", part[1], re.DOTALL | re.MULTILINE)
            words |= {name: " ".join(text.split()) for name, text in found}
    return words


def readable(hint: Any) -> str:
    """A type as people write it in TOML."""
    if get_origin(hint) is Literal:
        return " | ".join(f'"{value}"' if isinstance(value, str) else str(value) for value in get_args(hint))
    if get_origin(hint) is tuple:
        return f"list of {readable(get_args(hint)[0])}"
    names = {str: "text", int: "integer", float: "number", bool: "true | false"}
    parts = [readable(part) for part in get_args(hint) if part is not type(None)]
    return " | ".join(parts) or names[hint]


def written(value: Any) -> str:
    """A default as it stands in TOML."""
    if isinstance(value, tuple | list):
        return f"[{', '.join(map(written, value))}]"
    return str(value).lower() if isinstance(value, bool) else f'"{value}"' if isinstance(value, str) else str(value)
