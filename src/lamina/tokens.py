"""Text to token ids and back, as the folder of a network says.

Characters where its config.json has an alphabet; else what tokenizer.json says, read by the `tokenizers` library; else,
for the families of `_BUILT`, the older files of Hugging Face that say the same. Nothing of it is trained here, and
SentencePiece models are not read.
"""

from __future__ import annotations

import json
import re
import string
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from lamina import hf
from lamina.data import text as characters
from lamina.errors import UserError
from lamina.files import digest
from lamina.spec import Spec

if TYPE_CHECKING:
    import tokenizers

TOKENIZER = "tokenizer.json"
_WORDS, _VOCAB, _MERGES = "vocab.txt", "vocab.json", "merges.txt"
_ABOUT = ("special_tokens_map.json", "tokenizer_config.json")  # the second goes before the first
FILES = (TOKENIZER, *_ABOUT, _WORDS, _VOCAB, _MERGES, "chat_template.jinja")
"""What a folder may hold of a tokenizer."""

_PART = 1 << 17  # characters that are encoded at a time, where a text has a blank to cut it at
_CUT = re.compile(r"(?<=\w) (?=\w)")
_CONVERT = "write one with transformers: `AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)` in Python"


class Tokenizer(Protocol):
    """Text to token ids and back."""

    @property
    def vocab(self) -> int:
        """Ids are below it."""

    @property
    def before(self) -> tuple[int, ...]:
        """Ids that the network expects before a text, such as [CLS]."""

    @property
    def after(self) -> tuple[int, ...]:
        """Ids that the network expects after a text, such as [SEP]."""

    @property
    def end(self) -> int | None:
        """Id that parts documents in a stream of text; None: there is none."""

    @property
    def digest(self) -> str:
        """SHA-256 of all that decides about the ids."""

    @property
    def files(self) -> tuple[Path, ...]:
        """Files that a copy of the network needs; () where config.json says it all."""

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of each text, int64 [tokens], without those of `before` and `after`."""

    def decode(self, ids: np.ndarray) -> str:
        """The text of ids, integers [tokens]; special tokens are written out."""


@dataclass(frozen=True)
class Characters:
    """The characters of `lamina.data.text`, on one line as a typist would write it."""

    vocab: int = len(characters.ALPHABET)
    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()
    end: int | None = None
    digest: str = digest(characters.ALPHABET.encode())
    files: tuple[Path, ...] = ()

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of each text, int64 [characters of its normal form]."""
        return [characters.encode(characters.normalise(text)).astype(np.int64) for text in texts]

    def decode(self, ids: np.ndarray) -> str:
        """The text of ids, integers [characters]."""
        return characters.decode(ids)


@dataclass(frozen=True)
class Pieces:
    """A tokenizer of Hugging Face.

    Attributes:
        inner: The tokenizer; it neither cuts nor pads.
        vocab: Ids are below it.
        before: Ids that its post-processor puts before a text.
        after: Ids that its post-processor puts after a text.
        end: Id of the token that ends a document, if it has one.
        digest: SHA-256 of `inner` as it writes itself.
        files: Its files.
    """

    inner: tokenizers.Tokenizer
    vocab: int
    before: tuple[int, ...]
    after: tuple[int, ...]
    end: int | None
    digest: str
    files: tuple[Path, ...]

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of each text, int64 [tokens], without those of `before` and `after`.

        What the library keeps of a token takes a hundred times the space of its id. So no more than about 2^20
        characters are handed over at a time, and a text of more than 2^17 is cut at a blank between two words. It makes
        no difference to those tokenizers that begin a token there, which is to say all but a few of SentencePiece's.
        """
        pieces: list[list[np.ndarray]] = [[] for _ in texts]
        for batch in _batches(texts):
            found = self.inner.encode_batch_fast([part for _, part in batch], add_special_tokens=False)
            for (row, _), each in zip(batch, found, strict=True):
                pieces[row].append(np.array(each.ids, np.int64))
        return [np.concatenate(each) for each in pieces]

    def decode(self, ids: np.ndarray) -> str:
        """The text of ids, integers [tokens]; special tokens are written out."""
        return self.inner.decode(ids.tolist(), skip_special_tokens=False)


def read_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of the network in `folder`.

    Raises:
        UserError: There is none, it is damaged, or of a kind that is not read.
    """
    alphabet = hf.read_alphabet(folder)
    if alphabet is not None:
        if alphabet != characters.ALPHABET:
            raise UserError(f"network {folder.name} was trained on another alphabet than lamina.data.text.ALPHABET")
        return Characters()
    config = read_object(folder / hf.CONFIG)
    about: dict[str, Any] = {}
    for name in _ABOUT:
        found = read_object(folder / name) if (folder / name).is_file() else {}
        about |= {key: value for key, value in found.items() if value is not None}
    try:
        inner = _inner(folder, config, about)
        inner.no_truncation()
        inner.no_padding()
        whole = inner.encode(string.ascii_letters, add_special_tokens=True)
    except UserError:
        raise
    except Exception as error:  # the library raises nothing more precise
        raise UserError(f"the tokenizer in {folder} cannot be used: {error}") from error
    added = np.array(whole.special_tokens_mask, bool)
    if added.all():
        raise UserError(f"the tokenizer in {folder} cannot be used: it makes nothing of {string.ascii_letters!r}")
    return Pieces(
        inner=inner,
        vocab=1 + max(inner.get_vocab(with_added_tokens=True).values()),
        before=tuple(whole.ids[: added.argmin()]),
        after=tuple(whole.ids[len(added) - added[::-1].argmin() :]),
        end=_end(inner, config, about),
        digest=digest(inner.to_str().encode()),
        files=tuple(folder / name for name in FILES if (folder / name).is_file()),
    )


def choose_tokenizer(spec: Spec, folder: Path, window: int) -> Tokenizer:
    """The tokenizer of a network that is to take `window` of its tokens.

    Args:
        spec: Of the network in `folder`.
        folder: Of the network.
        window: Longest sequence, in tokens.

    Raises:
        UserError: The network is not for text, has too few positions or too few rows for the ids of its tokenizer, or
            the tokenizer cannot be used.
    """
    if spec.patch:
        raise UserError(f"network {folder.name} takes images, the task gives text; name a network for text")
    room = spec.positions - spec.first_position
    if not spec.rotary and room < window:
        raise UserError(f"network {folder.name} has {room} positions; task.window must be at most that, got {window}")
    tokenizer = read_tokenizer(folder)
    if tokenizer.vocab > spec.vocab:
        raise UserError(
            f"the tokenizer in {folder} is of another network: its ids are below {tokenizer.vocab}, the network has"
            f" {spec.vocab} tokens"
        )
    return tokenizer


def joined(pieces: Sequence[np.ndarray], vocab: int) -> np.ndarray:
    """Token ids below `vocab` in one array, uint16 if they fit in it or else int32, [tokens]."""
    return np.concatenate(pieces, dtype=np.uint16 if vocab <= 1 << 16 else np.int32, casting="unsafe")


def _end(inner: tokenizers.Tokenizer, config: Mapping[str, Any], about: Mapping[str, Any]) -> int | None:
    """Id of the token that ends a document: by its name, by its id in config.json, or as GPT-2 calls it."""
    named: int | None = inner.token_to_id(_special(about, "eos_token", ""))
    if named is not None:
        return named
    told = config.get("eos_token_id")
    known = isinstance(told, int) and inner.id_to_token(told) is not None
    return told if known else inner.token_to_id("<|endoftext|>")


def _inner(folder: Path, config: Mapping[str, Any], about: Mapping[str, Any]) -> tokenizers.Tokenizer:
    """The library's tokenizer: from tokenizer.json, or built from older files."""
    import tokenizers

    path = folder / TOKENIZER
    if path.is_file():
        return tokenizers.Tokenizer.from_str(characters.decode_utf8(path.read_bytes(), path))
    family = str(config.get("model_type"))
    needed, build = _BUILT.get(family, ((), _word_pieces))
    if needed and all((folder / name).is_file() for name in needed):
        return build(folder, about)
    models = sorted(path.name for path in folder.glob("*.model"))
    if models:
        raise UserError(
            f"{folder} has a tokenizer of SentencePiece alone, {models[0]}; {TOKENIZER} is read: {_CONVERT}"
        )
    older = f" (or {' and '.join(needed)})" if needed else ""
    raise UserError(f"{folder} has no tokenizer: {TOKENIZER}{older} is missing; copy it there, or {_CONVERT}")


def _word_pieces(folder: Path, about: Mapping[str, Any]) -> tokenizers.Tokenizer:
    """BERT's tokenizer (Devlin et al. 2019), from vocab.txt."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    path = folder / _WORDS
    words = characters.decode_utf8(path.read_bytes(), path).splitlines()
    ids = {word: row for row, word in enumerate(words)}
    names = {key: _special(about, f"{key}_token", f"[{key.upper()}]") for key in ("unk", "cls", "sep", "pad", "mask")}
    _demand_tokens(path, ids, [names[key] for key in ("unk", "cls", "sep")])
    inner = Tokenizer(models.WordPiece(ids, unk_token=names["unk"], max_input_chars_per_word=100))
    inner.add_special_tokens([name for name in names.values() if name in ids])
    inner.normalizer = normalizers.BertNormalizer(
        lowercase=bool(about.get("do_lower_case", True)),
        strip_accents=about.get("strip_accents"),
        handle_chinese_chars=bool(about.get("tokenize_chinese_chars", True)),
    )
    inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    inner.post_processor = processors.BertProcessing(
        (names["sep"], ids[names["sep"]]), (names["cls"], ids[names["cls"]])
    )
    inner.decoder = decoders.WordPiece()
    return inner


def _byte_level(folder: Path, about: Mapping[str, Any]) -> tokenizers.Tokenizer:
    """GPT-2's tokenizer (Radford et al. 2019), from vocab.json and merges.txt."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    inner = Tokenizer(models.BPE.from_file(str(folder / _VOCAB), str(folder / _MERGES)))
    prefix = bool(about.get("add_prefix_space", False))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    inner.post_processor = processors.ByteLevel(trim_offsets=False)
    inner.decoder = decoders.ByteLevel()
    special = _special(about, "eos_token", "<|endoftext|>")
    if inner.token_to_id(special) is not None:
        inner.add_special_tokens([special])
    return inner


def _byte_level_between(folder: Path, about: Mapping[str, Any]) -> tokenizers.Tokenizer:
    """RoBERTa's tokenizer (Liu et al. 2019): GPT-2's, with a text between two special tokens."""
    from tokenizers import processors

    inner = _byte_level(folder, about)
    cls, sep = _special(about, "cls_token", "<s>"), _special(about, "sep_token", "</s>")
    ids = inner.get_vocab()
    _demand_tokens(folder / _VOCAB, ids, [cls, sep])
    rest = [_special(about, f"{key}_token", f"<{key}>") for key in ("unk", "pad", "mask")]
    inner.add_special_tokens([name for name in (cls, sep, *rest) if name in ids])
    inner.post_processor = processors.RobertaProcessing(
        (sep, ids[sep]), (cls, ids[cls]), trim_offsets=True, add_prefix_space=bool(about.get("add_prefix_space", False))
    )
    return inner


_BUILT: dict[str, tuple[tuple[str, ...], Callable[[Path, Mapping[str, Any]], tokenizers.Tokenizer]]] = {
    "bert": ((_WORDS,), _word_pieces),
    "distilbert": ((_WORDS,), _word_pieces),
    "gpt2": ((_VOCAB, _MERGES), _byte_level),
    "roberta": ((_VOCAB, _MERGES), _byte_level_between),
}
"""Families whose older files are enough: the files, and what builds a tokenizer of them."""


def _batches(texts: Sequence[str]) -> Iterator[list[tuple[int, str]]]:
    """All texts in parts, with the row of the text, a handful of parts at a time."""
    batch: list[tuple[int, str]] = []
    size = 0
    for row, text in enumerate(texts):
        for part in _parts(text):
            batch.append((row, part))
            size += len(part)
            if size >= 8 * _PART:
                yield batch
                batch, size = [], 0
    if batch:
        yield batch


def _parts(text: str) -> Iterator[str]:
    """A text in parts of about `_PART` characters, cut before blanks between two words."""
    start = 0
    while len(text) - start > _PART and (found := _CUT.search(text, start + _PART)):
        yield text[start : found.start()]
        start = found.start()
    yield text[start:]


def _special(about: Mapping[str, Any], key: str, default: str) -> str:
    """A special token by its role, which tokenizer_config.json writes as text or as an object with `content`."""
    value = about.get(key, default)
    return str(value["content"] if isinstance(value, dict) and "content" in value else value)


def _demand_tokens(path: Path, ids: Mapping[str, int], tokens: Sequence[str]) -> None:
    """Raise a UserError that names a token which the vocabulary lacks."""
    missing = [token for token in tokens if token not in ids]
    if missing:
        raise UserError(f"{path} has no token {missing[0]!r}")


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        UserError: There is none.
    """
    try:
        value = json.loads(characters.decode_utf8(path.read_bytes(), path))
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} does not hold a JSON object")
    return value
