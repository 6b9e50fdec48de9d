"""What all tasks of images share: pictures in one array, a device's view of them, crops and flips, and the network."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from lamina import pixels
from lamina.data import split
from lamina.data.dealing import Dealing, held_out
from lamina.data.task import Task
from lamina.errors import UserError
from lamina.files import digest
from lamina.turn import generator

if TYPE_CHECKING:
    from lamina.job import Turn
    from lamina.spec import Spec


@dataclass(frozen=True, slots=True)
class Pictures:
    """A training or a test set.

    Attributes:
        images: uint8 [images, side, side, channels], one channel (grey) or three.
        labels: Class of each, int64 [images].
    """

    images: np.ndarray
    labels: np.ndarray


@dataclass(frozen=True, slots=True)
class Photos:
    """The images of one device: a view, the pictures of all devices being in one array.

    Attributes:
        pictures: Of all devices.
        rows: Which of them are the device's, int64 [examples].
        pixels: How the network wants them.
        shift: Most pixels that an image is moved by in each direction; 0: not at all.
        flip: Whether half of the images are mirrored.
        moves: Pixels down, pixels to the right and whether mirrored, int64 [examples, 3]; None before they are drawn.
    """

    pictures: Pictures
    rows: np.ndarray
    pixels: pixels.Pixels
    shift: int = 0
    flip: bool = False
    moves: np.ndarray | None = None

    def __len__(self) -> int:
        """Number of examples."""
        return len(self.rows)

    def at(self, turn: Turn) -> Photos:
        """The examples as they are in that turn: moved and mirrored, each in one way for the whole turn."""
        if not self.shift and not self.flip:
            return self
        rng, count = turn.rng("augment"), len(self)
        moves = rng.integers(-self.shift, self.shift, (count, 2), endpoint=True)
        mirrored = rng.integers(0, 2, (count, 1)) * self.flip
        return replace(self, moves=np.concatenate([moves, mirrored], axis=1))

    def batch(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Images, float32 BCHW and normalised, and their classes, int64 [rows, 1], of the examples `rows`."""
        chosen, moves = self.rows[rows], None if self.moves is None else self.moves[rows]
        images = self.pictures.images[chosen] if moves is None else _moved(self.pictures.images, chosen, moves)
        return self.pixels.normalise(images), self.pictures.labels[chosen, None]


@dataclass(frozen=True, kw_only=True)
class Album(Dealing):
    """A task of images; the fields of those it is the base of are keys of [task].

    Attributes:
        augment: Whether training images are moved by up to an eighth of their side (4 of 32 pixels, He et al. 2016,
            section 4.2; the border mirrors what is inside), and, where that keeps the class, mirrored at random:
            anew in every round, the same for all epochs of a round.
    """

    window: ClassVar[int] = 0  # images are no sequences of tokens
    flips: ClassVar[bool] = True

    augment: bool = True

    def classes(self) -> tuple[str, ...]:
        """Names of the classes, in the order of the labels.

        Raises:
            UserError: The data cannot be used.
        """
        raise NotImplementedError

    def side(self) -> int:
        """Side of the images in pixels.

        Raises:
            UserError: It depends on the data, and they cannot be used.
        """
        raise NotImplementedError

    def read(self) -> tuple[Pictures, Pictures]:
        """Training and test set.

        Raises:
            UserError: The data cannot be used.
        """
        raise NotImplementedError

    def device_count(self) -> int:
        """Number of devices `load` gives.

        Raises:
            UserError: The split needs users, whom images do not have.
        """
        return self.count_devices()

    def fit(self, spec: Spec, folder: Path) -> Spec:
        """The network as this task uses it: with a head for its classes.

        It sees what the network's own head sees, or else the class token, or else the mean over the patches.

        Raises:
            UserError: The network does not take images, or others than this task has.
        """
        if not spec.patch:
            raise UserError(
                f"network {folder.name} takes text; a task of images needs a network with patches, such as ViT"
            )
        side, channels = self.side(), len(pixels.read(folder).mean)
        if spec.image != side:
            raise UserError(
                f"network {folder.name} takes images of {spec.image} x {spec.image} pixels, the task's are {side} x"
                f" {side}; task.size = {spec.image} resizes them"
            )
        if spec.channels != channels:
            raise UserError(
                f"network {folder.name} takes {spec.channels} channels; {pixels.FILE} in its folder is for {channels}"
            )
        pool = spec.pool or ("first" if spec.leads else "mean")
        return replace(spec, labels=len(self.classes()), pool=pool, head_bias=True)

    def reads(self, folder: Path) -> str:
        """Digest of what the examples depend on in the folder of a network: means and standard deviations."""
        found = pixels.read(folder)
        return digest(repr((found.mean, found.std)).encode())

    def load(self, seed: int, groups: Sequence[int] | None, folder: Path) -> Task:
        """The images of every device.

        Args:
            seed: Decides who gets what; the same seed gives the same task.
            groups: Resource class of every device, [devices], from 0; used by split "resource" alone.
            folder: Of the network, which says how it wants its pixels.

        Returns:
            The task. All devices share one array per set.

        Raises:
            UserError: The data cannot be used, or are too few for the devices.
        """
        wanted, names = pixels.read(folder), self.classes()
        train, test = self.read()
        channels = train.images.shape[3], test.images.shape[3]
        if max(channels) > len(wanted.mean):
            raise UserError(f"the images have colours, and network {folder.name} takes grey ones (one channel)")
        dealt = self.deal(train.labels, test.labels, seed, groups)
        shift = train.images.shape[1] // 8 if self.augment else 0
        flip = self.augment and self.flips
        untested = unseen(test, names)
        told = f"{len(untested)} of {len(names)} classes have no test image: {listed(untested)}"
        parts = [train.images, train.labels, test.images, test.labels, *dealt.train, *dealt.test]
        return Task(
            train=tuple(Photos(train, rows, wanted, shift, flip) for rows in dealt.train),
            test=tuple(Photos(test, rows, wanted) for rows in dealt.test),
            names=dealt.names,
            scored=1,
            digest=digest("".join(digest(part.reshape(-1).data) for part in parts).encode()),
            kinds=names,
            mix=split.mixes(train.labels, dealt.train, len(names)),
            labels=names,
            notes=(told,) if untested else (),
        )


def unseen(pictures: Pictures, names: Sequence[str]) -> list[str]:
    """The classes of which there is no image."""
    counts = np.bincount(pictures.labels, minlength=len(names))
    return [name for name, count in zip(names, counts, strict=True) if not count]


def listed(names: Sequence[str]) -> str:
    """The first names of many."""
    return ", ".join([*names[:5], *["..."] * (len(names) > 5)])


def hold_out(pictures: Pictures, fraction: float) -> tuple[Pictures, Pictures]:
    """The rest and the held-out part: the given share of each class, the same for every seed."""
    held = held_out(pictures.labels, fraction, generator("task", "held out"))
    rest = np.setdiff1d(np.arange(len(pictures.labels)), held)
    first, second = (Pictures(pictures.images[part], pictures.labels[part]) for part in (rest, held))
    return first, second


def _moved(images: np.ndarray, rows: np.ndarray, moves: np.ndarray) -> np.ndarray:
    """Images, moved and mirrored.

    Args:
        images: uint8 [images, side, side, channels].
        rows: Which of them, integers [rows].
        moves: As in `Photos`, [rows, 3].

    Returns:
        uint8 [rows, side, side, channels].
    """
    side, channels = images.shape[1], images.shape[3]
    places = np.arange(side) - moves[:, :2, None]  # where each line and each column comes from, before the border
    places = (side - 1) - np.abs((side - 1) - np.abs(places))
    down, across = places[:, 0], np.where(moves[:, 2:], places[:, 1, ::-1], places[:, 1])
    at = (rows[:, None, None] * side + down[:, :, None]) * side + across[:, None, :]
    moved: np.ndarray = images.reshape(-1, channels).take(at, axis=0)
    return moved
