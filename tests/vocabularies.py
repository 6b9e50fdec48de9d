"""Folders with tiny tokenizers, made here and now, and what `transformers` reads from them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

CORPUS = (
    "the quick brown fox jumps over the lazy dog",
    "Hello, World! it's naïve café 中文 emoji 😀",
    "pack my box with five dozen liquor jugs",
)
BERT_SPECIALS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
ROBERTA_SPECIALS = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]


def write_bert(folder: Path, config: dict[str, Any] | None = None) -> Path:
    """vocab.txt of a WordPiece tokenizer of about 120 tokens in lower case."""
    inner = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    inner.normalizer = normalizers.BertNormalizer(lowercase=True)
    inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(vocab_size=150, special_tokens=BERT_SPECIALS, show_progress=False)
    inner.train_from_iterator(CORPUS * 3, trainer)
    return _write(folder, inner, "bert", {"do_lower_case": True} | (config or {}))


def write_bytes(folder: Path, family: str = "gpt2") -> Path:
    """vocab.json and merges.txt of a byte-level tokenizer of 320 tokens, of family gpt2 or roberta."""
    inner = byte_level(["<|endoftext|>"] if family == "gpt2" else ROBERTA_SPECIALS)
    return _write(folder, inner, family, {})


def byte_level(specials: list[str]) -> Tokenizer:
    """A byte-level tokenizer of 320 tokens; the special ones are the first."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    inner.train_from_iterator(CORPUS * 3, trainer)
    return inner


def write_llama(folder: Path) -> Path:
    """tokenizer.json of a byte-level tokenizer that puts <s> before a text, and cuts and pads."""
    inner = byte_level(["<unk>", "<s>", "</s>"])
    inner.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A $B", [("<s>", 1)])
    inner.enable_truncation(8)
    inner.enable_padding(length=12, pad_id=2, pad_token="</s>")
    folder.mkdir(parents=True)
    inner.save(str(folder / "tokenizer.json"))
    write_json(folder / "config.json", {"model_type": "llama", "eos_token_id": 2})
    return folder


def write_json(path: Path, value: object) -> Path:
    path.write_text(json.dumps(value), encoding="utf-8")
    return path


def _write(folder: Path, inner: Tokenizer, family: str, about: dict[str, Any]) -> Path:
    folder.mkdir(parents=True)
    inner.model.save(str(folder))
    write_json(folder / "config.json", {"model_type": family})
    write_json(folder / "tokenizer_config.json", about)
    return folder
