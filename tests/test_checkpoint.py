"""Network folders: round trips, and what is said about those that cannot be used: `pytest tests/test_checkpoint.py`."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lamina import checkpoint, model, networks
from lamina.errors import UserError
from lamina.layout import Params
from lamina.spec import LINEARS, Lora, Spec

RandomParams = Callable[[Spec, int], Params]


@pytest.fixture
def folder(tmp_path: Path, tiny: Spec, random_params: RandomParams) -> Path:
    """A network on disk."""
    checkpoint.write(tmp_path, tiny, random_params(tiny, 0), torch.float32, {"alphabet": "\ufffd abc"})
    return tmp_path


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8")) | changes
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not ...}), encoding="utf-8")


def edit_weights(folder: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors")


def message(folder: Path) -> str:
    """What loading says, with the folder's path as FOLDER."""
    with pytest.raises(UserError) as caught:
        checkpoint.load(folder)
    return str(caught.value).replace(str(folder), "FOLDER")


def test_round_trip_is_bit_for_bit(folder: Path, tiny: Spec, random_params: RandomParams) -> None:
    spec, params = checkpoint.load(folder)
    assert spec == checkpoint.read_spec(folder) == tiny
    assert list(params) == list(model.layout(tiny).params)
    for name, tensor in random_params(tiny, 0).items():
        assert params[name].dtype == torch.float32
        assert params[name].is_contiguous()
        assert torch.equal(params[name], tensor)


def test_writing_twice_gives_the_same_bytes(folder: Path, tmp_path: Path, tiny: Spec) -> None:
    spec, params = checkpoint.load(folder)
    checkpoint.write(tmp_path / "again", spec, params, torch.float32, {"alphabet": "\ufffd abc"})
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes()


def test_half_precision_rounds_once(tmp_path: Path, tiny: Spec, random_params: RandomParams) -> None:
    params = random_params(tiny, 0)
    checkpoint.write(tmp_path, tiny, params, torch.float16, {})
    assert {tensor.dtype for tensor in load_file(tmp_path / "model.safetensors").values()} == {torch.float16}
    assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == "float16"
    _, rounded = checkpoint.load(tmp_path)
    for name, tensor in params.items():
        assert rounded[name].dtype == torch.float32
        assert torch.equal(rounded[name], tensor.half().float())


def test_low_rank_additions_are_merged_when_written(tmp_path: Path, tiny: Spec, random_params: RandomParams) -> None:
    spec = replace(tiny, lora=Lora(2, 4.0, LINEARS))
    params = random_params(spec, 0)
    checkpoint.write(tmp_path, spec, params, torch.float32, {})
    found, loaded = checkpoint.load(tmp_path)
    assert found == tiny
    assert all(torch.equal(loaded[name], tensor) for name, tensor in model.merged(spec, params)[1].items())


def test_a_tied_head_is_a_copy_of_the_embedding(folder: Path) -> None:
    edit_weights(folder, lambda tensors: tensors.pop("lm_head.weight"))
    _, params = checkpoint.load(folder)
    assert torch.equal(params["head.weight"], params["embed.tokens"])


def test_a_tied_network_can_be_written(folder: Path, tmp_path: Path) -> None:
    edit_weights(folder, lambda tensors: tensors.pop("lm_head.weight"))
    spec, params = checkpoint.load(folder)
    checkpoint.write(tmp_path / "again", spec, params, torch.float32, {})
    assert torch.equal(checkpoint.load(tmp_path / "again")[1]["head.weight"], params["embed.tokens"])


def test_the_hidden_width_is_four_times_the_width_unless_said(folder: Path, tiny: Spec) -> None:
    for absent in (None, ...):
        edit_config(folder, n_inner=absent)
        assert checkpoint.read_spec(folder) == replace(tiny, ffn=64)


def test_missing_keys_are_what_they_are_in_transformers(folder: Path, tiny: Spec) -> None:
    edit_config(folder, layer_norm_epsilon=..., activation_function=..., scale_attn_weights=..., architectures=...)
    assert checkpoint.read_spec(folder) == tiny


def test_alphabet_is_read_from_the_config(folder: Path) -> None:
    assert checkpoint.read_alphabet(folder) == "\ufffd abc"
    edit_config(folder, alphabet=...)
    assert checkpoint.read_alphabet(folder) is None


def test_missing_files(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    assert message(folder) == "no weights at FOLDER/model.safetensors"
    (folder / "config.json").unlink()
    assert message(folder) == "no network at FOLDER: config.json is missing"
    with pytest.raises(UserError, match=r"config\.json is missing"):
        checkpoint.read_alphabet(folder)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b'{"n_layer": 3', "FOLDER/config.json is not JSON: Expecting ',' delimiter: line 1 column 14 (char 13)"),
        (b"", "FOLDER/config.json is not JSON: Expecting value: line 1 column 1 (char 0)"),
        (b"\xff{}", "FOLDER/config.json is not JSON: "),
        (b'["gpt2"]', "FOLDER/config.json does not hold a JSON object"),
    ],
)
def test_a_config_that_is_no_json_object(folder: Path, content: bytes, says: str) -> None:
    (folder / "config.json").write_bytes(content)
    assert message(folder).startswith(says)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (
            {"activation_function": "mish"},
            "FOLDER/config.json: activation_function is 'mish'; accepted: gelu, gelu_new, gelu_pytorch_tanh, relu",
        ),
        ({"activation_function": None}, "FOLDER/config.json: activation_function is None; accepted: gelu, gelu_new, "),
        ({"model_type": "lama"}, "FOLDER/config.json: model_type is 'lama'; did you mean 'llama'? accepted: gpt2, "),
        ({"model_type": ...}, "FOLDER/config.json: model_type is None; accepted: gpt2, bert, "),
        ({"model_type": ["gpt2"]}, "FOLDER/config.json: model_type is ['gpt2']; "),
        ({"n_layer": ...}, "FOLDER/config.json: key 'n_layer' is missing"),
        ({"n_layer": 10**9}, "FOLDER/config.json: n_layer is 1000000000; accepted: at most 1024"),
        ({"n_embd": 10**12}, "FOLDER/config.json: n_embd is 1000000000000; accepted: at most 16777216"),
        ({"n_embd": 15}, "FOLDER/config.json is not a usable network config: 2 heads do not divide the width 15"),
        ({"n_embd": "wide"}, "FOLDER/config.json is not a usable network config: invalid literal for int()"),
        ({"n_layer": -1}, "FOLDER/config.json is not a usable network config: sizes must be positive"),
        ({"layer_norm_epsilon": math.nan}, "FOLDER/config.json is not a usable network config: sizes must be positive"),
        ({"n_layer": math.inf}, "FOLDER/config.json is not a usable network config: cannot convert float infinity"),
        ({"n_embd": None}, "FOLDER/config.json is not a usable network config: int() argument must be"),
        ({"n_head": 0}, "FOLDER/config.json is not a usable network config: integer division or modulo by zero"),
    ],
)
def test_a_config_we_cannot_run(folder: Path, changes: dict[str, Any], says: str) -> None:
    edit_config(folder, **changes)
    assert message(folder).startswith(says)


@pytest.mark.parametrize("size", [0, 5, 100, 3000, -1])
def test_truncated_weights(folder: Path, size: int) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    assert message(folder).startswith("FOLDER/model.safetensors is truncated or not a safetensors file (")


def test_missing_tensor(folder: Path) -> None:
    edit_weights(folder, lambda tensors: tensors.pop("transformer.h.1.attn.c_attn.bias"))
    assert message(folder) == "FOLDER/model.safetensors: tensor transformer.h.1.attn.c_attn.bias is missing"


def test_missing_embedding_and_head(folder: Path) -> None:
    edit_weights(folder, lambda tensors: [tensors.pop(f"{name}.weight") for name in ("lm_head", "transformer.wte")])
    assert message(folder) == "FOLDER/model.safetensors: tensor transformer.wte.weight is missing"


@pytest.mark.parametrize(
    ("name", "shape", "says"),
    [
        ("transformer.ln_f.bias", (17,), "transformer.ln_f.bias has shape (17,); config.json asks for (16,)"),
        ("transformer.wpe.weight", (9, 16), "transformer.wpe.weight has shape (9, 16); config.json asks for (10, 16)"),
        ("transformer.h.2.mlp.c_fc.weight", (16, 25), "(16, 25); config.json asks for (16, 24)"),
        ("transformer.h.0.attn.c_attn.weight", (16, 47), "(16, 47); config.json asks for (16, 48)"),
        ("transformer.h.0.attn.c_attn.weight", (15, 48), "(15, 48); config.json asks for (16, 48)"),
        ("transformer.h.0.attn.c_attn.bias", (), "(); config.json asks for (48,)"),
    ],
)
def test_misshapen_tensor(folder: Path, name: str, shape: tuple[int, ...], says: str) -> None:
    edit_weights(folder, lambda tensors: tensors.update({name: torch.zeros(shape)}))
    assert message(folder).startswith("FOLDER/model.safetensors: transformer.")
    assert message(folder).endswith(says)


@pytest.mark.parametrize("name", ["transformer.h.2.mlp.c_fc.weight", "lm_head.weight", "transformer.wpe.weight"])
def test_transposed_tensor(folder: Path, name: str) -> None:
    edit_weights(folder, lambda tensors: tensors.update({name: tensors[name].T.contiguous()}))
    assert re.search(f"{name} has shape", message(folder))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_tensor_with_values_that_are_not_finite(folder: Path, value: float) -> None:
    edit_weights(folder, lambda tensors: tensors["transformer.h.1.ln_2.weight"][3:4].fill_(value))
    assert message(folder) == ("FOLDER/model.safetensors: tensor for h.1.norm2.weight holds values that are not finite")


def test_truncated_state(folder: Path) -> None:
    path = folder / "model.safetensors"
    with pytest.raises(UserError, match="is truncated or not a state of lamina"):
        checkpoint.read_manifest(path)  # a whole file, but without a manifest
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match="is truncated or not a state of lamina"):
        checkpoint.read_manifest(path)


def test_networks_are_found_by_folder_or_name(folder: Path) -> None:
    assert networks.find(str(folder)) == folder
    for name, path in networks.embedded().items():
        assert networks.find(name) == path
        assert checkpoint.load(path)[0] == checkpoint.read_spec(path)
    with pytest.raises(UserError, match=r"^no network 'nameless': it is neither a folder with a config\.json nor"):
        networks.find("nameless")


@pytest.mark.parametrize(("key", "value"), [("scale_attn_by_inverse_layer_idx", True), ("scale_attn_weights", False)])
def test_switches_that_change_the_function_are_refused(key: str, value: bool, folder: Path) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: not value}))
    checkpoint.read_spec(folder)
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    assert f"{key} is {value}; this version runs {not value} only" in message(folder)
