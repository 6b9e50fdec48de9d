"""FedHM and FLANC, which train linear layers in two factors."""

from __future__ import annotations

import gc
import math
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support import LOCAL, STEPS, TURN, WINDOW, Devices, Table, begin, moved, play, spec, weights, write_world
from test_factored import by_hand, linears, logits, near
from torch import Tensor

from lamina import checkpoint, client, measure, model
from lamina.cost import cost
from lamina.job import Job, Local, Update
from lamina.layout import Params
from lamina.levers import Levers
from lamina.methods import Method, lowrank, to_table
from lamina.methods.lowrank import FedHM, Flanc
from lamina.ops import TORCH
from lamina.plan import Plan, Vote
from lamina.planner import Fleet
from lamina.spec import Factored, Spec

SPEC = spec(3)
NOBODY = Fleet([], (), lambda group, plan: True)


@pytest.mark.parametrize(
    "settings",
    [
        {"ratios": ()},
        {"ratios": (2, 4)},
        {"ratios": (1, 4, 2)},
        {"ratios": (1, 2, 2)},
        {"first_block": -1},
        {"decay": -0.1},
        {"temperature": 0.0},
    ],
    ids=str,
)
def test_fedhm_refuses_what_means_nothing(settings: Table) -> None:
    refuses(FedHM, settings)


@pytest.mark.parametrize(
    "settings",
    [
        {"widths": ()},
        {"widths": (0.5, 0.25)},
        {"widths": (1.0, 0.5, 0.5)},
        {"widths": (1.0, 0.25, 0.5)},
        {"widths": (1.0, 0.0)},
        {"basis_fraction": 0.0},
        {"basis_fraction": 1.5},
        {"n_basis": 0.0},
        {"n_basis": 1.1},
        {"orthogonality": -1.0},
    ],
    ids=str,
)
def test_flanc_refuses_what_means_nothing(settings: Table) -> None:
    refuses(Flanc, settings)


def refuses(cls: Any, settings: Table) -> None:
    ((key, value),) = settings.items()
    given = list(value) if isinstance(value, tuple) else value
    with pytest.raises(ValueError) as caught:
        cls(**settings)
    assert str(caught.value).startswith(f"{key} must ") and str(caught.value).endswith(f", got {given}")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Table:
    """An experiment on tiny-3 alone."""
    folder = tmp_path_factory.mktemp("lowrank")
    return write_world(folder, networks=[str(folder / "tiny-3")])


def on(world: Table, method: Method, plan: int, **changes: Any) -> Table:
    """The experiment with a method, and devices without limits and such that fit just the given plan."""
    network = method.adapt(SPEC)
    price = cost(network, list(method.plans(network, TURN, {}))[plan], LOCAL, WINDOW, STEPS, method)
    fleet = [{"name": "strong"}, {"name": "weak", "memory": price.memory_bytes}]
    return world | {"method": to_table(method), "fleet": fleet, "cohort": 6} | changes


@pytest.mark.parametrize(("method", "plan"), [(FedHM(), 3), (Flanc(), 3), (Flanc(n_basis=0.75), 2)], ids=str)
def test_they_train(method: Method, plan: int, world: Table, tmp_path: Path) -> None:
    run = begin(on(world, method, plan), tmp_path)
    losses: list[dict[int, float]] = []
    for _ in range(4):
        run.state, rows = play(run)
        assert {row.group: row.plan for row in rows}[1] == list(method.plans(run.outlook.chosen.spec, TURN, {}))[
            plan
        ].label
        found = {group: [row.loss for row in rows if row.group == group and row.loss] for group in (0, 1)}
        losses.append({group: float(np.mean(each)) for group, each in found.items()})
    for group in (0, 1):
        assert losses[-1][group] < 0.97 * losses[0][group]


# FedHM


def whole_of(network: Spec) -> Plan:
    names = frozenset(model.layout(network).params)
    return Plan(names, names)


@pytest.mark.parametrize(("embed", "ranks"), [(16, [8, 4, 2]), (12, [6, 3, 2]), (2, [1])])
def test_fedhm_lists_falling_ranks(embed: int, ranks: list[int]) -> None:
    """r = D / ratio, rounded; of ratios that come to the same, the first."""
    network = replace(SPEC, embed=embed)
    plans = list(FedHM().plans(network, TURN, {}))
    assert plans[0].network is None
    assert plans[0].trains == plans[0].holds == set(model.layout(network).params)
    assert [plan.network and plan.network.factored for plan in plans[1:]] == [Factored(rank) for rank in ranks]
    assert list(FedHM()._ranks(network).items()) == list(zip(ranks, (2, 4, 8), strict=False))
    assert [plan.label for plan in plans] == ["full rank", *(f"rank {rank}, all 3" for rank in ranks)]
    for plan in plans[1:]:
        assert plan.trains == plan.holds == set(model.layout(plan.runs(network)).params)


def test_fedhm_can_leave_the_first_blocks_whole() -> None:
    _, plan = FedHM(ratios=(1, 4), first_block=2).plans(SPEC, TURN, {})
    assert plan.label == "rank 4, last 1 of 3"
    assert {name for name in plan.trains if name.endswith(".coef")} == {f"h.2.{short}.coef" for short in SPEC.linears}
    assert [plan.label for plan in FedHM(first_block=3).plans(SPEC, TURN, {})] == ["full rank"]


def test_what_factors_save() -> None:
    """12 D^2 weights in whole linear layers of a block; 4 (2 D r) + 2 (5 D r) = 18 D r in factors, r = D / s."""
    sizes = []
    for plan in FedHM().plans(SPEC, TURN, {}):
        layout = model.layout(plan.runs(SPEC))
        names = (f"h.1.{short}.{end}" for short in SPEC.linears for end in ("weight", "coef", "basis"))
        sizes.append(sum(layout.numel(name) for name in names if name in layout.params))
    assert sizes == [12 * 256, *(18 * 256 // ratio for ratio in (2, 4, 8))]
    half = model.layout(replace(SPEC, factored=Factored(8)))
    assert half.numel("h.0.attn.q.coef") + half.numel("h.0.attn.q.basis") == 256  # as much as the weight


@pytest.mark.parametrize("number", [1, 2, 3])
def test_fedhm_sends_the_best_approximation_in_balanced_factors(number: int) -> None:
    """Of its rank (Eckart and Young): what is lost are the singular values that are left out; C'C = B B' = S."""
    params, plan = weights(SPEC), list(FedHM().plans(SPEC, TURN, {}))[number]
    arrays = FedHM().encode(params, SPEC, plan, TURN, {})
    layout = model.layout(plan.runs(SPEC))
    assert {name: tuple(p.shape) for name, p in arrays.items()} == {name: layout.shape(name) for name in layout.params}
    for stem in linears(SPEC):
        weight = params[f"{stem}.weight"].reshape(params[f"{stem}.bias"].numel(), -1).double().numpy()
        values = np.linalg.svd(weight, compute_uv=False)
        rank = 16 >> number
        basis = arrays[f"{stem}.basis"].flatten(1).double()
        coef = arrays[f"{stem}.coef"].reshape(-1, rank).double()
        near(coef.T @ coef, np.diag(values[:rank]))
        near(basis @ basis.T, np.diag(values[:rank]))
        lost = np.linalg.norm(weight - (coef @ basis).numpy())
        assert lost == pytest.approx(np.linalg.norm(values[rank:]), rel=1e-4)
    for name, array in arrays.items():
        assert array.is_contiguous()
        assert array is params.get(name) or name.endswith((".coef", ".basis"))


def test_fedhm_gives_whole_weights_as_they_are() -> None:
    params = weights(SPEC)
    arrays = FedHM().encode(params, SPEC, next(FedHM().plans(SPEC, TURN, {})), TURN, {})
    assert list(arrays) == list(params) and all(arrays[name] is params[name] for name in params)


def test_fedhm_decomposes_a_weight_once_and_forgets_it_with_the_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def noted(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        return svd(*args, **kwargs)

    svd = torch.linalg.svd
    monkeypatch.setattr(torch.linalg, "svd", noted)
    gc.collect()
    before, params = len(lowrank._KNOWN), weights(SPEC)
    for plan in list(FedHM().plans(SPEC, TURN, {})) * 2:
        FedHM().encode(params, SPEC, plan, TURN, {})
    assert len(calls) == len(lowrank._KNOWN) - before == len(linears(SPEC))
    changed = params | {"h.1.ffn.up.weight": params["h.1.ffn.up.weight"] + 1}
    FedHM().encode(changed, SPEC, list(FedHM().plans(SPEC, TURN, {}))[1], TURN, {})
    assert len(calls) == len(linears(SPEC)) + 1
    calls.clear()
    del params, changed
    gc.collect()
    assert len(lowrank._KNOWN) == before


def answers(method: Method, plans: Sequence[tuple[int, int]], seed: int = 1) -> tuple[list[Vote], list[Params]]:
    """Votes of devices on SPEC with the given plans and examples, at random values, and those as plain weights."""
    network = method.adapt(SPEC)
    listed = list(method.plans(network, TURN, {}))
    votes, whole = [], []
    for device, (number, examples) in enumerate(plans):
        plan = listed[number]
        arrays = weights(plan.runs(network), seed + device)
        turn = replace(TURN, device=device)
        update = Update(turn, arrays, examples=examples, steps=1, loss=0.0)
        votes.append(method.decode(update, Job(turn, plan, LOCAL, arrays, method), network))
        whole.append(arrays if plan.network is None else model.merged(plan.network, arrays)[1])
    return votes, whole


def mean_of(parts: Sequence[Params], shares: Sequence[float], name: str) -> np.ndarray:
    stacked = np.stack([part[name].double().numpy() for part in parts])
    return np.average(stacked, axis=0, weights=shares)


@pytest.mark.parametrize(
    ("settings", "plans", "shares"),
    [
        ({}, [(0, 7), (1, 2), (3, 1)], [1, 1, 1]),
        ({"weighting": "examples"}, [(0, 7), (1, 2), (3, 1)], [7, 2, 1]),
        ({"dynamic": True}, [(0, 7), (1, 2), (3, 1)], np.exp([-1, -2, -8])),
        ({"dynamic": True, "temperature": 4.0}, [(2, 7), (0, 2)], np.exp([-4 / 4, -1 / 4])),
        ({"dynamic": True, "weighting": "examples"}, [(0, 7), (1, 2)], [7 * math.exp(-1), 2 * math.exp(-2)]),
        ({"dynamic": True, "temperature": 1e-3, "history": False}, [(2, 7), (1, 2)], [0, 1]),
        ({"history": False}, [(2, 7), (3, 1)], [1, 1]),
        ({}, [(2, 7), (3, 1)], [1, 1, 1]),
        ({"weighting": "examples"}, [(2, 7), (3, 1)], [7, 1, 4]),
        ({"dynamic": True}, [(2, 7), (3, 1)], np.exp([-4, -8, -1])),
        ({"history": True}, [(2, 7), (0, 1)], [1, 1]),
    ],
    ids=str,
)
def test_fedhm_takes_the_mean_of_products(settings: Table, plans: list[tuple[int, int]], shares: Any) -> None:
    """And, where no device was whole and history counts, of the global network, as a device of their mean weight."""
    method, params = FedHM(**settings), weights(SPEC)
    votes, whole = answers(method, plans)
    after, kept = method.merge(params, SPEC, votes, replace(TURN, device=-1), {})
    assert not kept
    for name in params:
        near(after[name], mean_of([*whole, params][: len(shares)], shares, name), 1e-6)


@pytest.mark.parametrize("number", [0, 2])
@pytest.mark.parametrize("first_block", [0, 1])
def test_fedhm_decays_the_product(number: int, first_block: int) -> None:
    """(lambda / 2) |W|^2 of all linear layers that are in factors on some device, whole or not."""
    method = FedHM(decay=0.3, first_block=first_block)
    plan = list(method.plans(SPEC, TURN, {}))[number]
    network = plan.runs(SPEC)
    leaves = {name: p.double().requires_grad_() for name, p in weights(network).items()}
    decayed = [stem for stem in linears(SPEC) if int(stem[2]) >= first_block]
    penalty = 0.3 / 2 * torch.stack([model.product(network, leaves, stem).square().sum() for stem in decayed]).sum()
    pulls(method, plan, leaves, penalty)


def pulls(method: Method, plan: Plan, leaves: Params, penalty: Tensor) -> None:
    """A method adds to the gradients that there are those of the penalty."""
    names = list(leaves)
    expected = torch.autograd.grad(penalty, [leaves[name] for name in names], allow_unused=True)
    before = {name: torch.randn_like(p) for name, p in leaves.items()}
    for name, p in leaves.items():
        p.grad = before[name].clone()
    method.pull(Job(TURN, plan, LOCAL, leaves, method), leaves, {}, TORCH)
    for name, grad in zip(names, expected, strict=True):
        found = leaves[name].grad
        assert found is not None
        near(found - before[name], torch.zeros_like(found) if grad is None else grad, 1e-9)


@pytest.mark.parametrize("method", [FedHM(decay=0), Flanc(orthogonality=0)], ids=["fedhm", "flanc"])
def test_without_a_penalty_nothing_is_pulled(method: Method) -> None:
    network = method.adapt(SPEC)
    plan = list(method.plans(network, TURN, {}))[1]
    method.pull(Job(TURN, plan, LOCAL, {}, method), weights(plan.runs(network)), {}, TORCH)  # there is no gradient


def test_a_penalty_is_pulled_at_every_step() -> None:
    """SGD on a penalty so strong that it decides: decay shrinks the products."""
    method, local = FedHM(decay=1.0), Local(lr=0.1, optimizer="sgd", batch_size=4, steps=8)
    plan = list(method.plans(SPEC, TURN, {}))[2]
    for lever in (Levers(), Levers(fused_update=True)):
        job, shard = measure.work(SPEC, replace(plan, levers=lever), local, 12, method)
        before = {stem: np.linalg.norm(by_hand(plan.runs(SPEC), dict(job.arrays), stem)) for stem in linears(SPEC)}
        after = client.train(job.owned(), shard, SPEC).arrays
        for stem, size in before.items():
            assert np.linalg.norm(by_hand(plan.runs(SPEC), after, stem)) < size


# FLANC


@pytest.mark.parametrize(
    ("changes", "settings", "group", "rank"),
    [
        ({}, {}, 8, 8),
        ({}, {"n_basis": 0.3}, 8, 3),
        ({}, {"basis_fraction": 0.3}, 4, 4),
        ({}, {"basis_fraction": 0.001, "n_basis": 0.1}, 1, 1),
        ({"head_dim": 24, "embed": 48, "ffn": 180}, {}, 12, 12),
        ({"head_dim": 7, "embed": 14, "ffn": 20}, {}, 1, 1),
    ],
    ids=str,
)
def test_flanc_takes_the_largest_groups_there_are(changes: Table, settings: Table, group: int, rank: int) -> None:
    method = Flanc(**settings)
    network = method.adapt(replace(SPEC, **changes))
    assert network.factored == Factored(rank, group)
    for plan in method.plans(network, TURN, {}):
        model.layout(plan.runs(network))


def test_flanc_lists_widths() -> None:
    network = Flanc().adapt(replace(SPEC, heads=4, head_dim=4, ffn=68))
    plans = list(Flanc().plans(network, TURN, {}))
    assert [plan.label for plan in plans] == ["width 1", "width 0.75", "width 0.5", "width 0.25"]
    assert plans[0].network is None
    assert [(each.heads, each.ffn) for each in (plan.runs(network) for plan in plans)] == [
        (4, 68),
        (3, 52),  # 17 groups of 4: 13, 9 and 5 of them
        (2, 36),
        (1, 20),
    ]
    for plan in plans:
        assert plan.trains == plan.holds == set(model.layout(plan.runs(network)).params)
        assert replace(plan.runs(network), heads=4, ffn=68) == network


def test_widths_that_come_to_the_same_are_one() -> None:
    network = Flanc().adapt(replace(SPEC, heads=1, ffn=16))
    method = Flanc(widths=(1.0, 0.8, 0.5, 0.3))
    assert [plan.label for plan in method.plans(network, TURN, {})] == ["width 1", "width 0.5"]
    assert {name.split("/")[0] for name in method.prepare(network, weights(network), NOBODY, TURN)} == {"0.5"}


@cache
def begun(method: Flanc) -> tuple[Spec, Params, Params]:
    """The network of a method on SPEC, its tensors fitted to random weights, and its memory."""
    network = method.adapt(SPEC)
    drawn = weights(network) | {name: p for name, p in weights(SPEC).items() if name in model.layout(network).params}
    params = method.equip(network, drawn, weights(SPEC))
    return network, params, method.prepare(network, params, NOBODY, TURN)


def held(method: Flanc, number: int) -> tuple[Spec, Params]:
    network, params, kept = begun(method)
    plan = list(method.plans(network, TURN, {}))[number]
    return plan.runs(network), method.encode(params, network, plan, TURN, kept)


def cut(number: int, method: Flanc) -> tuple[Spec, Params]:
    """The first heads and units of the pretrained network, as many as a width has."""
    network = replace(held(method, number)[0], factored=None)
    layout = model.layout(network)
    return network, {name: p[tuple(map(slice, layout.shape(name)))] for name, p in weights(SPEC).items()}


@pytest.mark.parametrize("number", [0, 1, 2, 3])
def test_flanc_with_complete_bases_begins_as_the_pretrained_network_cut(number: int) -> None:
    near(logits(*held(Flanc(), number)), logits(*cut(number, Flanc())))


def stacked(method: Flanc, stem: str) -> np.ndarray:
    """All groups of inputs of a layer's weights in all widths, [rows, g]."""
    group = begun(method)[0].factored.inputs  # type: ignore[union-attr]
    parts = []
    for number in range(len(method.widths)):
        weight = cut(number, method)[1][f"{stem}.weight"]
        parts.append(weight.reshape(-1, group).double().numpy())
    return np.concatenate(parts)


def test_flanc_fits_the_best_shared_basis() -> None:
    """Orthonormal, and over all widths what is lost are the singular values of the stack that are left out."""
    method = Flanc(widths=(1.0, 0.5), n_basis=0.6)
    network, params, _ = begun(method)
    for stem in linears(network):
        basis = params[f"{stem}.basis"].double().numpy()
        near(torch.from_numpy(basis @ basis.T), np.eye(5), 1e-6)
        lost = []
        for number in (0, 1):
            narrower, arrays = held(method, number)
            plain = cut(number, method)[1][f"{stem}.weight"].double().numpy()
            fitted = by_hand(narrower, arrays, stem)
            lost.append(np.linalg.norm(fitted - plain.reshape(fitted.shape)) ** 2)
        values = np.linalg.svd(stacked(method, stem), compute_uv=False)
        assert sum(lost) == pytest.approx((values[5:] ** 2).sum(), rel=1e-4)
        assert abs(np.linalg.norm(stacked(method, stem) @ basis[0]) - values[0]) < 1e-4 * values[0]  # largest first
    for name, p in params.items():
        if not name.endswith((".basis", ".coef")):
            assert torch.equal(p, weights(SPEC)[name])


def test_flanc_gives_what_there_is_and_makes_nothing() -> None:
    """So that what a device has already need not be sent again."""
    network, params, kept = begun(Flanc())
    everything = {id(p) for p in (params | {f"memory:{name}": p for name, p in kept.items()}).values()}
    for number, plan in enumerate(Flanc().plans(network, TURN, {})):
        _, arrays = held(Flanc(), number)
        assert {name: tuple(p.shape) for name, p in arrays.items()} == {
            name: model.layout(plan.runs(network)).shape(name) for name in plan.holds
        }
        assert {id(p) for p in arrays.values()} <= everything
        assert all(
            (array is params[name]) == (number == 0 or name.endswith(".basis")) for name, array in arrays.items()
        )


def test_flanc_averages_bases_over_all_and_the_rest_within_a_width() -> None:
    """Four devices: two of the full width, one of half, none of three quarters, one of a quarter."""
    network, params, kept = begun(Flanc())
    plans = [(0, 5), (0, 1), (2, 3), (3, 9)]
    votes, _ = answers(Flanc(), plans)
    sent = [vote.arrays for vote in votes]
    after, memory_after = Flanc().merge(params, network, votes, replace(TURN, device=-1), kept)
    assert (list(after), list(memory_after)) == (list(params), list(kept))
    for name in params:
        if name.endswith(".basis"):
            near(after[name], mean_of(sent, [1, 1, 1, 1], name), 1e-6)
            continue
        near(after[name], mean_of(sent[:2], [1, 1], name), 1e-6)
        assert memory_after[f"0.75/{name}"] is kept[f"0.75/{name}"]
        assert torch.equal(memory_after[f"0.5/{name}"], sent[2][name])
        assert torch.equal(memory_after[f"0.25/{name}"], sent[3][name])
    weighted = Flanc(weighting="examples")
    after, _ = weighted.merge(params, network, answers(weighted, plans)[0], replace(TURN, device=-1), kept)
    near(after["h.0.attn.q.basis"], mean_of(sent, [5, 1, 3, 9], "h.0.attn.q.basis"), 1e-6)
    near(after["h.0.attn.q.coef"], mean_of(sent[:2], [5, 1], "h.0.attn.q.coef"), 1e-6)


def test_where_nobody_is_of_full_width_only_the_bases_move() -> None:
    network, params, kept = begun(Flanc())
    votes, _ = answers(Flanc(), [(1, 1), (2, 1)])
    after, _ = Flanc().merge(params, network, votes, replace(TURN, device=-1), kept)
    assert moved(params, after) == {name for name in params if name.endswith(".basis")}


@pytest.mark.parametrize("settings", [{}, {"n_basis": 0.4, "orthogonality": 0.7}], ids=str)
def test_flanc_pulls_towards_orthonormal_bases(settings: Table) -> None:
    method = Flanc(**settings)
    network = method.adapt(SPEC)
    leaves = {name: p.double().requires_grad_() for name, p in weights(network).items()}
    bases = [p for name, p in leaves.items() if name.endswith(".basis")]
    errors = [(b @ b.T - torch.eye(len(b))).square().mean() for b in bases]
    pulls(method, next(method.plans(network, TURN, {})), leaves, method.orthogonality * torch.stack(errors).sum())


def test_a_device_that_has_it_gets_nothing_again(world: Table, tmp_path: Path) -> None:
    """Bases and the tensors of its own width, where nothing came of the first round; then all of them anew."""
    run = begin(on(world, Flanc(), 2), tmp_path)
    silent = Devices(run, lambda update: [])
    state, first = play(run, silent)
    for row in first:
        spec_of = next(p for p in Flanc().plans(run.outlook.chosen.spec, TURN, {}) if p.label == row.plan).runs(
            run.outlook.chosen.spec
        )
        layout = model.layout(spec_of)
        assert row.down_bytes == 4 * sum(map(layout.numel, layout.params))
    assert {row.group for row in first} == {0, 1}
    state, second = play(run, silent, state)
    assert [row.down_bytes for row in second] == [0] * 6
    state, _ = play(run, Devices(run), state)
    _, fourth = play(run, silent, state)
    assert [row.down_bytes for row in fourth] == [row.down_bytes for row in first]


def test_the_full_width_is_handed_out_as_a_plain_network(world: Table, tmp_path: Path) -> None:
    run = begin(on(world, Flanc(n_basis=0.5), 1, rounds=1), tmp_path)
    run.play()
    read, loaded = checkpoint.load(run.folder / "model")
    assert read == SPEC
    near(logits(read, loaded), logits(run.outlook.chosen.spec, run.state.params))
