"""The contract of a method over families of networks: texts and images, classes and tokens, every row of METHODS."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest
import torch
from specs import SPECS, TOKENS
from support import LOCAL, STEPS, bits, moved, weights
from test_methods import TENSORS_OF_OTHERS

from lamina import client, measure, model
from lamina.availability import availability
from lamina.clock import Clock
from lamina.config import Experiment
from lamina.cost import Cost, cost
from lamina.data.task import Pairs, Task
from lamina.engines.local import LocalEngine
from lamina.estimators import PROJECTED, unfold
from lamina.experiment import Outlook
from lamina.fleet import Budget, DeviceClass, roster
from lamina.job import Job, Turn, Update
from lamina.layout import Params
from lamina.methods import METHODS, Method
from lamina.metrics import evaluate
from lamina.ops import TORCH
from lamina.plan import Plan, Vote
from lamina.planner import Fleet, Group, assess
from lamina.server import play_round
from lamina.spec import Spec
from lamina.state import Copies, State

RATES, ALWAYS = roster([DeviceClass("all")], 4, 0).rates, availability("always", 8.0, 4, 0)
FAMILIES = ("bert", "vit", "llama", "qwen3", "dinov2")
every_pair = pytest.mark.parametrize(
    ("name", "family"),
    [
        (name, family)
        for name, cls in METHODS.items()
        for family in FAMILIES
        if ("classification" if SPECS[family].labels else "language") in cls.tasks
    ],
)


@cache
def weights_of(spec: Spec) -> Params:
    return weights(spec)


def shard(spec: Spec, examples: int, seed: int) -> Pairs:
    """Random examples of a device, texts of different lengths among them; of the classes, it has two."""
    rng = np.random.default_rng(seed)
    labels = rng.choice(spec.labels, 2, replace=False)[rng.integers(0, 2, (examples, 1))] if spec.labels else None
    if spec.patch:
        pixels = rng.standard_normal((examples, spec.channels, spec.image, spec.image), dtype=np.float32)
        return Pairs(pixels, cast(np.ndarray, labels))
    ids = rng.integers(0, spec.vocab, (examples, TOKENS + 1))
    if labels is None:
        return Pairs(ids[:, :-1], ids[:, 1:])
    return Pairs(np.where(np.arange(TOKENS) < rng.integers(1, TOKENS + 1, (examples, 1)), ids[:, :-1], -1), labels)


@dataclass
class Server:
    """A method on a network of a family: tensors of which none is zero or one, its memory, and the plans it lists."""

    name: str
    family: str

    def __post_init__(self) -> None:
        self.method: Method = METHODS[self.name]()
        bare = SPECS[self.family]
        self.spec = self.method.adapt(bare)
        self.layout = model.layout(self.spec)
        pretrained = weights_of(bare)
        common = {name: pretrained[name] for name in self.layout.params.keys() & pretrained.keys()}
        self.params = self.method.equip(self.spec, weights_of(self.spec) | common, pretrained)
        self.turn = max(
            (Turn(0, each, 3, 0) for each in self.method.peak_rounds(3)),
            key=lambda turn: self.price(next(self.method.plans(self.spec, turn, {}))).memory_bytes,
        )
        fleet = Fleet([0, 0], (next(self.method.plans(self.spec, self.turn, {})),), lambda group, plan: True)
        self.memory = self.method.prepare(self.spec, self.params, fleet, replace(self.turn, device=-1))
        plans = list(self.method.plans(self.spec, self.turn, self.memory))
        self.plans = plans if len(plans) < 4 else [plans[0], plans[len(plans) // 2], plans[-1]]

    def job(self, plan: Plan) -> Job:
        arrays = self.method.encode(self.params, self.spec, plan, self.turn, self.memory)
        state = {name: torch.zeros(plan.shape(self.layout, name)) for name in sorted(self.method.kept(self.spec, plan))}
        return Job(self.turn, plan, LOCAL, arrays, self.method, state)

    def price(self, plan: Plan) -> Cost:
        return cost(self.spec, plan, LOCAL, TOKENS, STEPS, self.method)

    def merged(self, votes: list[Vote]) -> Params:
        turn = replace(self.turn, device=-1)
        return self.method.merge(self.params, self.spec, votes, turn, self.memory)[0]


@every_pair
def test_cutting_out_and_putting_back_changes_nothing(name: str, family: str) -> None:
    server = Server(name, family)
    method, votes = server.method, []
    for number, plan in enumerate(server.plans):
        job = replace(server.job(plan), turn=replace(server.turn, device=number)).owned()
        assert set() < plan.trains <= plan.holds == set(job.arrays)
        aside = method.remember(job, dict(job.arrays), TORCH)
        labels = torch.ones(server.spec.outputs, dtype=torch.bool)
        aside |= {"labels": labels} if method.objective(job).own_labels else {}
        aside |= {PROJECTED: torch.zeros(STEPS, method.directions)} if plan.gradient == "zeroth" else {}
        arrays, _ = method.finish(job, dict(job.arrays), aside, TORCH)
        votes.append(method.decode(unfold(Update(job.turn, arrays, 2, STEPS, 0.0), job), job, server.spec))
    after = server.merged(votes)
    assert after.keys() == server.params.keys()
    if not method.lossy:
        for each, tensor in after.items():
            torch.testing.assert_close(tensor, server.params[each], rtol=1e-5, atol=1e-5, msg=each)
    else:
        others = TENSORS_OF_OTHERS.get(name, ())
        by_others = {each for each, row in server.layout.params.items() if row.part in others}
        assert moved(server.params, after) <= by_others.union(*(vote.plan.trains for vote in votes))


@every_pair
def test_a_device_trains_what_its_plan_says_in_the_memory_foreseen(name: str, family: str) -> None:
    """Live tensors within two percent at the peak."""
    server = Server(name, family)
    examples = shard(server.spec, 6, 0)
    for plan in server.plans[:: max(1, len(server.plans) - 1)]:
        job = server.job(plan)
        held = bits(job.arrays)
        update = client.train(job.owned(), examples, server.spec)
        assert bits(job.arrays) == held and np.isfinite(update.loss)
        sent = {name: (tuple(array.shape), array.dtype) for name, array in update.arrays.items()}
        assert sent == server.method.sends(server.spec, plan, STEPS)
        vote = server.method.decode(unfold(update, job), job, server.spec)
        after = server.merged([vote])
        for each in moved(server.params, after):
            if server.layout.params[each].part not in TENSORS_OF_OTHERS.get(name, ()):
                assert each in vote.plan.trains
        assert moved(server.params, after)
        steps = 8 if server.method.objective(job).widths else 2  # by then the widest was drawn
        timeline = measure.watch(server.spec, plan, replace(LOCAL, steps=steps), TOKENS, server.method)
        assert sum(timeline.peak()[0].values()) == pytest.approx(server.price(plan).memory_bytes, rel=0.02)


@dataclass
class World:
    """A run without files: two classes of devices, one without limits, one that fits the cheapest plan just so."""

    name: str
    family: str

    def __post_init__(self) -> None:
        server = Server(self.name, self.family)
        self.method, bare = server.method, SPECS[self.family]
        cheapest = min(server.price(plan).memory_bytes for plan in self.method.plans(server.spec, server.turn, {}))
        groups = (Group("strong", 2, Budget()), Group("weak", 2, Budget(memory_bytes=cheapest)))
        candidate = assess(self.method, self.family, bare, groups, LOCAL, TOKENS, STEPS, rounds=3)
        assert candidate.feasible
        self.outlook = Outlook([0, 1, 0, 1], groups, (candidate,), candidate, Path(), STEPS, RATES, ALWAYS)
        self.experiment = cast(
            Experiment,
            SimpleNamespace(
                seed=0,
                rounds=3,
                cohort=4,
                clock=Clock(),
                method=self.method,
                local=LOCAL,
                levers="none",
                clip_updates=0.0,
                task=SimpleNamespace(window=TOKENS),
            ),
        )
        self.shards = [shard(bare, 6, seed) for seed in range(4)]
        counts = [np.bincount(each.targets[:, 0], minlength=bare.outputs) for each in self.shards]
        names = tuple(f"class {i}" for i in range(bare.labels))
        task = cast(Task, SimpleNamespace(labels=names, mix=np.array(counts)))
        memory = self.method.prepare(
            server.spec, server.params, self.outlook.fleet(self.experiment, task), Turn(0, 0, 3)
        )
        changed = dict.fromkeys([*server.params, *(f"memory:{each}" for each in memory)], 0)
        self.spec, self.state = server.spec, State(0, server.params, changed, Copies.none(4), memory)

    def play(self) -> None:
        engine, sizes = LocalEngine(self.spec, self.shards, 1), [6] * 4
        self.state, rows = play_round(self.experiment, self.outlook, sizes, engine, self.state)
        assert [row.rejected for row in rows if row.plan] == [None] * len([row for row in rows if row.plan])
        assert {row.group for row in rows if row.plan} == {0, 1}

    def deployed(self) -> tuple[Spec, Params]:
        done = Turn(0, self.state.round - 1, 3)
        return self.method.deploy(self.spec, self.state.params, done, self.state.memory)


@every_pair
def test_rounds_move_the_network_and_what_is_handed_out_predicts(name: str, family: str) -> None:
    world = World(name, family)
    before = world.state.params
    for _ in range(2):
        world.play()
    assert moved(before, world.state.params)
    spec, params = world.deployed()
    assert model.layout(spec).params.keys() == params.keys()
    assert {each: tuple(p.shape) for each, p in params.items()} == {
        each: model.layout(spec).shape(each) for each in params
    }
    score = evaluate(spec, params, world.shards, 1 if spec.labels else 4)
    assert score.total.sum() == 24 * (1 if spec.labels else 4)
