"""Text as token ids: one symbol per printable ASCII character, and one for everything else.

Not covered: case (kept as it is) and sub-word pieces.
"""

from __future__ import annotations

import difflib
import lzma
import re
import unicodedata
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from lamina.errors import UserError

UNKNOWN = "\ufffd"
ALPHABET: str = UNKNOWN + "".join(map(chr, range(32, 127)))  # 96 symbols; the token id is the index

_IDS = bytes(code - 31 if 32 <= code < 127 else 0 for code in range(256))  # [ASCII code] -> token id
_CODES = np.array([0, *range(32, 127)], np.uint8)  # [token id] -> ASCII code, 0 for UNKNOWN

_ESCAPE = re.compile(r"\\u[dD][89abAB]..\\u[dD][c-fC-F]..|(\\u[dD][89a-fA-F]..)|\\.")  # of JSON; the group: half a pair
_NOT_ASCII = re.compile(r"[^\x00-\x7f]")
_NOT_ASCII_RUN = re.compile(r"[^\x00-\x7f]+")

# What Unicode's own compatibility forms (NFKD) leave, or turn into something else than a typist's ASCII.
_TYPOGRAPHY = {
    ord(mark): plain
    for marks, plain in (
        ("\u2018\u2019\u201a\u201b\u2032\u2035\u02bc\u00b4\u2039\u203a", "'"),  # single quotes, primes, acute
        ("\u201c\u201d\u201e\u201f\u2033\u2036\u00ab\u00bb", '"'),  # double quotes, guillemets
        ("\u2010\u2011\u2012\u2013\u2212\u2043", "-"),  # hyphens, figure and en dash, minus, hyphen bullet
        ("\u2014\u2015\u2e3a\u2e3b", "--"),  # em dash, bar, two- and three-em dash
        ("\u00ad\u200b\u200c\u200d\u2060\ufeff", ""),  # soft hyphen, zero-width characters, byte order mark
        ("\u2044\u2215", "/"),  # fraction and division slash
        ("\u00c6", "AE"), ("\u00e6", "ae"), ("\u0152", "OE"), ("\u0153", "oe"), ("\u00df", "ss"),
        ("\u00d8", "O"), ("\u00f8", "o"), ("\u0110\u00d0", "D"), ("\u0111\u00f0", "d"), ("\u0141", "L"),
        ("\u0142", "l"), ("\u00de", "Th"), ("\u00fe", "th"), ("\u0131", "i"),
    )
    for mark in marks
}  # fmt: skip


def normalise(text: str) -> str:
    """Write a text the way a typist would, on one line.

    Quotes, dashes, ligatures, accents and invisible characters become plain ASCII: an em dash is "--" (as in
    Project Gutenberg's plain texts), an en dash "-", an accented letter its base letter (NFKD). Every run of
    white space becomes one blank, as in LEAF's Shakespeare (Caldas et al., 2018), and the ends are stripped.
    What has no ASCII form, such as Greek or a pound sign, stays; `encode` gives it the id of UNKNOWN. Case is
    kept. A second pass changes nothing.
    """
    return " ".join(_NOT_ASCII_RUN.sub(_plain, text).split())


def encode(text: str) -> np.ndarray:
    """Token ids of a text: uint8 [characters], values in [0, 96); characters outside ALPHABET get 0."""
    ascii_text = text if text.isascii() else _NOT_ASCII.sub("\0", text)
    return np.frombuffer(bytearray(ascii_text, "ascii").translate(_IDS), np.uint8)


def decode(ids: np.ndarray) -> str:
    """Text of token ids, integers [characters] in [0, 96); the inverse of `encode` on texts over ALPHABET.

    Raises:
        IndexError: An id is 96 or more.
    """
    codes: bytes = _CODES[ids].tobytes()
    return codes.decode("ascii").replace("\0", UNKNOWN)


def read_text(path: str | Path) -> str:
    """The text of a UTF-8 file, as it is (see `normalise`); a name that ends in .txt.xz is unpacked.

    Raises:
        UserError: The file is missing, of another kind, damaged, not UTF-8, or holds nothing but white space.
    """
    text = decode_utf8(read_bytes(path, (".txt", ".txt.xz")), path)
    if not text.lstrip("\ufeff").strip():
        raise UserError(f"{path} holds no text")
    return text


def read_bytes(path: str | Path, endings: Sequence[str]) -> bytes:
    """The content of a file whose name has one of the endings, unpacked where the ending is of xz.

    Raises:
        UserError: The name has another ending, or the file is missing, unreadable or damaged.
    """
    path = Path(path)
    if not path.name.endswith(tuple(endings)):
        raise UserError(f"{path} is of an unknown kind: the name must end in {' or '.join(endings)}")
    if not path.is_file():
        raise UserError(f"{path} {'is not a file' if path.exists() else 'does not exist'}{_nearest(path)}")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    if path.suffix != ".xz":
        return content
    try:
        return lzma.decompress(content)
    except lzma.LZMAError as error:
        raise UserError(f"{path} is not a whole xz file ({error})") from error


def decode_utf8(content: bytes, path: str | Path) -> str:
    """The content of the file `path` as text.

    Raises:
        UserError: The content is not UTF-8; the message says at which byte.
    """
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: byte {error.start} cannot be decoded") from error


def demand_characters(content: str, path: str | Path) -> None:
    """Refuse JSON with an escape that is half a surrogate pair, which is no character and cannot be written as UTF-8.

    Args:
        content: Of the file.
        path: Of the file.

    Raises:
        UserError: There is one; the message says in which line.
    """
    for found in _ESCAPE.finditer(content):
        if found[1]:
            line = content.count("\n", 0, found.start()) + 1
            raise UserError(
                f"{path}, line {line}: {found[1]} is half a character (a surrogate without its other half), which no"
                " text can have; remove it, or write both halves"
            )


def _plain(run: re.Match[str]) -> str:
    """One run of characters outside ASCII, in ASCII as far as possible."""
    pieces = unicodedata.normalize("NFKD", run[0].translate(_TYPOGRAPHY)).translate(_TYPOGRAPHY)
    return "".join(piece for piece in pieces if not unicodedata.combining(piece))


def _nearest(path: Path) -> str:
    """A hint at the file whose name is nearest, or nothing."""
    names = [item.name for item in path.parent.iterdir()] if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, names, n=1)
    return f"; did you mean {path.parent / near[0]}?" if near else ""
