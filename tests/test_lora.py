"""LoRA against peft, FFA-LoRA, and HetLoRA, against numpy and autograd."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from adding import SERVER, SPEC, UP, V, answered, fleet, matrix, on_device, product, whole
from peft import LoraConfig, get_peft_model
from support import (
    LOCAL,
    STEPS,
    TURN,
    Devices,
    Table,
    begin,
    bits,
    moved,
    outcome,
    play,
    weights,
    write_world,
)
from transformers import GPT2LMHeadModel

from lamina import checkpoint, client, model
from lamina.data.task import Pairs
from lamina.job import Job, Local, Update
from lamina.layout import Axis, Params
from lamina.levers import Levers
from lamina.methods import Method, to_table
from lamina.methods.adapters import Adapters
from lamina.methods.exact import FlexLora, Flora
from lamina.methods.lora import FedLora, FfaLora, HetLora, LoraLastT, linears, product_norm
from lamina.methods.slora import SLora
from lamina.ops import TORCH
from lamina.plan import Plan, Vote
from lamina.run import resume
from lamina.spec import Spec


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Table:
    """An experiment on tiny-3 alone."""
    folder = tmp_path_factory.mktemp("lora")
    return write_world(folder, networks=[str(folder / "tiny-3")], fleet=[{"name": "all"}])


def on(world: Table, method: Method, **changes: Any) -> Table:
    return world | {"method": to_table(method)} | changes


def in_peft(arrays: Params, blocks: int) -> Params:
    """A and B by the names of peft, whose query, key and value are one linear: A stacked, B along the diagonal."""
    found: Params = {}
    for i in range(blocks):
        shorts = [short for short in ("q", "k", "v") if f"h.{i}.attn.{short}.lora_a" in arrays]
        stacked = [arrays[f"h.{i}.attn.{short}.lora_a"] for short in shorts]
        rank, inputs = stacked[0].shape
        diagonal = torch.zeros(3 * inputs, len(shorts) * rank)
        for j, short in enumerate(shorts):
            rows = slice("qkv".index(short) * inputs, ("qkv".index(short) + 1) * inputs)
            diagonal[rows, j * rank : (j + 1) * rank] = arrays[f"h.{i}.attn.{short}.lora_b"].reshape(inputs, rank)
        pairs = {"attn.c_attn": (torch.cat(stacked), diagonal)}
        for short, name in {"attn.o": "attn.c_proj", "ffn.up": "mlp.c_fc", "ffn.down": "mlp.c_proj"}.items():
            if f"h.{i}.{short}.lora_a" in arrays:
                pairs[name] = arrays[f"h.{i}.{short}.lora_a"].flatten(1), arrays[f"h.{i}.{short}.lora_b"]
        for name, (a, b) in pairs.items():
            place = f"base_model.model.transformer.h.{i}.{name}"
            found |= {f"{place}.lora_A.default.weight": a, f"{place}.lora_B.default.weight": b}
    return found


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft 0.21 asks for it
@pytest.mark.parametrize(("targets", "fused"), [("all", 3), ("qv", 2)])
def test_lora_is_that_of_peft(targets: Any, fused: int, tmp_path: Path) -> None:
    """Forward and gradients."""
    network = FedLora(rank=3, alpha=7.0, targets=targets).adapt(SPEC)
    params = weights(network)
    checkpoint.write(tmp_path, SPEC, {n: p for n, p in params.items() if "lora" not in n}, torch.float32, {})
    asked = LoraConfig(
        r=3,
        lora_alpha=7,
        target_modules=["c_attn", "c_proj", "c_fc"] if targets == "all" else ["c_attn"],
        rank_pattern={"c_attn": fused * 3},
        alpha_pattern={"c_attn": fused * 7},
        fan_in_fan_out=True,
        lora_dropout=0.0,
    )
    theirs = get_peft_model(GPT2LMHeadModel.from_pretrained(tmp_path), asked)
    trained = {name: p for name, p in theirs.named_parameters() if p.requires_grad}
    ours = {name: p.clone().requires_grad_("lora" in name) for name, p in params.items()}
    copies = in_peft(params, SPEC.blocks)
    assert trained.keys() == copies.keys()
    with torch.no_grad():
        for name, p in trained.items():
            p.copy_(copies[name])
    rng = torch.Generator().manual_seed(5)
    ids, labels = (torch.randint(0, SPEC.vocab, (3, 12), generator=rng) for _ in range(2))
    logits, their_logits = model.forward(network, ours, ids), theirs(ids).logits
    torch.testing.assert_close(logits, their_logits, rtol=1e-5, atol=1e-5)
    for each in (logits, their_logits):
        F.cross_entropy(each.flatten(0, 1), labels.flatten()).backward()  # type: ignore[no-untyped-call]
    gradients = {name: p.grad for name, p in ours.items() if p.grad is not None}
    there = in_peft({name: torch.ones_like(p) for name, p in params.items()}, SPEC.blocks)
    for name, expected in in_peft(gradients, SPEC.blocks).items():
        got = trained[name].grad
        assert got is not None and expected.any()
        torch.testing.assert_close(
            got * there[name], expected, rtol=1e-5, atol=1e-7
        )  # beside the diagonal ours has none


def test_lora_last_t_is_lora_by_the_budget() -> None:
    assert list(LoraLastT().plans(LoraLastT().adapt(SPEC), TURN, {})) == list(
        FedLora(depth="budget").plans(FedLora().adapt(SPEC), TURN, {})
    )
    labels = [plan.label for plan in LoraLastT().plans(LoraLastT().adapt(SPEC), TURN, {})]
    assert labels == ["low rank, all 2", "low rank, last 1 of 2"]


@pytest.mark.parametrize(
    ("cls", "settings"),
    [
        (LoraLastT, {"rank": 0}),
        (HetLora, {"gamma": 0.0}),
        (HetLora, {"gamma": 1.5}),
        (HetLora, {"lambda_": -0.1}),
        (HetLora, {"depth": 0}),
        (HetLora, {"ranks": (4, 8)}),
        (Flora, {"ranks": (4, 4)}),
        (FlexLora, {"ranks": (16, 8)}),
        (FlexLora, {"ranks": (4, 0)}),
        (SLora, {"density": 1.1}),
        (SLora, {"density": -0.1}),
        (SLora, {"first_stage": 0.0}),
        (SLora, {"first_stage": 1.0}),
        (Adapters, {"width": 0}),
        (Adapters, {"std": 0.0}),
        (Adapters, {"depth": -1}),
    ],
    ids=str,
)
def test_settings_that_mean_nothing_are_refused(cls: type[Method], settings: Table) -> None:
    (key,) = settings
    with pytest.raises(ValueError, match=f"^{key} must .*got ") as caught:
        cls(**settings)
    assert str(caught.value).endswith(f"got {settings[key]}")


@pytest.mark.parametrize("cls", [HetLora, Flora, FlexLora])
def test_ranks_on_offer_are_halves_unless_named(cls: type[Any]) -> None:
    def ranks(method: FedLora, memory: Params) -> list[int]:
        network = method.adapt(SPEC)
        plans = list(method.plans(network, on_device(1), memory))
        layouts = [model.layout(plan.runs(network)) for plan in plans]
        return [plan.shape(layout, f"{UP}.lora_a")[0] for plan, layout in zip(plans, layouts, strict=True)]

    assert ranks(cls(), {}) == [8, 4, 2, 1]
    assert ranks(cls(rank=7), {}) == [7, 3, 1]
    assert ranks(cls(rank=7, ranks=(6, 5)), {}) == [6, 5]
    assert ranks(cls(depth="budget"), {}) == [8, 4, 2, 1] * 2
    last = list(cls(depth="budget").plans(cls().adapt(SPEC), TURN, {}))[-1]
    assert last.label == "rank 1, last 1 of 2"


def test_ffa_lora_sends_b_alone_and_its_mean_is_exact(world: Table, tmp_path: Path) -> None:
    run = begin(on(world, FfaLora(rank=3)), tmp_path)
    devices = Devices(run)
    state, _ = play(run, devices)
    network = run.outlook.chosen.spec
    names = [name for name in state.params if name.endswith("lora_b")]
    assert moved(run.state.params, state.params) == {*names, "head.weight"}
    assert all(job.plan.trains == {*names, "head.weight"} for job in devices.jobs)
    updates = [devices.train(job) for job in devices.jobs]
    total = sum(update.examples for update in updates)
    for linear in linears(model.layout(network).params):
        mean = sum(
            update.examples / total * product({**job.arrays, **update.arrays}, linear)
            for update, job in zip(updates, devices.jobs, strict=True)
        )
        np.testing.assert_allclose(product(state.params, linear), mean, rtol=1e-5, atol=1e-7)
    state, rows = play(run, devices, state)
    first = {job.turn.device for job in devices.jobs[:4]}
    again = [row for row in rows if row.device in first]
    assert again and all(row.down_bytes == row.up_bytes for row in again)  # A has come before


def het(**settings: Any) -> tuple[HetLora, Spec, Params, Params]:
    method = HetLora(rank=4, **settings)
    network = method.adapt(SPEC)
    params = weights(network)
    return method, network, params, method.prepare(network, params, fleet(), TURN)


def of_rank(method: HetLora, network: Spec, rank: int, memory: Params | None = None) -> Plan:
    return next(p for p in method.plans(network, TURN, memory or {}) if p.keep[Axis("rank")].count == rank)


def test_hetlora_gives_the_first_ranks_on_one_scale() -> None:
    method, network, params, memory = het(alpha=6.0)
    plan = of_rank(method, network, 2)
    arrays = method.encode(params, network, plan, TURN, memory)
    assert torch.equal(arrays[f"{UP}.lora_a"], params[f"{UP}.lora_a"][:2])
    assert torch.equal(arrays[f"{UP}.lora_b"], params[f"{UP}.lora_b"][:, :2])
    assert plan.trains == {name for name in params if "lora" in name} | {"head.weight"}
    cut = whole(params[f"{UP}.weight"], 64) + 6 / 4 * product(arrays, UP)
    np.testing.assert_allclose(model.product(network, arrays, UP).double().numpy(), cut, rtol=1e-5, atol=1e-6)


def test_hetlora_weighs_by_the_size_of_the_product_and_pads_with_zeros() -> None:
    method, network, params, memory = het()
    votes = [
        answered(method, network, of_rank(method, network, rank), params, device, examples, memory)
        for device, rank, examples in ((0, 4, 10), (2, 1, 30), (3, 2, 20))
    ]
    after, kept = method.merge(params, network, votes, SERVER, memory)
    for linear in linears(params):
        sizes = [np.linalg.norm(product(vote.arrays, linear)) for vote in votes]
        assert [product_norm(vote.arrays, linear) for vote in votes] == pytest.approx(sizes, rel=1e-9)
        a, b = (np.zeros_like(matrix(params[f"{linear}.lora_{end}"], end == "b")) for end in "ab")
        for vote, size in zip(votes, sizes, strict=True):
            rank = len(vote.arrays[f"{linear}.lora_a"])
            a[:rank] += size / sum(sizes) * matrix(vote.arrays[f"{linear}.lora_a"])
            b[:, :rank] += size / sum(sizes) * matrix(vote.arrays[f"{linear}.lora_b"], True)
        np.testing.assert_allclose(matrix(after[f"{linear}.lora_a"]), a, rtol=1e-5, atol=1e-7)
        np.testing.assert_allclose(matrix(after[f"{linear}.lora_b"], True), b, rtol=1e-5, atol=1e-7)
    head = sum(vote.weight * vote.arrays["head.weight"].double() for vote in votes) / 60
    torch.testing.assert_close(after["head.weight"].double(), head, rtol=1e-6, atol=1e-7)
    assert moved(params, after) == {name for name in params if "lora" in name} | {"head.weight"}
    assert kept["ranks"].tolist() == [4, 4, 4, 4]
    once, _ = method.merge(params, network, iter(votes), SERVER, memory)
    assert bits(once) == bits(after)


def test_hetlora_where_all_products_are_zero_weighs_as_usual() -> None:
    method, network, params, memory = het()
    plan = of_rank(method, network, 4)
    votes = []
    for device, examples in ((0, 1), (1, 3)):
        arrays = {n: torch.full_like(params[n], float(device)) for n in plan.trains}
        arrays |= {n: torch.zeros_like(p) for n, p in arrays.items() if n.endswith("lora_b")}
        votes.append(Vote(device, plan, arrays, float(examples)))
    after, _ = method.merge(params, network, votes, SERVER, memory)
    assert set(after[f"{UP}.lora_a"].flatten().tolist()) == {0.75}
    assert not after[f"{UP}.lora_b"].any()


@pytest.mark.parametrize(
    ("gamma", "rank", "first"), [(0.99, 4, 3), (0.5, 4, 2), (0.3, 2, 1), (0.99, 1, 1), (1.0, 4, 4)]
)
def test_the_penalty_pulls_as_autograd_says(gamma: float, rank: int, first: int) -> None:
    method, network, params, memory = het(gamma=gamma, lambda_=0.7)
    plan = of_rank(method, network, rank)
    arrays = method.encode(params, network, plan, TURN, memory)
    arrays |= {f"{V}.lora_b": torch.zeros_like(arrays[f"{V}.lora_b"])}  # where a norm is zero, nothing pulls
    leaves = {name: arrays[name].clone().requires_grad_() for name in sorted(plan.trains)}
    penalty = torch.zeros(())
    for linear in set(linears(leaves)) - {V}:
        penalty = (
            penalty + 0.7 * leaves[f"{linear}.lora_b"][..., first:].norm() * leaves[f"{linear}.lora_a"][first:].norm()
        )
    expected = dict.fromkeys(leaves, torch.zeros(()))
    if penalty.requires_grad and first < rank:
        found = torch.autograd.grad(penalty, list(leaves.values()), allow_unused=True, materialize_grads=True)
        expected = dict(zip(leaves, found, strict=True))
    for p in leaves.values():
        p.grad = torch.ones_like(p)
    job = Job(TURN, plan, LOCAL, arrays, method)
    method.pull(job, leaves, {}, TORCH)
    for name, p in leaves.items():
        assert p.grad is not None
        torch.testing.assert_close(p.grad - 1, expected[name].expand_as(p), rtol=1e-4, atol=1e-6, msg=name)
    assert first == rank or any(each.any() for each in expected.values())


def test_a_tail_that_shrank_is_dropped_and_the_device_gets_no_more_ranks() -> None:
    method, network, params, memory = het(gamma=0.5)
    plan = of_rank(method, network, 4)
    arrays = {name: p.clone() for name, p in method.encode(params, network, plan, TURN, memory).items()}
    votes = []
    for device, factor in ((1, 1.0), (2, 1.1), (3, 0.9)):
        job = Job(on_device(device), plan, LOCAL, arrays, method)
        aside = method.remember(job, arrays, TORCH)
        trained = {name: p.clone() for name, p in arrays.items()}
        for linear in linears(trained):
            trained[f"{linear}.lora_a"][2:] *= factor
            trained[f"{linear}.lora_a"][:2] *= 2 - factor  # only the tail counts
        sent, state = method.finish(job, trained, aside, TORCH)
        assert not state
        for linear in linears(sent):
            assert sent[f"{linear}.lora_a"][2:].any() == sent[f"{linear}.lora_b"][..., 2:].any() == (factor >= 1)
            assert sent[f"{linear}.lora_a"][:2].any() and sent[f"{linear}.lora_b"][..., :2].any()
        votes.append(method.decode(Update(job.turn, sent, 5, STEPS, 0.0), job, network))
    _, kept = method.merge(params, network, votes, SERVER, memory)
    assert kept["ranks"].tolist() == [4, 4, 4, 2]
    assert memory["ranks"].tolist() == [4, 4, 4, 4]
    offered = [
        [plan.keep[Axis("rank")].count for plan in method.plans(network, on_device(device), kept)] for device in (0, 3)
    ]
    assert offered == [[4, 2, 1], [2, 1]]
    assert [plan.keep[Axis("rank")].count for plan in method.plans(network, SERVER, kept)] == [4, 2, 1]


def test_tails_that_do_not_train_stay() -> None:
    method, network, params, memory = het(gamma=0.5, depth="budget")
    plan = next(p for p in method.plans(network, TURN, memory) if "last 1 of 2" in p.label)
    arrays = {name: p.clone() for name, p in method.encode(params, network, plan, TURN, memory).items()}
    aside = method.remember(Job(TURN, plan, LOCAL, arrays, method), arrays, TORCH)
    arrays[f"{UP}.lora_a"][2:] *= 0.5
    sent, _ = method.finish(Job(TURN, plan, LOCAL, arrays, method), arrays, aside, TORCH)
    assert not sent[f"{UP}.lora_b"][..., 2:].any()
    frozen = {name for name in arrays if name.startswith("h.0.")}
    assert bits({name: arrays[name] for name in frozen}) == bits({name: params[name] for name in frozen})


@pytest.mark.parametrize("levers", [Levers(fused_update=True), Levers(micro_batch=1), Levers(recompute=True)], ids=str)
@pytest.mark.parametrize("clip", [0.0, 0.05])
def test_the_penalty_is_the_same_with_levers(levers: Levers, clip: float) -> None:
    """With SGD, and a penalty that is felt."""
    method, network, params, _ = het(gamma=0.5, lambda_=0.5)
    plan = of_rank(method, network, 4)
    shard = Pairs(*np.random.default_rng(0).integers(0, SPEC.vocab, (2, 8, 10)))
    local = Local(lr=0.1, optimizer="sgd", steps=3, batch_size=4, clip=clip)
    sent = []
    for each, how in ((method, Levers()), (method, levers), (replace(method, lambda_=0.0), Levers())):
        job = Job(on_device(0), replace(plan, levers=how), local, params, each)
        sent.append(client.train(job.owned(), shard, network).arrays)
    plain, levered, free = sent
    for name, p in plain.items():
        torch.testing.assert_close(levered[name], p, rtol=1e-4, atol=1e-6)
    assert not torch.allclose(plain[f"{UP}.lora_a"], free[f"{UP}.lora_a"], atol=1e-4)


def test_a_run_that_prunes_goes_on_where_it_was_stopped(world: Table, tmp_path: Path) -> None:
    """A strong penalty makes tails shrink once B is not zero any more."""
    table = on(world, HetLora(rank=8, gamma=0.5, lambda_=1.0), rounds=4, cohort=6)
    straight, stopped, labels = begin(table, tmp_path), begin(table, tmp_path), []

    def interrupt(row: Any, devices: Any) -> None:
        if row.round == 3:
            raise KeyboardInterrupt

    straight.play(lambda row, devices: labels.append({device.plan for device in devices}))
    assert labels[0] == {"rank 8, all 3"} != labels[2]
    with pytest.raises(KeyboardInterrupt):
        stopped.play(interrupt)
    assert min(stopped.state.memory["ranks"].tolist()) < 8
    resume(stopped.folder).play()
    assert outcome(stopped.folder) == outcome(straight.folder)
