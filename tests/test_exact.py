"""FLoRA, FlexLoRA and FedEx-LoRA against the formulas of their papers in numpy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from adding import SERVER, SPEC, UP, answered, fleet, matrix, on_device, product, whole
from support import (
    LOCAL,
    STEPS,
    TURN,
    bits,
    moved,
    weights,
)

from lamina.job import Job, Update
from lamina.layout import Params
from lamina.methods.exact import FedExLora, FlexLora, Flora
from lamina.methods.lora import FedLora, linears


def test_flora_is_the_product_of_the_stacked_matrices() -> None:
    """W + s [B_1 ... B_n] [p_1 A_1; ...; p_n A_n], ranks 4, 1 and 2, examples 10, 30 and 20."""
    method = Flora(rank=4, alpha=6.0)
    network = method.adapt(SPEC)
    params = weights(network)
    assert network == SPEC
    plans = list(method.plans(network, TURN, {}))
    votes, sent = [], []
    for device, plan, examples in ((0, plans[0], 10), (2, plans[2], 30), (3, plans[1], 20)):
        turn = on_device(device)
        arrays = method.encode(params, network, plan, turn, {})
        changed = {n: p + 0.1 * (device + 1) for n, p in arrays.items() if n in plan.trains}
        job = Job(turn, plan, LOCAL, arrays, method)
        votes.append(method.decode(Update(turn, changed, examples, STEPS, 0.0), job, network))
        sent.append((changed, examples / 60))
    after, _ = method.merge(params, network, votes, SERVER, {})
    for linear in (f"h.{i}.{short}" for i in range(SPEC.blocks) for short in SPEC.linears):
        b = np.concatenate([matrix(arrays[f"{linear}.lora_b"], True) for arrays, _ in sent], axis=1)
        a = np.concatenate([p * matrix(arrays[f"{linear}.lora_a"]) for arrays, p in sent], axis=0)
        assert a.shape[0] == b.shape[1] == 4 + 1 + 2
        expected = whole(params[f"{linear}.weight"], len(b)) + 6 / 4 * b @ a
        np.testing.assert_allclose(whole(after[f"{linear}.weight"], len(b)), expected, rtol=1e-6, atol=1e-7)
    assert moved(params, after) == {f"h.{i}.{short}.weight" for i in range(SPEC.blocks) for short in SPEC.linears} | {
        "head.weight"
    }


def test_flora_begins_every_round_with_new_a_and_zero_b() -> None:
    method = Flora(rank=4)
    network, params = method.adapt(SPEC), weights(SPEC)
    plan = next(method.plans(network, TURN, {}))
    first, again, other, later = (
        method.encode(params, network, plan, on_device(device, round_), {})
        for device, round_ in ((0, 0), (0, 0), (1, 0), (0, 1))
    )
    assert bits(first) == bits(again)
    for name in linears(first):
        a = first[f"{name}.lora_a"]
        bound = matrix(a).shape[1] ** -0.5
        assert 0.7 * bound < a.abs().max() <= bound
        assert not first[f"{name}.lora_b"].any()
        assert not any(torch.equal(a, each[f"{name}.lora_a"]) for each in (other, later))
    assert not torch.equal(first["h.0.attn.q.lora_a"], first["h.0.attn.k.lora_a"])
    assert all(first[name] is params[name] for name in params)  # counted as downloads only where they changed


def test_flora_holds_no_matrices_below_the_blocks_it_trains() -> None:
    network = Flora(depth="budget", rank=2).adapt(SPEC)
    plans = list(Flora(depth="budget", rank=2).plans(network, TURN, {}))
    assert [plan.label for plan in plans] == [
        "rank 2, all 2",
        "rank 1, all 2",
        "rank 2, last 1 of 2",
        "rank 1, last 1 of 2",
    ]
    assert {name.split(".")[1] for name in linears(plans[2].holds)} == {"1"}


def flex(**settings: Any) -> tuple[FlexLora, Params, Params]:
    """A server on which W is not W_0 any more: dW of rank 4 in the first block, and none in the second."""
    method = FlexLora(rank=4, alpha=6.0, **settings)
    base = weights(SPEC)
    memory = method.prepare(SPEC, base, fleet(), TURN)
    plan = next(p for p in method.plans(SPEC, TURN, {}))
    arrays = method.encode(base, SPEC, plan, on_device(0), memory)
    rng = torch.Generator().manual_seed(9)
    sent = {n: arrays[n] + 0.1 * torch.randn(arrays[n].shape, generator=rng) for n in sorted(plan.trains)}
    sent |= {n: arrays[n] for n in sent if n.startswith("h.1.")}  # B is zero there
    job = Job(on_device(0), plan, LOCAL, arrays, method)
    vote = method.decode(Update(on_device(0), sent, 5, STEPS, 0.0), job, SPEC)
    after, kept = method.merge(base, SPEC, [vote], SERVER, memory)
    for linear in linears(sent):
        change = whole(after[f"{linear}.weight"], 1) - whole(base[f"{linear}.weight"], 1)
        np.testing.assert_allclose(change, 6 / 4 * product(sent, linear).reshape(1, -1), rtol=1e-4, atol=1e-6)
    return method, after, kept


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_flexlora_gives_the_best_approximation_of_a_rank(rank: int) -> None:
    """By Eckart and Young: what is left is as large as the other singular values."""
    method, params, memory = flex()
    base = weights(SPEC)
    plan = next(p for p in method.plans(SPEC, TURN, memory) if p.label.startswith(f"rank {rank},"))
    arrays = method.encode(params, SPEC, plan, on_device(1, 1), memory)
    for linear in linears(arrays):
        assert torch.equal(arrays[f"{linear}.weight"], base[f"{linear}.weight"])
        outputs = len(product(arrays, linear))
        change = whole(params[f"{linear}.weight"], outputs) - whole(base[f"{linear}.weight"], outputs)
        got = 6 / 4 * product(arrays, linear)
        values = np.linalg.svd(change, compute_uv=False)
        if linear.startswith("h.1."):
            assert not got.any()
            assert np.linalg.matrix_rank(matrix(arrays[f"{linear}.lora_a"])) == rank  # random, so that B can train
        else:
            assert values[3] > 1e-2 > 1e-5 > values[4]
            assert np.linalg.norm(change - got) == pytest.approx(np.linalg.norm(values[rank:]), rel=1e-4, abs=1e-6)
            assert np.linalg.matrix_rank(got, tol=1e-5) == rank
            np.testing.assert_allclose(
                matrix(arrays[f"{linear}.lora_a"]) @ matrix(arrays[f"{linear}.lora_a"]).T, np.eye(rank), atol=1e-5
            )
    network = plan.runs(SPEC)
    assert network.lora and network.lora.alpha / network.lora.rank == 6 / 4


def test_ranks_that_flexlora_has_nothing_for_begin_as_lora_does() -> None:
    """After a round in which a single device of rank 1 took part; what the server keeps is not changed meanwhile."""
    method, params = FlexLora(rank=4), weights(SPEC)
    memory = method.prepare(SPEC, params, fleet(), SERVER)
    plans = list(method.plans(SPEC, TURN, memory))
    vote = answered(method, SPEC, plans[-1], params, 0, 5, memory)
    after, kept = method.merge(params, SPEC, [vote], SERVER, memory)
    before = bits(kept)
    arrays, same, later = (
        method.encode(after, SPEC, plans[0], on_device(*who), kept) for who in ((1, 1), (2, 1), (1, 2))
    )
    assert bits(kept) == before
    for linear in linears(arrays):
        a, b = matrix(arrays[f"{linear}.lora_a"]), matrix(arrays[f"{linear}.lora_b"], True)
        assert b[:, 0].any() and not b[:, 1:].any()
        assert np.linalg.norm(a[0]) == pytest.approx(1, rel=1e-5)
        assert 0.5 * a.shape[1] ** -0.5 < abs(a[1:]).max() <= a.shape[1] ** -0.5
        assert torch.equal(same[f"{linear}.lora_a"], arrays[f"{linear}.lora_a"])
        assert torch.equal(later[f"{linear}.lora_a"][0], arrays[f"{linear}.lora_a"][0])
        assert not torch.equal(later[f"{linear}.lora_a"], arrays[f"{linear}.lora_a"])


def test_flexlora_averages_products_in_full() -> None:
    method, params, memory = flex()
    plans = {plan.label.split(",")[0]: plan for plan in method.plans(SPEC, TURN, memory)}
    base, votes, sent = weights(SPEC), [], []
    for device, rank, examples in ((0, 4, 10), (1, 1, 30), (2, 2, 20)):
        turn = on_device(device, 1)
        arrays = method.encode(params, SPEC, plans[f"rank {rank}"], turn, memory)
        changed = {n: arrays[n] + 0.1 * (device + 1) for n in plans[f"rank {rank}"].trains}
        job = Job(turn, plans[f"rank {rank}"], LOCAL, arrays, method)
        votes.append(method.decode(Update(turn, changed, examples, STEPS, 0.0), job, SPEC))
        sent.append((changed, examples / 60))
    after, kept = method.merge(params, SPEC, votes, SERVER, memory)
    for linear in linears(memory):
        mean = sum(p * product(arrays, linear) for arrays, p in sent)
        assert isinstance(mean, np.ndarray)
        expected = whole(base[f"{linear}.weight"], len(mean)) + 6 / 4 * mean
        np.testing.assert_allclose(whole(after[f"{linear}.weight"], len(mean)), expected, rtol=1e-5, atol=1e-6)
        assert torch.equal(kept[f"{linear}.weight"], base[f"{linear}.weight"])
        change = whole(after[f"{linear}.weight"], len(mean)) - whole(base[f"{linear}.weight"], len(mean))
        best = np.linalg.norm(np.linalg.svd(change, compute_uv=False)[4:])
        assert np.linalg.norm(change - 6 / 4 * product(kept, linear)) == pytest.approx(best, rel=1e-4, abs=1e-6)


def test_flexlora_gives_blocks_that_do_not_train_whole() -> None:
    method, params, memory = flex(depth="budget")
    plan = next(p for p in method.plans(SPEC, TURN, memory) if p.label == "rank 2, last 1 of 2")
    arrays = method.encode(params, SPEC, plan, on_device(1, 1), memory)
    assert all(arrays[name] is params[name] for name in arrays if name.startswith("h.0."))
    assert arrays[f"{UP}.weight"] is memory[f"{UP}.weight"]


@pytest.mark.parametrize("weighting", ["uniform", "examples"])
def test_fedex_lora_is_the_mean_of_the_products(weighting: Any) -> None:
    """W + s B A of the server is W + s mean(B_c A_c), also where a device does not train a block."""
    method = FedExLora(rank=3, alpha=6.0, depth="budget", weighting=weighting)
    network = method.adapt(SPEC)
    params = weights(network)
    plans = list(method.plans(network, TURN, {}))
    asked = ((0, plans[0], 10), (1, plans[0], 30), (2, plans[1], 20))
    votes = [answered(method, network, plan, params, device, examples, {}) for device, plan, examples in asked]
    after, _ = method.merge(params, network, votes, SERVER, {})
    assert FedExLora().weighting == "uniform"
    for linear in linears(params):
        voters = [vote for vote in votes if f"{linear}.lora_a" in vote.arrays]
        assert len(voters) == (2 if linear.startswith("h.0.") else 3)
        total = sum(vote.weight for vote in voters)
        mean = sum(vote.weight / total * product(vote.arrays, linear) for vote in voters)
        assert isinstance(mean, np.ndarray)
        expected = whole(params[f"{linear}.weight"], len(mean)) + 6 / 3 * mean
        got = whole(after[f"{linear}.weight"], len(mean)) + 6 / 3 * product(after, linear)
        np.testing.assert_allclose(got, expected, rtol=1e-6, atol=2e-7)
        plain = FedLora.merge(method, params, network, votes, SERVER, {})[0]
        for end in ("lora_a", "lora_b"):
            assert torch.equal(after[f"{linear}.{end}"], plain[f"{linear}.{end}"])
        off = whole(params[f"{linear}.weight"], len(mean)) + 6 / 3 * product(plain, linear) - expected
        assert abs(off).max() > 1e-3


def test_fedex_lora_leaves_weights_alone_where_one_device_trains() -> None:
    method = FedExLora(rank=3, depth="budget")
    network = method.adapt(SPEC)
    params = weights(network)
    last = list(method.plans(network, TURN, {}))[-1]
    after, _ = method.merge(params, network, [answered(method, network, last, params, 0, 7, {})], SERVER, {})
    assert all(after[name] is params[name] for name in params if name.startswith("h.0."))
    for linear in linears(params):
        torch.testing.assert_close(after[f"{linear}.weight"], params[f"{linear}.weight"], rtol=1e-6, atol=1e-7)
