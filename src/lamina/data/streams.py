"""Next-token prediction on text of any kind, by the tokenizer of the network."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from lamina import tokens
from lamina.data import rows, split, windows
from lamina.data.dealing import Dealing, demand
from lamina.data.rows import Rows
from lamina.data.task import Task
from lamina.data.windows import Windows
from lamina.errors import UserError
from lamina.files import digest
from lamina.spec import Spec


@dataclass(frozen=True, kw_only=True)
class Text(Dealing):
    """Any text, for causal networks; the fields are the keys of [task].

    The texts of a user are one text. With split "natural" a device is a user, or, where the file does not say whose its
    texts are, a text. The other splits deal windows, with the user or text as the label; of these, neighbours that are
    too short by themselves are joined. Where the tokenizer has a token for the end of a text, every text ends in it.
    The last part of each is for testing, as `lamina.data.windows` says.

    Attributes:
        path: .txt, a folder of .txt, .csv or .tsv with a header, .jsonl, .json, or a folder of the `datasets` library;
            see `lamina.data.rows`. Of several parts, "train" is taken.
        test_path: Texts for testing, of the same kinds; `path` is then all for training. None: the part "test" of
            `path`, or else the last part of each text.
        text: Column of the texts. None: the first with a usual name, such as "text".
        user: Column of the users. None: the first with a usual name, such as "user"; of .txt, the name of the file.
        window: Tokens the network sees.
        stride: Tokens between training windows. None: as many as `window`; every token is a target once per epoch.
        scored: Positions at the end of a test window that count, and the tokens between test windows. With k, every
            token of the test part counts once and is seen with window - k + 1 to window tokens of context; up to k - 1
            at its end do not count.
        train_fraction: Part of a text that is for training.
        test_windows: At most this many test windows per text, evenly spaced. None: all.

    Raises:
        UserError: A field is out of range.
    """

    path: str
    test_path: str | None = None
    text: str | None = None
    user: str | None = None
    window: int = 128
    stride: int | None = None
    scored: int = 32
    train_fraction: float = 0.9
    test_windows: int | None = None

    def __post_init__(self) -> None:
        """Refuse fields that are out of range."""
        super().__post_init__()
        demand("window", self.window, self.window >= 2, "at least 2")
        demand("stride", self.stride, self.stride is None or self.stride >= 1, "at least 1")
        demand("scored", self.scored, 1 <= self.scored <= self.window, f"from 1 to window = {self.window}")
        demand("train_fraction", self.train_fraction, 0 < self.train_fraction < 1, "above 0 and below 1")
        demand("test_windows", self.test_windows, self.test_windows is None or self.test_windows >= 1, "at least 1")

    def device_count(self) -> int:
        """Number of devices `load` gives; reads the texts only where it depends on them.

        Raises:
            UserError: The texts are needed and cannot be used.
        """
        if self.devices is not None or self.split != "natural":
            return self.count_devices()
        return len(self._texts[0])

    def fit(self, spec: Spec, folder: Path) -> Spec:
        """The network with its head over the vocabulary.

        Args:
            spec: Of the network in `folder`.
            folder: Of the network.

        Raises:
            UserError: The network is not causal, or it or its tokenizer cannot be used.
        """
        tokens.choose_tokenizer(spec, folder, self.window)
        if not spec.causal:
            raise UserError(
                f"network {folder.name} sees what comes after a token, so it cannot learn to predict it; name a causal"
                ' network, or take task.name = "text-classification"'
            )
        return replace(spec, labels=0, pool="", pooler="")

    def reads(self, folder: Path) -> str:
        """Digest of what decides how a network's folder turns the texts into inputs.

        Raises:
            UserError: The tokenizer cannot be used.
        """
        return tokens.read_tokenizer(folder).digest

    def load(self, seed: int, groups: Sequence[int] | None, folder: Path) -> Task:
        """The windows of every device.

        Args:
            seed: Decides which users are drawn and who gets what.
            groups: Resource class of every device, [devices], from 0; used by split "resource" alone.
            folder: Of a network, whose tokenizer is used.

        Raises:
            UserError: The texts or the tokenizer cannot be used, or there is too little for the devices.
        """
        pool = self._pool(tokens.read_tokenizer(folder))
        every = list(dict.fromkeys([*pool.names, *pool.test_names]))
        labels, test_labels = _labels(every, pool.names, pool.starts), _labels(every, pool.test_names, pool.test_starts)
        users, test_users = ([every[label] for label in each.tolist()] for each in (labels, test_labels))
        dealt = self.deal(labels, test_labels, seed, groups, users, test_users)
        self._refuse_short(dealt.names)
        mix = split.mixes(labels, dealt.train, len(every))
        used = np.flatnonzero(mix.any(axis=0))
        starts, test_starts = np.concatenate(pool.starts), np.concatenate(pool.test_starts)
        train, test = [starts[part] for part in dealt.train], [test_starts[part] for part in dealt.test]
        return Task(
            train=tuple(Windows(pool.ids, part, self.window) for part in train),
            test=tuple(Windows(pool.ids, part, self.window) for part in test),
            names=dealt.names,
            scored=self.scored,
            digest=digest(b"".join(part.tobytes() for part in (pool.ids, *train, *test))),
            kinds=tuple(every[kind] for kind in used),
            mix=mix[:, used],
        )

    @cached_property
    def _texts(self) -> tuple[dict[str, list[str]], dict[str, list[str]] | None]:
        """The texts by user, or by a name of their own, for training and for testing; None: of the training texts."""
        table, test = rows.read(self.path, "train")
        if self.test_path is not None:
            test = rows.read(self.test_path, "test")[0]
        return self._by_user(table), None if test is None else self._by_user(test)

    def _by_user(self, table: Rows) -> dict[str, list[str]]:
        """The texts of a table by user, or by a name of their own; blank ones are left out."""
        texts = table.texts(table.demand("text", self.text, rows.TEXTS))
        column = table.find("user", self.user, (*rows.USERS, rows.FILE))
        names = table.names(column) if column else [f"text {row}" for row in range(1, len(texts) + 1)]
        found: dict[str, list[str]] = {}
        for name, text in zip(names, texts, strict=True):
            if text.strip():
                found.setdefault(name, []).append(text)
        if not found:
            raise UserError(f"{table.where} holds no text")
        return found

    def _pool(self, tokenizer: tokens.Tokenizer) -> _Pool:
        """All texts in one stream, and the windows of each."""
        texts, test_texts = self._texts
        if test_texts is None:
            fractions = self.train_fraction, self.train_fraction
            train = test = self._stream(tokenizer, texts, windows.least(self.window, self.train_fraction))
            ids = train.ids
        else:
            fractions = 1.0, 0.0
            train = self._stream(tokenizer, texts, self.window + 1)
            test = self._stream(tokenizer, test_texts, self.window + 1, len(train.ids))
            ids = np.concatenate([train.ids, test.ids])
        cut = self.window, self.stride or self.window, fractions[0]
        test_cut = self.window, self.scored, fractions[1], self.test_windows
        return _Pool(
            ids=ids,
            names=train.names,
            starts=[at + windows.training(length, *cut) for at, length in train.spans],
            test_names=test.names,
            test_starts=[at + windows.testing(length, *test_cut) for at, length in test.spans],
        )

    def _stream(self, tokenizer: tokens.Tokenizer, texts: dict[str, list[str]], least: int, at: int = 0) -> _Stream:
        """Texts one after the other from place `at` on; those of at least so many tokens.

        Neighbours that are shorter are joined, but not where each may be a device.
        """
        found = iter(tokenizer.encode([text for each in texts.values() for text in each]))
        end = [] if tokenizer.end is None else [np.array([tokenizer.end])]
        pieces, lengths = [], []
        for each in texts.values():
            mine = [part for _ in each for part in (next(found), *end)]
            pieces += mine
            lengths.append(sum(map(len, mine)))
        names, spans = list(texts), list(zip(np.cumsum([at, *lengths]).tolist(), lengths, strict=False))
        if self.split != "natural":
            names, spans = _neighbours(names, spans, least)
        kept = [row for row, (_, length) in enumerate(spans) if length >= least]
        if not kept:
            where = self.path if at == 0 else f"{self.test_path or self.path} for testing"
            raise UserError(
                f"no text of {where} is long enough: the longest has {max(length for _, length in spans)} tokens,"
                f" {least} are needed (task.window = {self.window}, task.train_fraction = {self.train_fraction})"
            )
        ids = tokens.joined(pieces, tokenizer.vocab)
        return _Stream(ids, [names[row] for row in kept], [spans[row] for row in kept])

    def _refuse_short(self, names: Sequence[str]) -> None:
        """Raise a UserError if all users are to be devices and some are too short to be."""
        every = len(self._texts[0])
        if self.split == "natural" and self.devices is None and len(names) < every:
            raise UserError(
                f"{every - len(names)} of the {every} texts of {self.path} are too short to be a device; set"
                f" task.devices to {len(names)} or less, or lower task.window or task.min_examples"
            )


@dataclass(frozen=True)
class _Stream:
    """Texts one after the other.

    Attributes:
        ids: Their tokens.
        names: Whose each is, or its own.
        spans: First token and number of tokens of each.
    """

    ids: np.ndarray
    names: list[str]
    spans: list[tuple[int, int]]


@dataclass(frozen=True)
class _Pool:
    """All windows: the stream, and for training and for testing the names of texts and the first tokens of theirs."""

    ids: np.ndarray
    names: list[str]
    starts: list[np.ndarray]
    test_names: list[str]
    test_starts: list[np.ndarray]


def _labels(every: Sequence[str], names: Sequence[str], starts: Sequence[np.ndarray]) -> np.ndarray:
    """Place in `every` of the text of each window, int64 [windows]."""
    place = {name: row for row, name in enumerate(every)}
    return np.repeat(np.array([place[name] for name in names], np.int64), list(map(len, starts)))


def _neighbours(
    names: Sequence[str], spans: Sequence[tuple[int, int]], least: int
) -> tuple[list[str], list[tuple[int, int]]]:
    """Neighbouring texts as one until they have enough tokens; what is left at the end goes to the last."""
    found: list[tuple[list[str], int, int]] = []
    for name, (at, length) in zip(names, spans, strict=True):
        if found and found[-1][2] < least:
            before, first, size = found.pop()
            found.append(([*before, name], first, size + length))
        else:
            found.append(([name], at, length))
    if len(found) > 1 and found[-1][2] < least:
        more, _, size = found.pop()
        before, first, length = found.pop()
        found.append(([*before, *more], first, length + size))
    every = [group[0] if len(group) == 1 else f"{group[0]} to {group[-1]}" for group, _, _ in found]
    return every, [(first, length) for _, first, length in found]
