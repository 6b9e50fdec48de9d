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
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.init import trunc_normal_

from lamina.layout import Axis, Layout, Param, Params, Part
from lamina.ops import TORCH, Mix, Ops
from lamina.turn import generator

LINEARS = ("attn.q", "attn.k", "attn.v", "attn.o", "ffn.up", "ffn.down")
ADAPTER_STD = 1e-3
"""Of fresh adapters."""


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
class Sparse:
    """Additions to a few elements of linear layers, drawn at random once and for all: y = (W + S) x.

    Attributes:
        density: Share of the elements of a weight.
        seed: Of the draw.
        targets: Which linears of a block get some; names from `LINEARS`.
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
        sparse: Sparse additions, if any.
        factored: Linear layers in two factors, if any.
        adapter: Width of the bottlenecks after attention and feed-forward part (Houlsby et al. 2019); none if 0.
        exits: Blocks after which there is a norm and a head of their own. The network's logits are the mean over all
            heads found.
        scale: Outputs of embeddings and of linear layers in the blocks are divided by it (HeteroFL's scaler).
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


def spec_from_json(data: Mapping[str, Any]) -> Spec:
    """The spec of which `data` is `dataclasses.asdict`, after a detour through JSON or not."""
    values = dict(data) | {"exits": tuple(data["exits"])}
    for key, cls in (("lora", Lora), ("sparse", Sparse), ("factored", Factored)):
        if values[key]:
            tuples = {name: tuple(each) for name, each in values[key].items() if isinstance(each, list)}
            values[key] = cls(**values[key] | tuples)
    return Spec(**values)


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
    if spec.adapter:
        sizes[Axis("adapter")] = spec.adapter
    for i in range(spec.blocks):
        heads, ffn = Axis(f"h.{i}.heads"), Axis(f"h.{i}.ffn")
        sizes |= {heads: spec.heads, ffn: spec.ffn}
        rows |= _norm(f"h.{i}.norm1", i)
        for short in ("q", "k", "v"):
            rows |= _linear(spec, sizes, i, f"attn.{short}", (heads, k), (d,))
        rows |= _linear(spec, sizes, i, "attn.o", (d,), (heads, k))
        rows |= _adapter(spec, i, 1)
        rows |= _norm(f"h.{i}.norm2", i)
        rows |= _linear(spec, sizes, i, "ffn.up", (ffn,), (d,))
        rows |= _linear(spec, sizes, i, "ffn.down", (d,), (ffn,))
        rows |= _adapter(spec, i, 2)
        if i in spec.exits:
            rows |= _norm(f"exit.{i}.norm", i, "exit")
            rows[f"exit.{i}.head.weight"] = Param((Axis("vocab"), d), "exit", i)
    rows |= _norm("norm", None)
    rows["head.weight"] = Param((Axis("vocab"), d), "head")
    return Layout(rows, sizes, spec.blocks)


def _norm(name: str, block: int | None, part: Part = "norm") -> dict[str, Param]:
    return {f"{name}.{end}": Param((Axis("embed"),), part, block) for end in ("weight", "bias")}


def _linear(
    spec: Spec, sizes: dict[Axis, int], block: int, short: str, out: tuple[Axis, ...], into: tuple[Axis, ...]
) -> dict[str, Param]:
    """Rows of a linear layer and of what is added to it; new axes go into `sizes`."""
    name = f"h.{block}.{short}"
    part: Part = "attn" if short.startswith("attn") else "ffn"
    rows = {f"{name}.weight": Param(out + into, part, block), f"{name}.bias": Param(out, part, block)}
    if (factors := spec.factored) and block >= factors.first_block:
        rows = _factors(factors, sizes, name, rows)
    if spec.sparse and short in spec.sparse.targets:
        count = max(1, round(spec.sparse.density * math.prod(sizes[axis] for axis in out + into)))
        sizes[Axis(f"{name}.sparse")] = count
        rows[f"{name}.sparse"] = Param((Axis(f"{name}.sparse"),), "sparse", block)
    if spec.lora and short in spec.lora.targets:
        rank = Axis("rank")
        rows[f"{name}.lora_a"] = Param((rank, *into), "lora", block)
        rows[f"{name}.lora_b"] = Param((*out, rank), "lora", block)
    return rows


def _factors(factors: Factored, sizes: dict[Axis, int], name: str, rows: dict[str, Param]) -> dict[str, Param]:
    """Rows of a linear layer in two factors, from those of the layer; new axes go into `sizes`."""
    weight, bias = rows[f"{name}.weight"], rows[f"{name}.bias"]
    into = weight.axes[len(bias.axes) :]
    outputs, inputs = (math.prod(sizes[axis] for axis in axes) for axes in (bias.axes, into))
    if factors.inputs and inputs % factors.inputs:
        raise ValueError(f"factored inputs must divide the {inputs} inputs of {name}, got {factors.inputs}")
    rank, inner = Axis(f"{name}.rank"), Axis(f"{name}.inner")
    sizes[rank] = factors.rank if factors.inputs else min(factors.rank, outputs, inputs)
    sizes[inner] = sizes[rank] * (inputs // factors.inputs if factors.inputs else 1)
    if factors.inputs:
        into = (Axis("group"),)
        sizes[into[0]] = factors.inputs
    return {
        f"{name}.basis": replace(weight, axes=(rank, *into)),
        f"{name}.coef": replace(weight, axes=(*bias.axes, inner)),
        f"{name}.bias": bias,
    }


def _adapter(spec: Spec, block: int, place: int) -> dict[str, Param]:
    name, d, m = f"h.{block}.adapter{place}", Axis("embed"), Axis("adapter")
    rows = {"down.weight": (m, d), "down.bias": (m,), "up.weight": (d, m), "up.bias": (d,)}
    return {f"{name}.{end}": Param(axes, "adapter", block) for end, axes in rows.items()} if spec.adapter else {}


def init(spec: Spec, generator: torch.Generator) -> Params:
    """Fresh weights: normal(0.02) as GPT-2, residual outputs scaled by 1/sqrt(2 blocks), norms at identity.

    LoRA's A is uniform within 1/sqrt(inputs), which is what Kaiming with a = sqrt(5) gives, and B is zero (the code of
    Hu et al. 2022), and sparse additions are zero, so an adapted network starts as the network itself. Adapters are
    normal(0.001) cut at two deviations, which is all but the network itself (the code of Houlsby et al. 2019).
    """
    shape = layout(spec)
    params: Params = {}
    for name, row in shape.params.items():
        size = shape.shape(name)
        if name.endswith("lora_a"):
            bound = 1 / math.sqrt(math.prod(size[1:]))
            params[name] = torch.empty(size).uniform_(-bound, bound, generator=generator)
        elif name.endswith(("norm.weight", "norm1.weight", "norm2.weight")):
            params[name] = torch.ones(size)
        elif name.endswith(("bias", "lora_b", "sparse")):
            params[name] = torch.zeros(size)
        elif row.part == "adapter":
            params[name] = trunc_normal_(
                torch.empty(size), 0, ADAPTER_STD, -2 * ADAPTER_STD, 2 * ADAPTER_STD, generator=generator
            )
        else:
            residual = name.endswith(("attn.o.weight", "ffn.down.weight"))
            std = 0.02 / math.sqrt(2 * spec.blocks) if residual else 0.02
            params[name] = torch.empty(size).normal_(0, std, generator=generator)
    return params


def found_blocks(spec: Spec, params: Mapping[str, Tensor]) -> list[int]:
    """Indices of the blocks present in `params`, in order."""
    return [i for i in range(spec.blocks) if f"h.{i}.norm1.weight" in params]


def found_exits(spec: Spec, params: Mapping[str, Tensor]) -> list[int]:
    """Blocks after which there is an exit in `params`, in order; `spec.blocks` stands for the network's own head."""
    found = [i for i in spec.exits if f"exit.{i}.head.weight" in params]
    return found + [spec.blocks] * ("head.weight" in params)


def embed(spec: Spec, params: Mapping[str, Tensor], ids_BS: Tensor, ops: Ops = TORCH) -> Tensor:
    """Ids BS -> residual stream BSD."""
    x_BSD = ops.embed(ids_BS, params["embed.tokens"], params["embed.positions"])
    return x_BSD if spec.scale == 1 else ops.scale(x_BSD, 1 / spec.scale)


def run_blocks(
    spec: Spec, params: Mapping[str, Tensor], x_BSD: Tensor, blocks: Iterable[int], ops: Ops = TORCH
) -> Tensor:
    """Residual stream BSD through the named blocks."""
    for i in blocks:
        x_BSD = _block(spec, params, x_BSD, i, ops)
    return x_BSD


def head(spec: Spec, params: Mapping[str, Tensor], x_BSD: Tensor, ops: Ops = TORCH, at: int | None = None) -> Tensor:
    """Residual stream BSD -> logits BSV, of the network's own head or of the exit after block `at`."""
    return ops.linear(final_norm(spec, params, x_BSD, ops, at), params[f"{_exit(spec, at)}head.weight"])


def final_norm(
    spec: Spec, params: Mapping[str, Tensor], x_BSD: Tensor, ops: Ops = TORCH, at: int | None = None
) -> Tensor:
    """Residual stream BSD -> what the head sees, BSD."""
    name = f"{_exit(spec, at)}norm"
    return ops.norm(x_BSD, params[f"{name}.weight"], params[f"{name}.bias"], spec.norm_eps)


def _exit(spec: Spec, at: int | None) -> str:
    return "" if at is None or at == spec.blocks else f"exit.{at}."


@dataclass(frozen=True)
class Output:
    """What the loss sees of a network: the residual stream BSD before one of its exits, and that exit's tensors.

    Attributes:
        x_BSD: Residual stream.
        at: The exit; see `found_exits`.
        params: Where its norm and head are.
        fixed: Whether it only teaches, without a graph.
    """

    x_BSD: Tensor
    at: int
    params: Mapping[str, Tensor]
    fixed: bool = False

    def before_head(self, spec: Spec, ops: Ops) -> tuple[Tensor, Tensor]:
        """What the head sees, BSD, and its weight VD."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.fixed):
            seen_BSD = final_norm(spec, self.params, self.x_BSD, ops, self.at)
            weight_VD = self.params[f"{_exit(spec, self.at)}head.weight"]
            return seen_BSD, weight_VD.detach() if self.fixed else weight_VD


def loss(
    spec: Spec,
    outputs: Sequence[Output],
    targets_BS: Tensor,
    mix: Mix | None = None,
    labels_V: Tensor | None = None,
    chunked: bool = False,
    ops: Ops = TORCH,
) -> Tensor:
    """Mean loss per token over one or more outputs, BS targets -> a number.

    Args:
        spec: The network.
        outputs: What predicts.
        targets_BS: What is to be predicted.
        mix: How much each output learns from the targets and from the others; by default from the targets alone.
        labels_V: Tokens that count; the logits of the others are 0 (HeteroFL, Diao et al. 2021, section 3).
        chunked: Whether to have logits of a few tokens only at a time.
        ops: What computes.
    """
    xs, heads = zip(*(each.before_head(spec, ops) for each in outputs), strict=True)
    if mix is None and labels_V is None and not chunked and len(xs) == 1:
        return ops.cross_entropy(ops.linear(xs[0], heads[0]), targets_BS)
    return ops.head_loss(xs, heads, targets_BS, mix or Mix.plain(len(xs)), labels_V, chunked)


def forward(
    spec: Spec, params: Mapping[str, Tensor], ids_BS: Tensor, ops: Ops = TORCH, last: int | None = None
) -> Tensor:
    """Ids BS -> logits BSV (of the `last` positions), through every block found; the mean over all exits found."""
    x_BSD, exits = embed(spec, params, ids_BS, ops), found_exits(spec, params)
    rows = slice(None if last is None else -last, None)
    seen = []
    for i in found_blocks(spec, params):
        x_BSD = _block(spec, params, x_BSD, i, ops)
        if i in exits:
            seen.append(head(spec, params, x_BSD[:, rows], ops, i))
    if spec.blocks in exits:
        seen.append(head(spec, params, x_BSD[:, rows], ops))
    return seen[0] if len(seen) == 1 else torch.stack(seen).mean(0)


def _block(spec: Spec, params: Mapping[str, Tensor], x_BSD: Tensor, i: int, ops: Ops) -> Tensor:
    def norm(x: Tensor, short: str) -> Tensor:
        return ops.norm(x, params[f"h.{i}.{short}.weight"], params[f"h.{i}.{short}.bias"], spec.norm_eps)

    def linear(x: Tensor, short: str) -> Tensor:
        return _adapted_linear(spec, params, x, f"h.{i}.{short}", ops)

    heads = params[f"h.{i}.attn.q.bias"].shape[0]
    y_BSD = norm(x_BSD, "norm1")
    q_BSE, k_BSE, v_BSE = (linear(y_BSD, f"attn.{short}") for short in "qkv")
    del y_BSD
    y_BSE = ops.attention(q_BSE, k_BSE, v_BSE, heads)
    del q_BSE, k_BSE, v_BSE
    x_BSD = ops.add(x_BSD, _adapted(spec, params, linear(y_BSE, "attn.o"), f"h.{i}.adapter1", ops))
    del y_BSE
    y_BSF = ops.gelu(linear(norm(x_BSD, "norm2"), "ffn.up"))
    return ops.add(x_BSD, _adapted(spec, params, linear(y_BSF, "ffn.down"), f"h.{i}.adapter2", ops))


def _adapted_linear(spec: Spec, params: Mapping[str, Tensor], x: Tensor, name: str, ops: Ops) -> Tensor:
    bias = params[f"{name}.bias"]
    rows = bias.numel()
    if f"{name}.basis" in params:
        basis = params[f"{name}.basis"].flatten(1)
        z = ops.linear(x.reshape(*x.shape[:-1], -1, basis.shape[1]), basis)
        y = ops.linear(z.reshape(*x.shape[:-1], -1), params[f"{name}.coef"].reshape(rows, -1), bias.reshape(rows))
    else:
        weight = params[f"{name}.weight"].reshape(rows, -1)
        if spec.sparse and f"{name}.sparse" in params:
            values = params[f"{name}.sparse"]
            indices = ops.tensor(sparse_indices(spec.sparse, name, weight.numel(), values.numel()))
            y = ops.sparse_linear(x, weight, values, indices, bias.reshape(rows))
        else:
            y = ops.linear(x, weight, bias.reshape(rows))
    if spec.lora and f"{name}.lora_a" in params:
        a, b = params[f"{name}.lora_a"], params[f"{name}.lora_b"].reshape(rows, -1)
        y = ops.add(y, ops.linear(ops.linear(x, a.flatten(1)), b), spec.lora.alpha / spec.lora.rank)
    return y if spec.scale == 1 else ops.scale(y, 1 / spec.scale)


def _adapted(spec: Spec, params: Mapping[str, Tensor], x_BSD: Tensor, name: str, ops: Ops) -> Tensor:
    """X + up(gelu(down(x))) where there is an adapter."""
    if not spec.adapter or f"{name}.down.weight" not in params:
        return x_BSD
    down, up = ((params[f"{name}.{end}.weight"], params[f"{name}.{end}.bias"]) for end in ("down", "up"))
    return ops.add(x_BSD, ops.linear(ops.gelu(ops.linear(x_BSD, *down)), *up))


def sparse_indices(sparse: Sparse, name: str, numel: int, count: int) -> np.ndarray:
    """Which elements of the flattened weight of a linear layer have a sparse addition, int64 [count]."""
    return generator("sparse", sparse.seed, name).choice(numel, count, replace=False)


def product(spec: Spec, params: Mapping[str, Tensor], name: str) -> Tensor:
    """The whole weight that a linear layer amounts to, of the shape of its bias and its inputs as one dimension."""
    bias = params[f"{name}.bias"]
    if f"{name}.basis" in params:
        basis, coef = params[f"{name}.basis"].flatten(1), params[f"{name}.coef"].reshape(bias.numel(), -1)
        groups = coef.shape[1] // len(basis)
        weight = (coef.reshape(-1, len(basis)) @ basis).reshape(bias.numel(), groups * basis.shape[1])
    else:
        weight = params[f"{name}.weight"].reshape(bias.numel(), -1)
    if spec.sparse and (values := params.get(f"{name}.sparse")) is not None:
        indices = torch.from_numpy(sparse_indices(spec.sparse, name, weight.numel(), values.numel()))
        weight = weight.flatten().index_add(0, indices, values).reshape(weight.shape)
    if spec.lora and (a := params.get(f"{name}.lora_a")) is not None:
        b = params[f"{name}.lora_b"].reshape(bias.numel(), -1)
        weight = weight + spec.lora.alpha / spec.lora.rank * (b @ a.flatten(1))
    return weight


def merged(spec: Spec, params: Params) -> tuple[Spec, Params]:
    """The same function with plain weights: additions and factors multiplied out. Adapters and exits stay."""
    plain = replace(spec, lora=None, sparse=None, factored=None)
    if plain == spec:
        return spec, params
    shape = layout(plain)
    linears = {f"h.{i}.{short}" for i in range(spec.blocks) for short in LINEARS}
    made: Params = {}
    for name in shape.params:
        stem, _, end = name.rpartition(".")
        changed = {f"{stem}.{other}" for other in ("lora_a", "sparse", "basis")} & params.keys()
        if end == "weight" and stem in linears and changed:
            made[name] = product(spec, params, stem).reshape(shape.shape(name))
        else:
            made[name] = params[name]
    return plain, made
