"""Text as token ids: `python -m pytest tests/data/test_text.py`."""

import lzma
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lamina.data.text import ALPHABET, UNKNOWN, decode, encode, normalise, read_text
from lamina.errors import UserError


def test_alphabet_is_unknown_and_printable_ascii() -> None:
    assert len(ALPHABET) == len(set(ALPHABET)) == 96
    assert ALPHABET[0] == UNKNOWN
    assert ALPHABET[1:] == bytes(range(32, 127)).decode("ascii")


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("\u2018tis \u201cso\u201d, don\u2019t", "'tis \"so\", don't"),
        ("don\u00b4t \u00abgo\u00bb", 'don\'t "go"'),
        ("one\u2014two\u2013three\u2010four", "one--two-three-four"),
        ("\ufb01ne \ufb02at \u017fo \u00e6on \u0152uvre Stra\u00dfe", "fine flat so aeon OEuvre Strasse"),
        ("caf\u00e9 cafe\u0301 ni\u00f1o \u00c5ngstr\u00f6m", "cafe cafe nino Angstrom"),
        ("\ufeffzero\u200bwidth soft\u00adhyphen", "zerowidth softhyphen"),
        (" a\u00a0b\tc\r\n\n d\x0ce\u2003f ", "a b c d e f"),
        ("wait\u2026 \u00bd", "wait... 1/2"),
        ("\u00a35 \u03b1\u03ac", "\u00a35 \u03b1\u03b1"),  # no ASCII form: left for `encode`
        ("Case STAYS", "Case STAYS"),
        ("", ""),
        (" \n\t", ""),
    ],
)
def test_normalise(text: str, plain: str) -> None:
    assert normalise(text) == plain


@settings(deadline=None)
@given(st.text())
def test_normalise_a_second_time_changes_nothing(text: str) -> None:
    once = normalise(text)
    assert normalise(once) == once
    assert once == " ".join(once.split())


@settings(deadline=None)
@given(st.text(st.sampled_from(ALPHABET + "\n\t\x00\x7f\u20ac\ud800\U0001f600")))
def test_encode_looks_every_character_up(text: str) -> None:
    ids = encode(text)
    assert ids.dtype == np.uint8
    assert ids.tolist() == [max(ALPHABET.find(character), 0) for character in text]
    assert decode(ids) == "".join(c if c in ALPHABET else UNKNOWN for c in text)


def test_ids_can_be_written_to() -> None:
    assert encode("plain").flags.writeable
    assert encode("caf\u00e9").flags.writeable


def test_decode_takes_any_integers_below_96() -> None:
    assert decode(np.array([41, 70, 0, 95], np.int64)) == "He" + UNKNOWN + "~"
    with pytest.raises(IndexError):
        decode(np.array([96]))


def test_read_text(tmp_path: Path) -> None:
    text = "\ufeffOn\u00e9 line\nand  another"
    (tmp_path / "a.txt").write_bytes(text.encode())
    (tmp_path / "a.txt.xz").write_bytes(lzma.compress(text.encode()))
    assert read_text(tmp_path / "a.txt") == text
    assert read_text(str(tmp_path / "a.txt.xz")) == text


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", b"", "{path} holds no text"),
        ("blank.txt", b"\xef\xbb\xbf \n", "{path} holds no text"),
        ("latin.txt", b"caf\xe9 noir", "{path} is not UTF-8 text: byte 3 cannot be decoded"),
        ("book.pdf", b"%PDF", "{path} is of an unknown kind: the name must end in .txt or .txt.xz"),
        (
            "plain.txt.xz",
            b"not packed",
            "{path} is not a whole xz file (Input format not supported by decoder)",
        ),
        (
            "half.txt.xz",
            lzma.compress(b"word " * 1000)[:-20],
            "{path} is not a whole xz file (Compressed data ended before the end-of-stream marker was reached)",
        ),
    ],
)
def test_read_text_says_what_is_wrong(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        read_text(path)
    assert str(caught.value) == message.format(path=path)


def test_read_text_names_the_nearest_file(tmp_path: Path) -> None:
    (tmp_path / "novels98.txt").write_text("text")
    with pytest.raises(UserError) as caught:
        read_text(tmp_path / "novel98.txt")
    hint = f"did you mean {tmp_path / 'novels98.txt'}?"
    assert str(caught.value) == f"{tmp_path / 'novel98.txt'} does not exist; {hint}"
    with pytest.raises(UserError, match=r"nowhere.txt does not exist$"):
        read_text(tmp_path / "no" / "nowhere.txt")
    (tmp_path / "folder.txt").mkdir()
    with pytest.raises(UserError, match=r"folder.txt is not a file"):
        read_text(tmp_path / "folder.txt")
