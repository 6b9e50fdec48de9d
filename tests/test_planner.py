"""The planner against a brute-force t* = max {t : price(t) <= budget}, and the choice of the network."""

import itertools
import re
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import pytest
from support import LOCAL, STEPS, TURN, VARIANTS, WINDOW, memory, prices, spec, write_world

from lamina import config, model
from lamina.errors import UserError
from lamina.experiment import look_ahead
from lamina.fleet import RESOURCES, Budget, quantity
from lamina.methods import Method
from lamina.methods.blocks import Caff
from lamina.planner import Candidate, Choice, Group, assess, choose_network, choose_plan
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
