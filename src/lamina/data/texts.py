"""Texts and their classes: one label per text, from a table with a column of each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from lamina import tokens
from lamina.data import rows, split
from lamina.data.dealing import Dealing, demand, held_out
from lamina.data.rows import Rows
from lamina.data.task import Task
from lamina.errors import UserError
from lamina.files import digest
from lamina.spec import Pool, Spec
from lamina.turn import generator

if TYPE_CHECKING:
    from lamina.job import Turn

_POOLING = "1_Pooling/config.json"  # of sentence-transformers (Reimers and Gurevych, 2019)
_POOLS: dict[str, Pool] = {"pooling_mode_cls_token": "first", "pooling_mode_mean_tokens": "mean"}


@dataclass(frozen=True, slots=True)
class Texts:
    """The texts of one device, a view into all texts.

    Attributes:
        ids: The ids of all texts one after the other, uint16 or int32 [tokens]; the same array for every device.
        ends: Where each text ends in `ids`, after a 0, int64 [texts + 1]; the same array for every device.
        targets: Class of each text, int64 [texts]; the same array for every device.
        rows: Those of the device, int64 [examples].
    """

    ids: np.ndarray
    ends: np.ndarray
    targets: np.ndarray
    rows: np.ndarray

    def __len__(self) -> int:
        """Number of examples."""
        return len(self.rows)

    def batch(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Inputs and targets of the examples `rows`.

        Args:
            rows: Indices of examples of the device, integers [rows].

        Returns:
            Token ids, int64 [rows, tokens of the longest of them], -1 after the end of a text; and classes, int64
            [rows, 1].

        Raises:
            IndexError: There is no such example.
        """
        chosen = self.rows[rows]
        lengths = self.ends[chosen + 1] - self.ends[chosen]
        places = np.arange(lengths.max(initial=0))
        inside = places < lengths[:, None]
        inputs = np.full(inside.shape, -1, np.int64)
        inputs[inside] = self.ids[(self.ends[chosen][:, None] + places)[inside]]
        return inputs, self.targets[chosen][:, None]

    def at(self, turn: Turn) -> Texts:
        """The same in every turn."""
        return self


@dataclass(frozen=True, kw_only=True)
class TextClassification(Dealing):
    """Texts with a class each; the fields are the keys of [task].

    The classes are in the order of the file, where it is a `datasets` folder that says, or else of their names, which
    are compared as numbers if all are numbers. A text is cut after as many tokens as leave room for those that
    the network expects before and after it, such as [CLS] and [SEP].

    Attributes:
        path: .csv or .tsv with a header, .jsonl, .json, or a folder of the `datasets` library; see `lamina.data.rows`.
            Of several parts, "train" is taken.
        test_path: The test examples, in a file of the same kinds. None: the part "test" of `path`, or else a share of
            its examples.
        test_fraction: That share. It is taken from every class, or with split "natural" from every user, rounded to the
            nearest number, but never all.
        text: Column of the texts. None: the first with a usual name, such as "text".
        label: Column of the classes. None: the first with a usual name, such as "label".
        user: Column of the users, for split "natural". None: the first with a usual name, such as "user".
        window: Longest text in tokens; longer ones are cut.
        pool: What the classification head sees: the "first" token, the "mean", or the "last". "auto": the last of a
            causal network; else what the network was made for, if its folder says so as that of a sentence
            transformer; else the first.

    Raises:
        UserError: A field is out of range.
    """

    path: str
    test_path: str | None = None
    test_fraction: float = 0.2
    text: str | None = None
    label: str | None = None
    user: str | None = None
    window: int = 64
    pool: Literal["auto", "first", "mean", "last"] = "auto"

    def __post_init__(self) -> None:
        """Refuse fields that are out of range."""
        super().__post_init__()
        demand("test_fraction", self.test_fraction, 0 < self.test_fraction < 1, "above 0 and below 1")
        demand("window", self.window, self.window >= 1, "at least 1")
        demand("pool", self.pool, self.pool in ("auto", "first", "mean", "last"), "one of auto, first, mean, last")

    def device_count(self) -> int:
        """Number of devices `load` gives; reads the texts only where it depends on them.

        Raises:
            UserError: The texts are needed and cannot be used.
        """
        if self.devices is not None or self.split != "natural":
            return self.count_devices()
        return self.count_devices(self._sides(0)[0].users)

    def fit(self, spec: Spec, folder: Path) -> Spec:
        """The network with a head for the classes.

        Args:
            spec: Of the network in `folder`.
            folder: Of the network.

        Raises:
            UserError: The network or the texts cannot be used.
        """
        tokens.choose_tokenizer(spec, folder, self.window)
        pool, pooler = self._pooling(spec, folder)
        return replace(spec, labels=len(self._classes), pool=pool, pooler=pooler, head_bias=not spec.causal)

    def reads(self, folder: Path) -> str:
        """Digest of what decides how a network's folder turns the texts into inputs.

        Raises:
            UserError: The tokenizer cannot be used.
        """
        return tokens.read_tokenizer(folder).digest

    def load(self, seed: int, groups: Sequence[int] | None, folder: Path) -> Task:
        """The examples of every device.

        Args:
            seed: Decides which examples are held out, which users are drawn and who gets what.
            groups: Resource class of every device, [devices], from 0; used by split "resource" alone.
            folder: Of a network, whose tokenizer is used.

        Raises:
            UserError: The texts or the tokenizer cannot be used, or there is too little for the devices.
        """
        train, test = self._sides(seed)
        dealt = self.deal(train.labels, test.labels, seed, groups, train.users, test.users)
        tokenizer = tokens.read_tokenizer(folder)
        ids, ends, cut = _flat(tokenizer, train.texts + test.texts, self.window)
        targets = np.concatenate([train.labels, test.labels])
        parts = [*dealt.train, *(part + len(train.texts) for part in dealt.test)]
        shards = [Texts(ids, ends, targets, part) for part in parts]
        notes = [f"{cut} of {len(targets)} texts are longer than task.window = {self.window} tokens and were cut"]
        return Task(
            train=tuple(shards[: len(dealt.train)]),
            test=tuple(shards[len(dealt.train) :]),
            names=dealt.names,
            scored=1,
            digest=digest(b"".join(part.tobytes() for part in (ids, ends, targets, *parts))),
            kinds=self._classes,
            mix=split.mixes(train.labels, dealt.train, len(self._classes)),
            labels=self._classes,
            notes=tuple(notes if cut else ()),
        )

    @cached_property
    def _tables(self) -> tuple[Rows, Rows | None]:
        """The tables of training and of test examples; None: to be held out."""
        train, test = rows.read(self.path, "train")
        return train, rows.read(self.test_path, "test")[0] if self.test_path else test

    @cached_property
    def _classes(self) -> tuple[str, ...]:
        """Names of the classes, in order."""
        table = self._tables[0]
        column = table.demand("label", self.label, rows.LABELS)
        used = set(table.names(column))
        names = table.classes.get(column) or sorted(used, key=int if all(map(_is_integer, used)) else str)
        for name in names:
            if name not in used:
                raise UserError(f"class {name!r} of {table.where} has no training example")
        if len(names) < 2:
            raise UserError(f"{table.where} has one class, {names[0]!r}; at least two are needed")
        return tuple(names)

    def _sides(self, seed: int) -> tuple[_Examples, _Examples]:
        """Training and test examples."""
        table, test = self._tables
        train = self._examples(table)
        if test is not None:
            return train, self._examples(test)
        strata = train.labels if train.users is None else np.unique(train.users, return_inverse=True)[1]
        held = held_out(strata, self.test_fraction, generator(seed, "task", "held out"))
        kept = np.setdiff1d(np.arange(len(strata)), held)
        missing = np.flatnonzero(np.bincount(train.labels[kept], minlength=len(self._classes)) == 0)
        if len(missing):
            raise UserError(f"class {self._classes[missing[0]]!r} of {self.path} has no training example")
        if not len(held):
            raise UserError(f"task.test_fraction = {self.test_fraction} of {self.path} is no test example; raise it")
        return train.take(kept), train.take(held)

    def _examples(self, table: Rows) -> _Examples:
        """The examples of a table."""
        column = table.demand("text", self.text, rows.TEXTS)
        texts = table.texts(column)
        empty = next((row for row, text in enumerate(texts, 1) if not text.strip()), None)
        if empty is not None:
            raise UserError(f"{table.where}, row {empty}: {column!r} is empty")
        place = {name: index for index, name in enumerate(self._classes)}
        labels = table.names(table.demand("label", self.label, rows.LABELS))
        if strange := [name for name in labels if name not in place]:
            raise UserError(f"{table.where} has class {strange[0]!r}, of which there is no training example")
        users, whose = None, table.demand if table is self._tables[0] else table.find
        if self.split == "natural" and (found := whose("user", self.user, rows.USERS)):
            users = table.names(found)
        return _Examples(texts, np.array([place[name] for name in labels], np.int64), users)

    def _pooling(self, spec: Spec, folder: Path) -> tuple[Pool, Literal["", "tanh", "relu"]]:
        """What the head sees, and the activation of the dense layer before it, "" for none."""
        if spec.causal:
            if self.pool == "first":
                raise UserError(f'task.pool: the first token of network {folder.name} sees no other; take "last"')
            return ("last" if self.pool == "auto" else self.pool), ""
        if self.pool == "last":
            raise UserError(f'task.pool: "last" is for causal networks, {folder.name} is none; take "first" or "mean"')
        if self.pool == "auto" and (told := _sentence_pool(folder)):
            return told, ""
        return ("mean", "") if self.pool == "mean" else ("first", spec.pooler)


@dataclass(frozen=True)
class _Examples:
    """Texts, their classes, int64 [texts], and whose they are, if that matters."""

    texts: list[str]
    labels: np.ndarray
    users: list[str] | None

    def take(self, chosen: np.ndarray) -> _Examples:
        """Some of them."""
        users = None if self.users is None else [self.users[row] for row in chosen]
        return _Examples([self.texts[row] for row in chosen], self.labels[chosen], users)


def _flat(tokenizer: tokens.Tokenizer, texts: Sequence[str], window: int) -> tuple[np.ndarray, np.ndarray, int]:
    """All texts as `Texts` has them, `ids` and `ends`, and how many of them were cut."""
    room = window - len(tokenizer.before) - len(tokenizer.after)
    demand("window", window, room >= 1, f"at least {window - room + 1}, for the tokens round a text and one of it")
    before, after = np.array(tokenizer.before, np.int64), np.array(tokenizer.after, np.int64)
    found = tokenizer.encode(texts)
    pieces = [np.concatenate([before, ids[:room], after]) for ids in found]
    lengths = np.array([len(piece) for piece in pieces], np.int64)
    if not lengths.all():
        raise UserError(f"the network's tokenizer makes no token of the text {texts[int(lengths.argmin())][:40]!r}")
    return tokens.joined(pieces, tokenizer.vocab), np.cumsum([0, *lengths]), sum(len(ids) > room for ids in found)


def _sentence_pool(folder: Path) -> Pool:
    """How the sentence transformer in `folder` pools; "" if there is none."""
    path = folder / _POOLING
    if not path.is_file():
        return ""
    config = tokens.read_object(path)
    modes = [key for key, value in config.items() if key.startswith("pooling_mode") and value is True]
    if len(modes) != 1 or modes[0] not in _POOLS:
        raise UserError(
            f'{path}: pools by {" and ".join(modes) or "nothing known"}; set task.pool to "first" or "mean"'
        )
    return _POOLS[modes[0]]


def _is_integer(name: str) -> bool:
    return name.removeprefix("-").isdecimal()
