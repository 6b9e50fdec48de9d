"""Classification of images that the user has: CIFAR, folders of images, folders of `datasets`, or sheets."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from lamina.data.arrow import saved
from lamina.data.dealing import demand
from lamina.data.formats import Source, cifar, folders, sheets
from lamina.data.pictures import Album, Pictures, hold_out, listed, unseen
from lamina.errors import UserError

ACCEPTED = (
    "a folder with the binary version of CIFAR-10 or CIFAR-100 (data_batch_1.bin, train.bin)",
    "a folder that `datasets` saved",
    "a folder with a sub-folder of PNG, JPEG or WebP images per class, or with these in train/ and test/",
    "sheets (FOLDER/NAME where there is FOLDER/NAME_classes.json)",
)


@dataclass(frozen=True, kw_only=True)
class Images(Album):
    """Images and their classes; the fields are the keys of [task].

    What is at `path` is told by the files that are there; no pickle is read. All images are held in memory, as bytes.
    Every class must have a training image.

    Attributes:
        path: A folder with the binary version of CIFAR-10 or CIFAR-100 (Krizhevsky 2009); one that `datasets` saved;
            one with a sub-folder of PNG, JPEG or WebP images per class, or with train/ and test/ (or val/) that
            have these; or FOLDER/NAME for sheets: FOLDER/NAME_classes.json, NAME_train_00.jpg (images 50 in a row),
            NAME_train_labels.npy, and the same for test (or val).
        test_path: The test set, where it is elsewhere; in any of these formats.
        test_fraction: Part of each class that is held out, where there is no test set; the same for every seed.
        size: Side that the middle square of every image is resized to, in pixels. None: the images stay as they are,
            and must be squares of one size.
        fine: Which labels of CIFAR-100's binary version count, its 100 classes or its 20 groups of classes.
        label: Column of the classes of a folder that `datasets` saved. None: the only one of class labels.

    Raises:
        UserError: A field is out of range.
    """

    path: str
    test_path: str | None = None
    test_fraction: float = 0.2
    size: int | None = None
    fine: bool = True
    label: str | None = None

    def __post_init__(self) -> None:
        """Refuse fields that are out of range."""
        super().__post_init__()
        demand("test_fraction", self.test_fraction, 0 < self.test_fraction < 1, "above 0 and below 1")
        demand("size", self.size, self.size is None or self.size >= 1, "at least 1")

    def classes(self) -> tuple[str, ...]:
        """Names of the classes, in the order of the labels."""
        names = self._source.names
        if len(names) < 2 or len(set(names)) < len(names):
            raise UserError(f"{self.path} must have at least two classes, each with a name of its own; got {names}")
        return names

    def side(self) -> int:
        """Side of the images in pixels; reads the first of them where `size` does not say."""
        return self.size or self._source.train.side()

    def read(self) -> tuple[Pictures, Pictures]:
        """Training and test set."""
        names, source = self.classes(), self._source
        train = _checked(source.train.read(self.size), names, f"the training set of {self.path}")
        empty = unseen(train, names)
        if empty:
            raise UserError(
                f"{len(empty)} of the {len(names)} classes of {self.path} have no training image: {listed(empty)}"
            )
        if self.test_path is None and source.test is None:
            train, test = hold_out(train, self.test_fraction)
            if not len(test.labels):
                raise UserError(f"task.test_fraction = {self.test_fraction} of {self.path} is no test image; raise it")
            return train, test
        test = self._test(names, source)
        sides = train.images.shape[1], test.images.shape[1]
        if sides[0] != sides[1]:
            raise UserError(
                f"training images of {self.path} have a side of {sides[0]} pixels, test images of {sides[1]};"
                f" task.size = {sides[0]} resizes them"
            )
        return train, test

    def _test(self, names: tuple[str, ...], source: Source) -> Pictures:
        """The test set, with labels in the order of the training set's `names`."""
        if self.test_path is None:
            assert source.test
            return _checked(source.test.read(self.size), names, f"the test set of {self.path}")
        other = self._find(self.test_path)
        strange = [name for name in other.names if name not in names]
        if other.test or strange:
            found = f"classes that {self.path} lacks: {listed(strange)}" if strange else "two sets"
            raise UserError(
                f"task.test_path = {self.test_path!r} must have one set, of the same classes; it has {found}"
            )
        test = _checked(other.train.read(self.size), other.names, self.test_path)
        return Pictures(test.images, np.array([names.index(name) for name in other.names])[test.labels])

    @cached_property
    def _source(self) -> Source:
        """What is at `path`, unread."""
        return self._find(self.path)

    def _find(self, place: str) -> Source:
        """The first format that fits."""
        path = Path(place)
        in_folders: tuple[Callable[[], Source | None], ...] = (
            lambda: saved(path, self.label),
            lambda: cifar(path, self.fine),
            lambda: folders(path),
        )
        found = sheets(path)
        if found is None and path.is_dir():
            found = next(filter(None, (read() for read in in_folders)), None)
        if found is None:
            what = "has none of the formats that can be read" if path.exists() else "does not exist"
            raise UserError(f"{place} {what}: {'; '.join(ACCEPTED)}")
        return found


def _checked(pictures: Pictures, names: tuple[str, ...], where: str) -> Pictures:
    """The same pictures, if every one has a label of one of the classes."""
    wrong = np.flatnonzero((pictures.labels < 0) | (pictures.labels >= len(names)))
    if len(wrong):
        raise UserError(
            f"{len(wrong)} of the {len(pictures.labels)} images of {where} have no label of the {len(names)} classes;"
            f" the first is image {wrong[0]} with label {pictures.labels[wrong[0]]}"
        )
    return pictures
