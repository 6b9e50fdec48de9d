"""The one Transformer, as pure functions of the tensors they are given.

Every size is read from the tensors and the blocks that are found are run, so a network cut in depth, width or rank
needs no second model class; families differ by switches of `lamina.spec.Spec`.

The functions are written against `lamina.ops`, a handful of kernels, so that they can be priced without being run.

Shape legend:
    B batch   S tokens, or patches and what is before them   D embed   H heads   K head_dim   E = H K   F ffn
    V vocabulary or labels   P positions   R rank   C channels   Y, X pixels
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.init import trunc_normal_

from lamina.kernels import Mix
from lamina.layout import Params
from lamina.ops import TORCH, Ops
from lamina.spec import Sparse, Spec, as_matrix, plain
from lamina.spec import layout as layout
from lamina.turn import generator

ADAPTER_STD = 1e-3
"""Of fresh adapters."""
ENDS = ("attn.o", "ffn.down")
"""Linear layers that end a branch: what they give is added to the residual stream."""


def init(spec: Spec, generator: torch.Generator) -> Params:
    """Fresh weights: normal(0.02) as GPT-2, residual outputs scaled by 1/sqrt(2 blocks), norms and scales at identity.

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
        elif name.endswith(("norm.weight", "norm1.weight", "norm2.weight", "scale1", "scale2")):
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


@dataclass(frozen=True)
class Batch:
    """What goes into a network, or into its trained part.

    Attributes:
        x: Ids BS, images BCYX, or BSD where the frozen part below has run already.
        lengths_B: Tokens of each text where they differ; what is beyond counts for nothing.
    """

    x: Tensor
    lengths_B: Tensor | None = None

    def __getitem__(self, rows: slice) -> Batch:
        """Some of the sequences."""
        return Batch(self.x[rows], None if self.lengths_B is None else self.lengths_B[rows])

    def hides(self, spec: Spec, tokens: int, ops: Ops) -> Tensor | None:
        """What attention adds to its scores, [B, 1, 1, S]: nothing where all is seen, or all that comes before."""
        return None if spec.causal or self.lengths_B is None else ops.hides(self.lengths_B, tokens)


def batch(spec: Spec, inputs: np.ndarray, ops: Ops = TORCH) -> Batch:
    """What goes into the network, from what a shard gives: ids, with -1 beyond the end of a text, or images."""
    if not spec.ragged:
        return Batch(ops.tensor(inputs))
    lengths = (inputs >= 0).sum(1)
    return Batch(ops.tensor(np.maximum(inputs[:, : lengths.max()], 0)), ops.tensor(lengths))


def embed(spec: Spec, params: Mapping[str, Tensor], x: Tensor, ops: Ops = TORCH) -> Tensor:
    """Ids BS, or images BCYX -> residual stream BSD."""
    if spec.patch:
        weight, bias = params["embed.patches.weight"], params["embed.patches.bias"]
        leads, registers = (params.get(f"embed.{short}") for short in ("leads", "registers"))
        x_BSD = ops.patches(x, weight, bias, params["embed.positions"], leads, registers)
    else:
        positions, types = (params.get(f"embed.{short}") for short in ("positions", "types"))
        x_BSD = ops.embed(x, params["embed.tokens"], positions, types, spec.first_position)
    if spec.embed_norm:
        x_BSD = _norm(spec, params, x_BSD, "embed.norm", ops)
    return x_BSD if spec.scale == 1 else ops.scale(x_BSD, 1 / spec.scale)


def forked(spec: Spec, x_BSD: Tensor, block: int, ops: Ops = TORCH) -> Tensor:
    """What a block sees of the residual stream that it is given: copies side by side where groups begin."""
    streams = spec.streams(block)
    return x_BSD if streams == spec.streams(block - 1) else ops.fork(x_BSD, streams)


def run_blocks(
    spec: Spec,
    params: Mapping[str, Tensor],
    x_BSD: Tensor,
    blocks: Iterable[int],
    ops: Ops = TORCH,
    hides: Tensor | None = None,
) -> Tensor:
    """Residual stream BSD through the named blocks; for `hides`, see `Batch`."""
    for i in blocks:
        x_BSD = _block(spec, params, x_BSD, i, ops, hides)
    return x_BSD


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
        lengths_B: Tokens of each text where they differ.
    """

    x_BSD: Tensor
    at: int
    params: Mapping[str, Tensor]
    fixed: bool = False
    lengths_B: Tensor | None = None

    def before_head(self, spec: Spec, ops: Ops) -> tuple[Tensor, Tensor, Tensor | None]:
        """What the head sees, BSD, or B1D where it classifies; its weight as a matrix VD, and its bias."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.fixed):
            seen = self._seen(spec, ops)
            name = f"{_exit(spec, self.at)}head"
            weight, bias = self.params[f"{name}.weight"], self.params[f"{name}.bias"] if spec.head_bias else None
            if spec.groups:
                weight, bias = _of_streams(spec, weight, ops), None if bias is None else _of_groups(spec, bias, ops)
            weight = as_matrix(name, weight)
            if self.fixed:
                weight, bias = weight.detach(), None if bias is None else bias.detach()
            return seen, weight, bias

    def logits(self, spec: Spec, ops: Ops = TORCH) -> Tensor:
        """BSV, or B1V where the network classifies."""
        return ops.linear(*self.before_head(spec, ops))

    def _seen(self, spec: Spec, ops: Ops) -> Tensor:
        """The residual stream, normed and pooled; norms are of each vector, so one vector is first picked."""
        params, prefix, x_BSD = self.params, _exit(spec, self.at), self.x_BSD
        single = spec.pool in ("first", "last")

        def pool(x_BSD: Tensor) -> Tensor:
            return ops.pool(x_BSD, spec.pool, spec.before_patches, self.lengths_B)

        if single:
            x_BSD = pool(x_BSD)
        if spec.final_norm:
            x_BSD = _norm(spec, params, x_BSD, f"{prefix}norm", ops)
        if spec.pool and not single:
            x_BSD = pool(x_BSD)
        if spec.pooler:
            weight, bias = params[f"{prefix}head.pool.weight"], params[f"{prefix}head.pool.bias"]
            x_BSD = ops.act(_apart(x_BSD, weight.shape[1], lambda x: ops.linear(x, weight, bias)), spec.pooler)
        return x_BSD


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
    if mix is None and labels_V is None and not chunked and len(outputs) == 1:
        return ops.cross_entropy(outputs[0].logits(spec, ops), targets_BS)
    xs, weights, biases = zip(*(each.before_head(spec, ops) for each in outputs), strict=True)
    return ops.head_loss(xs, weights, biases, targets_BS, mix or Mix.plain(len(xs)), labels_V, chunked)


def forward(
    spec: Spec, params: Mapping[str, Tensor], x: Tensor | Batch, ops: Ops = TORCH, last: int | None = None
) -> Tensor:
    """Ids BS, images BCYX or a batch -> logits, through every block found; the mean over all exits found.

    Logits are BSV, of the `last` positions if given, or B1V where the network classifies.
    """
    given = x if isinstance(x, Batch) else Batch(x)
    x_BSD, exits = embed(spec, params, given.x, ops), found_exits(spec, params)
    hides = given.hides(spec, x_BSD.shape[1], ops)
    rows = slice(None if last is None or spec.labels else -last, None)
    seen = []
    for i in [*found_blocks(spec, params), spec.blocks]:
        if i < spec.blocks:
            x_BSD = _block(spec, params, forked(spec, x_BSD, i, ops), i, ops, hides)
        if i in exits:
            seen.append(Output(x_BSD[:, rows], i, params, lengths_B=given.lengths_B).logits(spec, ops))
    return seen[0] if len(seen) == 1 else torch.stack(seen).mean(0)


def _norm(spec: Spec, params: Mapping[str, Tensor], x: Tensor, name: str, ops: Ops) -> Tensor:
    weight = params[f"{name}.weight"]
    if spec.norm == "rms":
        return _apart(x, weight.shape[0], lambda x: ops.rms_norm(x, weight, spec.norm_eps))
    return _apart(x, weight.shape[0], lambda x: ops.norm(x, weight, params[f"{name}.bias"], spec.norm_eps))


def _apart(x: Tensor, width: int, kernel: Callable[[Tensor], Tensor]) -> Tensor:
    """A kernel on each of the vectors of this width that stand side by side in the last dimension."""
    if x.shape[-1] == width:
        return kernel(x)
    return kernel(x.reshape(*x.shape[:-1], -1, width)).reshape(*x.shape[:-1], -1)


def _of_streams(spec: Spec, weight: Tensor, ops: Ops) -> Tensor:
    """The weight of a head of groups as one of all classes, each of which sees its own stream: zero elsewhere."""
    assert spec.groups
    parts = spec.groups.parts(spec.labels)
    places = [(row, stream) for stream, part in enumerate(parts) for row in part]
    return ops.spread(weight.reshape(len(places), -1, weight.shape[-1]), places, spec.labels, len(parts))


def _of_groups(spec: Spec, bias: Tensor, ops: Ops) -> Tensor:
    """The bias of a head of groups as one of all classes."""
    assert spec.groups
    places = [(row, 0) for part in spec.groups.parts(spec.labels) for row in part]
    return ops.spread(bias.reshape(-1, 1, 1), places, spec.labels, 1).reshape(-1)


def _block(
    spec: Spec, params: Mapping[str, Tensor], x_BSD: Tensor, i: int, ops: Ops, hides: Tensor | None = None
) -> Tensor:
    """Attention and feed-forward part, each a branch beside the residual stream."""

    def norm(x: Tensor, place: int) -> Tensor:
        return _norm(spec, params, x, f"h.{i}.norm{place}", ops)

    def joined(x_BSD: Tensor, y_BSD: Tensor, place: int) -> Tensor:
        y_BSD = _adapted(spec, params, y_BSD, f"h.{i}.adapter{place}", ops)
        if spec.layer_scale:
            scale = params[f"h.{i}.scale{place}"]
            y_BSD = _apart(y_BSD, scale.shape[0], lambda y: ops.multiply(y, scale))
        x_BSD = ops.add(x_BSD, y_BSD)
        return norm(x_BSD, place) if spec.post_norm else x_BSD

    x_BSD = joined(x_BSD, _attention(spec, params, x_BSD if spec.post_norm else norm(x_BSD, 1), i, ops, hides), 1)
    return joined(x_BSD, _ffn(spec, params, x_BSD if spec.post_norm else norm(x_BSD, 2), i, ops), 2)


def _attention(
    spec: Spec, params: Mapping[str, Tensor], y_BSD: Tensor, i: int, ops: Ops, hides: Tensor | None
) -> Tensor:
    q_BSE, k_BSE, v_BSE = (_linear(spec, params, y_BSD, f"h.{i}.attn.{short}", ops) for short in "qkv")
    del y_BSD
    heads, groups = _heads(params, f"h.{i}.attn.q"), _heads(params, f"h.{i}.attn.k")
    if spec.qk_norm:
        q_BSE = _head_norm(spec, params, q_BSE, heads, f"h.{i}.attn.q_norm", ops)
        k_BSE = _head_norm(spec, params, k_BSE, groups, f"h.{i}.attn.k_norm", ops)
    if spec.rotary:
        q_BSE, k_BSE = ops.rotate(q_BSE, heads, spec.rotary), ops.rotate(k_BSE, groups, spec.rotary)
    y_BSE = ops.attention(q_BSE, k_BSE, v_BSE, heads, spec.causal, hides)
    del q_BSE, k_BSE, v_BSE
    return _linear(spec, params, y_BSE, f"h.{i}.attn.o", ops)


def _heads(params: Mapping[str, Tensor], name: str) -> int:
    """Heads that the tensors of a linear layer make."""
    shape = params[f"{name}.weight" if f"{name}.weight" in params else f"{name}.coef"].shape
    return math.prod(shape[:-2])


def _head_norm(spec: Spec, params: Mapping[str, Tensor], x_BSE: Tensor, heads: int, name: str, ops: Ops) -> Tensor:
    """RMS norm of each head for itself."""
    split = (*x_BSE.shape[:-1], heads, -1)
    return ops.rms_norm(x_BSE.reshape(*split), params[f"{name}.weight"], spec.norm_eps).reshape(*x_BSE.shape)


def _ffn(spec: Spec, params: Mapping[str, Tensor], y_BSD: Tensor, i: int, ops: Ops) -> Tensor:
    up_BSF = _linear(spec, params, y_BSD, f"h.{i}.ffn.up", ops)
    if spec.gated:
        y_BSF = ops.gate(_linear(spec, params, y_BSD, f"h.{i}.ffn.gate", ops), up_BSF)
    else:
        y_BSF = ops.act(up_BSF, spec.act)
    del up_BSF, y_BSD
    return _linear(spec, params, y_BSF, f"h.{i}.ffn.down", ops)


def _linear(spec: Spec, params: Mapping[str, Tensor], x: Tensor, name: str, ops: Ops) -> Tensor:
    """A linear layer of a block, in whatever form it is there, with what is added to it."""
    bias, lora = params.get(f"{name}.bias"), None
    if bias is not None:
        bias = bias.reshape(bias.numel())
    if spec.lora and f"{name}.lora_a" in params:
        b = params[f"{name}.lora_b"]
        lora = params[f"{name}.lora_a"].flatten(1), b.reshape(-1, b.shape[-1]), spec.lora.alpha / spec.lora.rank
    if f"{name}.basis" in params:
        basis, coef = params[f"{name}.basis"].flatten(1), params[f"{name}.coef"]
        z = ops.linear(x.reshape(*x.shape[:-1], -1, basis.shape[1]), basis)
        y = ops.linear(z.reshape(*x.shape[:-1], -1), coef.reshape(-1, coef.shape[-1]), bias)
    else:
        weight = as_matrix(name, params[f"{name}.weight"])
        if spec.sparse and f"{name}.sparse" in params:
            values = params[f"{name}.sparse"]
            indices = ops.tensor(sparse_indices(spec.sparse, name, weight.numel(), values.numel()))
            y = ops.sparse_linear(x, weight, values, indices, bias)
        elif units := _stream_units(spec, name, weight):
            y = ops.group_linear(x, weight, bias, units, not name.endswith(ENDS))
        elif lora:
            y, lora = ops.lora_linear(x, weight, bias, *lora), None
        else:
            y = ops.linear(x, weight, bias)
    if lora:
        a, b, scale = lora
        y = ops.add(y, ops.linear(ops.linear(x, a), b), scale)
    return y if spec.scale == 1 else ops.scale(y, 1 / spec.scale)


def _stream_units(spec: Spec, name: str, weight: Tensor) -> tuple[int, ...]:
    """Rows of the weight of a linear layer, or columns where it ends a branch, of each stream; none if there is one."""
    if not spec.groups or spec.streams(int(name.split(".")[1])) == 1:
        return ()
    parts = spec.groups.parts(spec.ffn if ".ffn." in name else spec.kv_heads or spec.heads)
    each = weight.shape[name.endswith(ENDS)] // sum(map(len, parts))
    return tuple(len(part) * each for part in parts)


def _adapted(spec: Spec, params: Mapping[str, Tensor], x_BSD: Tensor, name: str, ops: Ops) -> Tensor:
    """X + up(gelu(down(x))) where there is an adapter."""
    if not spec.adapter or f"{name}.down.weight" not in params:
        return x_BSD
    down, up = ((params[f"{name}.{end}.weight"], params[f"{name}.{end}.bias"]) for end in ("down", "up"))
    return ops.add(x_BSD, ops.linear(ops.act(ops.linear(x_BSD, *down), "gelu_tanh"), *up))


def sparse_indices(sparse: Sparse, name: str, numel: int, count: int) -> np.ndarray:
    """Which elements of the flattened weight of a linear layer have a sparse addition, int64 [count]."""
    return generator("sparse", sparse.seed, name).choice(numel, count, replace=False)


def product(spec: Spec, params: Mapping[str, Tensor], name: str) -> Tensor:
    """The whole weight that a linear layer amounts to, as a matrix."""
    if f"{name}.basis" in params:
        basis, coef = params[f"{name}.basis"].flatten(1), params[f"{name}.coef"]
        weight = (coef.reshape(-1, len(basis)) @ basis).reshape(coef.numel() // coef.shape[-1], -1)
    else:
        weight = as_matrix(name, params[f"{name}.weight"])
    if spec.sparse and (values := params.get(f"{name}.sparse")) is not None:
        indices = torch.from_numpy(sparse_indices(spec.sparse, name, weight.numel(), values.numel()))
        weight = weight.flatten().index_add(0, indices, values).reshape(weight.shape)
    if spec.lora and (a := params.get(f"{name}.lora_a")) is not None:
        b = params[f"{name}.lora_b"].flatten(0, -2)
        weight = weight + spec.lora.alpha / spec.lora.rank * (b @ a.flatten(1))
    return weight


def merged(spec: Spec, params: Params) -> tuple[Spec, Params]:
    """The same function with plain weights: additions and factors multiplied out. Adapters and exits stay."""
    bare = plain(spec)
    if bare == spec:
        return spec, params
    shape = layout(bare)
    linears = {f"h.{i}.{short}" for i in range(spec.blocks) for short in spec.linears}
    made: Params = {}
    for name in shape.params:
        stem, _, end = name.rpartition(".")
        changed = {f"{stem}.{other}" for other in ("lora_a", "sparse", "basis")} & params.keys()
        if end == "weight" and stem in linears and changed:
            made[name] = product(spec, params, stem).reshape(shape.shape(name))
        else:
            made[name] = params[name]
    return bare, made
