"""Names, axes and sizes of tensors, and which of them are the tail: `python -m pytest tests/test_layout.py`."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from lamina import model
from lamina.layout import Axis, Layout
from lamina.spec import LINEARS, Lora, Spec


def with_axis(layout: Layout, axis: str) -> set[str]:
    return {name for name, row in layout.params.items() if Axis(axis) in row.axes}


def test_shapes_and_order_are_those_of_the_tensors(tiny: Spec) -> None:
    spec = replace(tiny, lora=Lora(3, 6.0, LINEARS))
    layout, params = model.layout(spec), model.init(spec, torch.Generator())
    assert list(params) == list(layout.params)
    for name, tensor in params.items():
        assert layout.shape(name) == tuple(tensor.shape)
        assert layout.numel(name) == tensor.numel()
    assert layout.shape("h.2.attn.q.weight") == (2, 8, 16)
    assert layout.shape("h.2.attn.o.lora_a") == (3, 2, 8)
    assert layout.blocks == 3


def test_an_axis_is_on_every_tensor_it_cuts(tiny: Spec) -> None:
    layout = model.layout(replace(tiny, lora=Lora(3, 6.0, ("attn.v", "ffn.down"))))
    assert with_axis(layout, "h.1.ffn") == {
        f"h.1.ffn.{end}" for end in ("up.weight", "up.bias", "down.weight", "down.lora_a")
    }
    inner = {f"h.0.attn.{short}.{end}" for short in "qkv" for end in ("weight", "bias")}
    assert with_axis(layout, "h.0.heads") == inner | {"h.0.attn.o.weight", "h.0.attn.v.lora_b"}
    assert with_axis(layout, "h.0.heads") == {name for name in with_axis(layout, "head_dim") if name.startswith("h.0.")}
    assert with_axis(layout, "vocab") == {"embed.tokens", "head.weight"}
    off_the_stream = {name for name in layout.params if name.startswith("h.2.")} - with_axis(layout, "embed")
    short = {"attn.q.bias", "attn.k.bias", "attn.v.bias", "ffn.up.bias", "attn.v.lora_b", "ffn.down.lora_a"}
    assert off_the_stream == {f"h.2.{name}" for name in short}


def test_part_and_block_are_fields(tiny: Spec) -> None:
    layout = model.layout(replace(tiny, lora=Lora(3, 6.0, ("attn.q",))))
    found = {name: (layout.params[name].part, layout.params[name].block) for name in layout.params}
    assert found["embed.positions"] == ("embed", None)
    assert found["norm.bias"] == ("norm", None)
    assert found["head.weight"] == ("head", None)
    assert found["h.1.norm2.weight"] == ("norm", 1)
    assert found["h.1.attn.o.weight"] == ("attn", 1)
    assert found["h.2.ffn.up.bias"] == ("ffn", 2)
    assert found["h.0.attn.q.lora_a"] == ("lora", 0)
    assert sum(part == "lora" for part, _ in found.values()) == 2 * 3


@pytest.mark.parametrize("trained", [0, 1, 2, 3])
def test_tail_is_the_last_blocks_the_final_norm_and_the_head(tiny: Spec, trained: int) -> None:
    layout = model.layout(tiny)
    blocks = {name for name in layout.params if name.startswith(tuple(f"h.{i}." for i in range(3 - trained, 3)))}
    embeds = {"embed.tokens", "embed.positions"} if trained == 3 else set()
    assert layout.tail(trained) == blocks | embeds | {"norm.weight", "norm.bias", "head.weight"}


def test_the_whole_tail_is_everything(tiny: Spec) -> None:
    layout = model.layout(replace(tiny, lora=Lora(3, 6.0, LINEARS)))
    assert layout.tail(3) == set(layout.params)
    assert all(layout.tail(t) < layout.tail(t + 1) for t in range(3))
