"""Every family: folders that `transformers` wrote, read, and written again: `pytest tests/test_families.py`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from lamina import checkpoint, model, weights
from lamina.errors import UserError
from lamina.families import FAMILIES, express
from lamina.spec import Spec, layout

# Every size different, so that no mix-up of axes can hide.
_TEXT = {"vocab_size": 31, "max_position_embeddings": 20}
_BLOCKS = {"num_hidden_layers": 2, "hidden_size": 12, "num_attention_heads": 3, "intermediate_size": 14}
_BERT = {**_TEXT, **_BLOCKS}
_IMAGE = {**_BLOCKS, "image_size": 8, "patch_size": 2, "num_channels": 1}
_DINO = {key: value for key, value in _IMAGE.items() if key != "intermediate_size"} | {"mlp_ratio": 2}
_LLAMA = {**_TEXT, **_BLOCKS, "num_attention_heads": 6, "num_key_value_heads": 2, "pad_token_id": 0}
_GPT2 = {"vocab_size": 31, "n_positions": 20, "n_layer": 2, "n_embd": 12, "n_head": 3, "n_inner": 14, "pad_token_id": 0}
_GPT2 |= {"bos_token_id": 1, "eos_token_id": 2}
_DISTIL = {**_TEXT, "n_layers": 2, "dim": 12, "n_heads": 3, "hidden_dim": 14}
_LABELS = {"id2label": {0: "sad", 1: "so so", 2: "glad"}, "label2id": {"sad": 0, "so so": 1, "glad": 2}}

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("GPT2LMHeadModel", _GPT2),
    "gpt2 untied, gelu, no ffn given": (
        "GPT2LMHeadModel",
        _GPT2 | {"tie_word_embeddings": False, "activation_function": "gelu", "n_inner": None},
    ),
    "gpt2 labels": ("GPT2ForSequenceClassification", _GPT2 | _LABELS),
    "bert": ("BertModel", _BERT),
    "bert, tanh, 3 types": (
        "BertModel",
        _BERT | {"hidden_act": "gelu_new", "type_vocab_size": 3, "layer_norm_eps": 1e-5},
    ),
    "bert labels": ("BertForSequenceClassification", _BERT | _LABELS),
    "bert relu labels": ("BertForSequenceClassification", _BERT | {"hidden_act": "relu"}),
    "roberta": ("RobertaModel", _BERT | {"type_vocab_size": 1}),
    "roberta labels": ("RobertaForSequenceClassification", _BERT | _LABELS | {"pad_token_id": 3}),
    "xlm-roberta": ("XLMRobertaModel", _BERT),
    "xlm-roberta labels": ("XLMRobertaForSequenceClassification", _BERT | _LABELS | {"type_vocab_size": 1}),
    "distilbert": ("DistilBertModel", _DISTIL),
    "distilbert labels": ("DistilBertForSequenceClassification", _DISTIL | _LABELS | {"sinusoidal_pos_embds": True}),
    "vit": ("ViTForImageClassification", _IMAGE | _LABELS),
    "vit without some biases": ("ViTForImageClassification", _IMAGE | _LABELS | {"qkv_bias": False, "num_channels": 3}),
    "deit": ("DeiTForImageClassification", _IMAGE | _LABELS | {"hidden_act": "gelu_pytorch_tanh"}),
    "dinov2": ("Dinov2ForImageClassification", _DINO | _LABELS),
    "dinov2 base": ("Dinov2Model", _DINO | {"layer_norm_eps": 1e-5, "qkv_bias": False}),
    "dinov2 registers": ("Dinov2WithRegistersForImageClassification", _DINO | _LABELS | {"num_register_tokens": 3}),
    "llama": ("LlamaForCausalLM", _LLAMA),
    "llama tied, all heads, theta, biases": (
        "LlamaForCausalLM",
        _LLAMA
        | {"tie_word_embeddings": True, "num_key_value_heads": 6, "attention_bias": True, "mlp_bias": True}
        | {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}, "rms_norm_eps": 1e-5},
    ),
    "llama wide heads": ("LlamaForCausalLM", _LLAMA | {"head_dim": 4}),
    "llama labels": ("LlamaForSequenceClassification", _LLAMA | _LABELS),
    "qwen2": ("Qwen2ForCausalLM", _LLAMA),
    "qwen2 tied": ("Qwen2ForCausalLM", _LLAMA | {"tie_word_embeddings": True}),
    "qwen2 labels": ("Qwen2ForSequenceClassification", _LLAMA | _LABELS),
    "qwen3": ("Qwen3ForCausalLM", _LLAMA | {"head_dim": 4}),
    "qwen3 tied, biases": (
        "Qwen3ForCausalLM",
        _LLAMA | {"head_dim": 4, "tie_word_embeddings": True, "attention_bias": True},
    ),
    "qwen3 labels": ("Qwen3ForSequenceClassification", _LLAMA | _LABELS | {"head_dim": 4}),
    "mistral": ("MistralForCausalLM", _LLAMA | {"sliding_window": None}),
}


_FIRST = {"xlm-roberta": "roberta", "mistral": "llama"}


def make(folder: Path, name: str, **changes: Any) -> Any:
    """The network of a case, every tensor drawn at random, saved by `transformers`."""
    architecture, settings = CASES[name]
    cls = getattr(transformers, architecture)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        theirs = cls(cls.config_class(**settings | changes)).eval()
    rng = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in theirs.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=rng))
    theirs.save_pretrained(folder)
    return theirs


def config_of(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "config.json").read_text()))


def edit_config(folder: Path, **changes: Any) -> None:
    config = {key: value for key, value in (config_of(folder) | changes).items() if value is not ...}
    (folder / "config.json").write_text(json.dumps(config))


def same(left: Mapping[str, torch.Tensor], right: Mapping[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert tensor.dtype == right[name].dtype and torch.equal(tensor, right[name]), name


def message(folder: Path) -> str:
    with pytest.raises(UserError) as caught:
        checkpoint.load(folder)
    return str(caught.value).replace(str(folder), "FOLDER")


@pytest.mark.parametrize("name", CASES)
def test_round_trip(name: str, tmp_path: Path) -> None:
    theirs = make(tmp_path / "a", name)
    spec, params = checkpoint.load(tmp_path / "a")
    assert list(params) == list(layout(spec).params)
    assert all(p.dtype == torch.float32 and p.is_contiguous() for p in params.values())
    assert sum(p.numel() for p in params.values()) >= 0.9 * theirs.num_parameters()
    checkpoint.write(tmp_path / "b", spec, params, torch.float32, {}, tmp_path / "a")
    same(load_file(tmp_path / "b" / "model.safetensors"), load_file(tmp_path / "a" / "model.safetensors"))
    before, after = config_of(tmp_path / "a"), config_of(tmp_path / "b")
    for each in (before, after):  # two words for the same
        each["dtype"] = each.pop("torch_dtype", None) or each.pop("dtype", None)
    assert {key: value for key, value in after.items() if before.get(key) != value} in (
        {},
        {"tie_word_embeddings": before.get("tie_word_embeddings")},
    )
    again, info = type(theirs).from_pretrained(tmp_path / "b", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    same(again.state_dict(), theirs.state_dict())


@pytest.mark.parametrize("name", CASES)
def test_written_without_a_source(name: str, tmp_path: Path) -> None:
    """The family is the first that has such a network, and the folder says all of it."""
    theirs = make(tmp_path / "a", name)
    spec, params = checkpoint.load(tmp_path / "a")
    names = checkpoint.label_keys(checkpoint.read_labels(tmp_path / "a")) if spec.labels else {}
    checkpoint.write(tmp_path / "b", spec, params, torch.float32, names)
    again, copied = checkpoint.load(tmp_path / "b")
    assert again == spec
    same(params, copied)
    loaded, given = type(theirs).config_class.from_pretrained(tmp_path / "b"), theirs.config
    assert config_of(tmp_path / "b")["model_type"] == _FIRST.get(given.model_type, given.model_type)
    assert loaded.id2label == given.id2label or not spec.labels


def batch(spec: Spec) -> tuple[np.ndarray, dict[str, torch.Tensor]]:
    """Three inputs, texts of different lengths where the network sees them as a whole: for us, and for them."""
    rng = np.random.default_rng(5)
    if spec.patch:
        images = rng.normal(size=(3, spec.channels, spec.image, spec.image)).astype(np.float32)
        return images, {"pixel_values": torch.from_numpy(images)}
    ids = rng.integers(5, spec.vocab, (3, 12))
    if not spec.labels and spec.causal:
        return ids, {"input_ids": torch.from_numpy(ids)}
    inside = np.arange(12) < np.array([[12], [5], [9]])
    pad = spec.first_position - 1 if spec.first_position else 0
    given = {"input_ids": np.where(inside, ids, pad), "attention_mask": inside.astype(np.int64)}
    return np.where(inside, ids, -1), {key: torch.from_numpy(value) for key, value in given.items()}


@pytest.mark.parametrize("name", CASES)
def test_the_network_computes_what_theirs_does(name: str, tmp_path: Path) -> None:
    theirs = make(tmp_path, name)
    spec, params = checkpoint.load(tmp_path)
    if spec.outputs:
        inputs, given = batch(spec)
        with torch.no_grad():
            expected = theirs(**given).logits
        got = model.forward(spec, params, model.batch(spec, inputs))
        torch.testing.assert_close(got.reshape(expected.shape), expected, rtol=1e-5, atol=1e-5)
        return
    for pool in ("first", "mean"):  # seen through a head that changes nothing
        seen = replace(spec, labels=spec.embed, pool=pool, pooler="" if pool == "mean" else spec.pooler)
        inputs, given = batch(seen)
        with torch.no_grad():
            out = theirs(**given)
        x_BSD = out.last_hidden_state
        if pool == "first":
            expected = out.pooler_output if spec.pooler else x_BSD[:, 0]
        elif spec.patch:
            expected = x_BSD[:, spec.before_patches :].mean(1)
        else:
            mask = given["attention_mask"][..., None]
            expected = (x_BSD * mask).sum(1) / mask.sum(1)
        got = model.forward(seen, params | {"head.weight": torch.eye(spec.embed)}, model.batch(seen, inputs))
        torch.testing.assert_close(got[:, 0], expected, rtol=1e-5, atol=1e-5)


# What the Hub holds besides


@pytest.mark.parametrize(
    ("name", "wrapped", "prefix"),
    [
        ("bert", "BertForMaskedLM", "bert."),
        ("bert", "BertForPreTraining", "bert."),
        ("bert", "BertForTokenClassification", "bert."),
        ("roberta", "RobertaForMaskedLM", "roberta."),
        ("distilbert", "DistilBertForMaskedLM", "distilbert."),
        ("deit", "DeiTForImageClassificationWithTeacher", "deit."),
        ("vit", "ViTForMaskedImageModeling", "vit."),
        ("dinov2 base", "Dinov2Backbone", "dinov2."),
    ],
)
def test_heads_of_other_tasks_are_left_out_and_listed(name: str, wrapped: str, prefix: str, tmp_path: Path) -> None:
    cls = getattr(transformers, wrapped)
    theirs = cls(cls.config_class(**CASES[name][1]))
    theirs.save_pretrained(tmp_path)
    spec, params = checkpoint.load(tmp_path)
    assert (spec.labels, spec.pool) == ((0, "first") if wrapped == "BertForPreTraining" else (0, ""))
    assert ("head.pool.weight" in params) == (wrapped == "BertForPreTraining")
    left = checkpoint.unused(tmp_path)
    in_body = {each for each in left if each.startswith(prefix)}
    assert in_body == {each for each in left if "mask_token" in each and prefix == "vit."}
    assert sum(p.numel() for p in params.values()) == theirs.num_parameters() - sum(
        p.numel() for each, p in theirs.named_parameters() if each in left
    )


@pytest.mark.parametrize(
    ("name", "prefix"), [("gpt2", "transformer."), ("llama tied, all heads, theta, biases", "model.")]
)
def test_names_without_prefix(name: str, prefix: str, tmp_path: Path) -> None:
    make(tmp_path, name)
    _, params = checkpoint.load(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors |= {f"{prefix}h.0.attn.bias": torch.ones(1, 1, 20, 20, dtype=torch.bool)}  # a buffer of old
    save_file({key.removeprefix(prefix): tensor for key, tensor in tensors.items()}, tmp_path / "model.safetensors")
    same(checkpoint.load(tmp_path)[1], params)
    assert list(checkpoint.unused(tmp_path)) == ["h.0.attn.bias"]
    (tensors := load_file(tmp_path / "model.safetensors")).pop("norm.weight" if name != "gpt2" else "ln_f.weight")
    save_file(tensors, tmp_path / "model.safetensors")
    assert message(tmp_path).startswith(
        "FOLDER/model.safetensors: tensor norm.weight is" if name != "gpt2" else "FOLDER/model.safetensors: tensor ln_f"
    )


def test_a_base_model_is_a_network_for_tokens_with_the_embedding_as_its_head(tmp_path: Path) -> None:
    theirs = transformers.LlamaModel(transformers.LlamaConfig(**CASES["llama"][1]))
    theirs.save_pretrained(tmp_path)
    spec, params = checkpoint.load(tmp_path)
    assert torch.equal(params["head.weight"], params["embed.tokens"]) and spec.causal


def test_gamma_and_beta_are_weight_and_bias(tmp_path: Path) -> None:
    make(tmp_path, "bert labels")
    _, params = checkpoint.load(tmp_path)
    old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    tensors = load_file(tmp_path / "model.safetensors")
    for new, end in old.items():
        tensors = {key.replace(new, end): tensor for key, tensor in tensors.items()}
    save_file(tensors, tmp_path / "model.safetensors")
    same(checkpoint.load(tmp_path)[1], params)
    assert not checkpoint.unused(tmp_path)


def test_old_configs_say_rotary_positions_otherwise(tmp_path: Path) -> None:
    make(tmp_path, "llama")
    new = checkpoint.read_spec(tmp_path)
    edit_config(tmp_path, rope_parameters=..., rope_theta=123.0, rope_scaling=None)
    assert checkpoint.read_spec(tmp_path) == replace(new, rotary=123.0)
    edit_config(tmp_path, rope_theta=..., head_dim=..., num_key_value_heads=..., attention_bias=..., mlp_bias=...)
    assert checkpoint.read_spec(tmp_path) == replace(new, kv_heads=0)
    edit_config(tmp_path, num_key_value_heads=None, rope_parameters={"type": "default", "rope_theta": 7})
    assert checkpoint.read_spec(tmp_path) == replace(new, kv_heads=0, rotary=7.0)


def test_missing_keys_are_what_they_are_in_transformers(tmp_path: Path) -> None:
    """A config with the bare sizes reads as the one that `transformers` completes it to."""
    required = {"n_layer", "n_embd", "n_head", "n_layers", "n_heads", "dim", "hidden_dim", "hidden_size", "n_positions"}
    required |= {"num_hidden_layers", "num_attention_heads", "intermediate_size", "max_position_embeddings"}
    required |= {"vocab_size", "sliding_window"}
    for name, row in FAMILIES.items():
        settings = CASES[name.replace("dinov2_with_", "dinov2 ")][1]
        sizes = {key: value for key, value in settings.items() if key in required}
        if name in ("qwen2", "qwen3", "mistral"):
            sizes |= {"num_attention_heads": 64, "hidden_size": 128, "sliding_window": None}
        (tmp_path / "config.json").write_text(json.dumps({"model_type": name, **sizes}))
        bare = checkpoint.read_spec(tmp_path)
        cls = getattr(transformers, row.base).config_class
        (tmp_path / "config.json").write_text(json.dumps({**cls(**sizes).to_dict(), "model_type": name}))
        assert checkpoint.read_spec(tmp_path) == bare, name


@pytest.mark.parametrize(
    ("name", "changes", "says"),
    [
        ("bert", {"is_decoder": True}, "is_decoder is True; this version runs False only"),
        (
            "bert",
            {"position_embedding_type": "relative_key"},
            "position_embedding_type is 'relative_key'; this version",
        ),
        (
            "bert",
            {"hidden_act": "quick_gelu"},
            "hidden_act is 'quick_gelu'; accepted: gelu, gelu_new, gelu_pytorch_tanh",
        ),
        (
            "bert",
            {"quantization_config": {"bits": 4}},
            "quantization_config is {'bits': 4}; this version runs None only",
        ),
        ("bert", {"pruned_heads": {"0": [1]}}, "pruned_heads is {'0': [1]}; this version runs {} only"),
        (
            "bert",
            {"type_vocab_size": 0},
            "FOLDER/config.json is not a usable network config: sizes must be positive; got",
        ),
        ("roberta", {"pad_token_id": None}, "is not a usable network config: int() argument must be"),
        ("dinov2", {"use_swiglu_ffn": True}, "use_swiglu_ffn is True; this version runs False only"),
        ("vit", {"image_size": [8, 16]}, "image_size and patch_size must be square, got [8, 16]"),
        ("vit", {"patch_size": 9}, "image_size must be at least patch_size; got"),
        ("vit", {"num_channels": 0}, "sizes must be positive; got"),
        ("vit", {"id2label": {"0": "a", "2": "b"}}, "id2label must number the labels 0, 1, 2, ...; got 0, 2"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "llama3", "factor": 8.0, "rope_theta": 1e4}},
            "rope_parameters.rope_type is 'llama3'; this version runs 'default' only",
        ),
        (
            "llama",
            {"rope_scaling": {"type": "linear", "factor": 2}},
            "rope_scaling.rope_type is 'linear'; this version",
        ),
        ("llama", {"num_key_value_heads": 4}, "num_attention_heads must be a multiple of num_key_value_heads; got"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act is 'gelu'; accepted: silu, swish"),
        ("qwen2", {"use_sliding_window": True}, "use_sliding_window is True; this version runs False only"),
        ("mistral", {"sliding_window": ...}, "sliding_window is 4096; this version runs None only"),
        ("mistral", {"vocab_size": 1 << 40}, "vocab_size is 1099511627776; accepted: at most 16777216"),
    ],
)
def test_configs_we_cannot_run(name: str, changes: dict[str, Any], says: str, tmp_path: Path) -> None:
    make(tmp_path, name)
    edit_config(tmp_path, **changes)
    said = message(tmp_path)
    assert said.startswith("FOLDER/config.json") and says in said


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_short_numbers_come_back_as_they_were(dtype: torch.dtype, tmp_path: Path) -> None:
    make(tmp_path / "a", "llama").to(dtype).save_pretrained(tmp_path / "a")
    spec, params = checkpoint.load(tmp_path / "a")
    assert {p.dtype for p in params.values()} == {torch.float32}
    checkpoint.write(tmp_path / "b", spec, params, dtype, {}, tmp_path / "a")
    same(load_file(tmp_path / "b" / "model.safetensors"), load_file(tmp_path / "a" / "model.safetensors"))
    assert "dtype" not in config_of(tmp_path / "b")
    assert transformers.AutoModel.from_pretrained(tmp_path / "b", dtype="auto").dtype == dtype


def test_labels_are_read(tmp_path: Path) -> None:
    make(tmp_path, "bert labels")
    assert checkpoint.read_labels(tmp_path) == ("sad", "so so", "glad")
    edit_config(tmp_path, id2label=..., label2id=...)
    assert checkpoint.read_labels(tmp_path) == ("LABEL_0", "LABEL_1")
    edit_config(tmp_path, architectures=["BertModel"])
    assert checkpoint.read_labels(tmp_path) == ()


# Files


def shard(folder: Path) -> dict[str, Any]:
    """The same weights in three files and an index."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    places = {name: f"model-{i % 3 + 1:05}-of-00003.safetensors" for i, name in enumerate(sorted(tensors))}
    for path in set(places.values()):
        save_file({name: tensors[name] for name in tensors if places[name] == path}, folder / path)
    index = {"metadata": {}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return index


def test_shards(tmp_path: Path) -> None:
    make(tmp_path, "llama")
    spec, params = checkpoint.load(tmp_path)
    whole = load_file(tmp_path / "model.safetensors")
    shard(tmp_path)
    again, copied = checkpoint.load(tmp_path)
    assert again == spec
    same(copied, params)
    weights.merge(weights.entries(tmp_path), tmp_path / "merged.safetensors")
    same(load_file(tmp_path / "merged.safetensors"), whole)


def test_merging_keeps_any_type_of_number(tmp_path: Path) -> None:
    tensors = {
        "a": torch.tensor([True, False, True]),
        "b": torch.tensor(7),
        "c": torch.randn(3, 3).to(torch.float8_e4m3fn),
        "d": torch.zeros(0, 4),
        "e": torch.randn(5).bfloat16(),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    weights.merge(weights.entries(tmp_path), tmp_path / "merged.safetensors")
    again = load_file(tmp_path / "merged.safetensors")
    assert again.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert again[name].dtype == tensor.dtype and again[name].shape == tensor.shape
        assert again[name].flatten().view(torch.uint8).equal(tensor.flatten().view(torch.uint8))


INDEX = "FOLDER/model.safetensors.index.json"


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{", f"{INDEX} is not an index of shards"),
        ("[]", f"{INDEX} is not an index of shards"),
        ('{"weight_map": ["a"]}', f"{INDEX} is not an index of shards"),
        ('{"weight_map": {}}', f"{INDEX} names no tensors"),
        (
            '{"weight_map": {"a": "../x.safetensors"}}',
            f"{INDEX} names '../x.safetensors'; a shard is a .safetensors file",
        ),
        ('{"weight_map": {"a": "/etc/x.safetensors"}}', f"{INDEX} names '/etc/x.safetensors'; a shard"),
        ('{"weight_map": {"a": "x.bin"}}', f"{INDEX} names 'x.bin'; a shard is a .safetensors file in the same folder"),
        ('{"weight_map": {"a": "x.safetensors"}}', f"{INDEX} names x.safetensors, which is missing"),
        (
            '{"weight_map": {"a": "model-00001-of-00003.safetensors"}}',
            f"{INDEX} says that a is in model-00001-of-00003.safetensors, but it is not",
        ),
    ],
)
def test_an_index_that_cannot_be_used(content: str, says: str, tmp_path: Path) -> None:
    make(tmp_path, "bert labels")
    shard(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(content)
    assert message(tmp_path).startswith(says)


def test_a_missing_and_a_truncated_shard(tmp_path: Path) -> None:
    make(tmp_path, "bert labels")
    shard(tmp_path)
    path = tmp_path / "model-00002-of-00003.safetensors"
    path.write_bytes(path.read_bytes()[:-5])
    assert message(tmp_path).startswith(
        "FOLDER/model-00002-of-00003.safetensors is truncated or not a safetensors file"
    )
    path.unlink()
    assert message(tmp_path) == f"{INDEX} names model-00002-of-00003.safetensors, which is missing"


def test_a_header_larger_than_the_file(tmp_path: Path) -> None:
    make(tmp_path, "bert labels")
    path = tmp_path / "model.safetensors"
    path.write_bytes((1 << 40).to_bytes(8, "little") + path.read_bytes()[8:])
    assert message(tmp_path).startswith("FOLDER/model.safetensors is truncated or not a safetensors file")


def test_pickles_are_not_opened(tmp_path: Path) -> None:
    make(tmp_path, "bert labels")
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    said = message(tmp_path)
    assert said.startswith("the weights in FOLDER are in pytorch_model.bin, and lamina opens safetensors only")
    assert "save_pretrained(FOLDER, safe_serialization=True)" in said


@pytest.mark.parametrize(
    ("name", "tensor", "says"),
    [
        (
            "bert labels",
            {"classifier.weight": torch.zeros(3, 13)},
            "classifier.weight has shape (3, 13); config.json asks for (3, 12)",
        ),
        (
            "bert labels",
            {"classifier.weight": torch.zeros(4, 12)},
            "classifier.weight has shape (4, 12); config.json asks for (3, 12)",
        ),
        (
            "llama",
            {"model.layers.1.self_attn.k_proj.weight": torch.zeros(12, 12)},
            "k_proj.weight has shape (12, 12); config.json asks for (4, 12)",
        ),
        (
            "vit",
            {"vit.embeddings.position_embeddings": torch.zeros(1, 16, 12)},
            "has shape (1, 16, 12); config.json asks for (1, 17, 12)",
        ),
        ("vit", {"vit.embeddings.cls_token": torch.zeros(12)}, "has shape (12,); config.json asks for (1, 1, 12)"),
        ("dinov2", {"classifier.weight": torch.zeros(3, 12)}, "has shape (3, 12); config.json asks for (3, 24)"),
        (
            "llama",
            {"lm_head.weight": torch.zeros(31, 12, dtype=torch.int8)},
            "lm_head.weight is stored as I8; accepted: F32, F16, BF16",
        ),
        (
            "llama",
            {"model.norm.weight": torch.full((12,), torch.nan)},
            "tensor for norm.weight holds values that are not finite",
        ),
        (
            "llama",
            {"model.norm.weight": torch.full((12,), torch.inf)},
            "tensor for norm.weight holds values that are not finite",
        ),
    ],
)
def test_tensors_we_cannot_use(name: str, tensor: dict[str, torch.Tensor], says: str, tmp_path: Path) -> None:
    make(tmp_path, name)
    save_file(load_file(tmp_path / "model.safetensors") | tensor, tmp_path / "model.safetensors")
    said = message(tmp_path)
    assert said.startswith("FOLDER/model.safetensors: ") and says in said


# Beside the layout of Hugging Face


def test_a_head_that_no_class_has_goes_beside(tmp_path: Path) -> None:
    make(tmp_path / "a", "bert labels")
    given, params = checkpoint.load(tmp_path / "a")
    spec = replace(given, pool="mean", pooler="")
    params = {name: params[name] for name in layout(spec).params}
    checkpoint.write(tmp_path / "b", spec, params, torch.float32, {}, tmp_path / "a")
    assert config_of(tmp_path / "b")["architectures"] == ["BertModel"]
    base, _ = checkpoint.load(tmp_path / "b")
    assert base.labels == 0 and base.pooler == "tanh"  # the pooler is carried over
    whole, copied = checkpoint.load_whole(tmp_path / "b")
    assert whole == spec
    same(copied, params)
    assert transformers.AutoModel.from_pretrained(tmp_path / "b").config.architectures == ["BertModel"]
    beside = tmp_path / "b" / checkpoint.OURS
    for content in (beside.read_bytes()[:-1], (tmp_path / "a" / "model.safetensors").read_bytes()):
        beside.write_bytes(content)
        with pytest.raises(UserError, match=r"lamina\.safetensors is truncated or not written by lamina"):
            checkpoint.load_whole(tmp_path / "b")


@pytest.mark.parametrize(
    ("name", "wrapped", "written"),
    [
        ("bert", "BertForPreTraining", "BertForSequenceClassification"),
        ("vit", "ViTForMaskedImageModeling", "ViTForImageClassification"),
    ],
)
def test_with_a_new_head_the_old_one_stays_behind(name: str, wrapped: str, written: str, tmp_path: Path) -> None:
    """What else the base model has goes along."""
    cls = getattr(transformers, wrapped)
    cls(cls.config_class(**CASES[name][1])).save_pretrained(tmp_path / "a")
    found, params = checkpoint.load(tmp_path / "a")
    spec = replace(found, labels=4, pool="first", head_bias=True)
    params |= {"head.weight": torch.ones(4, spec.embed), "head.bias": torch.ones(4)}
    checkpoint.write(tmp_path / "b", spec, params, torch.float32, {}, tmp_path / "a")
    before, after = (set(load_file(tmp_path / each / "model.safetensors")) for each in "ab")
    assert config_of(tmp_path / "b")["architectures"] == [written]
    assert after == {each for each in before if each.startswith(f"{name}.")} | {"classifier.weight", "classifier.bias"}


def test_what_no_family_has_is_refused() -> None:
    with pytest.raises(UserError, match=r"^no family of transformers has such a network: .*qk_norm = True"):
        express(replace(Spec(2, 12, 3, 4, 14, 31, 20), qk_norm=True), {})
