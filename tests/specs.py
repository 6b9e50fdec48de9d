"""One small network of each family, no two sizes alike where a mix-up could hide."""

from __future__ import annotations

from dataclasses import replace

from lamina.spec import Spec

TOKENS = 10
"""Longest text that all of them take."""
GPT2 = Spec(3, embed=24, heads=3, head_dim=8, ffn=40, vocab=31, positions=12)
BERT = replace(
    GPT2,
    norm_eps=1e-12,
    post_norm=True,
    final_norm=False,
    embed_norm=True,
    act="gelu",
    causal=False,
    types=2,
    labels=3,
    pool="first",
    pooler="tanh",
    head_bias=True,
)
VIT = replace(
    GPT2,
    vocab=0,
    positions=10,
    act="gelu",
    causal=False,
    patch=4,
    image=12,
    leads=1,
    labels=5,
    pool="first",
    head_bias=True,
)
LLAMA = replace(
    GPT2,
    heads=6,
    kv_heads=2,
    head_dim=4,
    positions=16,
    norm="rms",
    act="silu",
    gated=True,
    biases=(),
    rotary=10000.0,
)
SPECS = {
    "gpt2": GPT2,
    "gpt2, classes": replace(GPT2, labels=4, pool="last"),
    "bert": BERT,
    "roberta": replace(BERT, first_position=2, types=1),
    "distil": replace(BERT, types=0, pooler="relu"),
    "minilm": replace(BERT, pool="mean", pooler=""),
    "vit": VIT,
    "deit": replace(VIT, leads=2, positions=11),
    "dinov2": replace(VIT, registers=3, layer_scale=True, pool="first_mean"),
    "llama": LLAMA,
    "qwen2": replace(LLAMA, kv_heads=3, biases=("attn.q", "attn.k", "attn.v")),
    "qwen3": replace(LLAMA, head_dim=6, rotary=1e6, qk_norm=True),
    "qwen3, classes": replace(LLAMA, head_dim=6, qk_norm=True, labels=4, pool="last"),
}
