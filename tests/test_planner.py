"""The planner against a brute-force t* = max {t : price(t) <= budget}, and the choice of the network."""

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from functools import cache
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import LOCAL, STEPS, TURN, VARIANTS, WINDOW, memory, prices, spec, write_world

from lamina import config, model
from lamina.cost import Cost, cost
from lamina.errors import UserError
from lamina.experiment import look_ahead
from lamina.fleet import RESOURCES, Budget, quantity
from lamina.job import Local
from lamina.levers import EXACT, LADDER, NAMES, Allowed, Levers
from lamina.methods import Method
from lamina.methods.blocks import Caff
from lamina.methods.lora import FedLora
from lamina.plan import Plan
from lamina.planner import Candidate, Choice, Fitted, Group, assess, choose_network, choose_plan, fit
from lamina.spec import Spec
from lamina.units import human

CAFF, DROP, IGNORE = Caff(), Caff(on_infeasible="drop"), Caff(on_infeasible="ignore")
BUDGETED = {"caff": CAFF, "lora budget": VARIANTS["lora budget"]}


def pick(method: Method, blocks: int, budget: Budget) -> Choice:
    return choose_plan(method, method.adapt(spec(blocks)), budget, LOCAL, WINDOW, STEPS, TURN)


def depth(method: Method, blocks: int, choice: Choice) -> int:
    """Blocks that a choice trains, 0 when the device sits out."""
    return choice.plan.trained_blocks(model.layout(method.adapt(spec(blocks)))) if choice.plan else 0


def candidates(method: Method, groups: list[Group], depths: tuple[int, ...]) -> list[Candidate]:
    return [assess(method, f"tiny-{n}", spec(n), groups, LOCAL, WINDOW, STEPS) for n in depths]


def chosen(method: Method, groups: list[Group], depths: tuple[int, ...]) -> Candidate:
    return choose_network(method, candidates(method, groups, depths), groups, LOCAL, WINDOW, STEPS)


@pytest.mark.parametrize("method", BUDGETED.values(), ids=list(BUDGETED))
def test_the_richest_plan_that_fits_is_taken_under_every_mix_of_budgets(method: Method) -> None:
    table = prices(method, 3)
    limits = {
        resource: [None, *sorted({getattr(price, resource) - less for price in table.values() for less in (0, 1)})]
        for resource in RESOURCES
    }
    for mix in itertools.product(*limits.values()):
        budget = Budget(*mix)
        fitting = [
            t
            for t, price in table.items()
            if all(limit is None or getattr(price, r) <= limit for r, limit in zip(RESOURCES, mix, strict=True))
        ]
        assert depth(method, 3, pick(method, 3, budget)) == max(fitting, default=0), budget


@pytest.mark.parametrize("resource", RESOURCES)
@pytest.mark.parametrize("method", BUDGETED.values(), ids=list(BUDGETED))
def test_more_of_a_resource_never_means_fewer_blocks(method: Method, resource: str) -> None:
    needs = sorted({getattr(price, resource) for price in prices(method, 4).values()})
    budgets = [1, *(need + more for need in needs for more in (-1, 0, 1)), 10**12]
    depths = [depth(method, 4, pick(method, 4, Budget(**{resource: value}))) for value in budgets]
    assert depths == sorted(depths)
    assert (depths[0], depths[-1]) == (0, 4)
    assert len(set(depths)) == 1 + len(needs)  # a step for each price, and none in between


@pytest.mark.parametrize("trained", [1, 2, 3])
def test_binding_names_what_stops_the_next_richer_plan(trained: int) -> None:
    table = prices(CAFF, 4)
    needs = table[trained]
    for short in ({"memory_bytes"}, {"up_bytes"}, {"flops"}, {"memory_bytes", "flops"}, {"up_bytes", "flops"}):
        choice = pick(CAFF, 4, Budget(**{resource: getattr(needs, resource) for resource in short}))
        assert (depth(CAFF, 4, choice), choice.cost, set(choice.binding)) == (trained, needs, short)


def test_nothing_binds_at_the_richest_plan() -> None:
    assert pick(CAFF, 4, Budget()).binding == ()
    assert pick(CAFF, 4, Budget(memory_bytes=memory(4, 4))).binding == ()


def test_sitting_out_shows_the_price_of_the_cheapest_plan_and_what_it_lacks() -> None:
    choice = pick(CAFF, 4, Budget(memory_bytes=memory(4, 1) - 1, up_bytes=10**9))
    assert choice == Choice(None, prices(CAFF, 4)[1], ("memory_bytes",))


def test_ignore_looks_at_no_budget() -> None:
    assert depth(IGNORE, 4, pick(IGNORE, 4, Budget(1, 1, 1, 1))) == 4


def test_the_score_is_the_mean_over_devices() -> None:
    """Three devices train 2 blocks of 4 and one trains all 4: (3 * 2 + 1 * 4) / 4 = 5/2; without the last, 2."""
    groups = [Group("weak", 3, Budget(memory_bytes=memory(4, 2))), Group("strong", 1, Budget())]
    assert [each.mean_trained_blocks for each in candidates(CAFF, groups, (4,))] == [Fraction(5, 2)]
    (empty,) = candidates(CAFF, [groups[0], replace(groups[1], devices=0)], (4,))
    assert empty.mean_trained_blocks == 2
    assert [empty.trained_blocks(index) for index in (0, 1)] == [2, 4]


def test_devices_that_sit_out_count_zero_in_the_score() -> None:
    groups = [Group("out", 1, Budget(memory_bytes=1)), Group("strong", 3, Budget())]
    (candidate,) = candidates(DROP, groups, (4,))
    assert (candidate.mean_trained_blocks, candidate.trained_blocks(0)) == (Fraction(3 * 4, 4), 0)


def test_the_largest_score_wins_over_depth() -> None:
    """Operations for all of tiny-3, but not for three blocks of tiny-4, whose frozen block computes, too."""
    budget = Budget(flops=prices(CAFF, 3)[3].flops)
    scores = {n: depth(CAFF, n, pick(CAFF, n, budget)) for n in (2, 3, 4)}
    assert scores == {2: 2, 3: 3, 4: 2}
    assert chosen(CAFF, [Group("all", 5, budget)], (2, 3, 4)).name == "tiny-3"


def test_ties_go_to_the_deepest() -> None:
    groups = [Group("all", 5, Budget(up_bytes=prices(CAFF, 4)[1].up_bytes))]  # one block of whichever network
    scored = candidates(CAFF, groups, (1, 2, 3, 4))
    assert [each.mean_trained_blocks for each in scored] == [0, 1, 1, 1]  # all of tiny-1 has its embeddings, too
    for order in itertools.permutations((2, 3, 4)):
        assert chosen(CAFF, groups, order).name == "tiny-4"


def test_what_is_told_where_drift_leaves_too_little() -> None:
    """The memory that would do is that of which enough is always there."""
    full = memory(4, 1)
    group = Group("weak", 1, Budget(memory_bytes=full // 4), best_memory_bytes=full // 4 * 4)
    with pytest.raises(UserError) as caught:
        chosen(CAFF, [group], (4,))
    said = str(caught.value)
    worst, best = human("bytes", full // 4), human("bytes", full // 4 * 4)
    assert f", the budget is {worst} of {best} in the worst of rounds, by drift" in said
    (size,) = re.findall(r"memory = ([0-9.]+ \w+)", said)
    assert 4 * full <= quantity("memory", size) <= 4.2 * full


def test_the_deepest_may_be_preferred() -> None:
    """tiny-3 trains three blocks and tiny-4 two; who would be left out by tiny-4 alone makes it lose."""
    budget = Budget(flops=prices(CAFF, 3)[3].flops)
    groups = [Group("all", 5, budget), Group("weak", 1, Budget(memory_bytes=memory(3, 1)))]
    work = (LOCAL, WINDOW, STEPS)
    for method, some, name in ((CAFF, groups[:1], "tiny-4"), (CAFF, groups, "tiny-3"), (DROP, groups, "tiny-3")):
        scored = candidates(method, some, (2, 3, 4))
        assert choose_network(method, scored, some, *work, prefer="deep").name == name
    assert [each.feasible for each in candidates(DROP, groups, (3, 4))] == [True, True]
    assert memory(3, 1) < memory(4, 1)


def test_the_order_of_classes_and_networks_does_not_matter() -> None:
    groups = [
        Group("a", 1, Budget()),
        Group("b", 2, Budget(memory_bytes=memory(4, 2))),
        Group("c", 3, Budget(memory_bytes=memory(4, 1))),
    ]
    expected = {group.name: choice for group, choice in zip(groups, chosen(CAFF, groups, (4,)).choices, strict=True)}
    for shuffled in itertools.permutations(groups):
        for depths in itertools.permutations((2, 4)):
            winner = chosen(CAFF, list(shuffled), depths)
            assert winner.name == "tiny-4"
            assert {g.name: c for g, c in zip(shuffled, winner.choices, strict=True)} == expected
            assert winner.mean_trained_blocks == Fraction(1 * 4 + 2 * 2 + 3 * 1, 6)


@pytest.mark.parametrize(
    ("policy", "feasible"),
    [("reject", (False, False)), ("drop", (True, False)), ("ignore", (True, True))],
)
def test_who_may_be_left_out(policy: str, feasible: tuple[bool, bool]) -> None:
    method = Caff(on_infeasible=policy)  # type: ignore[arg-type]
    able, unable = Group("able", 1, Budget()), Group("unable", 1, Budget(memory_bytes=1))
    assert candidates(method, [able, unable], (2,))[0].feasible == feasible[0]
    assert candidates(method, [unable], (2,))[0].feasible == feasible[1]


def test_a_class_without_devices_makes_no_network_infeasible() -> None:
    groups = [Group("able", 1, Budget()), Group("nobody", 0, Budget(memory_bytes=1))]
    assert candidates(CAFF, groups, (2,))[0].feasible


def test_an_infeasible_network_is_rejected_for_a_shallower_one() -> None:
    budget = Budget(memory_bytes=memory(1, 1))
    assert [each.feasible for each in candidates(CAFF, [Group("all", 1, budget)], (1, 4))] == [True, False]
    assert chosen(CAFF, [Group("all", 1, budget)], (1, 4)).name == "tiny-1"


def misfit(budget: Budget, method: Method = CAFF, devices: int = 1) -> str:
    """What the planner says when a class of a fleet of two fits nothing."""
    with pytest.raises(UserError) as caught:
        chosen(method, [Group("strong", 1, Budget()), Group("weak", devices, budget)], (4, 3))
    return str(caught.value)


def test_the_misfit_message() -> None:
    needs = prices(CAFF, 3)[1]
    limit, needed = needs.memory_bytes - 20000, human("memory_bytes", needs.memory_bytes, up=True)
    assert misfit(Budget(memory_bytes=limit)) == (
        f"class 'weak' fits no plan of tiny-3: the cheapest needs {needed} of "
        f"memory, the budget is {human('memory_bytes', limit)}; activations are "
        f"{human('memory_bytes', needs.memory.activations)} of the memory; try local.batch_size = 2, "
        f'levers = "exact", memory = '
        f'{needed} or method.on_infeasible = "drop"'
    )


@pytest.mark.parametrize(
    "limits",
    [
        {"up_bytes": 10},
        {"down_bytes": 10},
        {"flops": 10},
        {"up_bytes": 10, "flops": 10**9},
        {"up_bytes": 10, "flops": 9},
    ],
    ids=["up", "down", "flops", "only what lacks", "two"],
)
def test_the_misfit_message_names_other_resources(limits: dict[str, int]) -> None:
    price = prices(CAFF, 3)[1]
    needs = {name: human(name, getattr(price, name), up=True) for name, limit in limits.items() if limit < 10**9}
    lacks = ", and ".join(
        f"needs {size} of {RESOURCES[name]}, the budget is {human(name, limits[name])}" for name, size in needs.items()
    )
    budget = " and ".join(f"{RESOURCES[name]} = {size}" for name, size in needs.items())
    assert misfit(Budget(**limits)) == (
        f"class 'weak' fits no plan of tiny-3: the cheapest {lacks}; try {budget} or method.on_infeasible = \"drop\""
    )


@pytest.mark.parametrize("share", [0.4, 0.55, 0.7, 0.99])
def test_the_recommended_batch_size_fits(share: float) -> None:
    budget = Budget(memory_bytes=int(share * memory(3, 1, replace(LOCAL, batch_size=16))))

    def fits(batch_size: int) -> bool:
        local = replace(LOCAL, batch_size=batch_size)
        return choose_plan(CAFF, spec(3), budget, local, WINDOW, STEPS, TURN).plan is not None

    group = [Group("weak", 1, budget)]
    local = replace(LOCAL, batch_size=16)
    scored = [assess(CAFF, "tiny-3", spec(3), group, local, WINDOW, STEPS)]
    with pytest.raises(UserError, match=r"try local\.batch_size = \d+,") as caught:
        choose_network(CAFF, scored, group, local, WINDOW, STEPS)
    (size,) = map(int, re.findall(r"batch_size = (\d+)", str(caught.value)))
    assert fits(size)
    assert not fits(2 * size)


def test_no_batch_size_is_recommended_where_none_fits() -> None:
    assert "batch_size" not in misfit(Budget(memory_bytes=1000))


def test_the_recommended_batch_size_fits_a_whole_pass_over_the_data(tmp_path: Path) -> None:
    """With `epochs`, smaller batches mean more steps, so they save no operations."""
    table = write_world(tmp_path, local={"lr": 0.02, "epochs": 1, "batch_size": 4})
    table["fleet"] = [{"name": "weak", "flops": "8 MFLOP"}]
    with pytest.raises(UserError, match="fits no plan") as caught:
        look_ahead(config.experiment(table, "test"))
    for size in map(int, re.findall(r"batch_size = (\d+)", str(caught.value))):
        table["local"]["batch_size"] = size
        look_ahead(config.experiment(table, "test"))


def test_the_recommended_budget_fits() -> None:
    for batch_size in range(1, 9):
        local, group = replace(LOCAL, batch_size=batch_size), [Group("weak", 1, Budget(memory_bytes=1000))]
        scored = [assess(CAFF, "tiny-3", spec(3), group, local, WINDOW, STEPS)]
        with pytest.raises(UserError, match=r"memory = [0-9.]+ \w+") as caught:
            choose_network(CAFF, scored, group, local, WINDOW, STEPS)
        advice = re.findall(r"memory = ([0-9.]+ \w+)", str(caught.value))[0]
        budget = Budget(memory_bytes=quantity("memory", advice))
        assert choose_plan(CAFF, spec(3), budget, local, WINDOW, STEPS, TURN).plan, str(caught.value)


LONG = 128
"""Tokens of the tests on levers: a prefix runs 256 tokens at a time, which should not be more than a batch."""
HALVES = (0, 2, 1)
"""Micro-batches of a batch of four, from weak to strong."""


def long_spec(blocks: int) -> Spec:
    return replace(spec(blocks), positions=LONG)


def long_plans(method: Method = CAFF, blocks: int = 3) -> list[Plan]:
    return list(method.plans(method.adapt(long_spec(blocks)), TURN, {}))


@cache
def every_price(method: Method, plan: Plan, local: Local = LOCAL) -> Mapping[Levers, Cost]:
    """Of a plan for three blocks, with every combination of exact levers."""
    axes = itertools.product((False, True), (False, True), ("", "ram", "disk"), HALVES, (False, True))
    found = [Levers(c, f, p, micro_batch=m, recompute=r) for c, f, p, m, r in axes]  # type: ignore[arg-type]
    adapted = method.adapt(long_spec(3))
    return {levers: cost(adapted, replace(plan, levers=levers), local, LONG, STEPS) for levers in found}


def fitted(plan: Plan, budget: Budget, allowed: Allowed, local: Local = LOCAL, method: Method = CAFF) -> Fitted:
    return fit(method.adapt(long_spec(3)), plan, budget, local, LONG, STEPS, allowed)


def pick_long(budget: Budget, allowed: Allowed, method: Method = CAFF, blocks: int = 3) -> Choice:
    return choose_plan(method, method.adapt(long_spec(blocks)), budget, LOCAL, LONG, STEPS, TURN, allowed)


def plain_price(plan: Plan) -> Cost:
    return every_price(CAFF, plan)[Levers()]


def weaker(levers: Levers, allowed: Sequence[str] = EXACT) -> list[Levers]:
    """The same with one lever off, or less of it."""
    found = [replace(levers, **{k: getattr(Levers(), k) for k in values}) for _, values in levers.parts()]
    if levers.prefix_cache == "disk" and "cache_ram" in allowed:
        found.append(replace(levers, prefix_cache="ram"))
    larger = HALVES[: HALVES.index(levers.micro_batch)]
    return found + [replace(levers, micro_batch=size) for size in larger]


LONG_PLANS = long_plans()
LOWEST, HIGHEST = 250_000, 2_600_000
"""Below what any plan of LONG_PLANS needs, and above what any needs without levers."""
budgets = st.integers(LOWEST, HIGHEST)


def test_the_budgets_of_these_tests_span_all_cases() -> None:
    needs = [price.memory_bytes for plan in LONG_PLANS for price in every_price(CAFF, plan).values()]
    assert min(needs) > LOWEST and max(needs) < HIGHEST


@pytest.mark.parametrize("allowed", ["none", ()], ids=["none", "an empty list"])
def test_without_levers_nothing_is_as_it_was_not(allowed: Allowed) -> None:
    """The first plan whose price as it stands fits, and that price."""
    for limit in range(LOWEST, HIGHEST, 50_000):
        budget = Budget(memory_bytes=limit)
        choice = pick_long(budget, allowed)
        able = [plan for plan in LONG_PLANS if plain_price(plan).memory_bytes <= limit]
        assert choice.plan == (able[0] if able else None)
        assert choice.cost == plain_price(able[0] if able else LONG_PLANS[-1])
        assert choice == choose_plan(CAFF, long_spec(3), budget, LOCAL, LONG, STEPS, TURN)


@pytest.mark.parametrize("allowed", ["exact", "all", NAMES], ids=["exact", "all", "names"])
def test_what_fits_without_levers_has_none(allowed: Allowed) -> None:
    for plan in LONG_PLANS:
        need = plain_price(plan)
        exactly = Budget(*(getattr(need, resource) for resource in RESOURCES))
        assert fitted(plan, exactly, allowed) == Fitted(plan, need, ())
        less = fitted(plan, replace(exactly, memory_bytes=need.memory_bytes - 1), allowed)
        assert less.plan.levers != Levers()
        assert not less.exceeded and less.cost.memory_bytes < need.memory_bytes
        assert less.cost == every_price(CAFF, plan)[less.plan.levers]
        assert replace(less.plan, levers=Levers()) == plan
    assert pick_long(Budget(), allowed) == Choice(LONG_PLANS[0], plain_price(LONG_PLANS[0]), ())


@given(limit=budgets)
def test_exact_is_exact_and_preferred(limit: int) -> None:
    for plan in LONG_PLANS:
        exact, everything = (fitted(plan, Budget(memory_bytes=limit), allowed) for allowed in ("exact", "all"))
        assert {name.split()[0] for name in exact.plan.levers.names()} <= set(EXACT)
        if not exact.exceeded:
            assert everything == exact


def test_inexact_levers_are_used_where_exact_ones_do_not_do_and_only_then() -> None:
    for plan in LONG_PLANS:
        least = min(price.memory_bytes for price in every_price(CAFF, plan).values())
        assert not {*fitted(plan, Budget(memory_bytes=least), "all").plan.levers.names()} - {*EXACT, "micro_batch 1"}
        below = fitted(plan, Budget(memory_bytes=least - 1), "all")
        assert not below.exceeded
        assert any(not rung.exact and rung.name in below.plan.levers.names() for rung in LADDER)
        assert fitted(plan, Budget(memory_bytes=least - 1), "exact").exceeded == ("memory_bytes",)


@given(limit=budgets, allowed=st.sampled_from(["exact", "all", ("cache_ram", "micro_batch"), ("recompute",)]))
def test_the_richest_plan_that_fits_with_levers_is_taken(limit: int, allowed: Allowed) -> None:
    budget = Budget(memory_bytes=limit)
    each = [fitted(plan, budget, allowed) for plan in LONG_PLANS]
    able = [found for found in each if not found.exceeded]
    choice = pick_long(budget, allowed)
    assert choice.plan == (able[0].plan if able else None)
    assert choice.cost == (able[0] if able else each[-1]).cost
    richer = each[each.index(able[0]) - 1] if able else each[-1]
    assert choice.binding == (() if able and able[0] is each[0] else richer.exceeded)


def limits(method: Method, plan: Plan, local: Local = LOCAL) -> list[Budget]:
    """All there are to tell apart: memory, and memory with as few operations as the plan can be trained in."""
    table = every_price(method, plan, local)
    fewest = min(price.flops for price in table.values())
    able = {price.memory_bytes for price in table.values() if price.flops == fewest}
    return [Budget(memory_bytes=price.memory_bytes) for price in table.values()] + [
        Budget(memory_bytes=size, flops=fewest) for size in able
    ]


LORA = FedLora(rank=2, depth="budget")
CLIP, SGD = replace(LOCAL, clip=1.0), replace(LOCAL, optimizer="sgd")
SETTINGS = {
    "caff": (CAFF, LOCAL),
    "caff, sgd": (CAFF, SGD),
    "caff, clip": (CAFF, CLIP),
    "lora": (LORA, LOCAL),
    "lora, clip": (LORA, CLIP),
}
settings = pytest.mark.parametrize(("method", "local"), SETTINGS.values(), ids=list(SETTINGS))


@settings
def test_no_lever_can_be_let_go(method: Method, local: Local) -> None:
    """Nor weakened: the micro-batch is as large as can be, and no disk is used where memory does."""
    for plan in long_plans(method):
        table = every_price(method, plan, local)
        for budget in limits(method, plan, local):
            found = fitted(plan, budget, "exact", local, method)
            if not found.exceeded:
                for levers in weaker(found.plan.levers):
                    assert budget.exceeded(table[levers]), (budget, found.plan.levers.names(), levers.names())


@settings
def test_what_some_combination_of_levers_fits_is_found(method: Method, local: Local) -> None:
    missed = []
    for plan in long_plans(method):
        table = every_price(method, plan, local)
        for budget in limits(method, plan, local):
            able = any(not budget.exceeded(price) for price in table.values())
            found = fitted(plan, budget, "exact", local, method)
            assert found.exceeded == tuple(budget.exceeded(found.cost))
            assert found.cost == table[found.plan.levers]
            if able != (not found.exceeded):
                missed.append((plan.label, budget, found.plan.levers.names()))
    assert not missed


def wide_plans() -> list[tuple[Plan, Spec]]:
    """Of a network with matrices that are worth packing."""
    wide = replace(long_spec(3), embed=64, heads=4, head_dim=16, ffn=256)
    found = []
    for method in (CAFF, LORA):
        adapted = method.adapt(wide)
        found += [(plan, adapted) for plan in method.plans(adapted, TURN, {})]
    return found


WIDE_PLANS = wide_plans()


@pytest.mark.parametrize("which", range(len(WIDE_PLANS)))
def test_no_inexact_lever_can_be_let_go(which: int) -> None:
    """From the least that all levers together need, to where no inexact one is needed."""
    plan, adapted = WIDE_PLANS[which]
    least = fit(adapted, plan, Budget(memory_bytes=1), LOCAL, LONG, STEPS, "all").cost.memory_bytes
    for percent in (0, 1, 4, 10, 25):
        limit = least + percent * least // 100
        found = fit(adapted, plan, Budget(memory_bytes=limit), LOCAL, LONG, STEPS, "all")
        assert not found.exceeded and found.cost.memory_bytes <= limit
        levers = found.plan.levers
        inexact = [rung for rung in LADDER if not rung.exact and rung.name in levers.names()]
        options = [{key: getattr(Levers(), key) for key in rung.sets} for rung in inexact]
        options += [{"frozen_bits": 16}] if levers.frozen_bits == 8 else []
        options += [{"optimizer": "adamw8"}] if levers.optimizer == "adafactor" else []
        for values in options:
            weak = replace(plan, levers=replace(levers, **values))
            assert cost(adapted, weak, LOCAL, LONG, STEPS).memory_bytes > limit, (percent, levers.names(), values)


def test_inexact_levers_are_used_as_the_budget_shrinks() -> None:
    """All of them, somewhere, and the harmless ones first."""
    used: dict[str, float] = {}
    for plan, adapted in WIDE_PLANS:
        least = fit(adapted, plan, Budget(memory_bytes=1), LOCAL, LONG, STEPS, "all").cost.memory_bytes
        for share in range(0, 30):
            limit = least + share * least // 100
            found = fit(adapted, plan, Budget(memory_bytes=limit), LOCAL, LONG, STEPS, "all")
            assert not found.exceeded
            used |= {name: max(share, used.get(name, 0)) for name in found.plan.levers.names()}
    assert {"frozen16", "frozen8", "adamw8", "adafactor"} <= set(used)
    assert used["frozen16"] >= used["frozen8"] and used["adamw8"] >= used["adafactor"]


@given(low=budgets, more=st.integers(0, 500_000), allowed=st.sampled_from(["none", "exact", "all"]))
def test_more_memory_never_trains_fewer_blocks(low: int, more: int, allowed: Allowed) -> None:
    little, much = (long_depth(Budget(memory_bytes=size), allowed) for size in (low, low + more))
    assert little <= much


@given(limit=budgets, tight=st.booleans())
def test_more_levers_never_train_fewer_blocks(limit: int, tight: bool) -> None:
    flops = plain_price(LONG_PLANS[0]).flops if tight else None
    wider: list[Allowed] = ["none", ("micro_batch",), ("chunked_loss", "cache_ram", "micro_batch"), "exact", "all"]
    depths = [long_depth(Budget(memory_bytes=limit, flops=flops), allowed) for allowed in wider]
    assert depths == sorted(depths)


def long_depth(budget: Budget, allowed: Allowed) -> int:
    plan = pick_long(budget, allowed).plan
    return plan.trained_blocks(model.layout(long_spec(3))) if plan else 0


def test_levers_let_a_device_train_more() -> None:
    """In the memory of the last block the last two; the last block in a third of it."""
    needs = [plain_price(plan).memory_bytes for plan in LONG_PLANS]
    assert long_depth(Budget(memory_bytes=needs[2]), "none") == 1
    assert long_depth(Budget(memory_bytes=needs[2]), "exact") == 3
    assert long_depth(Budget(memory_bytes=needs[2] // 3), "exact") >= 1
    assert long_depth(Budget(memory_bytes=needs[2] // 3), "none") == 0


@pytest.mark.parametrize("name", NAMES)
def test_a_list_of_names_restricts(name: str) -> None:
    """One lever alone: it is used exactly where it is needed and enough, and no other ever."""
    (rung,) = (rung for rung in LADDER if rung.name == name)
    for plan, adapted in WIDE_PLANS:
        need, least = (
            cost(adapted, replace(plan, levers=levers), LOCAL, LONG, STEPS).memory_bytes
            for levers in (Levers(), Levers(**rung.sets))
        )
        for limit in (need, need - 1, least, least - 1):
            found = fit(adapted, plan, Budget(memory_bytes=limit), LOCAL, LONG, STEPS, (name,))
            used = {each.split()[0] for each in found.plan.levers.names()}
            assert found.exceeded == (() if min(need, least) <= limit else ("memory_bytes",))
            assert used <= {name}
            assert found.exceeded or used == ({name} if limit < need else set())


def test_a_cache_that_takes_more_than_it_saves_is_not_used() -> None:
    """Of fifty steps the outputs for all examples are more than the batch needs."""
    plan, local = LONG_PLANS[-1], replace(LOCAL, steps=50)
    adapted = long_spec(3)

    def price(**levers: object) -> Cost:
        return cost(adapted, replace(plan, levers=Levers(**levers)), local, LONG, 50)  # type: ignore[arg-type]

    def found(limit: int, *allowed: str) -> Fitted:
        return fit(adapted, plan, Budget(memory_bytes=limit), local, LONG, 50, allowed)

    none, chunked = price(), price(chunked_loss=True)
    assert price(prefix_cache="ram").memory_bytes > none.memory_bytes > chunked.memory_bytes
    alone = found(none.memory_bytes - 1, "cache_ram")
    assert alone == Fitted(plan, none, ("memory_bytes",))
    assert found(chunked.memory_bytes, "chunked_loss", "cache_ram").plan.levers == Levers(chunked_loss=True)
    nearest = found(1, "chunked_loss", "cache_ram")
    assert (nearest.plan.levers, nearest.cost) == (Levers(chunked_loss=True), chunked)


def test_a_cache_goes_to_disk_only_where_memory_is_too_small() -> None:
    """In a single step the outputs are less than the weights below."""
    plan, local, adapted = LONG_PLANS[-1], replace(LOCAL, steps=1), long_spec(3)
    ram, disk = (
        cost(adapted, replace(plan, levers=Levers(prefix_cache=place)), local, LONG, 1).memory_bytes
        for place in ("ram", "disk")
    )
    assert disk < ram < cost(adapted, plan, local, LONG, 1).memory_bytes
    for limit, names in ((ram, ["cache_ram"]), (ram - 1, ["cache_disk"]), (disk, ["cache_disk"])):
        found = fit(adapted, plan, Budget(memory_bytes=limit), local, LONG, 1, ("cache_ram", "cache_disk"))
        assert (found.plan.levers.names(), found.exceeded) == (names, ())


def test_recomputing_counts_operations() -> None:
    """Where they are too few for it, it is not used, and that is what binds."""
    for plan in LONG_PLANS:
        plain, again = plain_price(plan), every_price(CAFF, plan)[Levers(recompute=True)]
        assert again.flops > plain.flops and again.memory_bytes < plain.memory_bytes
        enough = Budget(memory_bytes=again.memory_bytes, flops=again.flops)
        assert fitted(plan, enough, ("recompute",)) == Fitted(replace(plan, levers=Levers(recompute=True)), again, ())
        short = replace(enough, flops=again.flops - 1)
        assert fitted(plan, short, ("recompute",)).exceeded == ("flops",)
        other = fitted(plan, short, "exact")
        assert not other.exceeded and not other.plan.levers.recompute


def test_a_cache_saves_operations_where_examples_come_again() -> None:
    """Three epochs, but one pass through the frozen blocks; it is used for that alone, too."""
    plan, local, adapted = LONG_PLANS[-1], replace(LOCAL, steps=0, epochs=3), long_spec(3)
    plain, cached = (
        cost(adapted, replace(plan, levers=levers), local, LONG, 6) for levers in (Levers(), Levers(prefix_cache="ram"))
    )
    assert cached.flops < plain.flops
    assert fit(adapted, plan, Budget(flops=plain.flops), local, LONG, 6, "exact") == Fitted(plan, plain, ())
    found = fit(adapted, plan, Budget(flops=cached.flops), local, LONG, 6, "exact")
    assert found == Fitted(replace(plan, levers=Levers(prefix_cache="ram")), cached, ())
    short = fit(adapted, plan, Budget(flops=cached.flops - 1), local, LONG, 6, "exact")
    assert short.exceeded == ("flops",)


def test_no_lever_saves_what_is_sent() -> None:
    for plan in LONG_PLANS:
        need = plain_price(plan)
        for resource in ("up_bytes", "down_bytes"):
            short = Budget(**{resource: getattr(need, resource) - 1})
            assert fitted(plan, short, "all") == Fitted(plan, need, (resource,))
        both = fitted(plan, Budget(memory_bytes=need.memory_bytes - 1, up_bytes=need.up_bytes - 1), "exact")
        assert both.exceeded == ("up_bytes",)
        assert both == replace(
            fitted(plan, Budget(memory_bytes=need.memory_bytes - 1), "exact"), exceeded=("up_bytes",)
        )


@pytest.mark.parametrize("allowed", ["exact", "all"])
def test_ignored_budgets_need_no_levers(allowed: Allowed) -> None:
    choice = pick_long(Budget(1, 1, 1, 1), allowed, IGNORE)
    assert choice == Choice(LONG_PLANS[0], plain_price(LONG_PLANS[0]), ())


def test_sitting_out_shows_the_least_memory_there_is() -> None:
    choice = pick_long(Budget(memory_bytes=1), "exact")
    least = min(price.memory_bytes for price in every_price(CAFF, LONG_PLANS[-1]).values())
    assert (choice.plan, choice.cost.memory_bytes, choice.binding) == (None, least, ("memory_bytes",))


@given(limit=budgets, flops=st.integers(50_000_000, 300_000_000))
def test_what_binds_is_what_the_next_richer_plan_lacks(limit: int, flops: int) -> None:
    """With that much more of it, it is taken."""
    budget = Budget(memory_bytes=limit, flops=flops)
    choice = pick_long(budget, "exact")
    labels = [plan.label for plan in LONG_PLANS]
    taken = labels.index(choice.plan.label) if choice.plan else len(labels)
    if taken == 0:
        assert choice.binding == ()
        return
    richer = fitted(LONG_PLANS[taken - 1], budget, "exact")
    assert choice.binding == richer.exceeded != ()
    raised = replace(budget, **{name: getattr(richer.cost, name) for name in choice.binding})
    after = pick_long(raised, "exact").plan
    assert after and labels.index(after.label) <= taken - 1


def long_candidates(
    groups: list[Group], allowed: Allowed, method: Method = CAFF, blocks: Sequence[int] = (2, 4)
) -> list[Candidate]:
    return [assess(method, f"long-{n}", long_spec(n), groups, LOCAL, LONG, STEPS, allowed) for n in blocks]


def long_chosen(groups: list[Group], allowed: Allowed, method: Method = CAFF) -> Candidate:
    scored = long_candidates(groups, allowed, method)
    return choose_network(method, scored, groups, LOCAL, LONG, STEPS, allowed)


def test_levers_let_a_deeper_network_be_chosen() -> None:
    """In the memory of one block of two no block of four can be trained; with levers all four can."""
    shallow = cost(long_spec(2), long_plans(CAFF, 2)[-1], LOCAL, LONG, STEPS)
    groups = [Group("all", 3, Budget(memory_bytes=shallow.memory_bytes))]
    for allowed, means, feasible in (("none", [1, 0], [True, False]), ("exact", [2, 4], [True, True])):
        scored = long_candidates(groups, allowed)
        assert [each.mean_trained_blocks for each in scored] == means
        assert [each.feasible for each in scored] == feasible
    assert long_chosen(groups, "none").name == "long-2"
    winner = long_chosen(groups, "exact")
    assert winner.name == "long-4"
    assert winner.choices == (pick_long(groups[0].budget, "exact", blocks=4),)
    assert winner.choices[0].plan and winner.choices[0].plan.levers != Levers()


def lever_advice(limit: int, allowed: Allowed, **others: int) -> tuple[bool, bool]:
    """Whether the message says that exact levers would help, and whether they would."""
    groups = [Group("weak", 1, Budget(memory_bytes=limit, **others))]
    with pytest.raises(UserError) as caught:
        long_chosen(groups, allowed)
    nearest = re.findall(r"fits no plan of long-(\d)", str(caught.value))[0]
    helps = pick_long(groups[0].budget, "exact", blocks=int(nearest)).plan is not None
    return 'levers = "exact"' in str(caught.value), helps


def test_levers_are_recommended_exactly_where_they_help() -> None:
    cheapest = cost(long_spec(2), long_plans(CAFF, 2)[-1], LOCAL, LONG, STEPS)
    found = {lever_advice(limit, "none") for limit in range(100_000, cheapest.memory_bytes, 50_000)}
    assert found == {(True, True), (False, False)}
    assert lever_advice(cheapest.memory_bytes, "none", up_bytes=cheapest.up_bytes - 1) == (False, False)
    assert lever_advice(cheapest.memory_bytes - 1, "none", up_bytes=cheapest.up_bytes - 1) == (False, False)
    assert lever_advice(100_000, "exact") == (False, False)


def test_a_class_that_levers_would_not_save_is_priced_with_them() -> None:
    """The message shows what the nearest plan needs, levers included, and that much fits."""
    with pytest.raises(UserError) as caught:
        long_chosen([Group("weak", 1, Budget(memory_bytes=100_000))], "exact")
    advice = re.findall(r"memory = ([0-9.]+ \w+)", str(caught.value))[0]
    nearest = int(re.findall(r"fits no plan of long-(\d)", str(caught.value))[0])
    budget = Budget(memory_bytes=quantity("memory", advice))
    assert pick_long(budget, "exact", blocks=nearest).plan
    assert not pick_long(budget, "none", blocks=nearest).plan
