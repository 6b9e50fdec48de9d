"""The laws of the slice algebra on random layouts, cuts and votes: `python -m pytest tests/test_plan.py`.

Weights are eighths, so that their sums are exact in any order and equalities can be asserted bit for bit.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lamina import model
from lamina.layout import Axis, Layout, Param, Params, Part
from lamina.plan import Absent, Keep, Plan, Vote, merge, narrow
from lamina.spec import Lora, Spec

BOTH: tuple[Absent, ...] = get_args(Absent)
eighths = st.integers(1, 400).map(lambda n: n / 8)
absents = st.sampled_from(BOTH)


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    """Up to five tensors of up to three axes, out of four that they share."""
    sizes = {Axis(name): draw(st.integers(1, 4)) for name in "abcd"}
    shapes = draw(st.lists(st.lists(st.sampled_from(sorted(sizes)), max_size=3), min_size=1, max_size=5))
    parts, blocks = st.sampled_from(get_args(Part)), st.one_of(st.none(), st.integers(0, 2))
    rows = {f"t{i}": Param(tuple(axes), draw(parts), draw(blocks)) for i, axes in enumerate(shapes)}
    return Layout(rows, sizes, blocks=3)


@st.composite
def keeps(draw: st.DrawFn, size: int) -> Keep:
    """Some units in a row from anywhere, wrapping around, or any units in any order."""
    if draw(st.booleans()):
        return Keep(draw(st.integers(1, size)), draw(st.integers(0, 2 * size)))
    units = draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=size, unique=True))
    return Keep(len(units), units=tuple(units))


@st.composite
def plans(draw: st.DrawFn, layout: Layout) -> Plan:
    cut = draw(st.sets(st.sampled_from(sorted(layout.sizes))))
    holds = draw(st.sets(st.sampled_from(sorted(layout.params))))
    trains = draw(st.sets(st.sampled_from(sorted(holds)))) if holds else set()
    keep = {axis: draw(keeps(layout.sizes[axis])) for axis in sorted(cut)}
    return Plan(frozenset(holds), frozenset(trains), keep, draw(st.text(max_size=5)))


@dataclass(frozen=True)
class Case:
    """Global tensors, and up to four votes on them."""

    layout: Layout
    params: Params
    votes: list[Vote]


@st.composite
def cases(draw: st.DrawFn, weights: st.SearchStrategy[float] = eighths) -> Case:
    layout = draw(layouts())
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    params = {name: torch.randn(layout.shape(name), generator=generator) for name in layout.params}
    votes = []
    for device in range(draw(st.integers(1, 4))):
        plan = draw(plans(layout))
        arrays = {name: torch.randn(plan.shape(layout, name), generator=generator) for name in sorted(plan.trains)}
        votes.append(Vote(device, plan, arrays, draw(weights)))
    return Case(layout, params, votes)


def kept(layout: Layout, plan: Plan, axis: Axis) -> list[int]:
    """Kept units of an axis, the slow way."""
    size = layout.sizes[axis]
    if axis not in plan.keep:
        return list(range(size))
    keep = plan.keep[axis]
    return list(keep.units) if keep.units else [(keep.start + i) % size for i in range(keep.count)]


def places(layout: Layout, plan: Plan, name: str) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Place on the device and place in the full tensor of every scalar that the device holds of a tensor."""
    every = [kept(layout, plan, axis) for axis in layout.params[name].axes]
    for here in itertools.product(*(range(len(units)) for units in every)):
        yield here, tuple(units[i] for units, i in zip(every, here, strict=True))


def said(case: Case) -> dict[tuple[str, tuple[int, ...]], list[tuple[float, float]]]:
    """(name, place) -> (weight, value) of every device that trained that scalar, devices ascending."""
    votes: dict[tuple[str, tuple[int, ...]], list[tuple[float, float]]] = {}
    for vote in sorted(case.votes, key=lambda vote: vote.device):
        for name in vote.plan.trains:
            for here, there in places(case.layout, vote.plan, name):
                votes.setdefault((name, there), []).append((vote.weight, vote.arrays[name][here].item()))
    return votes


def bits(tensor: Tensor) -> list[int]:
    words: list[int] = tensor.reshape(-1).view(torch.int32).tolist()
    return words


def all_bits(params: Mapping[str, Tensor]) -> dict[str, list[int]]:
    return {name: bits(tensor) for name, tensor in params.items()}


@given(cases(), absents)
def test_without_training_nothing_changes(case: Case, absent: Absent) -> None:
    votes = []
    for vote in case.votes:
        device = narrow(case.params, case.layout, vote.plan)
        votes.append(replace(vote, arrays={name: device[name] for name in vote.plan.trains}))
    assert all_bits(merge(case.params, case.layout, votes, absent)) == all_bits(case.params)


@pytest.mark.parametrize("absent", BOTH)
def test_a_negative_zero_stays_one(absent: Absent) -> None:
    layout, params = Layout({"x": Param((), "head")}, {}, blocks=0), {"x": torch.tensor(-0.0)}
    names = frozenset(params)
    after = merge(params, layout, [Vote(0, Plan(names, names), params, 1.0)], absent)
    assert all_bits(after) == all_bits(params)


@given(cases(), absents)
def test_when_all_train_all_the_merge_is_the_weighted_mean(case: Case, absent: Absent) -> None:
    everything = frozenset(case.layout.params)
    full = Plan(everything, everything)
    votes = [
        Vote(vote.device, full, {name: old + vote.device + 1 / 3 for name, old in case.params.items()}, vote.weight)
        for vote in case.votes
    ]
    after = merge(case.params, case.layout, votes, absent)
    for name in case.params:
        ordered = sorted(votes, key=lambda vote: vote.device)
        weighted = sum((v.weight * v.arrays[name].double() for v in ordered), torch.tensor(0.0, dtype=torch.float64))
        assert bits(after[name]) == bits((weighted / sum(v.weight for v in ordered)).float())


@given(cases(st.floats(1e-3, 1e6)), absents)
def test_what_nobody_trained_does_not_move(case: Case, absent: Absent) -> None:
    after, trained = merge(case.params, case.layout, case.votes, absent), said(case)
    for name, old in case.params.items():
        for place in itertools.product(*map(range, old.shape)):
            if (name, place) not in trained:
                assert bits(after[name][place]) == bits(old[place])
        if not any(name in vote.plan.trains for vote in case.votes):
            assert after[name] is old


@given(cases(st.floats(1e-3, 1e6)), absents)
def test_votes_are_taken_as_they_come(case: Case, absent: Absent) -> None:
    """Nothing is asked of a vote once the next one is there."""

    def fading() -> Iterator[Vote]:
        for vote in case.votes:
            arrays = {name: array.clone() for name, array in vote.arrays.items()}
            yield replace(vote, arrays=arrays)
            for array in arrays.values():
                array.fill_(torch.nan)

    once = merge(case.params, case.layout, case.votes, absent)
    assert all_bits(once) == all_bits(merge(case.params, case.layout, fading(), absent))


@pytest.mark.parametrize("keep", [{}, {Axis("a"): Keep(2)}], ids=["whole", "cut"])
@pytest.mark.parametrize("absent", BOTH)
def test_votes_come_in_ascending_order_of_devices(absent: Absent, keep: dict[Axis, Keep]) -> None:
    """1e17 + 1 - 1e17 is 0 or 1 in float64, as the order has it."""
    layout = Layout({"x": Param((Axis("a"),), "head")}, {Axis("a"): 2}, blocks=0)
    names = frozenset("x")
    plan = Plan(names, names, keep)
    votes = [
        Vote(device, plan, {"x": torch.full((2,), value)}, weight)
        for device, (value, weight) in enumerate([(1e17, 1.0), (1.0, 1.0), (-1e17, 1.0)])
    ]
    assert merge({"x": torch.ones(2)}, layout, votes, absent)["x"].tolist() == [0, 0]
    for first, *others in itertools.permutations(votes):
        if [first, *others] != votes:
            with pytest.raises(ValueError, match=r"^votes come in ascending order of devices; \d came after \d$"):
                merge({"x": torch.ones(2)}, layout, [first, *others], absent)


@given(cases(), absents)
def test_merge_is_the_count_of_every_scalar(case: Case, absent: Absent) -> None:
    after, trained = merge(case.params, case.layout, case.votes, absent), said(case)
    silent = sum(vote.weight for vote in case.votes)
    for (name, place), votes in trained.items():
        count = sum(weight for weight, _ in votes)
        if absent == "keep":
            votes, count = [*votes, (silent - count, case.params[name][place].item())], silent
        mean = sum(weight * value for weight, value in votes) / count
        assert math.isclose(after[name][place].item(), mean, rel_tol=torch.finfo(torch.float32).eps, abs_tol=1e-12)


@given(cases())
def test_both_readings_agree_when_all_train_the_same(case: Case) -> None:
    plan = case.votes[0].plan
    votes = []
    for vote in case.votes:
        device = narrow(case.params, case.layout, plan)
        votes.append(replace(vote, plan=plan, arrays={name: device[name] * vote.weight for name in plan.trains}))
    skip, keep = (merge(case.params, case.layout, votes, absent) for absent in BOTH)
    assert all_bits(skip) == all_bits(keep)


def test_readings_differ_by_the_vote_of_the_silent() -> None:
    """Device 0 (weight 3) trains x to 5 from 1, device 1 (weight 1) does not: 5, or (3 * 5 + 1 * 1) / 4 = 4."""
    layout = Layout({"x": Param((), "head"), "y": Param((), "head")}, {}, blocks=0)
    params = {"x": torch.tensor(1.0), "y": torch.tensor(7.0)}
    names = frozenset(params)
    votes = [
        Vote(0, Plan(names, frozenset("x")), {"x": torch.tensor(5.0)}, 3),
        Vote(1, Plan(names, frozenset("y")), {"y": torch.tensor(3.0)}, 1),
    ]
    assert {name: p.item() for name, p in merge(params, layout, votes, "skip").items()} == {"x": 5, "y": 3}
    assert {name: p.item() for name, p in merge(params, layout, votes, "keep").items()} == {"x": 4, "y": 6}


@given(cases(), absents)
def test_merge_leaves_its_arguments_alone(case: Case, absent: Absent) -> None:
    before = all_bits(case.params), [all_bits(vote.arrays) for vote in case.votes]
    after = merge(case.params, case.layout, case.votes, absent)
    assert (all_bits(case.params), [all_bits(vote.arrays) for vote in case.votes]) == before
    assert list(after) == list(case.params)
    assert all(after[name].dtype == old.dtype and after[name].shape == old.shape for name, old in case.params.items())


@given(cases())
def test_narrow_takes_the_kept_units_of_what_is_held(case: Case) -> None:
    for plan in (vote.plan for vote in case.votes):
        device = narrow(case.params, case.layout, plan)
        assert list(device) == [name for name in case.layout.params if name in plan.holds]
        for name, tensor in device.items():
            assert tuple(tensor.shape) == plan.shape(case.layout, name)
            for here, there in places(case.layout, plan, name):
                assert bits(tensor[here]) == bits(case.params[name][there])
            uncut = not any(axis in plan.keep for axis in case.layout.params[name].axes)
            assert (tensor is case.params[name]) == uncut


def test_kept_units_wrap_around() -> None:
    assert Keep(3, start=4).indices(5).tolist() == [4, 0, 1]
    assert Keep(2).indices(5).tolist() == [0, 1]
    assert Keep(3, units=(4, 0, 2)).indices(5).tolist() == [4, 0, 2]


@given(st.data())
def test_plans_survive_json(data: st.DataObject) -> None:
    plan = data.draw(plans(data.draw(layouts())))
    assert Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan


def test_training_what_is_not_held_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^plan 'mine' trains tensors it does not hold: b, d$"):
        Plan(frozenset("ac"), frozenset("abcd"), label="mine")


@pytest.mark.parametrize(
    ("trains", "first", "blocks"),
    [
        ((), 3, 0),
        (("head.weight",), 3, 0),
        (("norm.weight", "head.weight"), 3, 0),
        (("h.2.ffn.up.bias", "h.2.norm1.weight", "head.weight"), 2, 1),
        (("h.1.attn.q.lora_a",), 1, 1),
        (("h.0.norm1.bias", "h.2.ffn.up.weight"), 0, 2),
        (("embed.positions", "h.2.ffn.up.weight"), 0, 1),
        (("embed.tokens",), 0, 0),
    ],
)
def test_first_trained_and_number_of_trained_blocks(
    tiny: Spec, trains: tuple[str, ...], first: int, blocks: int
) -> None:
    layout = model.layout(replace(tiny, lora=Lora(2, 4.0, ("attn.q",))))
    plan = Plan(frozenset(layout.params), frozenset(trains))
    assert plan.first_trained(layout) == first
    assert plan.trained_blocks(layout) == blocks


@pytest.mark.parametrize("trained", [0, 1, 2, 3])
def test_a_tail_needs_the_gradient_down_to_its_first_block(tiny: Spec, trained: int) -> None:
    layout = model.layout(tiny)
    plan = Plan(frozenset(layout.params), layout.tail(trained))
    assert (plan.first_trained(layout), plan.trained_blocks(layout)) == (3 - trained, trained)
