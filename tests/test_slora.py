"""SLoRA: the sparse stage, its gradients and its price, and the passage to low rank."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from adding import SERVER, SPEC, answered, matrix, product
from support import (
    LOCAL,
    STEPS,
    TURN,
    WINDOW,
    Devices,
    Table,
    begin,
    bits,
    moved,
    play,
    weights,
    write_world,
)
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from lamina import client, model
from lamina.cost import cost
from lamina.data.task import Pairs
from lamina.job import Job, Local, Turn
from lamina.layout import Params
from lamina.methods import Method, to_table
from lamina.methods.lora import linears
from lamina.methods.slora import SLora
from lamina.ops import HOST, TORCH
from lamina.packed import pack
from lamina.plan import Plan, Vote, narrow
from lamina.spec import Spec


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Table:
    """An experiment on tiny-3 alone."""
    folder = tmp_path_factory.mktemp("slora")
    return write_world(folder, networks=[str(folder / "tiny-3")], fleet=[{"name": "all"}])


def on(world: Table, method: Method, **changes: Any) -> Table:
    return world | {"method": to_table(method)} | changes


def sparse_world(density: float = 0.3) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    rng = torch.Generator().manual_seed(3)
    x = torch.randn(2, 3, 5, generator=rng, dtype=torch.float64)
    weight = torch.randn(4, 5, generator=rng, dtype=torch.float64)
    indices = torch.tensor([0, 7, 19, 4, 11, 12])
    values = torch.randn(6, generator=rng, dtype=torch.float64)
    bias = torch.randn(4, generator=rng, dtype=torch.float64)
    return x, weight, values, indices, bias


def test_gradients_of_sparse_additions() -> None:
    """Against finite differences in double precision, and the formula with a dense matrix."""
    x, weight, values, indices, bias = sparse_world()
    for p in (x, values, bias):
        p.requires_grad_()
    assert torch.autograd.gradcheck(lambda x, v, b: TORCH.sparse_linear(x, weight, v, indices, b), (x, values, bias))
    dense = torch.zeros(20, dtype=torch.float64).scatter(0, indices, values.detach()).reshape(4, 5)
    torch.testing.assert_close(TORCH.sparse_linear(x, weight, values, indices, bias), x @ (weight + dense).T + bias)
    weight_before = weight.clone()
    TORCH.sparse_linear(x, weight, values, indices, bias).sum().backward()  # type: ignore[no-untyped-call]
    assert torch.equal(weight, weight_before)


def test_sparse_additions_to_packed_weights() -> None:
    rng = torch.Generator().manual_seed(3)
    weight = torch.randn(64, 80, generator=rng)
    packed = pack((64, 80), 16, lambda rows: weight[rows.start : rows.stop], HOST)
    x, values, bias = (torch.randn(*size, generator=rng) for size in ((3, 80), (9,), (64,)))
    indices = torch.arange(9) * 500
    found = []
    for each in (packed, packed.unpack()):
        leaves = [x.clone().requires_grad_(), values.clone().requires_grad_()]
        out = TORCH.sparse_linear(leaves[0], each, leaves[1], indices, bias)  # type: ignore[arg-type]
        out.square().sum().backward()  # type: ignore[no-untyped-call]
        found.append([out.detach(), *(p.grad for p in leaves)])
    for one, two in zip(*found, strict=True):
        assert one is not None and torch.equal(one, two)


def test_sparse_elements_are_many_as_low_rank_ones_and_the_same_for_all() -> None:
    wide = Spec(2, embed=48, heads=3, head_dim=16, ffn=192, vocab=70, positions=64)
    network = SLora(rank=3).adapt(wide)
    layout = model.layout(network)
    size = {
        part: sum(layout.numel(n) for n, row in layout.params.items() if row.part == part)
        for part in ("sparse", "lora")
    }
    assert size["sparse"] == pytest.approx(size["lora"], rel=1e-3)
    assert network.sparse == SLora(rank=3).adapt(wide).sparse
    assert network.sparse
    at = [
        set(model.sparse_indices(network.sparse, name, 48 * 48, 200).tolist()) for name in ("h.0.attn.q", "h.1.attn.q")
    ]
    assert len(at[0]) == len(at[1]) == 200 and at[0] != at[1]
    seeded = SLora(mask_seed=5).adapt(wide).sparse
    assert seeded and seeded.seed == 5
    other = model.sparse_indices(replace(network.sparse, seed=1), "h.0.attn.q", 48 * 48, 200)
    assert set(other.tolist()) != at[0]
    tiny = SLora(rank=64).adapt(SPEC).sparse
    assert tiny and tiny.density == 1.0
    few = SLora(density=0.01, targets="qv").adapt(wide)
    counts = {n: model.layout(few).numel(n) for n, row in model.layout(few).params.items() if row.part == "sparse"}
    assert counts == {f"h.{i}.attn.{short}.sparse": 23 for i in range(2) for short in "qv"}


def test_operations_of_sparse_training_are_those_torch_counts() -> None:
    network = SLora(depth="budget", density=0.1).adapt(SPEC)
    for plan in SLora(depth="budget").plans(network, TURN, {}):
        shard = Pairs(*np.zeros((2, 4, WINDOW), dtype=np.int64))
        local = Local(batch_size=4, steps=1)
        arrays = narrow(weights(network), model.layout(network), plan)
        with (
            torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
            FlopCounterMode(display=False) as counted,
        ):
            client.train(Job(TURN, plan, local, arrays).owned(), shard, network)
        assert cost(network, plan, local, WINDOW, 1).flops == counted.get_total_flops()


def slora(**settings: Any) -> tuple[SLora, Spec, Params]:
    method = SLora(rank=3, alpha=12.0, **settings)
    network = method.adapt(SPEC)
    return method, network, model.init(network, torch.Generator().manual_seed(1))


def test_slora_turns_what_it_learnt_into_low_rank_matrices() -> None:
    """s B A is the best approximation of rank 3 of the sparse additions, B'B = A A', and W is W_0 again."""
    method, network, params = slora(density=0.5, first_stage=0.15)
    (plan,) = method.plans(network, replace(SERVER, round=1), {})
    assert plan.trains == {n for n in params if n.endswith(".sparse")} | {"head.weight"}
    assert not any("lora" in name for name in plan.holds)
    votes = [answered(method, network, plan, params, device, examples, {}) for device, examples in ((0, 1), (1, 3))]
    early, _ = method.merge(params, network, votes, replace(SERVER, round=0), {})
    assert moved(params, early) == plan.trains
    after, _ = method.merge(params, network, votes, replace(SERVER, round=1), {})
    assert torch.equal(after["head.weight"], early["head.weight"])
    for linear in linears(params):
        assert network.sparse
        numel, rows = params[f"{linear}.weight"].numel(), params[f"{linear}.bias"].numel()
        dense = np.zeros(numel)
        at = model.sparse_indices(network.sparse, linear, numel, params[f"{linear}.sparse"].numel())
        dense[at] = early[f"{linear}.sparse"].double().numpy()
        u, d, v = np.linalg.svd(dense.reshape(rows, -1), full_matrices=False)
        np.testing.assert_allclose(12 / 3 * product(after, linear), (u[:, :3] * d[:3]) @ v[:3], rtol=1e-4, atol=1e-5)
        a, b = matrix(after[f"{linear}.lora_a"]), matrix(after[f"{linear}.lora_b"], True)
        np.testing.assert_allclose(b.T @ b, a @ a.T, rtol=1e-4, atol=1e-5)
        assert not after[f"{linear}.sparse"].any()
        assert after[f"{linear}.weight"] is params[f"{linear}.weight"]
    (second,) = method.plans(network, replace(SERVER, round=2), {})
    assert second.trains == {n for n in params if "lora" in n} | {"head.weight"}
    assert not any("sparse" in name for name in second.holds)
    later, _ = method.merge(
        after, network, [answered(method, network, second, after, 0, 1, {})], replace(SERVER, round=2), {}
    )
    assert moved(after, later) == second.trains


def test_ranks_that_there_is_nothing_for_begin_as_lora_does() -> None:
    """Blocks in which nothing trained, and, of a linear with a single element, all ranks but one."""
    method, network, params = slora(depth="budget", density=1 / 1024)
    last = list(method.plans(network, SERVER, {}))[-1]
    votes = [answered(method, network, last, params, 0, 1, {})]
    after, _ = method.merge(params, network, votes, replace(SERVER, round=5), {})
    for linear in linears(params):
        assert params[f"{linear}.sparse"].numel() == 1
        if linear.startswith("h.0."):
            assert after[f"{linear}.lora_a"] is params[f"{linear}.lora_a"]
            assert after[f"{linear}.lora_b"] is params[f"{linear}.lora_b"]
        else:
            assert np.linalg.matrix_rank(product(after, linear)) == 1
            assert torch.equal(after[f"{linear}.lora_a"][1:], params[f"{linear}.lora_a"][1:])
            assert not after[f"{linear}.lora_b"][..., 1:].any()


def test_the_stages_follow_the_rounds_also_where_nobody_took_part(world: Table, tmp_path: Path) -> None:
    """Two of four rounds are sparse. Without answers in the second, devices get A and B for what the first learnt."""
    run = begin(on(world, SLora(rank=2, first_stage=0.3), rounds=4), tmp_path)
    states, labels = [], []
    for round_ in range(4):
        run.state, rows = play(run, Devices(run, lambda update: []) if round_ == 1 else None)
        states.append(run.state.params)
        labels.append({row.plan for row in rows})
    assert labels == [{"sparse, all 3"}] * 2 + [{"low rank, all 3"}] * 2
    assert states[1]["h.1.ffn.up.sparse"].any() and not states[2]["h.1.ffn.up.sparse"].any()
    method, network, turn = run.experiment.method, run.outlook.chosen.spec, Turn(0, 2, 4, 1)
    (plan,) = method.plans(network, turn, {})
    arrays = method.encode(states[1], network, plan, turn, {})
    for linear in linears(arrays):
        assert product(arrays, linear).any()
    changed = {name: p + (name in plan.trains) for name, p in arrays.items()}
    vote = Vote(1, plan, {name: changed[name] for name in plan.trains}, 1.0)
    after, _ = method.merge(states[1], network, [vote], replace(turn, device=-1), {})
    assert bits({name: after[name] for name in arrays}) == bits(changed)
    assert not any(p.any() for name, p in after.items() if name.endswith("sparse"))


def test_slora_says_what_its_first_stage_takes() -> None:
    """As many activations as full training keeps, or more."""
    method = SLora()
    network = method.adapt(SPEC)
    names = frozenset(model.layout(SPEC).params)
    full = cost(SPEC, Plan(names, names), LOCAL, WINDOW, STEPS)
    first = cost(network, next(method.plans(network, TURN, {})), LOCAL, WINDOW, STEPS, method)
    assert first.memory.activations > 0.9 * full.memory.activations
