"""Tables of text from files: CSV, JSON, JSON lines, plain text, and folders of them or of the `datasets` library."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lamina.data.text import decode_utf8, demand_characters, read_bytes, read_text
from lamina.errors import UserError, nearest

TEXTS = ("text", "sentence", "utterance", "query", "question", "content", "document", "review", "message", "tweet")
LABELS = ("label", "labels", "category", "intent", "class", "target", "sentiment", "topic")
USERS = ("user", "user_id", "client", "client_id", "author", "speaker", "writer", "role")
FILE = "file"
"""Column of the names of plain text files."""

_PLAIN = (".txt", ".txt.xz")
_TABLES = (".csv", ".tsv", ".jsonl", ".json")
_ENDINGS = (*_TABLES, *(f"{ending}.xz" for ending in _TABLES), *_PLAIN)


@dataclass(frozen=True)
class Rows:
    """A table, column by column.

    Attributes:
        where: Its origin, for messages.
        columns: Name -> values, one per row; None where a row has none.
        classes: Column -> the names that its integers stand for, where the file says.
    """

    where: str
    columns: Mapping[str, Sequence[object]]
    classes: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def find(self, key: str, given: str | None, usual: Sequence[str]) -> str | None:
        """The column for a key of [task]: the one given, or the first with a usual name, whatever its case.

        Raises:
            UserError: There is no column of the given name.
        """
        if given is None:
            lower = {name.lower(): name for name in reversed(list(self.columns))}
            return next((lower[name] for name in usual if name in lower), None)
        if given not in self.columns:
            raise UserError(f"task.{key}: {self.where} has no column {given!r}; {nearest(given, self.columns)}")
        return given

    def demand(self, key: str, given: str | None, usual: Sequence[str]) -> str:
        """As `find`, but there must be one.

        Raises:
            UserError: There is none.
        """
        found = self.find(key, given, usual)
        if found is None:
            raise UserError(
                f"task.{key} must name a column of {self.where}: {', '.join(self.columns)}; none has a usual name:"
                f" {', '.join(usual)}"
            )
        return found

    def texts(self, column: str) -> list[str]:
        """The texts of a column.

        Raises:
            UserError: One is missing or not text.
        """
        values = list(self.columns[column])
        for row, value in enumerate(values, 1):
            if not isinstance(value, str):
                raise UserError(f"{self.where}, row {row}: {column!r} must be text, got {_kind(value)}")
        return [str(value) for value in values]

    def names(self, column: str) -> list[str]:
        """The names in a column, such as labels or users; integers are written out, or named by `classes`.

        Raises:
            UserError: One is missing, empty, neither text nor an integer, not one of `classes`, or some are text and
                some are not.
        """
        values, classes = list(self.columns[column]), self.classes.get(column)
        for row, value in enumerate(values, 1):
            where = f"{self.where}, row {row}: {column!r}"
            if value is None or (isinstance(value, str) and not value.strip()):
                raise UserError(f"{where} is empty")
            if isinstance(value, bool) or not isinstance(value, str | int):
                raise UserError(f"{where} must be text or an integer, got {_kind(value)}")
            if type(value) is not type(values[0]):
                raise UserError(
                    f"{where} is {_kind(value)}, in the first row it is {_kind(values[0])}; make them alike"
                )
            if classes is not None and isinstance(value, int) and not 0 <= value < len(classes):
                raise UserError(f"{where} is {value}; the {len(classes)} classes are numbered from 0")
        return [classes[value] if classes and isinstance(value, int) else str(value) for value in values]

    def __len__(self) -> int:
        """Number of rows."""
        return len(next(iter(self.columns.values()), ()))


def read(path: str | Path, part: str) -> tuple[Rows, Rows | None]:
    """The table of a file or folder, or, where it holds several by name, its part and the one named "test".

    .csv and .tsv have a header. .jsonl has an object per line. .json is a list of objects, an object of such lists by
    part, or an object of texts by user; a row may also be a list, [text, label]. .txt is one text, and a folder of them
    a text per file. All may be packed by xz. A folder of the `datasets` library (`save_to_disk`) has a table, or
    tables by part.

    Args:
        path: Of the file or folder.
        part: Wanted where there are several.

    Raises:
        UserError: The file is missing, damaged, empty, of another kind or shape, or has no such part.
    """
    parts = _read(Path(path))
    wanted = parts.get(part, parts.get(""))
    if wanted is None:
        raise UserError(f"{path} has no part {part!r}; {nearest(part, parts)}")
    if not len(wanted):
        raise UserError(f"{wanted.where} has no rows")
    return wanted, parts.get("test") if part != "test" else None


def _read(path: Path) -> dict[str, Rows]:
    """The tables of a file or folder by part; a single one is ""."""
    if path.is_dir():
        return _folder(path)
    if path.name.endswith(_PLAIN):
        return {"": Rows(str(path), {"text": [read_text(path)], FILE: [path.name]})}
    content = decode_utf8(read_bytes(path, _ENDINGS), path).removeprefix("\ufeff")
    kind = path.name.removesuffix(".xz").rpartition(".")[2]
    if kind in ("csv", "tsv"):
        return {"": _csv(content, str(path), "," if kind == "csv" else "\t")}
    demand_characters(content, path)
    if kind == "jsonl":
        lines = [(number, line) for number, line in enumerate(content.split("\n"), 1) if line.strip()]
        return {"": _table((_json(line, f"{path}, line {number}") for number, line in lines), str(path))}
    value = _json(content, str(path))
    if isinstance(value, list):
        return {"": _table(value, str(path))}
    if isinstance(value, dict) and value and all(isinstance(each, str) for each in value.values()):
        return {"": Rows(str(path), {"text": list(value.values()), "user": list(value)})}
    if isinstance(value, dict) and value and all(isinstance(each, list) for each in value.values()):
        return {name: _table(each, f"{path}, part {name!r}") for name, each in value.items()}
    raise UserError(f"{path} must hold a list of rows, an object of such lists by part, or of texts by user")


def _folder(path: Path) -> dict[str, Rows]:
    """The tables of a folder: of the `datasets` library, or of plain text files."""
    if is_saved(path):
        return _datasets(path)
    found = sorted(each for each in path.rglob("*") if each.name.endswith(_PLAIN) and each.is_file())
    if not found:
        raise UserError(f"{path} has no file {' or '.join(_PLAIN)}, and is no folder of the `datasets` library either")
    names = [each.relative_to(path).as_posix() for each in found]
    return {"": Rows(str(path), {"text": [read_text(each) for each in found], FILE: names})}


def is_saved(path: Path) -> bool:
    """Whether `save_to_disk` of the `datasets` library wrote the folder."""
    return (path / "dataset_dict.json").is_file() or (path / "state.json").is_file()


def saved_tables(path: Path) -> dict[str, Any]:
    """Each `datasets.Dataset` in such a folder by part; a single one is "".

    Raises:
        UserError: The library is missing, or cannot read the folder.
    """
    try:
        import datasets
    except ImportError as error:
        raise UserError(f"{path} is read with the `datasets` library: pip install 'lamina[datasets]'") from error
    try:
        found = datasets.load_from_disk(str(path))
    except Exception as error:  # the library raises what its own libraries do
        raise UserError(f"{path} cannot be read as a folder of the `datasets` library: {error}") from error
    return dict(found) if isinstance(found, dict) else {"": found}


def _datasets(path: Path) -> dict[str, Rows]:
    """The tables in a folder that `save_to_disk` of the `datasets` library wrote."""
    made = {}
    for name, table in saved_tables(path).items():
        plain = table.with_format(None)
        classes = {key: tuple(each.names) for key, each in plain.features.items() if hasattr(each, "names")}
        where = f"{path}, part {name!r}" if name else str(path)
        made[str(name)] = Rows(where, {key: plain[key] for key in plain.column_names}, classes)
    return made


def _csv(content: str, where: str, delimiter: str) -> Rows:
    """A table of comma- or tab-separated values with a header."""
    limit = csv.field_size_limit(max(len(content), 1))
    reader = csv.reader(io.StringIO(content, newline=""), delimiter=delimiter, strict=True)
    rows: list[list[str]] = []
    try:
        for row in reader:
            if row and rows and len(row) != len(rows[0]):
                raise UserError(
                    f"{where}, line {reader.line_num}: {len(row)} values, the header has {len(rows[0])}; a value with"
                    f" {delimiter!r} in it must be in quotes"
                )
            rows += [row] if row else []
    except csv.Error as error:
        raise UserError(f"{where}, line {reader.line_num}: {error}") from error
    finally:
        csv.field_size_limit(limit)
    header, *body = rows or [[]]
    if len(set(header)) < len(header):
        raise UserError(f"{where}: two columns have the same name; the header is {', '.join(header)}")
    return Rows(where, {name: [row[place] for row in body] for place, name in enumerate(header)})


def _table(values: Iterable[object], where: str) -> Rows:
    """A table of rows that are objects, or lists [text, label]."""
    rows: list[dict[str, object]] = []
    for number, value in enumerate(values, 1):
        if isinstance(value, list) and len(value) == 2:
            value = dict(zip(("text", "label"), value, strict=True))
        if not isinstance(value, dict):
            raise UserError(f"{where}, row {number} must be an object or [text, label], got {_kind(value)}")
        rows.append(value)
    names = dict.fromkeys(name for row in rows for name in row)
    return Rows(where, {name: [row.get(name) for row in rows] for name in names})


def _json(content: str, where: str) -> Any:
    try:
        return json.loads(content)
    except (json.JSONDecodeError, RecursionError) as error:
        raise UserError(f"{where} is not JSON: {error}") from error


def _kind(value: object) -> str:
    """What a value is, in words."""
    words = {str: "text", int: "an integer", float: "a number", bool: "true or false", type(None): "nothing"}
    return words.get(type(value), "a list" if isinstance(value, list) else "an object")
