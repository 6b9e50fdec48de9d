"""The families of `transformers` that we run, a row each; what a row says, and what follows from it: `lamina.family`.

Configs and names are those of `transformers` 5.23, and of the folders on the Hub that its older versions wrote.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lamina.errors import UserError, nearest
from lamina.family import Config, Family, Head, Key, shown
from lamina.spec import LINEARS, Spec

_QKV = ("attn.q", "attn.k", "attn.v")
_SILU = {"silu": "silu", "swish": "silu"}
_ACTS = {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "relu": "relu"} | _SILU


def _act(name: str, default: str, values: Mapping[str, str] = _ACTS) -> Key:
    return Key(name, "act", default, values=values)


def _eps(name: str, default: float) -> Key:
    return Key(name, "norm_eps", default, into=lambda value, known: float(value))


def _bias(name: str, default: bool, which: tuple[str, ...]) -> Key:
    """Whether some linears have a bias."""

    def into(given: Any, known: Mapping[str, Any]) -> tuple[str, ...]:
        others = set(known.get("biases", LINEARS)) - set(which)
        return tuple(linear for linear in LINEARS if linear in others or (given and linear in which))

    return Key(name, "biases", default, into, lambda biases, spec: which[0] in biases)


def _share(known: Mapping[str, Any]) -> int:
    """Width of a head where nothing is said."""
    share, rest = divmod(known["embed"], known["heads"])
    if rest:
        raise ValueError(f"{known['heads']} heads do not divide the width {known['embed']}")
    return int(share)


def _head_dim(default: Any = _share) -> Key:
    """Real in some families; in the others a key of ours, for networks that were cut in width."""
    return Key("head_dim", "head_dim", default, optional=True)


def _side(given: Any, known: Mapping[str, Any]) -> int:
    """Images and patches are squares, given by one side or by both."""
    sides = given if isinstance(given, (list, tuple)) else (given, given)
    if len(set(sides)) != 1 or len(sides) != 2:
        raise ValueError(f"image_size and patch_size must be square, got {given}")
    return int(sides[0])


def _theta(config: Config) -> Any:
    """Base of rotary positions: on its own, or in a table of parameters.

    Raises:
        UserError: The table asks for more than the plain rotation of all dimensions.
    """
    for name in ("rope_scaling", "rope_parameters"):
        table = config.get(name) or {}
        kind = table.get("rope_type", table.get("type", "default"))
        if kind != "default":
            raise UserError(f"{name}.rope_type is {kind!r}; this version runs 'default' only")
        if "rope_theta" in table:
            return table["rope_theta"]
    return config.get("rope_theta", ...)


_ROTARY = Key("rope_theta", "rotary", 10000.0, lambda value, known: float(value), find=_theta)


def _kv(default: Any) -> Key:
    def into(given: Any, known: Mapping[str, Any]) -> int:
        return 0 if int(given) == known["heads"] else int(given)

    return Key("num_key_value_heads", "kv_heads", default, into, lambda value, spec: value or spec.heads)


# Text, from left to right: norms first, one head per token.

_GPT2 = Family(
    name="gpt2",
    prefix="transformer.",
    keys=(
        _act("activation_function", "gelu_new"),
        Key("n_layer", "blocks"),
        Key("n_embd", "embed"),
        Key("n_head", "heads"),
        Key("n_inner", "ffn", lambda known: 4 * known["embed"]),
        Key("vocab_size", "vocab"),
        Key("n_positions", "positions"),
        _eps("layer_norm_epsilon", 1e-5),
        _head_dim(),
    ),
    fields={},
    only={"scale_attn_weights": (True, True), "scale_attn_by_inverse_layer_idx": (False, False)},
    body={
        "embed.tokens": "wte.weight",
        "embed.positions": "wpe.weight",
        "h.{i}.norm1": "h.{i}.ln_1",
        "h.{i}.attn.q": "h.{i}.attn.c_attn[0]",
        "h.{i}.attn.k": "h.{i}.attn.c_attn[1]",
        "h.{i}.attn.v": "h.{i}.attn.c_attn[2]",
        "h.{i}.attn.o": "h.{i}.attn.c_proj",
        "h.{i}.norm2": "h.{i}.ln_2",
        "h.{i}.ffn.up": "h.{i}.mlp.c_fc",
        "h.{i}.ffn.down": "h.{i}.mlp.c_proj",
        "norm": "ln_f",
    },
    heads={
        "GPT2Model": Head(names={"head": "lm_head"}),
        "GPT2LMHeadModel": Head(names={"head": "lm_head"}),
        "GPT2ForSequenceClassification": Head({"pool": "last"}, {"head": "score"}, classifies=True),
    },
    transposed=True,
)


def _llama(name: str, stem: str, positions: int, *keys: Key, **fields: Any) -> Family:
    """Llama and its kin: RMS norms, rotary positions, grouped queries, a gated feed-forward part."""
    only = fields.pop("only", {})
    return Family(
        name=name,
        prefix="model.",
        keys=(
            _act("hidden_act", "silu", _SILU),
            Key("num_hidden_layers", "blocks"),
            Key("hidden_size", "embed"),
            Key("num_attention_heads", "heads"),
            Key("intermediate_size", "ffn"),
            Key("vocab_size", "vocab"),
            Key("max_position_embeddings", "positions", positions),
            _eps("rms_norm_eps", 1e-6),
            _ROTARY,
            *keys,
        ),
        fields={"norm": "rms", "gated": True, "biases": (), **fields},
        only=only,
        body={
            "embed.tokens": "embed_tokens.weight",
            "h.{i}.norm1": "layers.{i}.input_layernorm",
            "h.{i}.attn.q": "layers.{i}.self_attn.q_proj",
            "h.{i}.attn.k": "layers.{i}.self_attn.k_proj",
            "h.{i}.attn.v": "layers.{i}.self_attn.v_proj",
            "h.{i}.attn.o": "layers.{i}.self_attn.o_proj",
            "h.{i}.attn.q_norm": "layers.{i}.self_attn.q_norm",
            "h.{i}.attn.k_norm": "layers.{i}.self_attn.k_norm",
            "h.{i}.norm2": "layers.{i}.post_attention_layernorm",
            "h.{i}.ffn.gate": "layers.{i}.mlp.gate_proj",
            "h.{i}.ffn.up": "layers.{i}.mlp.up_proj",
            "h.{i}.ffn.down": "layers.{i}.mlp.down_proj",
            "norm": "norm",
        },
        heads={
            f"{stem}Model": Head(names={"head": "lm_head"}),
            f"{stem}ForCausalLM": Head(names={"head": "lm_head"}),
            f"{stem}ForSequenceClassification": Head({"pool": "last"}, {"head": "score"}, classifies=True),
        },
    )


_FULL = {"use_sliding_window": (False, False)}

# Text as a whole: norms last, an embedding with a norm, a head for all.


def _bert(name: str, stem: str, prefix: str, head: Head, *keys: Key) -> Family:
    """BERT and its kin."""
    return Family(
        name=name,
        prefix=prefix,
        keys=(
            _act("hidden_act", "gelu"),
            Key("num_hidden_layers", "blocks"),
            Key("hidden_size", "embed"),
            Key("num_attention_heads", "heads"),
            Key("intermediate_size", "ffn"),
            Key("vocab_size", "vocab"),
            Key("max_position_embeddings", "positions"),
            Key("type_vocab_size", "types", 2),
            _eps("layer_norm_eps", 1e-12),
            _head_dim(),
            *keys,
        ),
        fields={"post_norm": True, "final_norm": False, "embed_norm": True, "causal": False},
        only={"is_decoder": (False, False), "position_embedding_type": ("absolute", "absolute")},
        body={
            "embed.tokens": "embeddings.word_embeddings.weight",
            "embed.positions": "embeddings.position_embeddings.weight",
            "embed.types": "embeddings.token_type_embeddings.weight",
            "embed.norm": "embeddings.LayerNorm",
            "h.{i}.attn.q": "encoder.layer.{i}.attention.self.query",
            "h.{i}.attn.k": "encoder.layer.{i}.attention.self.key",
            "h.{i}.attn.v": "encoder.layer.{i}.attention.self.value",
            "h.{i}.attn.o": "encoder.layer.{i}.attention.output.dense",
            "h.{i}.norm1": "encoder.layer.{i}.attention.output.LayerNorm",
            "h.{i}.ffn.up": "encoder.layer.{i}.intermediate.dense",
            "h.{i}.ffn.down": "encoder.layer.{i}.output.dense",
            "h.{i}.norm2": "encoder.layer.{i}.output.LayerNorm",
            "head.pool": "pooler.dense",
        },
        heads={f"{stem}Model": Head({"pool": "first", "pooler": "tanh"}), f"{stem}ForSequenceClassification": head},
    )


_BERT_HEAD = Head({"pool": "first", "pooler": "tanh", "head_bias": True}, {"head": "classifier"}, classifies=True)
_ROBERTA_HEAD = Head(
    {"pool": "first", "pooler": "tanh", "head_bias": True},
    {"head.pool": "classifier.dense", "head": "classifier.out_proj"},
    classifies=True,
)
_AFTER_PADDING = Key(  # positions count from the one after the padding token's number
    "pad_token_id", "first_position", 1, lambda value, known: int(value) + 1, lambda value, spec: value - 1
)
_DISTILBERT = Family(
    name="distilbert",
    prefix="distilbert.",
    keys=(
        _act("activation", "gelu"),
        Key("n_layers", "blocks"),
        Key("dim", "embed"),
        Key("n_heads", "heads"),
        Key("hidden_dim", "ffn"),
        Key("vocab_size", "vocab"),
        Key("max_position_embeddings", "positions"),
        _head_dim(),
    ),
    fields={"post_norm": True, "final_norm": False, "embed_norm": True, "causal": False, "norm_eps": 1e-12},
    body={
        "embed.tokens": "embeddings.word_embeddings.weight",
        "embed.positions": "embeddings.position_embeddings.weight",
        "embed.norm": "embeddings.LayerNorm",
        "h.{i}.attn.q": "transformer.layer.{i}.attention.q_lin",
        "h.{i}.attn.k": "transformer.layer.{i}.attention.k_lin",
        "h.{i}.attn.v": "transformer.layer.{i}.attention.v_lin",
        "h.{i}.attn.o": "transformer.layer.{i}.attention.out_lin",
        "h.{i}.norm1": "transformer.layer.{i}.sa_layer_norm",
        "h.{i}.ffn.up": "transformer.layer.{i}.ffn.lin1",
        "h.{i}.ffn.down": "transformer.layer.{i}.ffn.lin2",
        "h.{i}.norm2": "transformer.layer.{i}.output_layer_norm",
    },
    heads={
        "DistilBertModel": Head(),
        "DistilBertForSequenceClassification": Head(
            {"pool": "first", "pooler": "relu", "head_bias": True},
            {"head.pool": "pre_classifier", "head": "classifier"},
            classifies=True,
        ),
    },
)

# Images: patches behind one or two learned vectors, norms first.

_VIT_BODY = {
    "embed.patches": "embeddings.patch_embeddings.projection",
    "embed.leads": "embeddings.cls_token",
    "embed.positions": "embeddings.position_embeddings",
    "h.{i}.attn.q": "encoder.layer.{i}.attention.attention.query",
    "h.{i}.attn.k": "encoder.layer.{i}.attention.attention.key",
    "h.{i}.attn.v": "encoder.layer.{i}.attention.attention.value",
    "h.{i}.attn.o": "encoder.layer.{i}.attention.output.dense",
    "norm": "layernorm",
}
_VIT_MLP = {
    "h.{i}.norm1": "encoder.layer.{i}.layernorm_before",
    "h.{i}.norm2": "encoder.layer.{i}.layernorm_after",
    "h.{i}.ffn.up": "encoder.layer.{i}.intermediate.dense",
    "h.{i}.ffn.down": "encoder.layer.{i}.output.dense",
}
_DINO_MLP = {
    "h.{i}.norm1": "encoder.layer.{i}.norm1",
    "h.{i}.scale1": "encoder.layer.{i}.layer_scale1.lambda1",
    "h.{i}.norm2": "encoder.layer.{i}.norm2",
    "h.{i}.ffn.up": "encoder.layer.{i}.mlp.fc1",
    "h.{i}.ffn.down": "encoder.layer.{i}.mlp.fc2",
    "h.{i}.scale2": "encoder.layer.{i}.layer_scale2.lambda1",
}
_VIT_MODULES = {
    "h.{i}.attn.q": "layers.{i}.attention.q_proj",
    "h.{i}.attn.k": "layers.{i}.attention.k_proj",
    "h.{i}.attn.v": "layers.{i}.attention.v_proj",
    "h.{i}.attn.o": "layers.{i}.attention.o_proj",
    "h.{i}.ffn.up": "layers.{i}.mlp.fc1",
    "h.{i}.ffn.down": "layers.{i}.mlp.fc2",
}
_DINO_MODULES = {ours: theirs.replace("layers.", "encoder.layer.") for ours, theirs in _VIT_MODULES.items()}
_FFN = Key("intermediate_size", "ffn")
_RATIO = Key(  # `transformers` rounds down
    "mlp_ratio",
    "ffn",
    4,
    lambda value, known: int(known["embed"] * value),
    lambda value, spec: value // spec.embed if value % spec.embed == 0 else (value + 0.5) / spec.embed,
)


def _vit(
    name: str, stem: str, ffn: Key, patch: int, eps: float, body: dict[str, str], *keys: Key, **fields: Any
) -> Family:
    """ViT and its kin."""
    pool = "first_mean" if fields.get("layer_scale") else "first"
    return Family(
        name=name,
        prefix=f"{name}.",
        keys=(
            _act("hidden_act", "gelu"),
            Key("num_hidden_layers", "blocks"),
            Key("hidden_size", "embed"),
            Key("num_attention_heads", "heads"),
            ffn,
            Key("image_size", "image", 224, _side),
            Key("patch_size", "patch", patch, _side),
            Key("num_channels", "channels", 3),
            _eps("layer_norm_eps", eps),
            _bias("qkv_bias", True, _QKV),
            _head_dim(),
            *keys,
        ),
        fields={"vocab": 0, "causal": False, "leads": 1, **fields},
        only={"use_swiglu_ffn": (False, False)},
        body=_VIT_BODY | body,
        heads={
            f"{stem}Model": Head(),
            f"{stem}ForImageClassification": Head(
                {"pool": pool, "head_bias": True}, {"head": "classifier"}, classifies=True
            ),
        },
        batched=frozenset(
            f"embeddings.{each}"
            for each in ("cls_token", "distillation_token", "position_embeddings", "register_tokens")
        ),
        modules=_DINO_MODULES if fields.get("layer_scale") else _VIT_MODULES,
    )


_ROWS = (
    _GPT2,
    _bert("bert", "Bert", "bert.", _BERT_HEAD),
    _bert("roberta", "Roberta", "roberta.", _ROBERTA_HEAD, _AFTER_PADDING),
    _bert("xlm-roberta", "XLMRoberta", "roberta.", _ROBERTA_HEAD, _AFTER_PADDING),
    _DISTILBERT,
    _vit("vit", "ViT", _FFN, 16, 1e-12, _VIT_MLP),
    _vit(
        *("deit", "DeiT", _FFN, 16, 1e-12),
        _VIT_MLP | {"embed.leads": "embeddings.cls_token + embeddings.distillation_token"},
        leads=2,
    ),
    _vit("dinov2", "Dinov2", _RATIO, 14, 1e-6, _DINO_MLP, layer_scale=True),
    _vit(
        *("dinov2_with_registers", "Dinov2WithRegisters", _RATIO, 16, 1e-6),
        _DINO_MLP | {"embed.registers": "embeddings.register_tokens"},
        Key("num_register_tokens", "registers", 4),
        layer_scale=True,
    ),
    _llama(
        *("llama", "Llama", 2048),
        *(_kv(lambda known: known["heads"]), _head_dim()),
        _bias("attention_bias", False, (*_QKV, "attn.o")),
        _bias("mlp_bias", False, ("ffn.gate", "ffn.up", "ffn.down")),
    ),
    _llama("qwen2", "Qwen2", 32768, _kv(32), _head_dim(), biases=_QKV, only=_FULL),
    _llama(
        *("qwen3", "Qwen3", 32768),
        *(_kv(32), _head_dim(128), _bias("attention_bias", False, (*_QKV, "attn.o"))),
        qk_norm=True,
        only=_FULL,
    ),
    _llama("mistral", "Mistral", 1 << 17, _kv(8), _head_dim(), only={"sliding_window": (4096, None)}),
)
FAMILIES = {row.name: row for row in _ROWS}
"""By `model_type`; of those that can express the same network, the first is written."""


def family_of(config: Config) -> Family:
    """The row of a config.

    Raises:
        UserError: There is none.
    """
    given = config.get("model_type")
    if not isinstance(given, str) or given not in FAMILIES:
        raise UserError(f"model_type is {given!r}; {nearest(str(given), FAMILIES)}")
    return FAMILIES[given]


def express(spec: Spec, base: Config) -> tuple[Family, str, dict[str, Any], bool]:
    """The family, class and config of a network, and whether that class has its head too.

    Args:
        spec: The network, without additions.
        base: The config it came from, if any: its family goes first, and its other keys are kept.

    Raises:
        UserError: No family has such a network.
    """
    own = [FAMILIES[base["model_type"]]] if base.get("model_type") in FAMILIES else []
    rows = [*own, *FAMILIES.values()]
    for family, architecture in [*((row, row.class_for(spec)) for row in rows), *((row, None) for row in rows)]:
        config = family.config(spec, architecture or family.base, base if family in own else {})
        if config is not None and (architecture or spec.labels):
            return family, architecture or family.base, config, architecture is not None
    raise UserError(f"no family of transformers has such a network: {shown(spec)}; families: {', '.join(FAMILIES)}")
