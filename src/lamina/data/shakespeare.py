"""Next-character prediction on the roles of Shakespeare's plays, one device per role or split otherwise.

Source: the Shakespeare task of LEAF (Caldas et al., 2018). A window of LEAF is 80 characters and the one to
predict; here the network predicts at every position of a window, and the last `scored` positions count.
Departs from LEAF in the alphabet (printable ASCII, see `lamina.data.text`) and, by default, in the strides;
`Shakespeare(stride=1, scored=1)` has LEAF's windows.
"""

from __future__ import annotations

import bisect
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib import resources
from math import isfinite
from pathlib import Path
from typing import Literal

import numpy as np

from lamina import tokens
from lamina.data import split, windows
from lamina.data.task import Task
from lamina.data.text import ALPHABET, decode_utf8, demand_characters, encode, normalise, read_bytes
from lamina.data.windows import Windows
from lamina.errors import UserError
from lamina.files import digest
from lamina.hf import read_alphabet
from lamina.spec import Spec
from lamina.turn import generator

POOLED_DEVICES = 100  # devices of a split that pools the roles, as in CoCoFL (Pfeiffer et al., 2023)


@dataclass(frozen=True)
class Shakespeare:
    """The roles of Shakespeare's plays; the fields are the keys of [task].

    A role's text is cut as `lamina.data.windows` says. Roles with fewer than `min_windows` LEAF windows (stride 1), or
    without a training or a test window, are left out.

    Attributes:
        path: A .json or .json.xz file of {"play|ROLE": text}. None: the 100 roles that come with lamina.
        split: Who gets which window. "role": a device is a role. "iid", "dirichlet" and "resource" pool the
            windows of all roles and deal them anew (`lamina.data.split`) with the role as the label;
            "resource" ties roles to the resource class of a device. A device is tested on the mix of roles
            that it trains on.
        devices: With split "role" that many roles are drawn by the seed, None: all; otherwise the number of
            devices, None: 100.
        alpha: Concentration of the "dirichlet" and "resource" splits; small is uneven.
        window: Characters the network sees.
        stride: Characters between training windows. As many as `window`: every character is a target once per
            epoch. 1: LEAF's windows.
        scored: Positions at the end of a test window that count, and the characters between test windows. 1:
            LEAF's. k: every character counts once, as with 1, at 1/k of the cost and with window - k + 1 to
            window characters of context; at the start of the test part k - 1 more characters count, at its
            end up to k - 1 fewer.
        train_fraction: Part of a role's LEAF windows that is for training.
        min_windows: Roles with fewer LEAF windows are left out; 64 as in LEAF's experiments.
        test_windows: At most this many test windows per role, evenly spaced. None: all.

    Raises:
        UserError: A field is out of range.
    """

    path: str | None = None
    split: Literal["role", "iid", "dirichlet", "resource"] = "role"
    devices: int | None = None
    alpha: float = 0.1
    window: int = 80
    stride: int = 80
    scored: int = 20
    train_fraction: float = 0.9
    min_windows: int = 64
    test_windows: int | None = None

    def __post_init__(self) -> None:
        """Refuse fields that are out of range."""
        splits = ("role", "iid", "dirichlet", "resource")
        _demand("split", self.split, self.split in splits, f"one of {', '.join(splits)}")
        _demand("devices", self.devices, self.devices is None or self.devices >= 1, "at least 1")
        _demand("alpha", self.alpha, isfinite(self.alpha) and self.alpha > 0, "finite and above 0")
        _demand("window", self.window, self.window >= 2, "at least 2")
        _demand("stride", self.stride, self.stride >= 1, "at least 1")
        _demand("scored", self.scored, 1 <= self.scored <= self.window, f"from 1 to window = {self.window}")
        _demand("train_fraction", self.train_fraction, 0 < self.train_fraction < 1, "above 0 and below 1")
        _demand("min_windows", self.min_windows, self.min_windows >= 1, "at least 1")
        _demand(
            "test_windows",
            self.test_windows,
            self.test_windows is None or self.test_windows >= 1,
            "at least 1",
        )

    @property
    def vocabulary(self) -> int:
        """Number of input symbols."""
        return len(ALPHABET)

    def device_count(self) -> int:
        """Number of devices `load` gives; reads the texts only where it depends on them.

        Raises:
            UserError: The texts are needed and cannot be used.
        """
        if self.devices is not None:
            return self.devices
        return len(self._roles) if self.split == "role" else POOLED_DEVICES

    def fit(self, spec: Spec, folder: Path) -> Spec:
        """The network as it is, if it can take the characters and the windows.

        Args:
            spec: Of the network in `folder`.
            folder: Of the network.

        Raises:
            UserError: It cannot.
        """
        if spec.patch or not spec.causal or spec.labels:
            raise UserError(f"network {folder.name} does not predict characters; name one that `lamina pretrain` made")
        room = self.window if spec.rotary else spec.positions
        if spec.vocab != self.vocabulary or room < self.window:
            raise UserError(
                f"network {folder.name} has {spec.vocab} symbols and {spec.positions} positions; the task needs "
                f"{self.vocabulary} symbols and at least {self.window} positions"
            )
        if read_alphabet(folder) not in (None, ALPHABET):
            raise UserError(f"network {folder.name} was trained on another alphabet than the task's")
        return spec

    def reads(self, folder: Path) -> str:
        """Digest of what decides how texts become ids: the alphabet, the same for every network that fits."""
        return tokens.Characters().digest

    def load(self, seed: int, groups: Sequence[int] | None = None, folder: Path | None = None) -> Task:
        """The windows of every device.

        Args:
            seed: Decides which roles are drawn and who gets what; the same seed gives the same task.
            groups: Resource class of every device, [devices], from 0; used by split "resource" alone.
            folder: Of a network; all that fit read the same.

        Returns:
            The task. Training and test windows of all devices share one stream of characters.

        Raises:
            UserError: The file cannot be used, has too little text for the devices, or `groups` does not fit.
        """
        roles = self._roles
        if self.split == "role":
            roles = self._drawn(roles, seed)
        lengths = list(map(len, roles.values()))
        train, test = self._starts(lengths)
        names, kinds = list(roles), tuple(roles)
        if self.split != "role":
            train, test = self._dealt(train, test, seed, groups)
            names = [f"device {device}" for device in range(len(train))]
        ids = encode("".join(roles.values()))
        return Task(
            train=tuple(Windows(ids, starts, self.window) for starts in train),
            test=tuple(Windows(ids, starts, self.window) for starts in test),
            names=tuple(names),
            scored=self.scored,
            digest=digest(b"".join(part.tobytes() for part in (ids, *train, *test))),
            kinds=kinds,
            mix=split.mixes(np.repeat(np.arange(len(kinds)), lengths), train, len(kinds)),
        )

    @cached_property
    def _roles(self) -> dict[str, str]:
        """Normalised texts of the roles that are long enough, in the order of their names."""
        if self.path is None:
            with resources.as_file(resources.files("lamina") / "assets" / "shakespeare.json.xz") as asset:
                texts = read_roles(asset)
        else:
            texts = read_roles(self.path)
        texts = {name: normalise(texts[name]) for name in sorted(texts)}
        roles = {name: text for name, text in texts.items() if self._long_enough(len(text))}
        if not roles:
            longest = max(map(len, texts.values()))
            needed = bisect.bisect_left(range(2**62), True, key=self._long_enough)
            raise UserError(
                f"no role of {self.path or 'the embedded plays'} is long enough: the longest has {longest}"
                f" characters, {needed} are needed (task.window = {self.window},"
                f" task.train_fraction = {self.train_fraction}, task.min_windows = {self.min_windows})"
            )
        return roles

    def _drawn(self, roles: dict[str, str], seed: int) -> dict[str, str]:
        """As many roles as `devices` says, drawn by the seed, in the order of their names."""
        if self.devices is None:
            return roles
        if self.devices > len(roles):
            raise UserError(f"task.devices must be at most {len(roles)}, the roles there are; got {self.devices}")
        rows = generator(seed, "task", "roles").choice(len(roles), self.devices, replace=False)
        names = list(roles)
        return {names[row]: roles[names[row]] for row in sorted(rows)}

    def _long_enough(self, characters: int) -> bool:
        """Whether a text has enough windows, one for training and one for testing among them."""
        train, count = windows.ends(characters, self.window, self.train_fraction)
        return count >= self.min_windows and count > train + self.window - 1

    def _starts(self, lengths: Sequence[int]) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """First characters of the training and of the test windows, per role of `lengths` characters."""
        train, test = [], []
        for offset, length in zip(np.cumsum([0, *lengths]), lengths, strict=False):
            train.append(offset + windows.training(length, self.window, self.stride, self.train_fraction))
            cut = (self.window, self.scored, self.train_fraction, self.test_windows)
            test.append(offset + windows.testing(length, *cut))
        return train, test

    def _dealt(
        self, train: list[np.ndarray], test: list[np.ndarray], seed: int, groups: Sequence[int] | None
    ) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """Windows per role, dealt to the devices: their first characters, int64 [windows of the device]."""
        labels = np.repeat(np.arange(len(train)), list(map(len, train)))
        test_labels = np.repeat(np.arange(len(test)), list(map(len, test)))
        parts = self._parts(labels, seed, "train", groups)
        if self.split == "dirichlet":
            mixes = [np.bincount(labels[part], minlength=len(train)) for part in parts]
            test_parts = split.matching(test_labels, np.stack(mixes, axis=1), generator(seed, "task", "test"))
        else:
            test_parts = self._parts(test_labels, seed, "test", groups)
        _refuse_empty("training", parts)
        _refuse_empty("test", test_parts)
        pool, test_pool = np.concatenate(train), np.concatenate(test)
        return [pool[part] for part in parts], [test_pool[part] for part in test_parts]

    def _parts(self, labels: np.ndarray, seed: int, purpose: str, groups: Sequence[int] | None) -> list[np.ndarray]:
        """Rows of each device among the windows of roles `labels`; all purposes use the same shares."""
        devices, rng = self.device_count(), generator(seed, "task", purpose)
        if self.split == "iid":
            return split.iid(len(labels), devices, rng)
        if self.split == "dirichlet":
            return split.dirichlet(labels, self._shares(labels, devices, seed), rng)
        if groups is None or len(groups) != devices or min(groups) < 0:
            got = "none" if groups is None else f"{len(groups)}, the smallest {min(groups, default=None)}"
            raise UserError(
                f'task.split = "resource" needs the resource class, from 0, of each of the {devices} devices; got {got}'
            )
        return split.resource_correlated(labels, groups, self._shares(labels, max(groups) + 1, seed), rng)

    def _shares(self, labels: np.ndarray, columns: int, seed: int) -> np.ndarray:
        """Share of each role per device or resource class, float64 [roles, columns]."""
        return split.proportions(int(labels.max()) + 1, columns, self.alpha, generator(seed, "task", "shares"))


def read_roles(path: str | Path) -> dict[str, str]:
    """The texts of a .json or .json.xz file of {"play|ROLE": text}, as they are.

    Raises:
        UserError: The file is missing, of another kind, damaged, not JSON, or of another shape.
    """
    content = decode_utf8(read_bytes(path, (".json", ".json.xz")), path)
    demand_characters(content, path)
    try:
        roles = json.loads(content)
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not JSON: {error}") from error
    if not isinstance(roles, dict) or not roles or not all(isinstance(text, str) for text in roles.values()):
        raise UserError(f'{path} must hold one JSON object of texts by role, {{"play|ROLE": "text"}}')
    return roles


def _refuse_empty(kind: str, parts: Sequence[np.ndarray]) -> None:
    """Raise a UserError if a device has no window."""
    empty = sum(len(part) == 0 for part in parts)
    if empty:
        raise UserError(
            f"{empty} of {len(parts)} devices have none of the {sum(map(len, parts))} {kind} windows;"
            " lower task.devices or raise task.alpha"
        )


def _demand(field: str, value: object, holds: bool, rule: str) -> None:
    """Raise a UserError that names the field unless the rule holds."""
    if not holds:
        raise UserError(f"task.{field} must be {rule}, got {value!r}")
