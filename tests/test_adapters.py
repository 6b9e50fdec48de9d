"""Adapters: the formula written out, what trains, what a run hands out."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from adding import SPEC
from safetensors import safe_open
from support import (
    TURN,
    Table,
    begin,
    bits,
    weights,
    write_world,
)
from torch import Tensor
from transformers import GPT2LMHeadModel

from lamina import checkpoint, model
from lamina.methods import Method, to_table
from lamina.methods.adapters import Adapters
from lamina.methods.lora import FedLora
from lamina.spec import Spec, spec_from_json


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Table:
    """An experiment on tiny-3 alone."""
    folder = tmp_path_factory.mktemp("adapters")
    return write_world(folder, networks=[str(folder / "tiny-3")], fleet=[{"name": "all"}])


def on(world: Table, method: Method, **changes: Any) -> Table:
    return world | {"method": to_table(method)} | changes


def test_adapters_compute_the_formula() -> None:
    """A block with both, every line written out, in double precision."""
    network = Spec(1, embed=6, heads=1, head_dim=6, ffn=5, vocab=7, positions=4, adapter=3)
    params = weights(network)
    p = {name.removeprefix("h.0."): tensor.double() for name, tensor in params.items()}

    def norm(x: Tensor, name: str) -> Tensor:
        x = x - x.mean(-1, keepdim=True)
        return (
            x / (x.square().mean(-1, keepdim=True) + network.norm_eps).sqrt() * p[f"{name}.weight"] + p[f"{name}.bias"]
        )

    def linear(x: Tensor, name: str) -> Tensor:
        weight = p[f"{name}.weight"].reshape(p[f"{name}.bias"].numel(), -1)
        return x @ weight.T + p[f"{name}.bias"].flatten()

    def gelu(x: Tensor) -> Tensor:
        return 0.5 * x * (1 + torch.tanh((2 / np.pi) ** 0.5 * (x + 0.044715 * x**3)))

    def adapter(x: Tensor, name: str) -> Tensor:
        return x + linear(gelu(linear(x, f"{name}.down")), f"{name}.up")

    ids = torch.tensor([3, 0, 6, 2])
    x = p["embed.tokens"][ids] + p["embed.positions"]
    q, k, v = (linear(norm(x, "norm1"), f"attn.{short}") for short in "qkv")
    scores = (q @ k.T / 6**0.5).masked_fill(torch.ones(4, 4).triu(1).bool(), -torch.inf)
    x = x + adapter(linear(scores.softmax(-1) @ v, "attn.o"), "adapter1")
    x = x + adapter(linear(gelu(linear(norm(x, "norm2"), "ffn.up")), "ffn.down"), "adapter2")
    logits = norm(x, "norm") @ p["head.weight"].T
    torch.testing.assert_close(model.forward(network, params, ids[None])[0].double(), logits, rtol=1e-5, atol=1e-5)
    without = {name: tensor for name, tensor in params.items() if "adapter2" not in name}
    assert not torch.allclose(model.forward(network, without, ids[None])[0].double(), logits, atol=1e-3)


def test_adapters_train_with_the_norms_and_the_head() -> None:
    method = Adapters(depth="budget", width=4)
    layout = model.layout(method.adapt(SPEC))
    plans = list(method.plans(method.adapt(SPEC), TURN, {}))
    assert [plan.label for plan in plans] == ["adapters, all 2", "adapters, last 1 of 2"]
    for plan, first in zip(plans, (0, 1), strict=True):
        assert plan.holds == set(layout.params)
        assert plan.trains == {
            name
            for name, row in layout.params.items()
            if (row.part in ("adapter", "norm") and (row.block is None or row.block >= first)) or row.part == "head"
        }
    frozen_head = next(Adapters(train_head=False).plans(Adapters().adapt(SPEC), TURN, {}))
    assert "head.weight" not in frozen_head.trains and "norm.weight" in frozen_head.trains
    per_block = 2 * (2 * 16 * 64 + 64 + 16)  # 2 (2 d m + m + d), by hand
    wide = model.layout(Adapters().adapt(SPEC))
    assert sum(wide.numel(name) for name, row in wide.params.items() if row.part == "adapter") == 2 * per_block


@pytest.mark.parametrize("std", [1e-2, 0.5])
def test_fresh_adapters_are_all_but_nothing(std: float) -> None:
    method = Adapters(width=200, std=std)
    network = method.adapt(SPEC)
    drawn = model.init(network, torch.Generator().manual_seed(0))
    params = method.equip(network, drawn, {})
    for name, p in params.items():
        if ".adapter" not in name:
            assert p is drawn[name]
        elif name.endswith("bias"):
            assert not p.any()
        else:
            # Cut at two deviations, a normal distribution has 0.88 of its deviation.
            assert p.std().item() == pytest.approx(0.88 * std, rel=0.05)
            assert 1.9 * std < p.abs().max() <= 2 * std
    ids = torch.arange(10)[None]
    plain = {name: p for name, p in params.items() if ".adapter" not in name}
    assert torch.allclose(model.forward(network, params, ids), model.forward(SPEC, plain, ids), atol=1e-2) == (
        std < 0.1
    )


def test_a_run_with_adapters_hands_out_network_and_adapters(world: Table, tmp_path: Path) -> None:
    run = begin(on(world, Adapters(width=4), rounds=1), tmp_path)
    run.play()
    folder, network = run.folder / "model", run.outlook.chosen.spec
    base, params = checkpoint.load(folder)
    assert base == replace(network, adapter=0)
    with safe_open(folder / checkpoint.OURS, "pt") as file:
        assert spec_from_json(json.loads(file.metadata()["spec"])) == network
        beside = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert beside.keys() == {name for name in run.state.params if ".adapter" in name}
    assert bits(params | beside) == bits(run.state.params)
    assert GPT2LMHeadModel.from_pretrained(folder).config.n_layer == 3
    plain = begin(on(world, FedLora(rank=2), rounds=1), tmp_path)
    plain.play()
    assert not (plain.folder / "model" / checkpoint.OURS).exists()
