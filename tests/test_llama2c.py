"""scripts/llama2c.py against the rules of llama2.c, written out here: `pytest tests/test_llama2c.py`."""

from __future__ import annotations

import importlib.util
import struct
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lamina import checkpoint, model, tokens
from lamina.errors import UserError

_SCRIPT = Path(__file__).parent.parent / "scripts" / "llama2c.py"
SIZES = {"embed": 12, "ffn": 10, "blocks": 2, "heads": 3, "kv_heads": 1, "vocab": 270, "positions": 9}
WORDS = ["a", "b", "t", " ", " t", "at", " a", "ab", " at", "\u00e9"]


@pytest.fixture(scope="module")
def llama2c() -> Any:
    spec = importlib.util.spec_from_file_location("llama2c", _SCRIPT)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def network(folder: Path, tied: bool = True, **changes: int) -> tuple[Path, dict[str, np.ndarray]]:
    """A file of random weights, and those weights by the names of llama2.c."""
    sizes = SIZES | changes
    d, f, n, v = (sizes[key] for key in ("embed", "ffn", "blocks", "vocab"))
    kv = d * sizes["kv_heads"] // sizes["heads"]
    shapes = {"embed": (v, d), "att": (n, d), "q": (n, d, d), "k": (n, kv, d), "v": (n, kv, d), "o": (n, d, d)}
    shapes |= {"ffn": (n, d), "w1": (n, f, d), "w2": (n, d, f), "w3": (n, f, d), "final": (d,)}
    shapes |= {"freq": (sizes["positions"], d // sizes["heads"])} | ({} if tied else {"cls": (v, d)})
    rng = np.random.default_rng(3)
    weights = {name: rng.normal(0, 0.5, shape).astype("<f4") for name, shape in shapes.items()}
    header = struct.pack("<7i", *({**sizes, "vocab": v if tied else -v}[key] for key in SIZES))
    (folder / "n.bin").write_bytes(header + b"".join(each.tobytes() for each in weights.values()))
    return folder / "n.bin", weights


def vocabulary(folder: Path) -> tuple[Path, list[tuple[bytes, float]]]:
    """A file of special tokens, bytes and words, and what is in it."""
    pieces = [(b"<unk>", 0.0), (b"\n<s>\n", 0.0), (b"\n</s>\n", 0.0)]
    pieces += [(f"<0x{i:02X}>".encode(), 0.0) for i in range(256)]
    pieces += [(word.encode(), -float(i)) for i, word in enumerate(reversed(WORDS))] + [(b"<pad>", -99.0)]
    content = struct.pack("<i", 7) + b"".join(struct.pack("<fi", s, len(p)) + p for p, s in pieces)
    (folder / "t.bin").write_bytes(content)
    return folder / "t.bin", pieces


def logits(w: dict[str, np.ndarray], ids: list[int]) -> np.ndarray:
    """The forward pass of llama2.c: rotary positions turn neighbouring numbers."""
    heads, shared, k = SIZES["heads"], SIZES["heads"] // SIZES["kv_heads"], SIZES["embed"] // SIZES["heads"]

    def norm(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
        return np.asarray(x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5) * weight)

    def turn(x: np.ndarray) -> np.ndarray:
        angles = np.outer(np.arange(len(ids)), 10000.0 ** -(np.arange(0, k, 2) / k))[:, None]
        z = (x[..., 0::2] + 1j * x[..., 1::2]) * np.exp(1j * angles)
        return np.stack([z.real, z.imag], -1).reshape(x.shape)

    x = w["embed"][ids].astype(np.float64)
    for i in range(SIZES["blocks"]):
        y = norm(x, w["att"][i])
        q, key, value = ((y @ w[name][i].T).reshape(len(ids), -1, k) for name in "qkv")
        q, key = turn(q), turn(key)
        seen = np.zeros_like(q)
        for h in range(heads):
            scores = q[:, h] @ key[:, h // shared].T / np.sqrt(k)
            scores[np.triu_indices(len(ids), 1)] = -np.inf
            share = np.exp(scores - scores.max(-1, keepdims=True))
            seen[:, h] = share / share.sum(-1, keepdims=True) @ value[:, h // shared]
        x = x + seen.reshape(len(ids), -1) @ w["o"][i].T
        y = norm(x, w["ffn"][i])
        gate = y @ w["w1"][i].T
        x = x + (gate / (1 + np.exp(-gate)) * (y @ w["w3"][i].T)) @ w["w2"][i].T
    return np.asarray(norm(x, w["final"]) @ w.get("cls", w["embed"]).T)


def encoded(pieces: list[tuple[bytes, float]], text: str) -> list[int]:
    """The ids that llama2.c gives a text: its letters, or their bytes, then merges, the highest score first."""
    ids = {piece: i for i, (piece, _) in enumerate(pieces)}
    found: list[int] = []
    for letter in " " + text:
        known = ids.get(letter.encode())
        found += [known] if known is not None else [byte + 3 for byte in letter.encode()]
    while True:
        joined = [pieces[a][0] + pieces[b][0] for a, b in pairwise(found)]
        best = max(
            (i for i, each in enumerate(joined) if each in ids), key=lambda i: pieces[ids[joined[i]]][1], default=-1
        )
        if best < 0:
            return found
        found[best : best + 2] = [ids[joined[best]]]


@pytest.mark.parametrize("tied", [True, False])
def test_the_network_computes_what_llama2c_does(tied: bool, llama2c: Any, tmp_path: Path) -> None:
    path, weights = network(tmp_path, tied)
    llama2c.convert(path, vocabulary(tmp_path)[0], tmp_path / "out")
    spec, params = checkpoint.load(tmp_path / "out")
    assert checkpoint.read_config(tmp_path / "out")["tie_word_embeddings"] is tied
    ids = [5, 269, 1, 0, 44, 44]
    got = model.forward(spec, params, torch.tensor([ids]))[0]
    torch.testing.assert_close(got, torch.from_numpy(logits(weights, ids)).float(), rtol=1e-4, atol=1e-4)


def test_the_tokenizer_gives_the_ids_of_llama2c(llama2c: Any, tmp_path: Path) -> None:
    path, pieces = vocabulary(tmp_path)
    llama2c.convert(network(tmp_path)[0], path, tmp_path / "out")
    reader = tokens.read_tokenizer(tmp_path / "out")
    assert (reader.before, reader.after, reader.end, reader.vocab) == ((1,), (), 2, 270)
    rng = np.random.default_rng(1)
    for _ in range(50):
        text = "".join(rng.choice(list("abt \u00e9z"), 12))
        assert reader.encode([text])[0].tolist() == encoded(pieces, text), text
        assert reader.decode(np.array(encoded(pieces, text))) == text


def test_files_that_are_something_else(llama2c: Any, tmp_path: Path) -> None:
    path, _ = network(tmp_path)
    words, _ = vocabulary(tmp_path)
    for cut in (0, 27, 28, -1):
        (tmp_path / "cut.bin").write_bytes(path.read_bytes()[:cut])
        with pytest.raises(UserError, match=r"cut\.bin is (not a network of llama2\.c|truncated, or not of version 0)"):
            llama2c.convert(tmp_path / "cut.bin", words, tmp_path / "out")
    (tmp_path / "other.bin").write_bytes(b"ak42" * 20)
    with pytest.raises(UserError, match=r"not a network of llama2\.c, version 0: its header says"):
        llama2c.convert(tmp_path / "other.bin", words, tmp_path / "out")
    for content in (words.read_bytes()[:-1], words.read_bytes() + b"x"):
        (tmp_path / "cut.bin").write_bytes(content)
        with pytest.raises(UserError, match=r"is not a tokenizer of llama2\.c with 270 tokens"):
            llama2c.convert(path, tmp_path / "cut.bin", tmp_path / "out")
    assert not (tmp_path / "out").exists()
