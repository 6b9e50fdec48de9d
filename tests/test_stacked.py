"""Devices that are simulated together against devices that are simulated one by one, and what is kept of prefixes."""

import errno
import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from specs import SPECS
from support import bits, spec, weights
from test_methods_families import FAMILIES, Server, shard

from lamina import client, model, packed
from lamina.data.task import Pairs, Shard
from lamina.engines.prefix import Prefixes
from lamina.engines.stacked import StackedEngine, stackable, stacks, train_stack
from lamina.job import Job, Local, Turn, Update
from lamina.kernels import Mix
from lamina.layout import Params
from lamina.levers import Levers
from lamina.methods import METHODS, Method
from lamina.methods.blocks import Caff
from lamina.methods.depth import DepthFL
from lamina.plan import Plan
from lamina.spec import Spec
from lamina.stack import Stack, Stacked

SIZES = (6, 3, 10, 6)
"""Examples of the devices: with batches of four, steps and last batches differ."""
SGD = Local(lr=0.02, optimizer="sgd", momentum=0.5, weight_decay=0.1, batch_size=4, epochs=2)


@pytest.fixture(autouse=True)
def packs_small_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """Frozen matrices of these networks are packed as those of larger ones."""
    monkeypatch.setattr(packed, "SMALLEST", 64)


def serial(jobs: Sequence[Job], shards: Sequence[Shard], network: Spec) -> list[Update]:
    return [client.train(job.owned(), each, network) for job, each in zip(jobs, shards, strict=True)]


def together(
    jobs: Sequence[Job], shards: Sequence[Shard], network: Spec, prefixes: Prefixes | None = None
) -> list[Update]:
    return train_stack(jobs, shards, network, prefixes or Prefixes(0, 0))


def assert_alike(found: Sequence[Update], wanted: Sequence[Update], jobs: Sequence[Job]) -> None:
    """All that devices answer is the same but for rounding: 1e-5 of a tensor, 1e-3 of its change."""
    for one, other, job in zip(found, wanted, jobs, strict=True):
        assert (one.turn, one.examples, one.steps) == (other.turn, other.examples, other.steps)
        assert one.loss == pytest.approx(other.loss, rel=1e-5)
        for mine, theirs in ((one.arrays, other.arrays), (one.state, other.state)):
            assert mine.keys() == theirs.keys()
            for name, tensor in theirs.items():
                if name.endswith("attn.k.bias") and job.local.kind == "adamw":
                    continue  # its gradient is zero but for rounding, which Adam makes large
                if not tensor.dtype.is_floating_point:
                    assert torch.equal(mine[name], tensor)
                    continue
                off = torch.linalg.vector_norm(mine[name] - tensor)
                assert off <= 1e-5 * torch.linalg.vector_norm(tensor) + 1e-7, name
                if name in job.arrays and job.arrays[name].shape == tensor.shape:
                    change = torch.linalg.vector_norm(tensor - job.arrays[name])
                    assert off <= 1e-3 * change + 1e-6, name


LANGUAGE, CLASSES = ("gpt2", "llama", "qwen3"), ("bert", "vit", "dinov2")


@pytest.mark.parametrize(("number", "name"), list(enumerate(METHODS)), ids=list(METHODS))
def test_devices_together_train_as_each_alone(number: int, name: str) -> None:
    """Every method, on a family of each kind of task; all families come up."""
    kinds = {"language": LANGUAGE, "classification": CLASSES}
    for family in (kinds[kind][number % 3] for kind in METHODS[name].tasks):
        together_as_alone(name, family)


def together_as_alone(name: str, family: str) -> None:
    server = Server(name, family)
    shards = [shard(server.spec, size, seed) for seed, size in enumerate(SIZES)]
    plans = [plan for plan in server.plans if width(server, plan) > 2]  # a norm of two has no gradient but rounding
    for plan in plans[:: max(1, len(plans) - 1)]:
        turns = [replace(server.turn, device=device) for device in range(len(SIZES))]
        jobs = [replace(server.job(plan), turn=turn, local=replace(SGD, lr=1e-3)) for turn in turns]
        if stackable(jobs[0]):
            assert_alike(together(jobs, shards, server.spec), serial(jobs, shards, server.spec), jobs)


def width(server: Server, plan: Plan) -> int:
    """Of the residual stream that a device holds, as far as norms see it."""
    layout = model.layout(plan.runs(server.spec))
    return min((plan.shape(layout, name)[0] for name in plan.holds if name.endswith("norm1.weight")), default=9)


def caff_jobs(network: Spec, trained: Sequence[int], params: Params | None = None, local: Local = SGD) -> list[Job]:
    """Devices that train so many last blocks each."""
    method, params, layout = Caff(), params or weights(network), model.layout(network)
    plans = {plan.trained_blocks(layout): plan for plan in method.plans(network, Turn(0, 0, 9), {})}
    return [Job(Turn(0, 3, 9, i), plans[count], local, params, method) for i, count in enumerate(trained)]


def texts(count: int, tokens: int = 8, seed: int = 0) -> Pairs:
    ids = np.random.default_rng(seed).integers(0, spec(1).vocab, (count, tokens + 1))
    return Pairs(ids[:, :-1], ids[:, 1:])


SHARDS = [texts(size, seed=seed) for seed, size in enumerate(SIZES)]


@pytest.mark.parametrize(
    "local",
    [
        replace(SGD, clip=0.05),
        replace(SGD, clip=0.8),
        Local(lr=1e-3, batch_size=4, weight_decay=0.1),
        Local(lr=1e-3, batch_size=4, steps=3, clip=0.1),
        Local(lr=1e-3, batch_size=32, schedule="cosine"),
        Local(lr=1e-3, head_lr=1e-2, batch_size=4),
    ],
    ids=["clipped", "some clipped", "adamw", "steps", "one batch", "fast head"],
)
def test_optimizers_clipping_and_ragged_steps(local: Local) -> None:
    jobs = caff_jobs(spec(3), [2] * 4, local=local)
    found = together(jobs, SHARDS, spec(3))
    assert [update.steps for update in found] == [local.round_steps(size) for size in SIZES]
    assert_alike(found, serial(jobs, SHARDS, spec(3)), jobs)


def test_a_device_that_has_finished_moves_no_more() -> None:
    """With momentum and weight decay it would, if it took steps without a gradient."""
    jobs = caff_jobs(spec(2), [2, 2])
    few, many = texts(3), texts(24, seed=1)
    alone, beside = together(jobs[:1], [few], spec(2)), together(jobs, [few, many], spec(2))
    assert_alike(beside[:1], alone, jobs[:1])
    assert [update.steps for update in beside] == [2, 12]


def test_penalties_are_of_each_device() -> None:
    """FedDyn's linear term differs from device to device."""
    network = DepthFL(alpha=0.5).adapt(spec(2))
    method, params = DepthFL(alpha=0.5), weights(network)
    plan = next(method.plans(network, Turn(0, 0, 9), {}))
    states = [{name: torch.full_like(params[name], 0.1 * device) for name in plan.trains} for device in range(4)]
    jobs = [Job(Turn(0, 3, 9, i), plan, SGD, params, method, states[i]) for i in range(4)]
    found = together(jobs, SHARDS, network)
    assert_alike(found, serial(jobs, SHARDS, network), jobs)
    assert all(update.state for update in found)


@pytest.mark.parametrize(
    "levers",
    [
        Levers(chunked_loss=True, fused_update=True, micro_batch=2, recompute=True),
        Levers(prefix_cache="ram"),
        Levers(prefix_cache="ram", cache_bits=16),
        Levers(frozen_bits=8),
        Levers(prefix_cache="disk", frozen_bits=8),
    ],
    ids=lambda levers: "+".join(levers.names()),
)
def test_levers_mean_what_they_mean_for_a_device(levers: Levers) -> None:
    jobs = [replace(job, plan=replace(job.plan, levers=levers)) for job in caff_jobs(spec(3), [1] * 4)]
    found = together(jobs, SHARDS, spec(3))
    assert_alike(found, serial(jobs, SHARDS, spec(3)), jobs)


@pytest.mark.parametrize("levers", [Levers(frozen_bits=8), Levers()], ids=["8 bits", "32 bits"])
@pytest.mark.parametrize("shared", [True, False], ids=["shared", "of their own"])
def test_frozen_tensors_above_the_first_trained_block(levers: Levers, shared: bool) -> None:
    frozen = {"h.2.ffn.up.weight", "h.2.attn.q.bias", "h.1.norm2.bias", "norm.weight"}
    jobs = caff_jobs(spec(3), [2] * 4)
    plan = replace(jobs[0].plan, trains=jobs[0].plan.trains - frozen, levers=levers)
    arrays = [weights(spec(3), 0 if shared else seed) for seed in range(4)]
    jobs = [replace(job, plan=plan, arrays=arrays[0 if shared else i]) for i, job in enumerate(jobs)]
    assert_alike(together(jobs, SHARDS, spec(3)), serial(jobs, SHARDS, spec(3)), jobs)


def test_a_frozen_head_in_8_bits() -> None:
    jobs = caff_jobs(spec(2), [1] * 4)
    plan = replace(jobs[0].plan, trains=jobs[0].plan.trains - {"head.weight"}, levers=Levers(frozen_bits=8))
    jobs = [replace(job, plan=plan) for job in jobs]
    assert_alike(together(jobs, SHARDS, spec(2)), serial(jobs, SHARDS, spec(2)), jobs)


def test_the_loss_can_be_weighted() -> None:
    """Gradients of the head follow what comes down."""
    ops, rng = Stacked(), torch.Generator().manual_seed(0)
    ops.aim(2)
    x, head = torch.randn(4, 3, 5, generator=rng), torch.randn(2, 7, 5, generator=rng)
    bias, targets = torch.randn(2, 7, generator=rng), torch.arange(12).view(4, 3) % 7
    share = torch.tensor([2.0, -3.0])
    leaves = [each.clone().requires_grad_() for each in (x, head, bias)]
    stacks = [cast(torch.Tensor, Stack(each)) for each in leaves[1:]]
    losses = ops.head_loss([leaves[0]], stacks[:1], stacks[1:], targets, Mix.plain(1), None, True)
    losses.mul(share).sum().backward()  # type: ignore[no-untyped-call]
    plain = [each.clone().requires_grad_() for each in (x, head, bias)]
    for i in range(2):
        logits = plain[0][2 * i : 2 * i + 2] @ plain[1][i].T + plain[2][i]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets[2 * i : 2 * i + 2].flatten())
        torch.testing.assert_close(losses[i], loss)
        (loss * share[i]).backward()  # type: ignore[no-untyped-call]
    for mine, theirs in zip(leaves, plain, strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad)


def test_a_loss_beyond_what_a_probability_can_tell() -> None:
    """The target's logit is 200 below the others': its probability is zero in fp32, its loss is not infinite."""
    x, weight, targets = torch.ones(1, 40, 1), torch.zeros(3, 1), torch.tensor([[0] * 39 + [2]])
    weight[2] = -200.0
    weight.requires_grad_()
    ops = Stacked()
    loss = ops.head_loss([x], [weight], [None], targets, Mix.plain(1), None, True).sum()
    wanted = F.cross_entropy(x[0] @ weight.T, targets[0])
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-6) and wanted > 5
    found, right = (torch.autograd.grad(each, weight)[0] for each in (loss, wanted))
    assert torch.allclose(found, right, rtol=1e-6)


@pytest.mark.parametrize("size", [0.01, 1.0, 30.0])
def test_gelu_is_as_exact_as_torch_s(size: float) -> None:
    x, g = torch.randn(2, 5000, generator=torch.Generator().manual_seed(0)) * torch.tensor([[size], [1.0]])
    x.requires_grad_()
    exact = x.detach().double().requires_grad_()
    mine, wanted = Stacked().act(x, "gelu_tanh"), F.gelu(exact, approximate="tanh")
    mine.backward(g)  # type: ignore[no-untyped-call]
    wanted.backward(g.double())  # type: ignore[no-untyped-call]
    assert x.grad is not None and exact.grad is not None
    for found, right in ((mine, wanted), (x.grad, exact.grad)):
        assert torch.linalg.vector_norm(found.double() - right) < 5e-7 * torch.linalg.vector_norm(right)
    narrow = x.detach().bfloat16()
    assert torch.equal(Stacked(torch.bfloat16).act(narrow, "gelu_tanh"), F.gelu(narrow, approximate="tanh"))


def test_who_is_stacked_with_whom() -> None:
    network = spec(3)
    jobs = caff_jobs(network, [1, 2, 1, 1, 2, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1])
    shards = [texts(20, seed=seed) for seed in range(30)]
    found = stacks(jobs, network, shards)
    assert sorted(job.turn.device for stack in found for job in stack) == list(range(len(jobs)))
    assert {len({job.plan for job in stack}) for stack in found} == {1}
    assert [stack[0].turn.device for stack in found] == sorted(stack[0].turn.device for stack in found)
    assert max(map(len, found)) == 3  # an eighth of the cohort, rounded up
    eight_bits = replace(jobs[0].plan, levers=Levers(optimizer="adamw8"))
    alone = [replace(job, plan=eight_bits, local=Local()) for job in jobs[:3]]
    assert not stackable(alone[0]) and list(map(len, stacks(alone, network, shards))) == [1, 1, 1]
    assert all(
        len(stack) == 1
        for stack in stacks(caff_jobs(network, [1] * 30, local=Local(batch_size=10_000)), network, [texts(2000)] * 30)
    )


def test_neither_workers_nor_what_is_kept_change_a_bit() -> None:
    network, shards = spec(3), [texts(size, seed=seed) for seed, size in enumerate((6, 3, 10, 6, 8, 5, 7, 9, 4))]
    jobs = caff_jobs(network, [1, 2, 1, 2, 1, 1, 2, 1, 2])
    wanted: dict[int, dict[str, bytes]] = {}
    for workers, prefixes in (
        (1, Prefixes(0, 0)),
        (2, Prefixes(2**20, 0)),
        (2, Prefixes(0, 2**20)),
        (1, Prefixes(4000, 2**20)),
    ):
        engine = StackedEngine(network, shards, workers, prefixes)
        for _ in range(2):
            found = {update.turn.device: bits(update.arrays) for update in engine.run(jobs)}
            assert found == (wanted := wanted or found)


def run_twice(first: Sequence[Job], second: Sequence[Job], network: Spec, shards: Sequence[Shard]) -> tuple[int, int]:
    """Examples times blocks that the second round found and made."""
    prefixes = Prefixes(2**20, 0)
    engine = StackedEngine(network, shards, 1, prefixes)
    list(engine.run(first))
    before = prefixes.found, prefixes.made
    fresh = StackedEngine(network, shards, 1, Prefixes(0, 0))
    for mine, other in zip(engine.run(second), fresh.run(second), strict=True):
        assert bits(mine.arrays) == bits(other.arrays)
    return prefixes.found - before[0], prefixes.made - before[1]


def test_prefixes_are_kept_below_the_deepest_trained_block() -> None:
    network, params = spec(4), weights(spec(4))
    shards = [texts(5, seed=0), texts(7, seed=1)]
    jobs = caff_jobs(network, [3, 1], params)
    moved = params | {name: params[name] + 0.1 for name in params if name.startswith(("h.1.", "h.2.", "h.3.", "head"))}
    later = caff_jobs(network, [3, 1], moved)
    assert run_twice(jobs, later, network, shards) == (5 + 7, 2 * 7)
    assert run_twice(jobs, jobs, network, shards) == (5 + 7, 2 * 7)


def test_what_a_changed_prefix_made_is_not_used() -> None:
    network, params = spec(3), weights(spec(3))
    shards, jobs = [texts(5)], caff_jobs(network, [1], params)
    for name in ("embed.positions", "h.0.ffn.up.bias", "h.1.norm2.weight"):
        assert run_twice(jobs, caff_jobs(network, [1], params | {name: params[name] + 1}), network, shards) == (0, 10)
    assert run_twice(
        jobs, caff_jobs(network, [1], params | {"h.2.norm1.bias": params["norm.bias"] + 1}), network, shards
    ) == (10, 0)
    deeper = caff_jobs(network, [2], params)
    assert run_twice(jobs, deeper, network, shards) == (0, 5)


def test_nothing_is_kept_of_who_does_not_come_back_or_of_what_changes() -> None:
    network, jobs = spec(3), caff_jobs(spec(3), [1] * 2)
    many = [texts(5, seed=seed) for seed in range(100)]
    assert run_twice(jobs, jobs, network, many) == (0, 20)  # 5 rounds of 2 of 100: most never come back

    class Changing(Pairs):
        def at(self, turn: Turn) -> Pairs:
            return Pairs(self.inputs, self.targets)

    changing = [Changing(each.inputs, each.targets) for each in SHARDS[:2]]
    assert run_twice(jobs, jobs, network, changing) == (0, 2 * (6 + 3))
    few = [replace(job, local=Local(batch_size=2, steps=1)) for job in jobs]
    assert run_twice(few, few, network, [texts(50), texts(50, seed=1)]) == (0, 2 * (2 + 2))


def test_room_is_used_again() -> None:
    network, params = spec(3), weights(spec(3))
    room = 5 * 8 * 16 * 4
    for prefixes in (Prefixes(room, 0), Prefixes(0, room)):
        engine = StackedEngine(network, [texts(5), texts(5, seed=1)], 1, prefixes)
        list(engine.run(caff_jobs(network, [1], params)))
        changed = caff_jobs(network, [1, 1], params | {"embed.tokens": params["embed.tokens"] + 1})
        for expected in (0, 0, 10, 20):
            assert prefixes.found == expected
            list(engine.run(changed))


def test_a_file_that_takes_little_at_a_time_or_nothing_changes_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    network, shards = spec(3), [texts(5), texts(5, seed=1)]
    jobs, room = caff_jobs(network, [1, 1]), 2 * 5 * 8 * 16 * 4

    def played() -> tuple[list[Any], int]:
        prefixes = Prefixes(0, room)
        engine = StackedEngine(network, shards, 1, prefixes)
        list(engine.run(jobs))
        return [bits(update.arrays) for update in engine.run(jobs)], prefixes.found

    wanted, found = played()
    write, read = os.pwrite, os.preadv
    monkeypatch.setattr(os, "pwrite", lambda file, data, at: write(file, data[:100], at))
    monkeypatch.setattr(os, "preadv", lambda file, into, at: read(file, [into[0][:100]], at))
    assert played() == (wanted, found) and found == 20

    def full(file: int, start: int, size: int) -> None:
        raise OSError(errno.ENOSPC, "no space left")

    monkeypatch.setattr(os, "posix_fallocate", full)
    assert played() == (wanted, 0)


def test_fewer_bits_and_ragged_steps() -> None:
    jobs = caff_jobs(spec(2), [1] * 4, local=replace(SGD, lr=0.01))
    found = train_stack(jobs, SHARDS, spec(2), Prefixes(0, 0), torch.bfloat16)
    for one, other in zip(found, serial(jobs, SHARDS, spec(2)), strict=True):
        assert (one.turn, one.steps) == (other.turn, other.steps)
        assert one.loss == pytest.approx(other.loss, rel=0.02) and one.loss != other.loss


@pytest.mark.parametrize("family", FAMILIES)
def test_fewer_bits_are_close(family: str) -> None:
    network = SPECS[family]
    names = frozenset(model.layout(network).params)
    plan = Plan(names, names)
    params, method = weights(network), Method()
    shards = [shard(network, 6, seed) for seed in range(2)]
    jobs = [Job(Turn(0, 0, 9, i), plan, replace(SGD, lr=0.01), params, method) for i in range(2)]
    exact = serial(jobs, shards, network)
    found = train_stack(jobs, shards, network, Prefixes(0, 0), torch.bfloat16)
    for one, other in zip(found, exact, strict=True):
        assert one.loss == pytest.approx(other.loss, rel=0.02) and one.loss != other.loss
        mine, theirs = (torch.cat([(p[n] - params[n]).flatten() for n in names]) for p in (one.arrays, other.arrays))
        assert torch.nn.functional.cosine_similarity(mine, theirs, dim=0) > 0.98
        assert all(p.dtype == torch.float32 for p in one.arrays.values())
