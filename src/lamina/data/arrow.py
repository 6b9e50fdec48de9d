"""Folders that `datasets` saved (`save_to_disk`): sets with a column of images and one of class labels."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lamina.data.decoding import Encoded
from lamina.data.formats import TESTS, Files, Source
from lamina.data.rows import is_saved, saved_tables
from lamina.errors import UserError, nearest

_SLICE = 256  # rows read at a time


@dataclass(frozen=True)
class Column:
    """The images of a column, read from disk as they are asked for.

    Attributes:
        table: A `datasets.Dataset` whose images are left encoded.
        column: Name of the column.
        where: The set, in messages.
    """

    table: Any
    column: str
    where: str

    def __iter__(self) -> Iterator[Encoded]:
        """The images in order.

        Raises:
            UserError: A row has none.
        """
        for start in range(0, len(self.table), _SLICE):
            for row, cell in enumerate(self.table[start : start + _SLICE][self.column], start):
                name = f"{self.where}: image {row}"
                if not cell or not cell["bytes"]:
                    raise UserError(f"{name} is missing: the column {self.column!r} must hold the files themselves")
                yield Encoded(name, cell["bytes"])


def saved(path: Path, wanted: str | None) -> Source | None:
    """The set that `datasets` saved in a folder; None where it saved none.

    Args:
        path: The folder, of a Dataset or a DatasetDict.
        wanted: Column of the classes; None: the only one of class labels.

    Raises:
        UserError: `datasets` is not installed or cannot read it, or the columns are not what is needed.
    """
    if not is_saved(path):
        return None
    parts = saved_tables(path)
    import datasets

    if "" in parts:
        parts = {"train": parts[""]}
    if "train" not in parts:
        raise UserError(f"{path} has no part 'train'; {nearest('train', parts)}")
    train = parts["train"].features
    image = _only(train, datasets.Image, path, "images", "keep one")
    cure = "name one with task.label, or make one with `class_encode_column`"
    label = wanted or _only(train, datasets.ClassLabel, path, "class labels", cure)
    if not isinstance(train.get(label), datasets.ClassLabel):
        raise UserError(f"{path}: task.label = {label!r} is no column of class labels; {nearest(label, train)}")
    test = next((part for part in TESTS if part in parts), None)
    for part in ("train", test) if test else ("train",):
        features = parts[part].features
        if image not in features or label not in features or features[label] != train[label]:
            raise UserError(
                f"{path}: the columns {image!r} and {label!r} of part {part!r} differ from those of 'train'"
            )
    files = {
        part: _files(parts[part].cast_column(image, datasets.Image(decode=False)), image, label, f"{path}: {part}")
        for part in ("train", test)
        if part
    }
    return Source(tuple(train[label].names), files["train"], files[test] if test else None)


def _only(features: dict[str, Any], kind: type, path: Path, what: str, cure: str) -> str:
    """The only column of a kind."""
    found = [name for name, each in features.items() if isinstance(each, kind)]
    if len(found) != 1:
        raise UserError(
            f"{path} must have one column of {what}, it has {len(found)} (of its columns {', '.join(features)}); {cure}"
        )
    return found[0]


def _files(table: Any, image: str, label: str, where: str) -> Files:
    """A set whose labels that are missing are -1."""
    if not len(table):
        raise UserError(f"{where}: there is no image")
    labels = [-1 if each is None else each for each in table[label]]
    return Files(Column(table.select_columns(image), image, where), np.array(labels, np.int64))
