"""Tokenizers against those of `transformers` on the same files: `python -m pytest tests/test_tokens.py`."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from vocabularies import write_bert, write_bytes, write_json, write_llama

from lamina import tokens
from lamina.data.text import ALPHABET, encode, normalise
from lamina.errors import UserError
from lamina.spec import Spec
from lamina.tokens import Characters, choose_tokenizer, joined, read_tokenizer

TEXTS = (
    "Hello, World!",
    "it's the naïve CAFÉ 中文 😀",
    "",
    "  two  spaces\n\nnew line\ttab ",
    "x" * 500,
    "[SEP] <s> </s> <|endoftext|> <mask> fox [MASK] z",
    "a\u0301\u200b\u00a0b\x00c",
)
WRITERS: dict[str, Callable[[Path], Path]] = {
    "bert": write_bert,
    "gpt2": write_bytes,
    "roberta": lambda folder: write_bytes(folder, "roberta"),
    "llama": write_llama,
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: write(tmp_path_factory.mktemp("all") / name) for name, write in WRITERS.items()}


def theirs(folder: Path) -> PreTrainedTokenizerFast:
    if (folder / "tokenizer.json").is_file():
        return PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    return AutoTokenizer.from_pretrained(folder)


def framed(tokenizer: tokens.Tokenizer, text: str) -> list[int]:
    return [*tokenizer.before, *tokenizer.encode([text])[0].tolist(), *tokenizer.after]


@pytest.mark.parametrize("name", WRITERS)
def test_ids_are_those_of_transformers(folders: dict[str, Path], name: str, tmp_path: Path) -> None:
    reference, mine = theirs(folders[name]), read_tokenizer(folders[name])
    for text in TEXTS:
        assert framed(mine, text) == reference(text)["input_ids"], text
        assert mine.encode([text])[0].tolist() == reference(text, add_special_tokens=False)["input_ids"]
        ids = mine.encode([text])[0]
        assert ids.dtype == np.int64
        assert mine.decode(ids) == reference.decode(ids, clean_up_tokenization_spaces=False)
    assert mine.vocab == len(reference)
    reference.save_pretrained(tmp_path)
    shutil.copy(folders[name] / "config.json", tmp_path)
    saved = read_tokenizer(tmp_path)
    assert [framed(saved, text) for text in TEXTS] == [framed(mine, text) for text in TEXTS]


@pytest.fixture(scope="module")
def pairs(folders: dict[str, Path]) -> list[tuple[PreTrainedTokenizerFast, tokens.Tokenizer]]:
    return [(theirs(folders[name]), read_tokenizer(folders[name])) for name in ("bert", "gpt2")]


@settings(max_examples=100)
@given(texts=st.lists(st.text(max_size=60), max_size=4))
def test_any_text_is_as_in_transformers(
    pairs: list[tuple[PreTrainedTokenizerFast, tokens.Tokenizer]], texts: list[str]
) -> None:
    for reference, mine in pairs:
        expected = [reference(text, add_special_tokens=False)["input_ids"] for text in texts]
        assert [ids.tolist() for ids in mine.encode(texts)] == expected


def test_bytes_come_back(folders: dict[str, Path]) -> None:
    tokenizer = read_tokenizer(folders["gpt2"])
    assert [tokenizer.decode(ids) for ids in tokenizer.encode(TEXTS)] == list(TEXTS)


@pytest.mark.parametrize(
    ("name", "before", "after", "end"),
    [("bert", (2,), (3,), None), ("gpt2", (), (), 0), ("roberta", (0,), (2,), None), ("llama", (1,), (), 2)],
)
def test_special_tokens(
    folders: dict[str, Path], name: str, before: tuple[int, ...], after: tuple[int, ...], end: int | None
) -> None:
    tokenizer = read_tokenizer(folders[name])
    assert (tokenizer.before, tokenizer.after, tokenizer.end) == (before, after, end)


def test_the_end_goes_by_its_name_first(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(folders["llama"], tmp_path / "net"))
    write_json(folder / "special_tokens_map.json", {"eos_token": "<unk>"})
    assert read_tokenizer(folder).end == 0
    write_json(folder / "tokenizer_config.json", {"eos_token": {"content": "<s>", "lstrip": False}})
    assert read_tokenizer(folder).end == 1
    write_json(folder / "tokenizer_config.json", {"eos_token": None})
    assert read_tokenizer(folder).end == 0
    (folder / "special_tokens_map.json").unlink()
    write_json(folder / "config.json", {"model_type": "llama", "eos_token_id": 999})
    assert read_tokenizer(folder).end is None


def test_long_texts_are_cut_where_it_makes_no_difference(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "the quick,  brown\n\n fox's 12 34 jumps. " * 40
    for name in WRITERS:
        tokenizer = read_tokenizer(folders[name])
        whole = tokenizer.encode([text, "fox", "", text + "x"])
        with monkeypatch.context() as patch:
            patch.setattr(tokens, "_PART", 50)
            assert len(list(tokens._parts(text))) > 10
            assert "".join(tokens._parts(text)) == text
            parts = tokenizer.encode([text, "fox", "", text + "x"])
        assert [each.tolist() for each in parts] == [each.tolist() for each in whole]


def test_upper_case_is_kept_where_the_folder_says(tmp_path: Path) -> None:
    lower = read_tokenizer(write_bert(tmp_path / "lower"))
    cased = read_tokenizer(write_bert(tmp_path / "cased", {"do_lower_case": False}))
    assert lower.encode(["FOX"])[0].tolist() == lower.encode(["fox"])[0].tolist()
    assert cased.encode(["FOX"])[0].tolist() == [1]  # [UNK]
    assert lower.digest != cased.digest


def test_digests_are_of_the_content(folders: dict[str, Path], tmp_path: Path) -> None:
    digests = {name: read_tokenizer(folder).digest for name, folder in folders.items()}
    assert len(set(digests.values())) == len(digests)
    copy = Path(shutil.copytree(folders["llama"], tmp_path / "copy"))
    (copy / "tokenizer.json").write_text((copy / "tokenizer.json").read_text(encoding="utf-8") + "\n", encoding="utf-8")
    assert read_tokenizer(copy).digest == digests["llama"]


def test_files_are_what_a_copy_needs(folders: dict[str, Path]) -> None:
    names = {name: [path.name for path in read_tokenizer(folder).files] for name, folder in folders.items()}
    assert names["bert"] == ["tokenizer_config.json", "vocab.txt"]
    assert names["gpt2"] == ["tokenizer_config.json", "vocab.json", "merges.txt"]
    assert names["llama"] == ["tokenizer.json"]


def test_characters(tmp_path: Path) -> None:
    write_json(tmp_path / "config.json", {"model_type": "gpt2", "alphabet": ALPHABET})
    tokenizer = read_tokenizer(tmp_path)
    assert isinstance(tokenizer, Characters)
    assert (tokenizer.vocab, tokenizer.before, tokenizer.after, tokenizer.end, tokenizer.files) == (
        96,
        (),
        (),
        None,
        (),
    )
    ids = tokenizer.encode(["two\nlines — “quoted”", ""])
    assert [each.tolist() for each in ids] == [encode(normalise("two\nlines — “quoted”")).tolist(), []]
    assert tokenizer.decode(ids[0]) == 'two lines -- "quoted"'
    write_json(tmp_path / "config.json", {"alphabet": "abc"})
    with pytest.raises(UserError, match="another alphabet"):
        read_tokenizer(tmp_path)


def test_joined_is_as_narrow_as_the_vocabulary() -> None:
    pieces = [np.array([1, 65535]), np.array([0])]
    assert joined(pieces, 1 << 16).dtype == np.uint16
    assert joined(pieces, (1 << 16) + 1).dtype == np.int32
    assert joined(pieces, 1 << 16).tolist() == [1, 65535, 0]


def damage(folder: Path, name: str, content: bytes | None) -> None:
    if content is None:
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(content)


@pytest.mark.parametrize(
    ("name", "file", "content", "message"),
    [
        ("llama", "tokenizer.json", b"{}", "the tokenizer in FOLDER cannot be used: "),
        ("llama", "tokenizer.json", b'{"version": "1.0"', "the tokenizer in FOLDER cannot be used: "),
        ("llama", "tokenizer.json", b"\xff", "FOLDER/tokenizer.json is not UTF-8 text: byte 0 cannot be decoded"),
        (
            "llama",
            "tokenizer.json",
            None,
            "FOLDER has no tokenizer: tokenizer.json is missing; copy it there, or write",
        ),
        ("llama", "config.json", None, "no network at FOLDER: config.json is missing"),
        ("llama", "config.json", b"[]", "FOLDER/config.json does not hold a JSON object"),
        ("llama", "tokenizer_config.json", b"{", "FOLDER/tokenizer_config.json is not JSON: "),
        ("bert", "vocab.txt", None, "FOLDER has no tokenizer: tokenizer.json (or vocab.txt) is missing"),
        ("bert", "vocab.txt", b"[UNK]\na\n[SEP]\n", "FOLDER/vocab.txt has no token '[CLS]'"),
        (
            "gpt2",
            "merges.txt",
            None,
            "FOLDER has no tokenizer: tokenizer.json (or vocab.json and merges.txt) is missing",
        ),
        ("gpt2", "merges.txt", b"#version: 0.2\nqq zz\n", "the tokenizer in FOLDER cannot be used: "),
        ("gpt2", "vocab.json", b"nonsense", "the tokenizer in FOLDER cannot be used: "),
        ("roberta", "vocab.json", b'{"a": 0}', "the tokenizer in FOLDER cannot be used: "),
    ],
)
def test_what_is_damaged_or_missing_is_said(
    folders: dict[str, Path], tmp_path: Path, name: str, file: str, content: bytes | None, message: str
) -> None:
    folder = Path(shutil.copytree(folders[name], tmp_path / "net"))
    damage(folder, file, content)
    with pytest.raises(UserError) as caught:
        read_tokenizer(folder)
    assert str(caught.value).startswith(message.replace("FOLDER", str(folder)))


def test_what_is_not_read_is_said(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(folders["gpt2"], tmp_path / "net"))
    write_json(folder / "config.json", {"model_type": "qwen2"})  # its words are not GPT-2's
    with pytest.raises(UserError, match=r"has no tokenizer: tokenizer\.json is missing"):
        read_tokenizer(folder)
    (folder / "tokenizer.model").write_bytes(b"\n\x0e")
    with pytest.raises(UserError, match=r"SentencePiece alone, tokenizer\.model; .*save_pretrained"):
        read_tokenizer(folder)


SPEC = Spec(blocks=1, embed=8, heads=2, head_dim=4, ffn=8, vocab=320, positions=16)


def test_a_network_that_fits_its_tokenizer(folders: dict[str, Path]) -> None:
    folder = folders["gpt2"]
    assert choose_tokenizer(SPEC, folder, 16).vocab == 320
    assert choose_tokenizer(replace(SPEC, rotary=1e4, positions=0), folder, 512).vocab == 320
    for spec, message in (
        (SPEC, "network gpt2 has 16 positions; task.window must be at most that, got 17"),
        (
            replace(SPEC, positions=18, first_position=2),
            "network gpt2 has 16 positions; task.window must be at most that, got 17",
        ),
        (replace(SPEC, patch=4, image=8), "network gpt2 takes images, the task gives text; name a network for text"),
        (
            replace(SPEC, positions=17, vocab=319),
            f"the tokenizer in {folder} is of another network: its ids are below 320, the network has 319 tokens",
        ),
    ):
        with pytest.raises(UserError) as caught:
            choose_tokenizer(spec, folder, 17)
        assert str(caught.value) == message
