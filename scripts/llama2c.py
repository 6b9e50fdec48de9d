"""A network of llama2.c (Karpathy 2023) as a Hugging Face folder, with its tokenizer.

    python scripts/llama2c.py stories260K.bin tok512.bin stories260K

The first file has a header of seven integers (width, feed-forward width, blocks, heads, heads of keys and values,
tokens, positions) and then the weights as fp32, one kind after the other, each over all blocks; this is its version 0.
Its rotary positions turn neighbouring numbers, those of `transformers` the first and second half of a head, so the rows
of queries and keys change places. The second has for each token a score, a length and the bytes: SentencePiece's BPE,
which merges what gives the token of the highest score.
"""

from __future__ import annotations

import argparse
import json
import struct
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lamina import checkpoint, files
from lamina.errors import UserError
from lamina.spec import Spec, layout

_HEADER = ("embed", "ffn", "blocks", "heads", "kv_heads", "vocab", "positions")
_BLOCK = ("norm1", "attn.q", "attn.k", "attn.v", "attn.o", "norm2", "ffn.gate", "ffn.down", "ffn.up")
"""Kinds of weights of a block, in the order of the file."""
_SPACE = "\u2581"
BEGIN, END = "<s>", "</s>"


def read_network(path: Path) -> tuple[Spec, dict[str, torch.Tensor]]:
    """Sizes and weights in the file of a network.

    Raises:
        UserError: It is not such a file.
    """
    content = path.read_bytes()
    if len(content) < 28:
        raise UserError(f"{path} is not a network of llama2.c: it has {len(content)} bytes")
    sizes = dict(zip(_HEADER, struct.unpack("<7i", content[:28]), strict=True))
    tied = sizes["vocab"] > 0
    sizes["vocab"] = abs(sizes["vocab"])
    if not 0 < min(sizes.values()) <= max(sizes.values()) < 1 << 24 or sizes["embed"] % sizes["heads"]:
        raise UserError(f"{path} is not a network of llama2.c, version 0: its header says {sizes}")
    sizes["kv_heads"] *= sizes["kv_heads"] != sizes["heads"]
    spec = Spec(
        **sizes,
        head_dim=sizes["embed"] // sizes["heads"],
        norm="rms",
        act="silu",
        gated=True,
        biases=(),
        rotary=10000.0,
    )
    shape = layout(spec)
    blocks = [[f"h.{i}.{short}.weight" for i in range(spec.blocks)] for short in _BLOCK]
    order = ["embed.tokens", *chain.from_iterable(blocks), "norm.weight", *([] if tied else ["head.weight"])]
    rotations = spec.positions * spec.head_dim  # which the file has before an untied head
    wanted = 28 + 4 * (sum(map(shape.numel, order)) + rotations)
    if len(content) != wanted:
        raise UserError(f"{path} is truncated, or not of version 0: it has {len(content)} bytes, not {wanted}")
    params, start = {}, 28
    for name in order:
        start += 4 * rotations * (name == "head.weight")
        numbers = np.frombuffer(content, "<f4", shape.numel(name), start)
        start += numbers.nbytes
        params[name] = torch.from_numpy(numbers.copy()).reshape(shape.shape(name))
        if name.endswith(("attn.q.weight", "attn.k.weight")):
            pairs = params[name].reshape(-1, spec.head_dim // 2, 2, spec.embed)
            params[name] = pairs.transpose(1, 2).reshape(shape.shape(name)).contiguous()
    params.setdefault("head.weight", params["embed.tokens"].clone())
    return spec, {name: params[name] for name in shape.params}


def read_tokens(path: Path, vocab: int) -> list[tuple[str, float]]:
    """Each token as SentencePiece writes it, and its score.

    Raises:
        UserError: It is not such a file.
    """
    content, start, found = path.read_bytes(), 4, []
    try:
        for _ in range(vocab):
            score, size = struct.unpack_from("<fi", content, start)
            piece = content[start + 8 : start + 8 + size].decode()
            found.append(
                (piece.strip("\n") if piece.strip("\n") in (BEGIN, END) else piece.replace(" ", _SPACE), score)
            )
            start += 8 + size
    except (struct.error, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not a tokenizer of llama2.c with {vocab} tokens: {error}") from error
    if start != len(content):
        raise UserError(f"{path} is not a tokenizer of llama2.c with {vocab} tokens: it goes on after them")
    return found


def tokenizer_json(tokens: list[tuple[str, float]]) -> dict[str, Any]:
    """The tokenizer as the `tokenizers` library reads it: merges in the order of the scores of what they make."""
    ids = {piece: i for i, (piece, _) in enumerate(tokens)}
    merges = []
    for piece, score in tokens:
        cuts = ((piece[:i], piece[i:]) for i in range(1, len(piece)))
        pairs = sorted((ids[left], ids[right], left, right) for left, right in cuts if left in ids and right in ids)
        merges += [(-score, ids[piece], rank, [left, right]) for rank, (_, _, left, right) in enumerate(pairs)]
    special = [(name, ids[name]) for name in ("<unk>", BEGIN, END)]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, "content": name, **flags} for name, i in special],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "Prepend", "prepend": _SPACE},
                {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE},
            ],
        },
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": BEGIN, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {BEGIN: {"id": BEGIN, "ids": [ids[BEGIN]], "tokens": [BEGIN]}},
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": "<unk>",
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": ids,
            "merges": [pair for *_, pair in sorted(merges)],
        },
    }


def convert(network: Path, tokens: Path, out: Path) -> None:
    """Write the folder.

    Raises:
        UserError: A file is not what it should be, or the folder exists.
    """
    spec, params = read_network(network)
    pieces = read_tokens(tokens, spec.vocab)
    ids = {piece: i for i, (piece, _) in enumerate(pieces)}
    with files.new_folder(out) as made:
        about = {"bos_token_id": ids[BEGIN], "eos_token_id": ids[END]}
        checkpoint.write(made, spec, params, torch.float32, about)
        files.write_json(made / "tokenizer.json", tokenizer_json(pieces))
        names = {"bos_token": BEGIN, "eos_token": END, "unk_token": "<unk>"}
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": spec.positions, **names}
        files.write(made / "tokenizer_config.json", json.dumps(settings, indent=2) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("network", "tokens", "out"):
        parser.add_argument(name, type=Path)
    try:
        convert(**vars(parser.parse_args()))
    except UserError as error:
        raise SystemExit(f"error: {error}") from error
