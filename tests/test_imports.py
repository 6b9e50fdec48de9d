"""`lamina import`: what is checked, copied and said: `pytest tests/test_imports.py`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models

from lamina import checkpoint, cli, files, hf, imports
from lamina.errors import UserError

_CONFIG = {
    "vocab_size": 5,
    "n_positions": 8,
    "n_layer": 1,
    "n_embd": 8,
    "n_head": 2,
    "bos_token_id": 0,
    "eos_token_id": 0,
}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A small GPT-2 with labels, a tokenizer, a buffer of old, and files that nobody needs."""
    folder = tmp_path / "source"
    config = transformers.GPT2Config(**_CONFIG, id2label={0: "no", 1: "yes", 2: "maybe"})
    transformers.GPT2ForSequenceClassification(config).save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors") | {
        "transformer.h.0.attn.bias": torch.ones(8, 8, dtype=torch.bool)
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    Tokenizer(models.WordLevel({"a": 0, "b": 1, "c": 2, "[UNK]": 3}, unk_token="[UNK]")).save(
        str(folder / "tokenizer.json")
    )
    for name in ("optimizer.bin", "training_args.bin", "README.md"):
        (folder / name).write_bytes(b"\x80")
    (folder / "generation_config.json").write_text("{}")
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text('{"pooling_mode_mean_tokens": true}')
    return folder


def test_the_network_is_copied_bit_for_bit(source: Path, tmp_path: Path) -> None:
    found = imports.bring(source, tmp_path / "networks" / "mine")
    there = (path.relative_to(found.folder).as_posix() for path in found.folder.rglob("*") if path.is_file())
    assert sorted(there) == sorted(found.copied)
    wanted = {"config.json", "model.safetensors", "tokenizer.json", "generation_config.json", "1_Pooling/config.json"}
    assert set(found.copied) == wanted
    for name in found.copied:
        assert (found.folder / name).read_bytes() == (source / name).read_bytes()
    assert [path.name for path in found.folder.parent.iterdir()] == ["mine"]
    assert checkpoint.load(found.folder)[0] == found.spec == checkpoint.read_spec(source)


def test_what_is_said(source: Path, tmp_path: Path) -> None:
    found = imports.bring(source, tmp_path / "mine")
    theirs = transformers.GPT2ForSequenceClassification.from_pretrained(source)
    assert found.parameters == theirs.num_parameters()
    assert (found.family, found.architecture) == ("gpt2", "GPT2ForSequenceClassification")
    assert found.labels == ("no", "yes", "maybe") and found.dtypes == ("float32",)
    assert found.unused == ("transformer.h.0.attn.bias",)
    assert found.tokenizer == "WordLevel, 4 tokens"
    rows = dict(found.rows())
    assert rows["not used"] == "transformer.h.*.attn.bias" and rows["classes"] == "3: no, yes, maybe"
    data = json.loads(json.dumps(found.to_json()))
    assert data["schema"] == "lamina.import/1" and data["spec"]["blocks"] == 1 and data["bytes"] == found.bytes


def test_shards_become_one_file(source: Path, tmp_path: Path) -> None:
    whole = load_file(source / "model.safetensors")
    names = sorted(whole)
    places = {name: f"part-{i % 2}.safetensors" for i, name in enumerate(names)}
    for part in set(places.values()):
        save_file({name: whole[name] for name in names if places[name] == part}, source / part)
    (source / "model.safetensors").unlink()
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    found = imports.bring(source, tmp_path / "mine")
    merged = load_file(found.folder / "model.safetensors")
    assert merged.keys() == whole.keys()
    assert all(tensor.dtype == merged[name].dtype and tensor.equal(merged[name]) for name, tensor in whole.items())
    assert not list(found.folder.glob("part*"))


@pytest.mark.parametrize(("name", "value"), [("score.weight", torch.nan), ("transformer.h.0.ln_1.bias", -torch.inf)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_value_that_is_not_finite_is_found(
    name: str, value: float, dtype: torch.dtype, source: Path, tmp_path: Path
) -> None:
    tensors = {key: tensor.to(dtype) for key, tensor in load_file(source / "model.safetensors").items()}
    largest = torch.finfo(dtype).max
    tensors[name].view(-1)[0] = largest
    save_file(tensors, source / "model.safetensors")
    hf.check(source)
    tensors[name].view(-1)[-1] = value
    save_file(tensors, source / "model.safetensors")
    with pytest.raises(UserError, match="holds values that are not finite"):
        imports.bring(source, tmp_path / "mine")
    assert not (tmp_path / "mine").exists()


def test_no_network_is_replaced_unless_asked(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "mine"
    imports.bring(source, target)
    (target / "mark").write_text("old")
    with pytest.raises(UserError, match="mine exists already; take another name, or --force to replace it"):
        imports.bring(source, target)
    assert (target / "mark").exists()
    imports.bring(source, target, force=True)
    assert not (target / "mark").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "source"]
    (target / "config.json").unlink()
    with pytest.raises(UserError, match=r"mine is not replaced: it is no folder with a config\.json"):
        imports.bring(source, target, force=True)
    with pytest.raises(UserError, match="source is where the network is to go; it can be used as it is"):
        imports.bring(source, source, force=True)


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), files.new_folder(tmp_path / "made") as made:
        (made / "half").write_text("half")
        raise RuntimeError
    assert not list(tmp_path.iterdir())


def test_a_tokenizer_that_cannot_be_used_is_said(source: Path, tmp_path: Path) -> None:
    (source / "tokenizer.json").unlink()
    found = imports.bring(source, tmp_path / "mine")
    assert found.tokenizer.startswith("none (") and "tokenizer.json" in found.tokenizer


def test_the_command(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    cli.bring(source)
    assert "network networks/source" in capsys.readouterr().out
    cli.bring(source, name="other", as_json=True)
    assert json.loads(capsys.readouterr().out)["folder"] == "networks/other"
    for name in ("../x", "a/b", ".."):
        with pytest.raises(UserError, match="--name must be the name of a folder"):
            cli.bring(source, name=name)


def test_importing_takes_no_torch(source: Path, tmp_path: Path) -> None:
    """It takes more memory than a network of 100 MB, and longer."""
    code = f"""
import sys
from pathlib import Path
from lamina import cli
cli.bring(Path({str(source)!r}), out=Path({str(tmp_path)!r}), name="mine")
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ, capture_output=True)
