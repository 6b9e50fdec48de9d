"""Watching a local round: all tensors, by what they are for and when, against the price and by hand."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from support import TURN, bits

from lamina import client, model
from lamina.cost import cost
from lamina.flash import Flash
from lamina.job import Local
from lamina.levers import Levers
from lamina.measure import watch, work
from lamina.methods import Method
from lamina.methods.blocks import Caff
from lamina.methods.lora import FedLora
from lamina.plan import Plan
from lamina.spec import Spec
from lamina.watch import Watch, count_allocations, watch_job

MOMENTS = ("load", "prefix", "forward", "loss", "backward", "update")
SPEC = Spec(3, embed=64, heads=4, head_dim=16, ffn=256, vocab=96, positions=64)
WIDE = replace(SPEC, vocab=4096)
LOCAL = Local(lr=0.01, batch_size=4, steps=2)
KIB, TOKENS = 1024, 64


def plan_of(method: Method, spec: Spec, trained: int, levers: Levers) -> tuple[Spec, Plan]:
    adapted = method.adapt(spec)
    layout = model.layout(adapted)
    plans = {plan.trained_blocks(layout): plan for plan in method.plans(adapted, TURN, {})}
    return adapted, replace(plans[trained], levers=levers)


CELLS: dict[str, tuple[Method, Spec, int, Levers, Local]] = {
    "backward": (Caff(), SPEC, 1, Levers(), LOCAL),
    "loss": (Caff(), WIDE, 1, Levers(chunked_loss=True, micro_batch=1), replace(LOCAL, optimizer="sgd")),
    "prefix": (
        *(FedLora(rank=2, depth=1), SPEC, 1, Levers(prefix_cache="disk", micro_batch=1)),
        replace(LOCAL, optimizer="sgd"),
    ),
    "low rank": (FedLora(rank=2), WIDE, 3, Levers(frozen_bits=8, recompute=True), LOCAL),
}


@pytest.mark.parametrize(("method", "spec", "trained", "levers", "local"), CELLS.values(), ids=list(CELLS))
def test_what_is_watched_is_the_price(method: Method, spec: Spec, trained: int, levers: Levers, local: Local) -> None:
    """By category, to a few numbers: divisors of means, counters of steps."""
    adapted, plan = plan_of(method, spec, trained, levers)
    price = cost(adapted, plan, local, TOKENS, local.steps)
    found, moment = watch(adapted, plan, local, TOKENS).peak()
    assert moment == price.moment
    assert found.keys() <= asdict(price.memory).keys()
    for category, size in asdict(price.memory).items():
        assert abs(size - found.get(category, 0)) <= 16, category


def test_moments_are_those_of_the_documents() -> None:
    """All of them happen, and no other."""
    adapted, plan = plan_of(Caff(), SPEC, 1, Levers(prefix_cache="ram", fused_update=True))
    moments = {moment for _, _, moment in watch(adapted, plan, LOCAL, TOKENS).events}
    assert moments == set(MOMENTS)
    assert {cost(*each).moment for each in priced()} == {"backward", "loss", "prefix"}


def priced() -> list[tuple[Spec, Plan, Local, int, int]]:
    return [(*plan_of(*cell[:4]), cell[4], TOKENS, cell[4].steps) for cell in CELLS.values()]


@pytest.mark.parametrize(
    "levers", [Levers(), Levers(prefix_cache="disk", chunked_loss=True, fused_update=True)], ids=str
)
def test_watching_and_counting_change_no_bit(levers: Levers, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """And say nothing. The allocator gives out what is watched, but for the batch, and what kernels take."""
    adapted, plan = plan_of(Caff(), SPEC, 2, levers)
    job, shard = work(adapted, plan, LOCAL, TOKENS)
    path = tmp_path / "arrays.safetensors"
    save_file(dict(job.arrays), path)
    plain = client.train(job.owned(), shard, adapted)
    flashed = replace(job, arrays=Flash(path))
    watched, timeline = watch_job(flashed, shard, adapted)
    counted, allocated = count_allocations(lambda: client.train(flashed, shard, adapted))
    for update in (watched, counted):
        assert bits(update.arrays) == bits(plain.arrays)
        assert (update.turn, update.examples, update.steps, update.loss) == (
            *(plain.turn, plain.examples, plain.steps, plain.loss),
        )
    peak, batch = sum(timeline.peak()[0].values()), 2 * 8 * LOCAL.batch_size * TOKENS
    assert peak - batch <= allocated <= 1.1 * peak
    assert capfd.readouterr() == ("", "")


def test_random_work_is_always_the_same() -> None:
    adapted, plan = plan_of(FedLora(rank=2), SPEC, 3, Levers())
    (job, shard), (again, others) = (work(adapted, plan, LOCAL, TOKENS) for _ in range(2))
    layout = model.layout(adapted)
    assert bits(job.arrays) == bits(again.arrays)
    assert {name: tuple(p.shape) for name, p in job.arrays.items()} == {n: plan.shape(layout, n) for n in plan.holds}
    assert (job.plan, job.local) == (plan, LOCAL)
    inputs, targets = shard.batch(np.arange(len(shard)))
    assert inputs.shape == targets.shape == (LOCAL.steps * LOCAL.batch_size, TOKENS)
    assert inputs.min() >= 0 and inputs.max() == SPEC.vocab - 1 and (inputs != targets).any()
    assert (others.inputs == inputs).all() and (others.targets == targets).all()
    assert all(p.std() > 0 for p in job.arrays.values())


def test_a_watch_sees_births_and_deaths() -> None:
    """By hand: 1 KiB, then 2 KiB beside it, which a view does not add to, then 4 KiB alone."""
    with Watch() as watched:
        watched.timeline.moment = "first"
        one = torch.ones(KIB // 4)
        watched.timeline.moment = "second"
        two = torch.cat([one, one])
        view = two.view(2, -1)[1:]
        del one, two
        watched.timeline.moment = "third"
        del view
        four = torch.ones(4 * KIB // 4)
        del four
    torch.ones(KIB)
    sizes = [(size, storage.category, moment) for size, storage, moment in watched.timeline.events]
    assert sizes == [
        (KIB, "temporary", "first"),
        (2 * KIB, "temporary", "second"),
        (-KIB, "temporary", "second"),
        (-2 * KIB, "temporary", "third"),
        (4 * KIB, "temporary", "third"),
        (-4 * KIB, "temporary", "third"),
    ]
    assert watched.timeline.peak() == ({"temporary": 4 * KIB}, "third")


def test_a_watch_tells_what_tensors_are_for() -> None:
    """What is kept for backward, gradients when they are used, states of the optimizer; nothing after its end."""
    p = torch.ones(KIB // 4, requires_grad=True)
    optimizer = torch.optim.AdamW([p], fused=True)
    with Watch() as watched:
        (p.exp() * 2.0).sum().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    totals: dict[str, int] = {}
    for size, storage, _ in watched.timeline.events:
        if size > 0:
            totals[storage.category] = totals.get(storage.category, 0) + size
    assert totals["gradients"] == KIB
    assert totals["optimizer"] == 2 * KIB + 4
    assert totals["activations"] >= KIB
    events = len(watched.timeline.events)
    p.exp().sum().backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    assert len([size for size, _, _ in watched.timeline.events[events:] if size > 0]) == 0
