"""What a network is made of: its sizes and switches, and the names, axes and sizes of all its tensors.

One Transformer for all families: GPT-2, BERT and its kin, vision Transformers, Llama and its kin differ in fields of
`Spec`, not in classes.

Shape legend: as in `lamina.model`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Literal

from lamina.layout import Axis, Layout, Param, Part

LINEARS = ("attn.q", "attn.k", "attn.v", "attn.o", "ffn.gate", "ffn.up", "ffn.down")
"""Linear layers of a block; `ffn.gate` is only in gated networks."""

Act = Literal["gelu_tanh", "gelu", "relu", "silu", "tanh"]
Pool = Literal["", "first", "mean", "last", "first_mean"]


@dataclass(frozen=True)
class Lora:
    """Low-rank additions to linear layers: y = W x + (alpha / rank) B A x (Hu et al. 2022, section 4.1).

    Attributes:
        rank: Rows of A and columns of B.
        alpha: Numerator of the scale.
        targets: Which linears of a block get one, where they are there; names from `LINEARS`.
    """

    rank: int
    alpha: float
    targets: tuple[str, ...]


@dataclass(frozen=True)
class Sparse:
    """Additions to a few elements of linear layers, drawn at random once and for all: y = (W + S) x.

    Attributes:
        density: Share of the elements of a weight.
        seed: Of the draw.
        targets: Which linears of a block get some, where they are there; names from `LINEARS`.
    """

    density: float
    seed: int
    targets: tuple[str, ...]


@dataclass(frozen=True)
class Factored:
    """Linear layers in two factors instead of one weight: y = C (B x), with B on groups of inputs.

    With one group, W = C B is a matrix of low rank. With several, all groups of inputs go through the same basis:
    W = [C_1 B, ..., C_G B].

    Attributes:
        rank: Rows of B; where all inputs are one group, at most the smaller side of W.
        inputs: Size of a group, which must divide the inputs of every layer; 0 takes all inputs as one.
        first_block: The blocks before it keep their weights.
    """

    rank: int
    inputs: int = 0
    first_block: int = 0


@dataclass(frozen=True)
class Groups:
    """Residual streams side by side, each with heads, units and classes of its own (Yu et al. 2021).

    Before block `first_block` the stream is copied, once for each group. From there on, heads and units of a group see
    its stream alone and add to it alone, and the logits of its classes come from it alone; the logits of classes of
    groups that are not held are 0. Norms, and the biases that are added to a stream, are the same for all groups.

    Attributes:
        count: Groups of the whole network, at most as many as it has classes and heads (of keys).
        first_block: The blocks before it have one stream.
        held: Indices of the groups that are there, ascending.
    """

    count: int
    first_block: int
    held: tuple[int, ...]

    def parts(self, size: int) -> tuple[range, ...]:
        """Of `size` units, those of each group held: neighbours, the first groups with one more where need be."""
        each, more = divmod(size, self.count)
        starts = ((group, group * each + min(group, more)) for group in self.held)
        return tuple(range(start, start + each + (group < more)) for group, start in starts)


@dataclass(frozen=True)
class Spec:
    """Sizes and switches of a network: all that is needed to know its layout and to run it. The defaults are GPT-2's.

    Attributes:
        blocks: Number of blocks.
        embed: Width D of the residual stream.
        heads: Attention heads H per block.
        head_dim: Width K of a head.
        ffn: Hidden width F of the feed-forward part.
        vocab: Number of tokens V; 0 where images go in.
        positions: Longest sequence P, or rows of the position table; for images, patches and leads together.
        norm_eps: Epsilon of the norms.
        lora: Low-rank additions, if any.
        sparse: Sparse additions, if any.
        factored: Linear layers in two factors, if any.
        adapter: Width of the bottlenecks after attention and feed-forward part (Houlsby et al. 2019); none if 0.
        exits: Blocks after which there is a norm, a pooler and a head of their own, as far as the network has them. Its
            logits are the mean over all heads found.
        scale: Outputs of embeddings and of linear layers in the blocks are divided by it (HeteroFL's scaler).
        kv_heads: Heads of keys and values, which must divide `heads` (Ainslie et al. 2023); 0: as many as heads.
        norm: "layer", or "rms" without bias (Zhang and Sennrich 2019).
        post_norm: Whether norms follow the sums of the residual stream, as in BERT, and are not before its branches.
        final_norm: Whether there is a norm before the head.
        embed_norm: Whether there is one after the embedding.
        act: Activation of the feed-forward part.
        gated: Whether that is down(silu(gate x) * up x) (Shazeer 2020), whatever `act` says.
        biases: Which of `LINEARS` have a bias.
        causal: Whether a token sees only those before it.
        rotary: Base of rotary positions (Su et al. 2021), which then stand in the place of the table; 0: none.
        qk_norm: Whether queries and keys of each head go through an RMS norm.
        types: Rows of a table of token types, of which the first is added to every token; none if 0.
        first_position: Row of the position table for the first token.
        patch: Side of a patch in pixels, where images go in; 0: text.
        image: Side of an image in pixels.
        channels: Of an image.
        leads: Learned vectors before the patches: the class token, and with DeiT another.
        registers: Learned vectors after the leads, without positions (Darcet et al. 2024).
        layer_scale: Whether branches are multiplied by a learned vector (Touvron et al. 2021).
        labels: Classes of a classification head; 0: a head over the vocabulary if causal, else none.
        pool: What the classification head sees of a sequence: its "first" vector, its "last", the "mean" over tokens or
            patches, or the first and the mean side by side, "first_mean".
        pooler: Activation of a dense layer between pool and head; none if empty.
        head_bias: Whether the head has a bias.
        groups: Residual streams side by side in the upper blocks, if any, and the classes of each.
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
    sparse: Sparse | None = None
    factored: Factored | None = None
    adapter: int = 0
    exits: tuple[int, ...] = ()
    scale: float = 1.0
    kv_heads: int = 0
    norm: Literal["layer", "rms"] = "layer"
    post_norm: bool = False
    final_norm: bool = True
    embed_norm: bool = False
    act: Act = "gelu_tanh"
    gated: bool = False
    biases: tuple[str, ...] = LINEARS
    causal: bool = True
    rotary: float = 0.0
    qk_norm: bool = False
    types: int = 0
    first_position: int = 0
    patch: int = 0
    image: int = 0
    channels: int = 3
    leads: int = 0
    registers: int = 0
    layer_scale: bool = False
    labels: int = 0
    pool: Pool = ""
    pooler: Literal["", "tanh", "relu"] = ""
    head_bias: bool = False
    groups: Groups | None = None

    @property
    def linears(self) -> tuple[str, ...]:
        """Those of `LINEARS` that a block has."""
        return tuple(short for short in LINEARS if self.gated or short != "ffn.gate")

    @property
    def outputs(self) -> int:
        """Classes or tokens that the head tells apart; 0: there is no head."""
        return self.labels or (self.vocab if self.causal else 0)

    @property
    def output_axis(self) -> Axis:
        """Axis of the head's outputs."""
        return Axis("labels" if self.labels else "vocab")

    @property
    def ragged(self) -> bool:
        """Whether sequences of different lengths go in, each with one target."""
        return bool(self.labels and not self.patch)

    @property
    def before_patches(self) -> int:
        """Vectors before those of patches."""
        return self.leads + self.registers

    def streams(self, block: int) -> int:
        """Residual streams side by side in a block."""
        return len(self.groups.held) if self.groups and block >= self.groups.first_block else 1

    def length(self, tokens: int) -> int:
        """Vectors in the residual stream of a sequence of so many tokens, or of an image."""
        return self.registers + self.positions if self.patch else tokens


def spec_from_json(data: Mapping[str, Any]) -> Spec:
    """The spec of which `data` is `dataclasses.asdict`, after a detour through JSON or not."""
    values: dict[str, Any] = {k: tuple(value) if isinstance(value, list) else value for k, value in data.items()}
    for key, cls in (("lora", Lora), ("sparse", Sparse), ("factored", Factored), ("groups", Groups)):
        if values[key]:
            tuples = {name: tuple(each) for name, each in values[key].items() if isinstance(each, list)}
            values[key] = cls(**values[key] | tuples)
    return Spec(**values)


@cache
def layout(spec: Spec) -> Layout:
    """Names, axes and sizes of every tensor of the network `spec` describes.

    Raises:
        ValueError: Sizes that must divide one another do not.
    """
    sizes = {Axis("embed"): spec.embed, Axis("head_dim"): spec.head_dim}
    if spec.lora:
        sizes[Axis("rank")] = spec.lora.rank
    if spec.adapter:
        sizes[Axis("adapter")] = spec.adapter
    rows = _input(spec, sizes)
    for i in range(spec.blocks):
        rows |= _block(spec, sizes, i)
        if i in spec.exits:
            rows |= _end(spec, sizes, f"exit.{i}.", i)
    return Layout(rows | _end(spec, sizes, "", None), sizes, spec.blocks)


def _input(spec: Spec, sizes: dict[Axis, int]) -> dict[str, Param]:
    """Rows of what makes vectors of tokens or of images; new axes go into `sizes`."""
    d = Axis("embed")
    tables: dict[str, tuple[Axis, int]] = {}
    rows: dict[str, Param] = {}
    if spec.patch:
        axes = tuple(map(Axis, ("channels", "patch_rows", "patch_columns")))
        sizes |= dict(zip(axes, (spec.channels, spec.patch, spec.patch), strict=True))
        rows["embed.patches.weight"] = Param((d, *axes), "embed")
        rows["embed.patches.bias"] = Param((d,), "embed")
        tables |= {"leads": (Axis("leads"), spec.leads), "registers": (Axis("registers"), spec.registers)}
    else:
        tables["tokens"] = (Axis("vocab"), spec.vocab)
    tables["positions"] = (Axis("positions"), 0 if spec.rotary else spec.positions)
    tables["types"] = (Axis("types"), spec.types)
    for short, (axis, size) in tables.items():
        if size:
            sizes[axis] = size
            rows[f"embed.{short}"] = Param((axis, d), "embed")
    return rows | (_norm(spec, "embed.norm", None, "embed") if spec.embed_norm else {})


def _block(spec: Spec, sizes: dict[Axis, int], i: int) -> dict[str, Param]:
    """Rows of a block; new axes go into `sizes`. Queries that share a key are cut with it."""
    d, k = Axis("embed"), Axis("head_dim")
    heads, ffn = Axis(f"h.{i}.heads"), Axis(f"h.{i}.ffn")
    sizes |= {heads: spec.kv_heads or spec.heads, ffn: spec.ffn}
    if spec.heads % sizes[heads]:
        raise ValueError(f"kv_heads ({spec.kv_heads}) must divide heads ({spec.heads})")
    queries: tuple[Axis, ...] = (heads, k)
    if sizes[heads] < spec.heads:
        sizes[Axis("queries")] = spec.heads // sizes[heads]
        queries = (heads, Axis("queries"), k)
    ends = {"q": (queries, (d,)), "k": ((heads, k), (d,)), "v": ((heads, k), (d,)), "o": ((d,), queries)}
    rows = _norm(spec, f"h.{i}.norm1", i)
    for short, (out, into) in ends.items():
        rows |= _linear(spec, sizes, i, f"attn.{short}", out, into)
    if spec.qk_norm:
        rows |= {f"h.{i}.attn.{short}_norm.weight": Param((k,), "norm", i) for short in "qk"}
    rows |= _branch_end(spec, i, 1)
    rows |= _norm(spec, f"h.{i}.norm2", i)
    for short in ("ffn.gate", "ffn.up") if spec.gated else ("ffn.up",):
        rows |= _linear(spec, sizes, i, short, (ffn,), (d,))
    rows |= _linear(spec, sizes, i, "ffn.down", (d,), (ffn,))
    return rows | _branch_end(spec, i, 2)


def _norm(spec: Spec, name: str, block: int | None, part: Part = "norm") -> dict[str, Param]:
    ends = ("weight", "bias") if spec.norm == "layer" else ("weight",)
    return {f"{name}.{end}": Param((Axis("embed"),), part, block) for end in ends}


def _end(spec: Spec, sizes: dict[Axis, int], prefix: str, block: int | None) -> dict[str, Param]:
    """Rows of norm, pooler and head, of the network or of an exit after a block; new axes go into `sizes`."""
    norm: Part = "norm" if block is None else "exit"
    part: Part = "head" if block is None else "exit"
    rows = _norm(spec, f"{prefix}norm", block, norm) if spec.final_norm else {}
    into: tuple[Axis, ...] = (Axis("embed"),)
    if spec.pooler:
        sizes[Axis("pooled")] = spec.embed
        rows[f"{prefix}head.pool.weight"] = Param((Axis("pooled"), *into), part, block)
        rows[f"{prefix}head.pool.bias"] = Param((Axis("pooled"),), part, block)
        into = (Axis("pooled"),)
    if not spec.outputs:
        return rows
    sizes[spec.output_axis] = spec.outputs
    if spec.pool == "first_mean":
        sizes[Axis("halves")] = 2
        into = (Axis("halves"), *into)
    rows[f"{prefix}head.weight"] = Param((spec.output_axis, *into), part, block)
    if spec.head_bias:
        rows[f"{prefix}head.bias"] = Param((spec.output_axis,), part, block)
    return rows


def _linear(
    spec: Spec, sizes: dict[Axis, int], block: int, short: str, out: tuple[Axis, ...], into: tuple[Axis, ...]
) -> dict[str, Param]:
    """Rows of a linear layer and of what is added to it; new axes go into `sizes`."""
    name = f"h.{block}.{short}"
    part: Part = "attn" if short.startswith("attn") else "ffn"
    rows = {f"{name}.weight": Param(out + into, part, block)}
    if (factors := spec.factored) and block >= factors.first_block:
        rows = _factors(factors, sizes, name, out, into, part, block)
    if short in spec.biases:
        rows[f"{name}.bias"] = Param(out, part, block)
    if spec.sparse and short in spec.sparse.targets:
        count = max(1, round(spec.sparse.density * math.prod(sizes[axis] for axis in out + into)))
        sizes[Axis(f"{name}.sparse")] = count
        rows[f"{name}.sparse"] = Param((Axis(f"{name}.sparse"),), "sparse", block)
    if spec.lora and short in spec.lora.targets:
        rank = Axis("rank")
        rows[f"{name}.lora_a"] = Param((rank, *into), "lora", block)
        rows[f"{name}.lora_b"] = Param((*out, rank), "lora", block)
    return rows


def _factors(
    factors: Factored,
    sizes: dict[Axis, int],
    name: str,
    out: tuple[Axis, ...],
    into: tuple[Axis, ...],
    part: Part,
    block: int,
) -> dict[str, Param]:
    """Rows of the two factors of a linear layer; new axes go into `sizes`."""
    outputs, inputs = (math.prod(sizes[axis] for axis in axes) for axes in (out, into))
    if factors.inputs and inputs % factors.inputs:
        raise ValueError(f"factored inputs must divide the {inputs} inputs of {name}, got {factors.inputs}")
    rank, inner = Axis(f"{name}.rank"), Axis(f"{name}.inner")
    sizes[rank] = factors.rank if factors.inputs else min(factors.rank, outputs, inputs)
    sizes[inner] = sizes[rank] * (inputs // factors.inputs if factors.inputs else 1)
    if factors.inputs:
        into = (Axis("group"),)
        sizes[into[0]] = factors.inputs
    return {f"{name}.basis": Param((rank, *into), part, block), f"{name}.coef": Param((*out, inner), part, block)}


def _branch_end(spec: Spec, block: int, place: int) -> dict[str, Param]:
    """Rows of what follows attention (place 1) or the feed-forward part (2)."""
    name, d, m = f"h.{block}.adapter{place}", Axis("embed"), Axis("adapter")
    bottleneck = {"down.weight": (m, d), "down.bias": (m,), "up.weight": (d, m), "up.bias": (d,)}
    rows = {f"{name}.{end}": Param(axes, "adapter", block) for end, axes in bottleneck.items()} if spec.adapter else {}
    return rows | ({f"h.{block}.scale{place}": Param((d,), "norm", block)} if spec.layer_scale else {})


def as_matrix(name: str, weight: Any) -> Any:
    """A weight of a linear layer as [outputs, inputs]; of a bias-free name such as `h.3.attn.q`, or of `head`."""
    return weight.reshape(-1, weight.shape[-1]) if name.endswith((".q", ".k", ".v")) else weight.flatten(1)


def plain(spec: Spec) -> Spec:
    """The same network without low-rank and sparse additions and factors."""
    return replace(spec, lora=None, sparse=None, factored=None)
