"""Sets of images on disk: CIFAR's binary files, sheets, and folders of images. `lamina.data.arrow` has one more."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from lamina.data.decoding import ENDINGS, Encoded, common_side, decode, head, read_all, stack
from lamina.data.pictures import Pictures
from lamina.data.text import demand_characters
from lamina.errors import UserError

TESTS = ("test", "val", "validation")
"""Names of a test set; the first that is there is it."""

_CIFAR_SIDE = 32
_SHEET_COLUMNS = 50


class Part(Protocol):
    """A training or a test set on disk."""

    def side(self) -> int:
        """Side of its images in pixels, by the first of them."""

    def read(self, size: int | None) -> Pictures:
        """All of it, resized to `size` if given; the labels may be any integers."""


@dataclass(frozen=True)
class Source:
    """What was found on disk.

    Attributes:
        names: Of the classes.
        train: Training set, or the only set.
        test: Test set, if there is one.
    """

    names: tuple[str, ...]
    train: Part
    test: Part | None


@dataclass(frozen=True)
class Records:
    """Files of records as CIFAR's binary version has them: labels, and 3072 bytes channel by channel (Krizhevsky 2009).

    Attributes:
        paths: Of the files.
        labels: Number of labels of a record, a byte each.
        label: Index of the one that counts.
    """

    paths: tuple[Path, ...]
    labels: int = 1
    label: int = 0

    def side(self) -> int:
        """Side of the images in pixels."""
        return _CIFAR_SIDE

    def read(self, size: int | None) -> Pictures:
        """All records of all files."""
        length = self.labels + 3 * _CIFAR_SIDE**2
        files = []
        for path in self.paths:
            content = np.frombuffer(_bytes(path), np.uint8)
            if len(content) == 0 or len(content) % length:
                raise UserError(
                    f"{path} is truncated, or of another kind: its {len(content)} bytes are no multiple of the"
                    f" {length} of a record"
                )
            files.append(content.reshape(-1, length))
        chunks = (
            each[:, self.labels :].reshape(-1, 3, _CIFAR_SIDE, _CIFAR_SIDE).transpose(0, 2, 3, 1) for each in files
        )
        images = stack(chunks, sum(map(len, files)), size or _CIFAR_SIDE, 3)
        return Pictures(images, np.concatenate([each[:, self.label] for each in files]).astype(np.int64))


@dataclass(frozen=True)
class Sheets:
    """Atlases of square images, 50 in a row, and their labels in the same order.

    Attributes:
        paths: Of the atlases.
        labels: A .npy file of integers.
    """

    paths: tuple[Path, ...]
    labels: Path

    def side(self) -> int:
        """Side of the images in pixels."""
        return head(Encoded(str(self.paths[0]), self.paths[0])).width // _SHEET_COLUMNS

    def read(self, size: int | None) -> Pictures:
        """All images of all sheets."""
        side, labels = self.side(), self._labels()
        sheets = [Encoded(str(path), path) for path in self.paths]
        counts = []
        for sheet in map(head, sheets):
            if side == 0 or sheet.width != side * _SHEET_COLUMNS or sheet.height % side:
                raise UserError(
                    f"{sheet.name} is no sheet of images of {side} x {side}, {_SHEET_COLUMNS} in a row: it has"
                    f" {sheet.width} x {sheet.height} pixels"
                )
            counts.append(sheet.height // side * _SHEET_COLUMNS)
        if sum(counts) != len(labels):
            raise UserError(
                f"{self.labels} has {len(labels)} labels for the {sum(counts)} images of {len(counts)} sheets"
            )
        cut = (decode(sheet, "RGB").reshape(-1, side, _SHEET_COLUMNS, side, 3).swapaxes(1, 2) for sheet in sheets)
        images = stack((each.reshape(-1, side, side, 3) for each in cut), len(labels), size or side, 3)
        return Pictures(images, labels)

    def _labels(self) -> np.ndarray:
        """Of all images, int64 [images]."""
        _demand(self.labels)
        try:
            labels = np.load(self.labels, allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise UserError(f"{self.labels} cannot be read as an array of numbers: {error}") from error
        if not isinstance(labels, np.ndarray) or labels.ndim != 1 or labels.dtype.kind not in "iu":
            raise UserError(f"{self.labels} must hold one integer per image")
        return labels.astype(np.int64)


@dataclass(frozen=True)
class Files:
    """Images of a file each.

    Attributes:
        files: The images, at least one; can be gone through several times.
        labels: Of each, int64 [images].
    """

    files: Iterable[Encoded]
    labels: np.ndarray

    def side(self) -> int:
        """Side of the first image in pixels."""
        return common_side([head(next(iter(self.files)))])

    def read(self, size: int | None) -> Pictures:
        """All images."""
        return Pictures(read_all(self.files, size), self.labels)


def cifar(path: Path, fine: bool) -> Source | None:
    """The binary version of CIFAR-10 or CIFAR-100 in a folder; None where it has neither.

    Args:
        path: The folder.
        fine: Which of the two labels of CIFAR-100 counts.

    Raises:
        UserError: A file is missing, or the folder has the python version.
    """
    if (path / "data_batch_1.bin").is_file():
        batches = tuple(path / f"data_batch_{number}.bin" for number in range(1, 6))
        return Source(_lines(path / "batches.meta.txt"), Records(batches), Records((path / "test_batch.bin",)))
    if (path / "train.bin").is_file():
        names = _lines(path / ("fine_label_names.txt" if fine else "coarse_label_names.txt"))
        train, test = (Records((path / f"{part}.bin",), 2, int(fine)) for part in ("train", "test"))
        return Source(names, train, test)
    if any((path / name).is_file() for name in ("data_batch_1", "train")):
        raise UserError(
            f"{path} has CIFAR's python version, which is pickled: to read it is to run what it says; take the binary"
            " version (cifar-10-binary.tar.gz or cifar-100-binary.tar.gz), unpacked"
        )
    return None


def sheets(path: Path) -> Source | None:
    """The sheets NAME_train_00.jpg and on, NAME_train_labels.npy, the same for the test set, and NAME_classes.json.

    Args:
        path: FOLDER/NAME.

    Returns:
        The set; None where there is no FOLDER/NAME_classes.json.

    Raises:
        UserError: A file is missing or damaged.
    """
    names_path = Path(f"{path}_classes.json")
    if not names_path.is_file():
        return None
    try:
        content = names_path.read_text(encoding="utf-8")
        demand_characters(content, names_path)
        names = json.loads(content)
    except (OSError, ValueError) as error:
        raise UserError(f"{names_path} cannot be read as JSON: {error}") from error
    if isinstance(names, dict):
        names = names.get("names")
    if not isinstance(names, list) or not all(isinstance(each, str) for each in names):
        raise UserError(f'{names_path} must hold a list of the names of the classes, or an object with it as "names"')
    found = {}
    for part in ("train", *TESTS):
        pattern = re.compile(rf"{re.escape(path.name)}_{part}_\d+({'|'.join(map(re.escape, ENDINGS))})")
        paths = sorted(each for each in path.parent.iterdir() if pattern.fullmatch(each.name))
        if paths:
            found[part] = Sheets(tuple(paths), Path(f"{path}_{part}_labels.npy"))
    if "train" not in found:
        raise UserError(f"there is no {path}_train_00.jpg (or {', '.join(ENDINGS)}) beside {names_path.name}")
    return Source(tuple(names), found["train"], next((found[part] for part in TESTS if part in found), None))


def folders(path: Path) -> Source | None:
    """Images in a sub-folder per class, in `path` or in train/ and test/ there.

    Returns:
        The set; None where there are no sub-folders.

    Raises:
        UserError: A class has no images, or a class of the test set is not in the training set.
    """
    parts = _subfolders(path)
    if "train" not in parts:
        return Source(tuple(parts), _files(path, tuple(parts)), None) if parts else None
    names = tuple(_subfolders(parts["train"]))
    test = next((parts[part] for part in TESTS if part in parts), None)
    return Source(names, _files(parts["train"], names), _files(test, names) if test else None)


def _subfolders(path: Path) -> dict[str, Path]:
    """Sub-folders by name, in the order of their names; hidden ones are left alone.

    Raises:
        UserError: A name is not UTF-8.
    """
    found = {each.name: each for each in sorted(path.iterdir()) if each.is_dir() and not each.name.startswith(".")}
    for name in found:
        if any("\ud800" <= letter <= "\udfff" for letter in name):
            raise UserError(f"{path} has a folder {name!r}, whose name is not UTF-8 text; give it another name")
    return found


def _files(path: Path, names: tuple[str, ...]) -> Files:
    """The images in the folders of the classes and below, in the order of their paths; other files are left alone."""
    files: list[Encoded] = []
    labels: list[int] = []
    for name, folder in _subfolders(path).items():
        if name not in names:
            raise UserError(f"{folder} is the folder of a class that has no training images")
        inside = (Path(at) / each for at, _, found in os.walk(folder) for each in found)
        images = sorted(each for each in inside if each.suffix.lower() in ENDINGS and not each.name.startswith("."))
        if not images:
            raise UserError(
                f"class {name!r} is empty: {folder} has no image ({', '.join(ENDINGS)}); remove it or put images there"
            )
        files += [Encoded(str(each), each) for each in images]
        labels += [names.index(name)] * len(images)
    if not files:
        raise UserError(f"{path} has no images: there must be a sub-folder of them per class")
    return Files(files, np.array(labels, np.int64))


def _lines(path: Path) -> tuple[str, ...]:
    """Names of classes, one a line."""
    return tuple(filter(None, map(str.strip, _bytes(path).decode("utf-8", errors="replace").splitlines())))


def _bytes(path: Path) -> bytes:
    _demand(path)
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error


def _demand(path: Path) -> None:
    """Raise a UserError unless there is such a file."""
    if not path.is_file():
        raise UserError(f"{path} is missing: it goes with the other files there")
