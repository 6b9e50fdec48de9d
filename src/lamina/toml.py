"""TOML files: tables read and changed from the command line, objects built from them, and text made of them."""

from __future__ import annotations

import dataclasses
import difflib
import json
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from lamina.errors import UserError, nearest

T = TypeVar("T")


def read(path: Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The tables of a file, after `key.sub=value` overrides.

    Raises:
        UserError: The file is missing or not TOML, or an override is not accepted.
    """
    if not path.is_file():
        siblings = [each.name for each in path.parent.glob("*.toml")] if path.parent.is_dir() else []
        close = difflib.get_close_matches(path.name, siblings, n=1)
        raise UserError(f"{path} is not a file" + (f"; did you mean {path.with_name(close[0])}?" if close else ""))
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid TOML: {error}") from error
    for override in overrides:
        _override(table, override)
    return table


def _override(table: dict[str, Any], text: str) -> None:
    """Set `a.b=value`: TOML, or else a plain string; nothing after the sign unsets the key.

    Classes of the fleet go by name: fleet.weak.memory.
    """
    key, separator, value = text.partition("=")
    *path, last = key.strip().split(".")
    if not separator or not last:
        raise UserError(f"--set takes key=value, such as local.lr=0.001; got {text!r}")
    try:
        parsed = tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        parsed = value.strip()
    target: Any = table
    for step in path:
        if isinstance(target, list):
            named = {str(each.get("label", each.get("name"))): each for each in target if isinstance(each, dict)}
            if step not in named:
                raise UserError(f"--set {text}: {path[0]} has no {step!r}; {nearest(step, named)}")
            target = named[step]
        elif isinstance(target, dict):
            target = target.setdefault(step, {})
    if not isinstance(target, dict):
        raise UserError(f"--set {text}: {'.'.join(path)} is not a table")
    if value.strip():
        target[last] = parsed
    else:
        target.pop(last, None)


def build_named(table: Mapping[str, type[T]], default: Mapping[str, Any], given: Any, where: str) -> T:
    """An object of the class that `name` picks from a table of classes.

    Raises:
        UserError: As `build`, or there is no such name.
    """
    if not isinstance(given, Mapping):
        raise UserError(f"{where} must be a table, got {given!r}")
    values = dict(default) | dict(given)
    name = values.pop("name")
    if not isinstance(name, str) or name not in table:
        raise UserError(f"{where}: unknown name {name!r}; {nearest(str(name), table)}")
    return build(table[name], values, f"{where} {name}")


def build(cls: type[T], values: Any, where: str, parts: Mapping[str, Any] | None = None) -> T:
    """An object of a dataclass from plain values, typed strictly; `parts` are fields that are built already.

    Raises:
        UserError: A key or value is not accepted; `where` names its origin.
    """
    from pydantic import TypeAdapter, ValidationError

    if not isinstance(values, Mapping):
        raise UserError(f"{where} must be a table, got {values!r}")
    check_keys(cls, values, where)
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    hints = get_type_hints(cls)
    made = dict(parts or {})
    for key, value in values.items():
        try:
            adapter: TypeAdapter[Any] = TypeAdapter(hints[key], config={"strict": True, "allow_inf_nan": False})
            made[key] = adapter.validate_json(json.dumps(value, default=str))
        except ValidationError as error:
            reason = error.errors()[0]["msg"]
            raise UserError(f"{where}: {key} = {value!r} is not accepted: {reason}") from error
    optional = (dataclasses.MISSING, dataclasses.MISSING)
    missing = [k for k, f in fields.items() if k not in made and (f.default, f.default_factory) == optional]
    if missing:
        raise UserError(f"{where}: {missing[0]} is missing")
    try:
        return cls(**made)
    except ValueError as error:
        raise UserError(f"{where}: {error}") from error


def check_keys(cls: type, values: Mapping[str, Any], where: str, others: Sequence[str] = ()) -> None:
    """Refuse keys that are neither fields nor among the others.

    Raises:
        UserError: Naming the first, and the nearest that is one.
    """
    names = [*(f.name for f in dataclasses.fields(cls)), *others]
    for key in values:
        if key not in names:
            raise UserError(f"{where}: unknown key {key!r}; {nearest(key, names)}")


def flat(table: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    """Keys, those of tables within as `local.lr`, and values."""
    for key, value in table.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{before}{key}.")
        else:
            yield before + key, value


def dump(table: Mapping[str, Any]) -> str:
    """TOML text of tables as `Experiment.to_table` gives them; None is left out."""
    lines, tables = [], []
    for key, value in table.items():
        if isinstance(value, Mapping):
            tables.append((f"[{key}]", value))
        elif isinstance(value, list | tuple) and value and isinstance(value[0], Mapping):
            tables += [(f"[[{key}]]", each) for each in value]
        elif value is not None:
            lines.append(f"{key} = {_toml(value)}")
    for head, content in tables:
        lines += ["", head, *(f"{key} = {_toml(value)}" for key, value in content.items() if value is not None)]
    return "\n".join(lines) + "\n"


def _toml(value: object) -> str:
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_toml, value))}]"
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{key} = {_toml(each)}' for key, each in value.items())}}}"
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
