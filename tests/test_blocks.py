"""CoCoFL, ALF and FedRA: what their devices train and hold, and what their servers make of it."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support import LOCAL, STEPS, TURN, WINDOW, Table, begin, bits, moved, play, spec, weights, write_world

from lamina import client, model
from lamina.cost import cost
from lamina.data.task import Pairs
from lamina.fleet import Budget
from lamina.job import Job, Local, Turn
from lamina.layout import Params
from lamina.levers import Levers
from lamina.methods.blocks import Alf, Caff, CocoFl, FedRa
from lamina.plan import Plan, Vote, narrow
from lamina.planner import Fleet, choose_plan
from lamina.spec import Lora, Spec

SPEC = spec(3)
LAYOUT = model.layout(SPEC)
UNITS = [
    {"embed.tokens", "embed.positions"},
    *({name for name in LAYOUT.params if name.startswith(f"h.{i}.")} for i in range(3)),
    {"norm.weight", "norm.bias", "head.weight"},
]
FLEET = Fleet([0], (None,), lambda group, plan: True)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Table:
    """An experiment on tiny-3 alone, in which all devices take part in every round."""
    folder = tmp_path_factory.mktemp("blocks")
    return write_world(folder, networks=[str(folder / "tiny-3")], cohort=6)


def union(units: Any) -> frozenset[str]:
    return frozenset().union(*units)


# CoCoFL


def runs(method: CocoFl | None = None) -> list[Plan]:
    return list((method or CocoFl()).plans(SPEC, TURN, {}))


def test_every_run_of_units_is_a_candidate_once_and_all_else_is_frozen_in_8_bits() -> None:
    wanted = {union(UNITS[first:end]) for first in range(5) for end in range(first + 1, 6)}
    assert Counter(plan.trains for plan in runs()) == Counter(wanted)
    assert {plan.holds for plan in runs()} == {frozenset(LAYOUT.params)}
    for bits_ in (8, 16, 32):
        some = [plan for plan in runs(CocoFl(frozen_bits=bits_)) if plan.trains != plan.holds]
        assert {plan.levers for plan in some} == {Levers(frozen_bits=bits_)}
    assert runs()[0].levers == Levers()
    assert CocoFl().frozen_bits == 8


def test_runs_are_called_by_their_ends() -> None:
    labels = {plan.trains: plan.label for plan in runs()}
    assert labels[union(UNITS)] == "all 3"
    assert labels[union(UNITS[:2])] == "embeddings to block 0 of 3"
    assert labels[frozenset(UNITS[3])] == "block 2 of 3"
    assert labels[union(UNITS[3:])] == "block 2 to head of 3"
    assert len(set(labels.values())) == 15


def maximal(runs: set[frozenset[str]]) -> set[frozenset[str]]:
    return {trains for trains in runs if not any(trains < other for other in runs)}


@pytest.mark.parametrize("vocab", [20, 96, 900])
def test_runs_come_by_what_they_upload_the_lower_first(vocab: int) -> None:
    network = replace(SPEC, vocab=vocab)
    demands = [cost(network, plan, LOCAL, WINDOW, STEPS) for plan in CocoFl().plans(network, TURN, {})]
    order = [(-each.up_bytes, -each.flops) for each in demands]
    assert order == sorted(order)


def asked(fits: set[frozenset[str]]) -> tuple[list[Plan], list[Plan]]:
    """The plans that CoCoFL offers where these runs and those within them fit, and those it asked for."""
    told: list[Plan] = []

    def answer(plan: Plan) -> Plan | None:
        told.append(plan)
        return plan if any(plan.trains <= run for run in fits) else None

    return list(CocoFl().fitting(SPEC, TURN, {}, answer)), told


ENDS = [(first, end) for first in range(5) for end in range(first + 1, 6)]
FITTING = [*combinations(ENDS, 1), *combinations(ENDS, 2), *combinations(ENDS, 3)]


def test_of_the_runs_that_fit_those_within_others_are_left_out() -> None:
    for ends in FITTING:
        fits = {union(UNITS[first:end]) for first, end in ends}
        found, told = asked(fits)
        assert Counter(plan.trains for plan in found) == Counter(maximal(fits))
        assert len(told) <= 2 * 5 + 1
    assert len(asked({union(UNITS)})[1]) == 1
    nothing, told = asked(set())
    assert not nothing and (told[0].trains, told[-1].trains) == (union(UNITS), frozenset(UNITS[4]))


@pytest.mark.parametrize("kept", [[9], [4, 7], [4, 7, 11], [1, 5, 8, 12]])
def test_each_is_as_likely(kept: list[int]) -> None:
    feasible = [runs()[i] for i in kept]
    turns = [Turn(seed=1, round=i // 40, rounds=9, device=i % 40) for i in range(360)]
    drawn = Counter(picked.label for turn in turns if (picked := CocoFl().pick(iter(feasible), turn)))
    mean = 360 / len(feasible)
    assert set(drawn) == {plan.label for plan in feasible}
    assert all(abs(count - mean) <= 4 * math.sqrt(mean) for count in drawn.values())


def test_what_stands_for_a_class_has_the_longest_run_and_without_any_there_is_none() -> None:
    feasible = [runs()[i] for i in (12, 4, 9)]
    assert max(feasible, key=lambda plan: len(plan.trains)) is feasible[1]
    for round_ in range(5):
        assert CocoFl().pick(iter(feasible), Turn(0, round_, 9)) is feasible[1]
    assert CocoFl().pick(iter([]), TURN) is None
    assert CocoFl().pick(iter([]), replace(TURN, device=0)) is None


@pytest.mark.parametrize("limit", ["memory_bytes", "up_bytes", "flops"])
def test_the_planner_offers_what_fits(limit: str) -> None:
    """Against all prices, one by one, at the price of two different runs and just below."""
    prices = {plan.trains: getattr(cost(SPEC, plan, LOCAL, WINDOW, STEPS), limit) for plan in runs()}
    for edge in (union(UNITS[1:3]), union(UNITS[3:]), union(UNITS[:2]), frozenset(UNITS[2])):
        for size in (prices[edge], prices[edge] - 1):
            fitting = maximal({plan.trains for plan in runs() if prices[plan.trains] <= size})
            budget, found = Budget(**{limit: size}), set()
            for device in range(60):
                turn = Turn(0, 0, 1, device)
                choice = choose_plan(CocoFl(), SPEC, budget, LOCAL, WINDOW, STEPS, turn)
                assert choice.plan and getattr(choice.cost, limit) == prices[choice.plan.trains]
                found.add(choice.plan.trains)
            assert found == fitting


def test_the_planner_leaves_the_bits_of_the_method_as_they_are() -> None:
    least = min(cost(SPEC, plan, LOCAL, WINDOW, STEPS).memory_bytes for plan in runs())
    budget, method, allowed = Budget(memory_bytes=least - 1), CocoFl(frozen_bits=16), ("chunked_loss", "frozen8")
    choice = choose_plan(method, SPEC, budget, LOCAL, WINDOW, STEPS, TURN, allowed)
    assert choice.plan and choice.plan.levers == Levers(chunked_loss=True, frozen_bits=16)


def test_a_device_that_did_not_train_a_unit_votes_for_its_old_value() -> None:
    """r mean + (1 - r) old: of devices with 10, 10 and 20 examples two train block 1, at 3 and 6; it was 1.

    r = 20/40 and the mean is 4.5, so it becomes 2.75. Block 2 is trained by all, at 3, 6 and 9: 6.75.
    """
    params = {name: torch.ones_like(p) for name, p in weights(SPEC).items()}
    plans = [union(UNITS[2:4]), union(UNITS[2:4]), frozenset(UNITS[3])]
    votes = [
        Vote(i, Plan(frozenset(params), names), {n: torch.full_like(params[n], 3.0 * (i + 1)) for n in names}, weight)
        for i, (names, weight) in enumerate(zip(plans, (10.0, 10.0, 20.0), strict=True))
    ]
    after, _ = CocoFl().merge(params, SPEC, votes, TURN, {})
    for unit, value in zip(UNITS, (1, 1, 2.75, 6.75, 1), strict=True):
        assert {x for name in unit for x in after[name].flatten().tolist()} == {value}


def test_a_device_trains_beside_rounded_weights_and_holds_them_in_a_byte_each() -> None:
    """Against a device that holds what the rounding leaves, in fp32: w = s round(w / s), s = max|w| / 127 per row."""
    large = Spec(2, embed=64, heads=2, head_dim=32, ffn=96, vocab=80, positions=16)
    params, layout = weights(large), model.layout(large)
    plan = next(plan for plan in CocoFl().plans(large, TURN, {}) if plan.label == "block 1 of 2")
    coarse = dict(params)
    for name in plan.holds - plan.trains:
        whole = params[name].double().numpy()
        if whole.ndim > 1 and whole.size >= 4096:
            scale = np.abs(whole).max(-1, keepdims=True) / 127
            coarse[name] = torch.from_numpy(np.round(whole / scale) * scale).float()
    assert len(moved(params, coarse)) == 8  # six of block 0, token embedding, head
    examples = np.random.default_rng(0).integers(0, 80, (2, 12, 9))
    local = Local(lr=0.1, optimizer="sgd", steps=4, batch_size=3)

    def train(plan: Plan, arrays: Params) -> Params:
        return client.train(
            Job(TURN, plan, local, narrow(arrays, layout, plan)).owned(), Pairs(*examples), large
        ).arrays

    plain = replace(plan, levers=replace(plan.levers, frozen_bits=32))
    got, wanted, without = train(plan, params), train(plain, coarse), train(plain, params)
    for name in plan.trains:
        torch.testing.assert_close(got[name], wanted[name], rtol=1e-4, atol=1e-6)
    assert any(not torch.allclose(got[name], without[name], rtol=1e-4, atol=1e-6) for name in plan.trains)
    saved = [cost(large, each, local, 9, 4).memory.weights for each in (plain, plan)]
    packed = [p for name in plan.holds - plan.trains if (p := params[name]).dim() > 1 and p.numel() >= 4096]
    assert saved[0] - saved[1] == sum(3 * p.numel() - 4 * p.numel() // p.shape[-1] for p in packed)


def test_runs_change_from_round_to_round_and_from_device_to_device(world: Table, tmp_path: Path) -> None:
    two = 4 * 2 * sum(map(LAYOUT.numel, UNITS[1]))
    run = begin(world | {"method": {"name": "cocofl"}, "fleet": [{"name": "all", "uplink": two}]}, tmp_path)
    seen = []
    for _ in range(2):
        run.state, rows = play(run)
        seen.append([row.plan for row in rows])
        assert all(row.up_bytes <= two for row in rows)
    assert seen[0] != seen[1] and len(set(seen[0])) > 1


# ALF


def fields_of(**changes: Any) -> Alf:
    return Alf(**{"threshold": 0.5, "patience": 2, "min_rounds": 3} | changes)


def pushed(method: Alf, changes: list[list[float]], memory: Params | None = None) -> tuple[Params, list[Params]]:
    """Global tensors and memories when unit k (of five) moves by changes[round][k] in all its elements in a round."""
    params = weights(SPEC)
    memory = memory or method.prepare(SPEC, params, FLEET, TURN)
    seen = []
    for number, row in enumerate(changes):
        (plan, *_) = method.plans(SPEC, replace(TURN, round=number), memory)
        arrays = {n: params[n] + row[k] for k, unit in enumerate(UNITS) for n in unit if n in plan.trains}
        kept = {name: tensor.clone() for name, tensor in memory.items()}
        before = memory
        params, memory = method.merge(params, SPEC, [Vote(0, plan, arrays, 1.0)], replace(TURN, round=number), memory)
        assert bits(before) == bits(kept)
        seen.append(memory)
    return params, seen


def reference(changes: list[list[float]], method: Alf) -> list[tuple[list[int], int]]:
    """Judgements in a row below the threshold and the number of frozen units, round by round, from the formula.

    All elements of a unit move alike, so that the norm of a sum is the size of the sum of the numbers, and the number
    of elements cancels out.
    """
    calm, frozen, told = [0, 0, 0], 0, []
    for now in range(len(changes)):
        for k in range(frozen, 3):
            if method.window:
                if (now + 1) % method.window:
                    continue
                terms = [changes[i][k] for i in range(now + 1 - method.window, now + 1)]
            else:
                terms = [method.decay ** (now - i) * changes[i][k] for i in range(now + 1)]
            perturbation = abs(sum(terms)) / sum(map(abs, terms))
            calm[k] = calm[k] + 1 if perturbation < method.threshold else 0
        while frozen < 3 and now + 1 >= method.min_rounds and calm[frozen] >= method.patience:
            frozen += 1
        told.append((list(calm), frozen))
    return told


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"decay": 0.5},
        {"decay": 0.0, "threshold": 1.0},
        {"threshold": 0.2, "patience": 1},
        {"window": 1},
        {"window": 2, "patience": 1},
        {"window": 3, "patience": 1, "threshold": 0.7},
        {"window": 4, "min_rounds": 9},
        {"min_rounds": 20, "patience": 3},
    ],
    ids=str,
)
def test_the_server_judges_by_the_effective_perturbation(settings: Table) -> None:
    """Against the formula: units that tremble, drift, and first drift and then tremble."""
    method, rng = fields_of(**settings), np.random.default_rng(3)
    for drift in ((0, 0, 0), (0, 1, 0), (1, 0, 0), (0.3, 0.3, 1)):
        changes = [
            [float(rng.normal(d if n < 8 else 0)) for d in drift] + [float(rng.normal()), float(rng.normal())]
            for n in range(25)
        ]
        for kept, (calm, frozen) in zip(pushed(method, changes)[1], reference(changes, method), strict=True):
            assert (kept["calm"].tolist(), int(kept["frozen"])) == (calm, frozen)
            assert {n.removeprefix("sum.") for n in kept if "sum." in n} == union(UNITS[frozen:3])


def test_some_of_these_freeze_and_some_never_do() -> None:
    tremble = [[(-1.0) ** n, (-1.0) ** n, (-1.0) ** n, 1.0, 1.0] for n in range(6)]
    assert [int(m["frozen"]) for m in pushed(fields_of(), tremble)[1]] == [0, 0, 3, 3, 3, 3]
    drift = [[1.0, *row[1:]] for row in tremble]  # the lowest unit keeps those above it
    assert [int(m["frozen"]) for m in pushed(fields_of(), drift)[1]] == [0] * 6
    middle = [[row[0], 1.0, *row[2:]] for row in tremble]
    assert [int(m["frozen"]) for m in pushed(fields_of(), middle)[1]] == [0, 0, 1, 1, 1, 1]


def test_the_norm_of_a_unit_is_over_all_its_tensors() -> None:
    """Two steps along different axes: |S| / A = |b a + c| / (b |a| + |c|) with a and c orthogonal."""
    method, params = fields_of(decay=0.9, threshold=0.9), weights(SPEC)
    memory = method.prepare(SPEC, params, FLEET, TURN)
    (plan, *_) = method.plans(SPEC, TURN, memory)
    for name, size in (("embed.tokens", 3.0), ("embed.positions", 4.0)):
        arrays = {n: params[n].clone() for n in plan.trains}
        arrays[name][0, 0] += size
        params, memory = method.merge(params, SPEC, [Vote(0, plan, arrays, 1.0)], TURN, memory)
    assert float(memory["travel"][0]) == pytest.approx(0.9 * 3 + 4, rel=1e-6)
    sums = torch.cat([memory["sum.embed.tokens"].flatten(), memory["sum.embed.positions"].flatten()])
    assert float(sums.norm()) == pytest.approx(math.hypot(0.9 * 3, 4), rel=1e-6)
    assert int(memory["calm"][0]) == 1  # 4.83 / 6.7 = 0.72


def test_updates_without_a_common_direction_are_where_the_docstring_says() -> None:
    """A random walk in many dimensions: sqrt((1 - b) / (1 + b)), or 1 / sqrt(window)."""
    rng = torch.Generator().manual_seed(0)
    for settings, wanted in (({"decay": 0.9}, 0.2294), ({"decay": 0.5}, 0.5774), ({"window": 16}, 0.25)):
        method, params = fields_of(**settings, min_rounds=99), weights(SPEC)
        memory = method.prepare(SPEC, params, FLEET, TURN)
        (plan, *_) = method.plans(SPEC, TURN, memory)
        for _ in range(48):
            arrays = {n: params[n] + torch.randn(params[n].shape, generator=rng) for n in plan.trains}
            params, memory = method.merge(params, SPEC, [Vote(0, plan, arrays, 1.0)], TURN, memory)
        sums = torch.cat([memory[f"sum.{name}"].flatten() for name in sorted(UNITS[1])])
        assert float(sums.norm() / memory["travel"][1]) == pytest.approx(wanted, rel=0.03)


def test_a_unit_that_nobody_trained_is_not_judged() -> None:
    method = fields_of(decay=0.9)
    seen = pushed(method, [[1.0] * 5, [-1.0] * 5])[1][-1]
    assert seen["calm"].tolist() == [1, 1, 1]
    plan = Plan(frozenset(LAYOUT.params), union(UNITS[2:]))
    params = weights(SPEC)
    arrays = {name: params[name] + 1.0 for name in plan.trains}
    _, after = method.merge(params, SPEC, [Vote(0, plan, arrays, 1.0)], TURN, seen)
    assert after["calm"].tolist() == [1, 1, 2]
    assert int(after["frozen"]) == 0


@pytest.mark.parametrize("frozen", [0, 1, 2, 3])
@pytest.mark.parametrize("depth", ["all", "budget"])
def test_what_is_frozen_is_not_trained_but_held(depth: Any, frozen: int) -> None:
    method = Alf(depth=depth)
    memory = {"frozen": torch.tensor(frozen)}
    plans = list(method.plans(SPEC, TURN, memory))
    wanted = [union(UNITS[frozen:])]
    if depth == "budget":
        wanted += [union(UNITS[first:]) for first in range(max(2, frozen + 1), 4)]
    assert [plan.trains for plan in plans] == wanted
    assert {plan.holds for plan in plans} == {frozenset(LAYOUT.params)}


def test_before_the_first_round_all_is_trained() -> None:
    (plan,) = Alf().plans(SPEC, TURN, {})
    assert plan.trains == plan.holds == set(LAYOUT.params)


def test_what_is_frozen_is_neither_sent_up_nor_down(world: Table, tmp_path: Path) -> None:
    """Everything freezes after the second round; what changed in that round is received once more in the third."""
    method = {"name": "alf", "threshold": 1.0, "patience": 1, "min_rounds": 1}
    run = begin(world | {"method": method, "fleet": [{"name": "all"}], "rounds": 4}, tmp_path)
    whole, tail = (4 * sum(map(LAYOUT.numel, names)) for names in (LAYOUT.params, union(UNITS[3:])))
    sent = []
    for _ in range(4):
        before = run.state.params
        run.state, rows = play(run)
        sent.append({(row.up_bytes, row.down_bytes, row.trained_blocks) for row in rows})
    assert sent == [{(whole, whole, 3)}, {(whole, whole, 3)}, {(tail, whole, 1)}, {(tail, tail, 1)}]
    assert moved(before, run.state.params) == union(UNITS[3:])


@pytest.mark.parametrize(
    "settings",
    [
        *({"threshold": 0.0}, {"threshold": 1.5}, {"decay": 1.0}, {"decay": -0.1}),
        *({"patience": 0}, {"min_rounds": -1}, {"window": -1}),
    ],
    ids=str,
)
def test_alf_refuses_settings_that_mean_nothing(settings: Table) -> None:
    (key,) = settings
    with pytest.raises(ValueError, match=f"^{key} must .*got {settings[key]}"):
        Alf(**settings)


# FedRA


def test_a_device_holds_some_blocks_and_trains_their_low_rank_matrices_and_the_head() -> None:
    method = FedRa(rank=2)
    adapted = method.adapt(SPEC)
    layout = model.layout(adapted)
    for train_head in (True, False):
        plans = list(replace(method, train_head=train_head).plans(adapted, TURN, {}))
        assert [plan.trained_blocks(layout) for plan in plans] == [3, 2, 1]
        for plan in plans:
            blocks = plan.blocks(layout)
            outside = {"embed.tokens", "embed.positions", "norm.weight", "norm.bias", "head.weight"}
            held = {name for name in layout.params if name.startswith(tuple(f"h.{i}." for i in blocks))}
            assert plan.holds == outside | held
            added = {name for name in held if name.endswith(("lora_a", "lora_b"))}
            assert plan.trains == added | ({"head.weight"} if train_head else set())
    assert [plan.label for plan in plans][1] == "low rank, 2 of 3, others skipped"


def test_every_choice_of_blocks_is_as_likely() -> None:
    adapted = FedRa().adapt(spec(4))
    layout = model.layout(adapted)
    drawn: dict[int, Counter[tuple[int, ...]]] = {1: Counter(), 2: Counter(), 3: Counter()}
    for device in range(600):
        for plan in FedRa().plans(adapted, Turn(5, 2, 9, device), {}):
            if (blocks := plan.blocks(layout)) != (0, 1, 2, 3):
                drawn[len(blocks)][blocks] += 1
    for count, found in drawn.items():
        assert set(found) == set(combinations(range(4), count))
        mean = 600 / len(found)
        assert all(abs(times - mean) < 4 * math.sqrt(mean) for times in found.values())


def test_blocks_are_drawn_anew_every_round() -> None:
    adapted = FedRa().adapt(SPEC)
    layout = model.layout(adapted)
    turns = [Turn(0, round_, 20, 3) for round_ in range(20)]
    assert len({list(FedRa().plans(adapted, turn, {}))[1].blocks(layout) for turn in turns}) == 3


def test_the_stream_passes_over_the_blocks_that_are_not_held() -> None:
    """Against a network of two blocks that are the first and the third of three."""
    method = FedRa(rank=2)
    adapted, smaller = method.adapt(SPEC), method.adapt(spec(2))
    params = weights(adapted)
    plan = next(
        each
        for device in range(50)
        for each in method.plans(adapted, Turn(0, 0, 1, device), {})
        if each.blocks(model.layout(adapted)) == (0, 2)
    )
    renamed = {name.replace("h.2.", "h.1."): p for name, p in params.items() if not name.startswith("h.1.")}
    ids = torch.arange(12).reshape(2, 6)
    of_device = model.forward(adapted, narrow(params, model.layout(adapted), plan), ids)
    assert torch.equal(of_device, model.forward(smaller, renamed, ids))
    assert cost(adapted, plan, LOCAL, WINDOW, STEPS).memory.weights == 4 * sum(p.numel() for p in renamed.values())


def test_the_price_is_of_the_number_of_blocks_and_not_of_which() -> None:
    method = FedRa()
    adapted = method.adapt(SPEC)
    for count in range(3):
        plans = [list(method.plans(adapted, Turn(0, 0, 1, device), {}))[count] for device in range(20)]
        assert len({cost(adapted, plan, LOCAL, WINDOW, STEPS) for plan in plans}) == 1


def test_a_block_becomes_the_plain_mean_over_those_that_hold_it() -> None:
    method = FedRa(rank=2)
    adapted = method.adapt(SPEC)
    params, layout, rng = weights(adapted), model.layout(adapted), torch.Generator().manual_seed(1)
    votes = []
    for device in range(4):
        plan = list(method.plans(adapted, Turn(0, 0, 1, device), {}))[2]
        arrays = {n: torch.randn(params[n].shape, generator=rng) for n in sorted(plan.trains)}
        votes.append(Vote(device, plan, arrays, float(method.weighting == "uniform")))
    after, _ = method.merge(params, adapted, votes, TURN, {})
    held = [vote.plan.blocks(layout)[0] for vote in votes]
    assert 1 < len(set(held)) < 4
    for name, row in layout.params.items():
        values = [vote.arrays[name].double().numpy() for vote in votes if name in vote.arrays]
        if row.part in ("lora", "head") and values:
            assert len(values) == (4 if row.part == "head" else held.count(row.block or 0))
            np.testing.assert_allclose(after[name].numpy(), sum(values) / len(values), rtol=1e-6, atol=1e-7)
        else:
            assert after[name] is params[name]


@pytest.mark.parametrize(("settings", "scale"), [({}, 1.0), ({"rank": 4}, 1.0), ({"rank": 4, "alpha": 2.0}, 0.5)])
def test_low_rank_matrices_count_as_they_are_unless_told_otherwise(settings: Table, scale: float) -> None:
    lora = FedRa(**settings).adapt(SPEC).lora
    assert lora and lora.alpha / lora.rank == scale
    assert lora.rank == settings.get("rank", 8)
    assert FedRa(targets="qv").adapt(SPEC).lora == Lora(8, 8.0, ("attn.q", "attn.v"))


@pytest.mark.parametrize("settings", [{"rank": 0}, {"alpha": -1.0}], ids=str)
def test_fedra_refuses_sizes_that_mean_nothing(settings: Table) -> None:
    (key,) = settings
    with pytest.raises(ValueError, match=f"^{key} must .*got {settings[key]}"):
        FedRa(**settings)


def test_a_block_needs_less_than_the_whole_even_in_weights() -> None:
    """Where CAFF holds all blocks."""
    adapted = FedRa().adapt(SPEC)
    last = list(FedRa().plans(adapted, TURN, {}))[-1]
    held = cost(adapted, last, LOCAL, WINDOW, STEPS).memory.weights
    assert held < cost(SPEC, list(Caff().plans(SPEC, TURN, {}))[-1], LOCAL, WINDOW, STEPS).memory.weights
