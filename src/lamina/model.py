"""The one Transformer, as pure functions of the tensors they are given.

Causal text, pre-LN, as GPT-2 (Radford et al. 2019): learned positions, tanh-GELU, biases, head not tied to the
embedding. Every size is read from the tensors and the blocks that are found are run, so a network cut in depth, width
or rank needs no second model class.

The functions are written against `lamina.ops`, a handful of kernels, so that they can be priced without being run.

Shape legend:
    B batch   S tokens   D embed   H heads   K head_dim   F ffn   V vocabulary   P positions   R rank
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor

from lamina.layout import Axis, Layout, Param, Params, Part
from lamina.ops import TORCH, Ops

LINEARS = ("attn.q", "attn.k", "attn.v", "attn.o", "ffn.up", "ffn.down")


@dataclass(frozen=True)
class Lora:
    """Low-rank additions to linear layers: y = W x + (alpha / rank) B A x (Hu et al. 2022, section 4.1).

    Attributes:
        rank: Rows of A and columns of B.
        alpha: Numerator of the scale.
        targets: Which linears of a block get one; names from `LINEARS`.
    """

    rank: int
    alpha: float
    targets: tuple[str, ...]


@dataclass(frozen=True)
class Spec:
    """Sizes of a network: all that is needed to know its layout.

    Attributes:
        blocks: Number of blocks.
        embed: Width D of the residual stream.
        heads: Attention heads H per block.
        head_dim: Width K of a head.
        ffn: Hidden width F of the feed-forward part.
        vocab: Number of tokens V.
        positions: Longest sequence P.
        norm_eps: Epsilon of the layer norms.
        lora: Low-rank additions, if any.
    """

    blocks: int
    embed: int
    heads: int
    head_dim: int
    ffn: int
    vocab: int
    positions: int
    norm_eps: float = 1e-5
    lora: Lora | None = None


@cache
def layout(spec: Spec) -> Layout:
    """Names, axes and sizes of every tensor of the network `spec` describes."""
    d, k = Axis("embed"), Axis("head_dim")
    sizes = {d: spec.embed, k: spec.head_dim, Axis("vocab"): spec.vocab, Axis("positions"): spec.positions}
    rows: dict[str, Param] = {
        "embed.tokens": Param((Axis("vocab"), d), "embed"),
        "embed.positions": Param((Axis("positions"), d), "embed"),
    }
    if spec.lora:
        sizes[Axis("rank")] = spec.lora.rank
    for i in range(spec.blocks):
        heads, ffn = Axis(f"h.{i}.heads"), Axis(f"h.{i}.ffn")
        sizes |= {heads: spec.heads, ffn: spec.ffn}
        rows |= _norm(f"h.{i}.norm1", i)
        for short in ("q", "k", "v"):
            rows |= _linear(spec, i, f"attn.{short}", (heads, k), (d,))
        rows |= _linear(spec, i, "attn.o", (d,), (heads, k))
        rows |= _norm(f"h.{i}.norm2", i)
        rows |= _linear(spec, i, "ffn.up", (ffn,), (d,))
        rows |= _linear(spec, i, "ffn.down", (d,), (ffn,))
    rows |= _norm("norm", None)
    rows["head.weight"] = Param((Axis("vocab"), d), "head")
    return Layout(rows, sizes, spec.blocks)


def _norm(name: str, block: int | None) -> dict[str, Param]:
    return {f"{name}.{end}": Param((Axis("embed"),), "norm", block) for end in ("weight", "bias")}


def _linear(spec: Spec, block: int, short: str, out: tuple[Axis, ...], into: tuple[Axis, ...]) -> dict[str, Param]:
    name = f"h.{block}.{short}"
    part: Part = "attn" if short.startswith("attn") else "ffn"
    rows = {f"{name}.weight": Param(out + into, part, block), f"{name}.bias": Param(out, part, block)}
    if spec.lora and short in spec.lora.targets:
        rank = Axis("rank")
        rows[f"{name}.lora_a"] = Param((rank, *into), "lora", block)
        rows[f"{name}.lora_b"] = Param((*out, rank), "lora", block)
    return rows


def init(spec: Spec, generator: torch.Generator) -> Params:
    """Fresh weights: normal(0.02) as GPT-2, residual outputs scaled by 1/sqrt(2 blocks), norms at identity.

    LoRA's A is uniform within 1/sqrt(inputs), which is what Kaiming with a = sqrt(5) gives, and B is zero (the code of
    Hu et al. 2022), so an adapted network starts as the network itself.
    """
    shape = layout(spec)
    params: Params = {}
    for name, row in shape.params.items():
        size = shape.shape(name)
        if name.endswith("lora_a"):
            bound = 1 / math.sqrt(math.prod(size[1:]))
            params[name] = torch.empty(size).uniform_(-bound, bound, generator=generator)
        elif row.part == "norm" and name.endswith("weight"):
            params[name] = torch.ones(size)
        elif name.endswith(("bias", "lora_b")):
            params[name] = torch.zeros(size)
        else:
            residual = name.endswith(("attn.o.weight", "ffn.down.weight"))
            std = 0.02 / math.sqrt(2 * spec.blocks) if residual else 0.02
            params[name] = torch.empty(size).normal_(0, std, generator=generator)
    return params


def found_blocks(spec: Spec, params: Params) -> list[int]:
    """Indices of the blocks present in `params`, in order."""
    return [i for i in range(spec.blocks) if f"h.{i}.norm1.weight" in params]


def embed(spec: Spec, params: Params, ids_BS: Tensor, ops: Ops = TORCH) -> Tensor:
    """Ids BS -> residual stream BSD."""
    return ops.embed(ids_BS, params["embed.tokens"], params["embed.positions"])


def run_blocks(spec: Spec, params: Params, x_BSD: Tensor, blocks: Iterable[int], ops: Ops = TORCH) -> Tensor:
    """Residual stream BSD through the named blocks."""
    for i in blocks:
        x_BSD = _block(spec, params, x_BSD, i, ops)
    return x_BSD


def head(spec: Spec, params: Params, x_BSD: Tensor, ops: Ops = TORCH) -> Tensor:
    """Residual stream BSD -> logits BSV."""
    return ops.linear(final_norm(spec, params, x_BSD, ops), params["head.weight"])


def final_norm(spec: Spec, params: Params, x_BSD: Tensor, ops: Ops = TORCH) -> Tensor:
    """Residual stream BSD -> what the head sees, BSD."""
    return ops.norm(x_BSD, params["norm.weight"], params["norm.bias"], spec.norm_eps)


def loss(
    spec: Spec, params: Params, x_BSD: Tensor, targets_BS: Tensor, chunked: bool = False, ops: Ops = TORCH
) -> Tensor:
    """Residual stream BSD, targets BS -> mean negative log-likelihood."""
    x_BSD = final_norm(spec, params, x_BSD, ops)
    if chunked:
        return ops.linear_cross_entropy(x_BSD, params["head.weight"], targets_BS)
    return ops.cross_entropy(ops.linear(x_BSD, params["head.weight"]), targets_BS)


def forward(spec: Spec, params: Params, ids_BS: Tensor, ops: Ops = TORCH) -> Tensor:
    """Ids BS -> logits BSV, through every block found."""
    x_BSD = embed(spec, params, ids_BS, ops)
    return head(spec, params, run_blocks(spec, params, x_BSD, found_blocks(spec, params), ops), ops)


def _block(spec: Spec, params: Params, x_BSD: Tensor, i: int, ops: Ops) -> Tensor:
    def norm(x: Tensor, short: str) -> Tensor:
        return ops.norm(x, params[f"h.{i}.{short}.weight"], params[f"h.{i}.{short}.bias"], spec.norm_eps)

    def linear(x: Tensor, short: str) -> Tensor:
        return _adapted_linear(spec, params, x, f"h.{i}.{short}", ops)

    heads = params[f"h.{i}.attn.q.weight"].shape[0]
    y_BSD = norm(x_BSD, "norm1")
    q_BSE, k_BSE, v_BSE = (linear(y_BSD, f"attn.{short}") for short in "qkv")
    x_BSD = ops.add(x_BSD, linear(ops.attention(q_BSE, k_BSE, v_BSE, heads), "attn.o"))
    y_BSF = ops.gelu(linear(norm(x_BSD, "norm2"), "ffn.up"))
    return ops.add(x_BSD, linear(y_BSF, "ffn.down"))


def _adapted_linear(spec: Spec, params: Params, x: Tensor, name: str, ops: Ops) -> Tensor:
    bias = params[f"{name}.bias"]
    rows = bias.numel()
    y = ops.linear(x, params[f"{name}.weight"].reshape(rows, -1), bias.reshape(rows))
    if spec.lora and (a := params.get(f"{name}.lora_a")) is not None:
        b = params[f"{name}.lora_b"].reshape(rows, -1)
        y = ops.add(y, ops.linear(ops.linear(x, a.flatten(1)), b), spec.lora.alpha / spec.lora.rank)
    return y


def merged(spec: Spec, params: Params) -> tuple[Spec, Params]:
    """The same function without low-rank additions: W + (alpha / rank) B A in their place."""
    if spec.lora is None:
        return spec, params
    scale = spec.lora.alpha / spec.lora.rank
    plain: Params = {}
    for name, tensor in params.items():
        stem = name.removesuffix("weight")
        if name.endswith("weight") and f"{stem}lora_a" in params:
            a, b = params[f"{stem}lora_a"], params[f"{stem}lora_b"]
            tensor = tensor + scale * (b.flatten(0, -2) @ a.flatten(1)).reshape(tensor.shape)
        if layout(spec).params[name].part != "lora":
            plain[name] = tensor
    return replace(spec, lora=None), plain
