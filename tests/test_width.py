"""Methods that cut the width, against their papers' formulas written out anew."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support import TURN, begin, bits, moved, play, spec, weights, write_world
from torch import Tensor

from lamina import checkpoint, client, measure, model, packed
from lamina.cost import cost
from lamina.data.task import Pairs
from lamina.job import Job, Local, Turn, Update
from lamina.layout import Axis, Params
from lamina.levers import Levers
from lamina.methods import METHODS, Method
from lamina.methods.base import Objective
from lamina.methods.width import FederatedDropout, FedRolex, Fjord, HeteroFL, Width
from lamina.ops import TORCH, Ops
from lamina.plan import Plan, narrow
from lamina.planner import Fleet
from lamina.spec import Spec

T = TypeVar("T")
SPEC = Spec(2, embed=12, heads=3, head_dim=4, ffn=20, vocab=23, positions=9)
LAYOUT = model.layout(SPEC)
PARAMS = weights(SPEC)
SGD = Local(lr=1.0, optimizer="sgd", steps=1, batch_size=4)
WIDTHS: dict[str, type[Width]] = {name: cls for name, cls in METHODS.items() if issubclass(cls, Width)}
every_width = pytest.mark.parametrize("cls", WIDTHS.values(), ids=list(WIDTHS))


def examples(count: int = 12, tokens: int = 7, vocab: int = SPEC.vocab) -> Pairs:
    drawn = np.random.default_rng(0).integers(0, vocab, (count, tokens + 1))
    return Pairs(drawn[:, :-1].copy(), drawn[:, 1:].copy())


def plans(method: Method, turn: Turn = TURN, network: Spec = SPEC) -> list[Plan]:
    return list(method.plans(network, turn, {}))


def job(method: Method, plan: Plan, local: Local = SGD, turn: Turn = TURN) -> Job:
    return Job(turn, plan, local, narrow(PARAMS, LAYOUT, plan), method)


def step(job: Job, shard: Pairs, ops: Ops = TORCH) -> tuple[Params, float]:
    """With SGD at lr = 1, what a step takes away is the gradient; and the loss."""
    update = client.train(job.owned(), shard, SPEC, ops)
    return {name: job.arrays[name] - update.arrays[name] for name in job.plan.trains}, update.loss


def near(got: Mapping[str, Tensor], expected: Mapping[str, Tensor], rtol: float = 1e-4, atol: float = 2e-6) -> None:
    assert got.keys() == expected.keys()
    for name in got:
        torch.testing.assert_close(got[name], expected[name], rtol=rtol, atol=atol, msg=name)


def logits(params: Mapping[str, Tensor], ids: Tensor, scale: float = 1.0) -> Tensor:
    """A GPT-2 of whatever sizes the tensors have, with HeteroFL's Scaler where its code has one, written out."""

    def norm(x: Tensor, name: str) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        deviation = (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        return centred / deviation * params[f"{name}.weight"] + params[f"{name}.bias"]

    tokens = ids.shape[1]
    x = params["embed.tokens"][ids] / scale + params["embed.positions"][:tokens] / scale
    for i in range(2):
        name, y = f"h.{i}.attn", norm(x, f"h.{i}.norm1")
        q, k, v = (
            (torch.einsum("bsd,hkd->bhsk", y, params[f"{name}.{s}.weight"]) + params[f"{name}.{s}.bias"][:, None])
            / scale
            for s in "qkv"
        )
        scores = q @ k.transpose(2, 3) / math.sqrt(q.shape[-1])
        scores = scores.masked_fill(torch.ones(tokens, tokens).triu(1).bool(), -math.inf)
        mixed = torch.einsum("bhsk,dhk->bsd", scores.softmax(-1) @ v, params[f"{name}.o.weight"])
        x = x + (mixed + params[f"{name}.o.bias"]) / scale
        y = norm(x, f"h.{i}.norm2") @ params[f"h.{i}.ffn.up.weight"].T + params[f"h.{i}.ffn.up.bias"]
        y = F.gelu(y / scale, approximate="tanh") @ params[f"h.{i}.ffn.down.weight"].T
        x = x + (y + params[f"h.{i}.ffn.down.bias"]) / scale
    return norm(x, "norm") @ params["head.weight"].T


def first(params: Mapping[str, Tensor], sizes: Mapping[str, int]) -> Params:
    """The first so many units of the axes "embed", "heads", "head_dim" and "ffn", the same in all blocks."""

    def cut(name: str, p: Tensor) -> Tensor:
        axes = [str(axis).split(".")[-1] for axis in LAYOUT.params[name].axes]
        return p[tuple(slice(sizes.get(axis)) for axis in axes)]

    return {name: cut(name, p) for name, p in params.items()}


def first_batch(shard: Pairs, local: Local = SGD, turn: Turn = TURN) -> tuple[Tensor, Tensor]:
    ids, targets = shard.batch(local.batches(turn, len(shard))[0])
    return torch.from_numpy(ids), torch.from_numpy(targets)


# What devices hold


@every_width
@pytest.mark.parametrize("scope", ["inner", "full"])
def test_all_is_trained_at_every_width(cls: type[Width], scope: Any) -> None:
    """Of n units the fewest that are at least r n: of heads, or of the dimensions of each, and so on."""
    cut = {"heads", "ffn"}
    if scope == "full":
        cut = {"embed", "head_dim", "ffn"} if cls in (HeteroFL, FedRolex) else {"embed", "heads", "ffn"}
    found = plans(cls(scope=scope))
    assert [plan.label for plan in found] == ["width 1", "width 1/2", "width 1/4", "width 1/8", "width 1/16"]
    for plan, ratio in zip(found, (1, 2, 4, 8, 16), strict=True):
        assert plan.trains == plan.holds == set(LAYOUT.params)
        for axis, size in LAYOUT.sizes.items():
            wanted = -(-size // ratio) if str(axis).split(".")[-1] in cut else size
            assert (plan.keep[axis].count if axis in plan.keep else size) == wanted
            assert (axis in plan.keep) == (wanted < size)
        for name, p in narrow(PARAMS, LAYOUT, plan).items():
            assert tuple(p.shape) == plan.shape(LAYOUT, name)


def test_defaults_are_those_of_the_papers() -> None:
    assert {name: cls().scope for name, cls in WIDTHS.items()} == {
        "federated-dropout": "inner",
        "heterofl": "full",
        "fedrolex": "full",
        "fjord": "inner",
    }
    assert [cls().weighting for cls in WIDTHS.values()] == ["examples", "uniform", "uniform", "examples"]
    assert {cls().absent for cls in WIDTHS.values()} == {"skip"}
    assert (HeteroFL().own_labels, FedRolex().own_labels, Fjord().distill) == (True, False, True)
    assert FederatedDropout().coding is None


def test_a_width_that_comes_to_the_same_units_is_listed_once() -> None:
    narrow_net = replace(SPEC, heads=2, ffn=2)
    assert [plan.label for plan in plans(Fjord(), network=narrow_net)] == ["width 1", "width 1/2"]
    assert [plan.label for plan in plans(HeteroFL(ratios=(0.75, 0.3)))] == ["width 3/4", "width 3/10"]


@every_width
@pytest.mark.parametrize("ratios", [(), (1.0, 0.0), (1.5, 1.0), (0.5, 0.5), (0.25, 0.5)], ids=str)
def test_widths_that_mean_nothing_are_refused(cls: type[Width], ratios: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match=r"^ratios must fall, each above 0 and at most 1, got \["):
        cls(ratios=ratios)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FederatedDropout(subsample=0.0), "subsample must be above 0 and at most 1, got 0.0"),
        (lambda: FederatedDropout(subsample=1.1), "subsample must be above 0 and at most 1, got 1.1"),
        (lambda: FederatedDropout(bits=3), "bits must be 0, 1, 2, 4 or 8, got 3"),
        (lambda: FedRolex(stride=0), "stride must be at least 1, got 0"),
    ],
)
def test_settings_that_mean_nothing_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        make()


@every_width
def test_devices_of_all_widths_learn_together(cls: type[Width], tmp_path: Path) -> None:
    """The weak ones have room for half the width and no more."""
    network, local = spec(2), Local(lr=0.02, steps=3, batch_size=4)
    method = cls(ratios=(1.0, 0.5))
    weak = cost(network, plans(method, network=network)[1], local, 16, 3, method).memory_bytes
    fleet = [{"name": "strong"}, {"name": "weak", "memory": weak}]
    table = write_world(tmp_path, method={"name": _name(method), "ratios": [1, 0.5]}, fleet=fleet, rounds=4, cohort=6)
    run = begin(table | {"networks": [str(tmp_path / "tiny-2")]}, tmp_path / "runs")
    losses = []
    for _ in range(4):
        run.state, rows = play(run)
        assert {row.plan for row in rows} == {"width 1", "width 1/2"}
        assert all(row.rejected is None for row in rows)
        losses.append([row.loss for row in rows])
    assert np.all(np.array(losses[-1]) < np.array(losses[0]) - 0.2)


def _name(method: Method) -> str:
    return next(name for name, cls in METHODS.items() if type(method) is cls)


# Federated dropout


def test_dropped_units_are_drawn_for_each_device_round_and_axis() -> None:
    method = FederatedDropout(scope="full", ratios=(0.5,))
    seen = {}
    for device in range(3):
        for round_ in range(3):
            (plan,) = plans(method, Turn(0, round_, 9, device))
            assert [plan] == plans(method, Turn(0, round_, 9, device))
            for axis, kept in plan.keep.items():
                assert kept.units is not None and len(kept.units) == kept.count == -(-LAYOUT.sizes[axis] // 2)
                assert list(kept.units) == sorted(set(kept.units)) and set(kept.units) <= set(range(LAYOUT.sizes[axis]))
                seen[device, round_, axis] = kept.units
    for axes in ({"h.0.ffn", "h.1.ffn"}, {"embed"}):
        drawn = [units for (_, _, axis), units in seen.items() if axis in axes]
        assert len(set(drawn)) == len(drawn) == 9 * len(axes)


def test_every_unit_is_kept_as_often_as_every_other() -> None:
    """Binomial(1000, 1/4) is within 250 +- 70 but for one time in a million."""
    counts = np.zeros(SPEC.ffn)
    for round_ in range(1000):
        (plan,) = plans(FederatedDropout(ratios=(0.25,)), Turn(0, round_, 1000, 1))
        counts[list(plan.keep[Axis("h.0.ffn")].units or ())] += 1
    assert counts.sum() == 5000 and np.all(abs(counts - 250) < 70)


CODINGS = {
    "rotated": FederatedDropout(rotate=True),
    "a share": FederatedDropout(subsample=0.4),
    "1 bit": FederatedDropout(bits=1),
    "8 bits": FederatedDropout(bits=8),
    "all": FederatedDropout(rotate=True, subsample=0.3, bits=2),
    "all in full": FederatedDropout(scope="full", rotate=True, subsample=0.7, bits=4),
}
every_coding = pytest.mark.parametrize("method", CODINGS.values(), ids=list(CODINGS))


@every_coding
def test_a_coded_change_is_right_on_average(method: FederatedDropout) -> None:
    """The mean of 500 is within five standard errors, everywhere."""
    coding = method.coding
    assert coding
    old, new = torch.full((5, 7), 3.0), 3.0 + torch.randn(5, 7, generator=torch.Generator().manual_seed(1))
    arrived = []
    for round_ in range(500):
        turn = Turn(0, round_, 500, 4)
        arrived.append(coding.decode("w", coding.encode("w", new, old, turn), old, turn))
    found = torch.stack(arrived).double()
    error = found.std(0) / math.sqrt(500)
    assert ((found.mean(0) - new).abs() <= 5 * error + 1e-6).all()
    assert (error > 1e-3).any() or method in (CODINGS["rotated"], CODINGS["8 bits"])


@every_coding
@pytest.mark.parametrize("width", [0, 2])
def test_a_coded_upload_is_as_announced_to_the_byte(method: FederatedDropout, width: int) -> None:
    plan = plans(method)[width]
    update = client.train(job(method, plan).owned(), examples(), SPEC)
    sends = method.sends(SPEC, plan, 1)
    assert {name: (tuple(p.shape), p.dtype) for name, p in update.arrays.items()} == sends
    real = sum(p.numel() * p.element_size() for p in update.arrays.values())
    assert cost(SPEC, plan, SGD, 7, 1, method).up_bytes == real
    vote = method.decode(update, job(method, plan), SPEC)
    assert {name: tuple(p.shape) for name, p in vote.arrays.items()} == {
        name: plan.shape(LAYOUT, name) for name in plan.trains
    }


@pytest.mark.parametrize(
    ("numel", "method", "sizes"),
    [
        (35, CODINGS["all"], [5, 8]),  # padded to 64, of which ceil(0.3 * 64) = 20 go, four to a byte
        (35, FederatedDropout(subsample=0.3, bits=2), [3, 8]),  # ceil(10.5) = 11
        (3000, FederatedDropout(rotate=True, subsample=0.5, bits=4), [768, 8]),  # padded to 3 * 1024
        (35, FederatedDropout(subsample=0.3), [11 * 4]),
        (35, CODINGS["1 bit"], [5, 8]),
        (35, CODINGS["8 bits"], [35, 8]),
        (35, CODINGS["a share"], [14 * 4]),
        (1, CODINGS["rotated"], [4]),
        (1, CODINGS["1 bit"], [1, 8]),
    ],
)
def test_bytes_of_a_coded_tensor_by_hand(numel: int, method: FederatedDropout, sizes: list[int]) -> None:
    assert method.coding
    sends = method.coding.sends("w", numel).values()
    assert [math.prod(shape) * dtype.itemsize for shape, dtype in sends] == sizes


def test_levels_lie_between_the_least_and_the_largest_change() -> None:
    """Each element goes to one of its two neighbours among 2^bits levels."""
    x = torch.linspace(-2, 7, 50)[torch.randperm(50, generator=torch.Generator().manual_seed(0))]
    for method in (FederatedDropout(bits=each) for each in (1, 2, 4, 8)):
        assert method.coding
        got = method.coding.decode("w", method.coding.encode("w", x, torch.zeros(50), TURN), torch.zeros(50), TURN)
        place = (got + 2) / 9 * (2**method.bits - 1)
        assert torch.allclose(place, place.round(), atol=1e-4)
        assert ((got - x).abs() <= 9 / (2**method.bits - 1) + 1e-5).all()
        assert len(place.round().unique()) == min(2**method.bits, len(place.round().unique())) > 1


def test_a_share_of_a_change_is_scaled_up_and_the_rest_is_nothing() -> None:
    coding, x = FederatedDropout(subsample=0.25).coding, torch.arange(1.0, 41.0)
    assert coding
    got = coding.decode("w", coding.encode("w", x, torch.zeros(40), TURN), torch.zeros(40), TURN)
    sent = got != 0
    assert sent.sum() == 10
    torch.testing.assert_close(got[sent], 4 * x[sent])


@pytest.mark.parametrize("numel", [1, 2, 30, 64, 1500])
def test_the_rotation_is_random_signs_and_a_hadamard_matrix(numel: int) -> None:
    """H_1 = [1], H_2n = [[H_n, H_n], [H_n, -H_n]], by Sylvester, over sqrt(n)."""
    coding, x = FederatedDropout(rotate=True).coding, torch.randn(numel, generator=torch.Generator().manual_seed(2))
    assert coding
    size, matrix = min(1024, 2 ** math.ceil(math.log2(numel))), torch.ones(1, 1)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    (sent,) = coding.encode("w", x, torch.zeros(numel), TURN).values()
    padded = F.pad(x, (0, -numel % size)).reshape(-1, size)
    signs = (sent.reshape(-1, size) @ matrix / math.sqrt(size)) / padded
    assert torch.allclose(signs[padded.abs() > 1e-3].abs(), torch.ones(()), atol=1e-3)
    assert numel < 30 or {-1.0, 1.0} == set(signs[padded.abs() > 1e-3].round().tolist())
    back = coding.decode("w", {"w": sent}, torch.zeros(numel), TURN)
    torch.testing.assert_close(back, x, rtol=1e-5, atol=1e-6)
    other = coding.encode("w", x, torch.zeros(numel), replace(TURN, round=5))["w"]
    assert numel < 30 or not torch.allclose(sent, other)


def test_rotating_first_makes_coarse_levels_finer() -> None:
    """Where one element is large, levels from the least to the largest are far apart; a rotation spreads it out."""
    x = 0.01 * torch.randn(1024, generator=torch.Generator().manual_seed(3))
    x[17] = 5.0
    errors = []
    for method in (FederatedDropout(bits=2), FederatedDropout(bits=2, rotate=True)):
        assert method.coding
        got = method.coding.decode("w", method.coding.encode("w", x, torch.zeros(1024), TURN), torch.zeros(1024), TURN)
        errors.append(float((got - x).square().mean()))
    assert errors[1] < errors[0] / 10


@every_coding
def test_a_device_that_learns_nothing_changes_nothing(method: FederatedDropout) -> None:
    """Coded or not, what arrives are the tensors that were sent out, bit for bit."""
    plan = plans(method)[1]
    work = job(method, plan)
    aside = method.remember(work, work.arrays, TORCH)
    sent, kept = method.finish(work, work.arrays, aside, TORCH)
    vote = method.decode(Update(TURN, sent, 3, 1, 0.0), work, SPEC)
    assert moved(vote.arrays, {name: work.arrays[name] for name in plan.trains}) == set() and not kept
    assert (vote.weight, vote.plan) == (3.0, plan)


@every_coding
def test_a_device_trains_the_same_whatever_it_sends(method: FederatedDropout) -> None:
    """And what arrives differs from what it has only by the coding; nothing but the coded change is sent."""
    turn, local = Turn(3, 2, 9, 5), replace(SGD, lr=0.1)
    plain = FederatedDropout(scope=method.scope)
    plan = plans(method, turn)[1]
    assert plan == plans(plain, turn)[1]
    coded = client.train(job(method, plan, local, turn).owned(), examples(), SPEC)
    exact = client.train(job(plain, plan, local, turn).owned(), examples(), SPEC)
    assert coded.loss == exact.loss and not coded.state
    arrived = method.decode(coded, job(method, plan, local, turn), SPEC).arrays
    change = {name: exact.arrays[name] - p for name, p in job(plain, plan, local, turn).arrays.items()}
    off = {name: (arrived[name] - exact.arrays[name]).norm() for name in arrived}
    if method is CODINGS["rotated"]:
        assert all(off[name] <= 1e-6 * exact.arrays[name].norm() for name in off)
    else:
        assert all(off[name] <= 6 * change[name].norm() + 1e-6 for name in off)
        assert sum(off.values()) > 0.001 * sum(each.norm() for each in change.values())


# HeteroFL


@pytest.mark.parametrize("scope", ["full", "inner"])
@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("width", [0, 1, 2])
@pytest.mark.parametrize("masked", [True, False])
def test_a_device_minimises_the_masked_loss_of_its_scaled_slice(
    scope: Any, width: int, masked: bool, chunked: bool
) -> None:
    """Logits of tokens that are no target of the device are 0, not minus infinity; the rest is its code's Scaler."""
    method, shard, ratio = HeteroFL(scope=scope, own_labels=masked), examples(vocab=9), 0.5**width
    plan = replace(plans(method)[width], levers=Levers(chunked_loss=chunked))
    got, loss = step(job(method, plan), shard)
    sizes = {"ffn": math.ceil(20 * ratio)}
    inner, outer = {"heads": math.ceil(3 * ratio)}, {"embed": math.ceil(12 * ratio), "head_dim": math.ceil(4 * ratio)}
    leaves = {
        name: p.clone().requires_grad_()
        for name, p in first(PARAMS, sizes | (inner if scope == "inner" else outer)).items()
    }
    ids, targets = first_batch(shard)
    out = logits(leaves, ids, ratio)
    if masked:
        mine = torch.isin(torch.arange(SPEC.vocab), torch.from_numpy(shard.targets))
        assert 5 < mine.sum() < 10
        out = out.masked_fill(~mine, 0.0)
    expected = F.cross_entropy(out.flatten(0, 1), targets.flatten())
    expected.backward()  # type: ignore[no-untyped-call]
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    near(got, {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None})


def test_the_scaler_can_be_left_out() -> None:
    ids, _ = first_batch(examples())
    for method, ratio in ((HeteroFL(), 0.5), (HeteroFL(scaler=False), 1.0)):
        plan = plans(method)[1]
        arrays = narrow(PARAMS, LAYOUT, plan)
        got = model.forward(plan.runs(SPEC), arrays, ids)
        torch.testing.assert_close(got, logits(arrays, ids, ratio), rtol=1e-4, atol=1e-5)
    assert plans(HeteroFL())[0].network is None


def test_the_scaler_is_by_the_width_that_is_evaluated() -> None:
    """As in their code: the widest of the fleet trains the function that is evaluated, as it is."""
    method, ratios = HeteroFL(), (1.0, 0.5, 0.25, 0.125, 0.0625)
    for place, widest in enumerate(ratios):
        fleet = Fleet([0, 1], (plans(method)[place], plans(method)[-1]), lambda group, plan: True)
        memory = method.prepare(SPEC, PARAMS, fleet, TURN)
        found = [plan.runs(SPEC).scale for plan in method.plans(SPEC, TURN, memory)]
        assert found == [min(1.0, ratio / widest) for ratio in ratios]
    rolling = FedRolex()
    memory = rolling.prepare(SPEC, PARAMS, Fleet([0], (plans(rolling)[2],), lambda group, plan: True), TURN)
    assert [plan.runs(SPEC).scale for plan in rolling.plans(SPEC, TURN, memory)] == list(ratios)


def answers(
    method: Method, labels: Sequence[Sequence[int]], widths: Sequence[int], turn: Turn
) -> list[tuple[Job, Update]]:
    """Devices that send random numbers, and that these tokens are their own."""
    found = []
    for device, (own, width) in enumerate(zip(labels, widths, strict=True)):
        plan = plans(method, replace(turn, device=device))[width]
        rng = torch.Generator().manual_seed(device)
        arrays = {name: torch.randn(plan.shape(LAYOUT, name), generator=rng) for name in sorted(plan.trains)}
        arrays["labels"] = torch.isin(torch.arange(SPEC.vocab), torch.tensor(own))
        asked = Job(replace(turn, device=device), plan, SGD, narrow(PARAMS, LAYOUT, plan), method)
        found.append((asked, Update(asked.turn, arrays, 10 * device + 1, 1, 0.0)))
    return found


@pytest.mark.parametrize(
    "method", [HeteroFL(), HeteroFL(scope="inner"), FedRolex(own_labels=True), FedRolex(own_labels=True, stride=3)]
)
def test_each_scalar_is_the_mean_over_those_who_hold_it_and_own_the_token(method: Method) -> None:
    """The counting loop of HeteroFL's server, over whole tensors; devices count alike, whatever their examples."""
    turn = Turn(0, 5, 9)
    came = answers(method, [[1, 2, 3], [2, 3, 4, 20], [2, 22]], [0, 1, 2], turn)
    after, _ = method.merge(PARAMS, SPEC, [method.decode(u, j, SPEC) for j, u in came], turn, {})
    shift = turn.round * method.stride if isinstance(method, FedRolex) else 0
    for name, row in LAYOUT.params.items():
        total, count = np.zeros(LAYOUT.shape(name)), np.zeros(LAYOUT.shape(name))
        for _, update in came:
            p = update.arrays[name].double().numpy()
            picks = [
                np.roll(np.arange(size), -(shift % size))[:kept] if kept < size else np.arange(size)
                for size, kept in zip(total.shape, p.shape, strict=True)
            ]
            if row.axes[0] == "vocab":
                own = np.flatnonzero(update.arrays["labels"].numpy())
                picks[0], p = own, p[own]
            total[np.ix_(*picks)] += p
            count[np.ix_(*picks)] += 1
        expected = np.where(count > 0, total / np.maximum(count, 1), PARAMS[name].numpy())
        np.testing.assert_allclose(after[name].numpy(), expected, rtol=1e-6, err_msg=name)
        assert count.max() == 3 and (row.axes[0] != "vocab" or count.min() == 0)


def test_a_device_sends_which_tokens_are_its_own_a_byte_each() -> None:
    method, shard = HeteroFL(), examples(vocab=9)
    plan = plans(method)[1]
    update = client.train(job(method, plan).owned(), shard, SPEC)
    assert update.arrays["labels"].nonzero().flatten().tolist() == sorted(set(shard.targets.flatten().tolist()))
    bare = replace(method, own_labels=False)
    assert "labels" not in client.train(job(bare, plan).owned(), shard, SPEC).arrays
    masked, without = (cost(SPEC, plan, SGD, 7, 1, each).up_bytes for each in (method, bare))
    assert masked == without + SPEC.vocab
    vote = method.decode(update, job(method, plan), SPEC)
    assert set(vote.arrays) == plan.trains and len(vote.arrays["head.weight"]) == update.arrays["labels"].sum()


def test_an_update_that_owns_no_token_says_nothing_about_any() -> None:
    method, turn = HeteroFL(), Turn(0, 0, 1)
    ((asked, update),) = answers(method, [[]], [1], turn)
    after, _ = method.merge(PARAMS, SPEC, [method.decode(update, asked, SPEC)], turn, {})
    assert moved(PARAMS, after) == set(PARAMS) - {"embed.tokens", "head.weight"}


@pytest.mark.parametrize("method", [HeteroFL(), HeteroFL(scope="inner"), Fjord(), Fjord(scope="full")])
@pytest.mark.parametrize("widest", [0, 1, 3])
def test_the_widest_that_some_device_trains_is_evaluated(method: Width, widest: int, tmp_path: Path) -> None:
    """A class without devices is none; the narrower network is a network of its own, also on disk."""
    found = plans(method)
    fleet = Fleet([2, 1, 2], (found[0], found[4], found[widest], None), lambda group, plan: True)
    memory = method.prepare(SPEC, PARAMS, fleet, TURN)
    network, params = method.deploy(SPEC, PARAMS, Turn(7, -1, 9), memory)
    ids, _ = first_batch(examples())
    expected = logits(narrow(PARAMS, LAYOUT, found[widest]), ids)
    torch.testing.assert_close(model.forward(network, params, ids), expected, rtol=1e-4, atol=1e-5)
    assert {name: model.layout(network).shape(name) for name in params} == {
        n: tuple(p.shape) for n, p in params.items()
    }
    assert widest or (network, params) == (SPEC, PARAMS)
    checkpoint.write(tmp_path, network, params, torch.float32, {})
    again, stored = checkpoint.load(tmp_path)
    assert again == network and moved(params, stored) == set()


def test_a_run_of_weak_devices_hands_out_a_narrow_network(tmp_path: Path) -> None:
    network, local = spec(3), Local(lr=0.02, steps=3, batch_size=4)
    half = cost(network, plans(HeteroFL(), network=network)[1], local, 16, 3, HeteroFL()).memory_bytes
    table = write_world(tmp_path, method={"name": "heterofl"}, fleet=[{"name": "weak", "memory": half}], rounds=1)
    run = begin(table | {"networks": [str(tmp_path / "tiny-3")]}, tmp_path / "runs")
    summary = run.play()
    assert [each["plan"] for each in summary["classes"]] == ["width 1/2"]
    handed, params = checkpoint.load(run.folder / "model")
    assert (handed.embed, handed.heads, handed.head_dim, handed.ffn, handed.scale) == (8, 2, 4, 32, 1.0)
    assert torch.equal(params["embed.tokens"], run.state.params["embed.tokens"][:, :8])


# FedRolex


@pytest.mark.parametrize("stride", [1, 5])
@pytest.mark.parametrize("scope", ["full", "inner"])
def test_the_window_rolls_by_its_stride_around_every_axis(stride: int, scope: Any) -> None:
    method = FedRolex(stride=stride, scope=scope)
    held = {axis: set[int]() for axis in LAYOUT.sizes}
    for round_ in range(20):
        for device in range(2):
            plan = plans(method, Turn(0, round_, 20, device))[2]
            for axis, kept in plan.keep.items():
                size = LAYOUT.sizes[axis]
                window = np.roll(np.arange(size), -((round_ * stride) % size))[: -(-size // 4)]
                assert kept.indices(size).tolist() == window.tolist()
                held[axis] |= set(window.tolist())
    assert all(held[axis] == set(range(LAYOUT.sizes[axis])) for axis in plan.keep)
    assert method.deploy(
        SPEC, PARAMS, TURN, method.prepare(SPEC, PARAMS, Fleet([0], (plan,), lambda g, p: True), TURN)
    ) == (
        SPEC,
        PARAMS,
    )


def test_fedrolex_in_its_first_round_is_heterofl_without_labels() -> None:
    shard = examples()
    for width in range(5):
        plan = plans(FedRolex())[width]
        assert narrow(PARAMS, LAYOUT, plan).keys() == set(PARAMS)
        rolled, _ = step(job(FedRolex(), plan), shard)
        fixed, _ = step(job(HeteroFL(own_labels=False), plans(HeteroFL())[width]), shard)
        assert bits(rolled) == bits(fixed)


# FjORD


class Forced(Ops):
    """Draws the network that it is told, and remembers what it would have drawn."""

    def __init__(self, index: int) -> None:
        super().__init__()
        self.index, self.drew = index, list[int]()

    def drawn(self, networks: Sequence[T], index: int) -> Iterator[T]:
        self.drew.append(index)
        yield networks[self.index]


def cut_sizes(width: int) -> dict[str, int]:
    """Heads and feed-forward units of the width 2^-width."""
    return {"heads": math.ceil(3 * 0.5**width), "ffn": math.ceil(20 * 0.5**width)}


def soft_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(p_teacher || p_student), mean over tokens."""
    goal, logs = teacher.detach().log_softmax(-1), student.log_softmax(-1)
    return (goal.exp() * (goal - logs)).sum(-1).mean()


@pytest.mark.parametrize(
    "lever", [Levers(), Levers(fused_update=True, recompute=True, micro_batch=3, chunked_loss=True)]
)
@pytest.mark.parametrize("distill", [True, False])
@pytest.mark.parametrize(("own", "drawn"), [(0, 0), (0, 1), (0, 4), (2, 0), (2, 1)])
def test_a_step_of_ordered_dropout_by_autograd(own: int, drawn: int, distill: bool, lever: Levers) -> None:
    """One step along CE(whole) + KL(whole || drawn), or along CE(drawn); what is beyond the slice gets no gradient."""
    method, shard = Fjord(distill=distill), examples()
    got, loss = step(job(method, replace(plans(method)[own], levers=lever)), shard, Forced(drawn))
    leaves = {name: p.clone().requires_grad_() for name, p in first(PARAMS, cut_sizes(own)).items()}
    ids, targets = first_batch(shard)
    slice_ = logits(first(leaves, cut_sizes(own + drawn)), ids)
    whole = logits(leaves, ids)
    hard = F.cross_entropy((whole if distill else slice_).flatten(0, 1), targets.flatten())
    total = hard + soft_loss(slice_, whole) if distill else hard
    total.backward()  # type: ignore[no-untyped-call]
    assert loss == pytest.approx(hard.item(), rel=1e-5)
    near(got, {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None})


@dataclass(frozen=True)
class Ordered(Method):
    """Ordered dropout where part of the network is frozen: for the client, not a method of anybody's."""

    distill: bool = True

    def objective(self, job: Job) -> Objective:
        sizes = {axis: -(-LAYOUT.sizes[axis] // 2) for axis in LAYOUT.sizes if axis.endswith((".heads", ".ffn"))}
        return Objective(widths=({}, sizes), distill=self.distill)


FROZEN = {
    "prefix": lambda name: not name.startswith(("embed.", "h.0.")),
    "above": lambda name: name.startswith("h.0.attn"),
    "head alone": lambda name: name == "head.weight",
}


@pytest.mark.parametrize("lever", [Levers(), Levers(fused_update=True, recompute=True, micro_batch=1)])
@pytest.mark.parametrize("packed_bits", [32, 8, 16])
@pytest.mark.parametrize("trained", FROZEN.values(), ids=list(FROZEN))
def test_frozen_parts_are_cut_as_well(
    trained: Any, packed_bits: Any, lever: Levers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Packed or not; and a prefix is then not cached, since each width has its own."""
    monkeypatch.setattr(packed, "SMALLEST", 1)
    names = frozenset(LAYOUT.params)
    plan = Plan(names, frozenset(filter(trained, names)), levers=replace(lever, frozen_bits=packed_bits))
    got, loss = step(job(Ordered(), plan), examples(), Forced(1))
    held = {}
    for name, p in PARAMS.items():
        if name in plan.trains:
            held[name] = p.clone().requires_grad_()
        else:
            kept: Any = TORCH.hold(PARAMS, name, 32 if name.endswith("bias") else packed_bits)
            held[name] = kept.unpack() if isinstance(kept, packed.Packed) else kept
    ids, targets = first_batch(examples())
    whole = logits(held, ids)
    hard = F.cross_entropy(whole.flatten(0, 1), targets.flatten())
    total = hard + soft_loss(logits(first(held, cut_sizes(1)), ids), whole)
    wanted = dict(zip(plan.trains, torch.autograd.grad(total, [held[name] for name in plan.trains]), strict=True))
    assert loss == pytest.approx(hard.item(), rel=1e-5)
    near(got, wanted)
    cached = replace(plan, levers=replace(plan.levers, prefix_cache="ram"))
    assert bits(step(job(Ordered(), cached), examples(), Forced(1))[0]) == bits(got)
    price, same = (cost(SPEC, each, SGD, 7, 3, Ordered()) for each in (plan, cached))
    assert (price.flops, price.memory) == (same.flops, same.memory)


EXACT = {
    "chunked": Levers(chunked_loss=True),
    "fused": Levers(fused_update=True),
    "micro 3": Levers(micro_batch=3),
    "recompute": Levers(recompute=True),
    "all": Levers(chunked_loss=True, fused_update=True, prefix_cache="disk", micro_batch=1, recompute=True),
}
OBJECTIVES: dict[str, Method] = {
    "fjord": Fjord(),
    "fjord in full": Fjord(scope="full"),
    "fjord alone": Fjord(distill=False),
    "heterofl": HeteroFL(),
    "fedrolex": FedRolex(scope="inner"),
    "federated dropout": CODINGS["all"],
}


@pytest.mark.parametrize("lever", EXACT.values(), ids=list(EXACT))
@pytest.mark.parametrize("method", OBJECTIVES.values(), ids=list(OBJECTIVES))
def test_exact_levers_leave_every_objective_as_it_is(method: Method, lever: Levers) -> None:
    """Six clipped steps with momentum; the same widths are drawn."""
    local = Local(lr=0.1, optimizer="sgd", momentum=0.9, steps=6, batch_size=4, clip=0.5)
    for plan in plans(method)[:3:2]:
        plain = client.train(job(method, plan, local).owned(), examples(), SPEC)
        eased = client.train(job(method, replace(plan, levers=lever), local).owned(), examples(), SPEC)
        assert eased.loss == pytest.approx(plain.loss, rel=1e-5)
        got, wanted = (method.decode(u, job(method, plan, local), SPEC).arrays for u in (eased, plain))
        if not (isinstance(method, FederatedDropout)):  # rounding at random may take another way
            near(got, wanted, atol=1e-5)
        moved_by = sum((wanted[name] - p).norm() for name, p in job(method, plan).arrays.items() if "head" not in name)
        assert moved_by > 0.01


def test_a_device_draws_among_the_widths_that_it_holds() -> None:
    method = Fjord(ratios=(1.0, 0.6, 0.3))
    for own, plan in enumerate(plans(method)):
        widths = method.objective(job(method, plan)).widths
        assert [{str(axis): n for axis, n in each.items()} for each in widths] == [
            {f"h.{i}.{axis}": math.ceil(ratio * size) for axis, size in (("heads", 3), ("ffn", 20)) for i in range(2)}
            for ratio in (1.0, 0.6, 0.3)[own:]
        ]
        assert method.objective(job(method, plan)).distill == (own < 2)  # the narrowest would teach itself
    assert Axis("embed") in next(iter(Fjord(scope="full").objective(job(Fjord(), plans(Fjord())[0])).widths))


def test_each_step_of_each_device_draws_anew_and_evenly() -> None:
    """Of 180 draws among three, each comes 60 +- 32 times but for one time in a million."""
    method, local = Fjord(ratios=(1.0, 0.5, 0.25), distill=False), replace(SGD, lr=1e-3, steps=60, batch_size=1)
    drew = {}
    for device, round_ in ((0, 0), (1, 0), (0, 1)):
        ops, turn = Forced(2), Turn(0, round_, 2, device)
        client.train(job(method, plans(method)[0], local, turn).owned(), examples(4, 2), SPEC, ops)
        drew[device, round_] = ops.drew
    assert len({tuple(each) for each in drew.values()}) == 3
    counts = np.bincount(np.concatenate(list(drew.values())), minlength=3)
    assert counts.sum() == 180 and np.all(abs(counts - 60) < 32)


def test_the_overlap_mean_is_the_nested_rule() -> None:
    """For p from large to small, the slice of p becomes the mean, by examples, over devices with p_max >= p."""
    method, turn, widths = Fjord(), Turn(0, 0, 1), [2, 1, 1, 3, 2]
    came = answers(replace(HeteroFL(), own_labels=False), [[]] * 5, [0] * 5, turn)  # only for their shapes
    came = answers(method, [[]] * 5, widths, turn)
    for _, update in came:
        del update.arrays["labels"]
    after, _ = method.merge(PARAMS, SPEC, [method.decode(u, j, SPEC) for j, u in came], turn, {})
    for name in LAYOUT.params:
        nested = PARAMS[name].double()
        for p in sorted(set(widths)):
            able = [u for (_, u), width in zip(came, widths, strict=True) if width <= p]
            part = next(u.arrays[name] for (_, u), width in zip(came, widths, strict=True) if width == p)
            inside = tuple(slice(size) for size in part.shape)
            mean = sum(u.examples * u.arrays[name][inside].double() for u in able) / sum(u.examples for u in able)
            nested[inside] = mean
        torch.testing.assert_close(after[name].double(), nested, rtol=1e-6, atol=1e-7)


# Prices


WIDE = Spec(2, embed=48, heads=4, head_dim=12, ffn=192, vocab=70, positions=64)
PRICED = {
    "none": Levers(),
    "chunked": EXACT["chunked"],
    "fused": EXACT["fused"],
    "micro 3": EXACT["micro 3"],
    "recompute": EXACT["recompute"],
    "all": EXACT["all"],
}


@pytest.mark.parametrize("lever", PRICED.values(), ids=list(PRICED))
@pytest.mark.parametrize("settings", [{}, {"distill": False}, {"scope": "full"}], ids=str)
def test_the_price_is_that_of_the_dearest_width(settings: Any, lever: Levers, monkeypatch: pytest.MonkeyPatch) -> None:
    """No width takes more, and the dearest takes just that: all but half a percent."""
    method = Fjord(ratios=(1.0, 0.5, 0.125), **settings)
    own, batch, tokens = (0, 4, 32) if lever.micro_batch else (1, 1, 8)
    local = Local(lr=0.01, batch_size=batch, steps=2, clip=float(lever.fused_update))
    plan = replace(plans(method, network=WIDE)[own], levers=lever)
    price = cost(WIDE, plan, local, tokens, 2, method).memory_bytes
    real = []
    for index in range(3 - own):
        monkeypatch.setattr(Ops, "drawn", lambda self, networks, _, index=index: iter([networks[index]]))
        real.append(sum(measure.watch(WIDE, plan, local, tokens, method).peak()[0].values()))
    assert max(real) == pytest.approx(price, rel=0.005)


def test_the_gradient_of_a_cut_tensor_is_made_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where tensors are all that counts, half of the width therefore takes more than all of it."""
    network, local = replace(WIDE, vocab=3000), Local(optimizer="sgd", batch_size=1, steps=2)
    method = Fjord(scope="full", ratios=(1.0, 0.5), distill=False)
    plan = replace(plans(method, network=network)[0], levers=Levers(chunked_loss=True))
    real = []
    for index in range(2):
        monkeypatch.setattr(Ops, "drawn", lambda self, networks, _, index=index: iter([networks[index]]))
        real.append(sum(measure.watch(network, plan, local, 2, method).peak()[0].values()))
    assert real[1] > 1.05 * real[0]
    assert cost(network, plan, local, 2, 2, method).memory_bytes == pytest.approx(real[1], rel=0.005)


def test_a_step_takes_the_operations_of_the_whole_and_of_a_drawn_width_on_average() -> None:
    """And those of the whole one's head, which predicts once more to teach: 2 V D per token."""
    local, tokens, steps = Local(batch_size=4, steps=3), 32, 3

    def flops(method: Fjord) -> int:
        return cost(WIDE, plans(method, network=WIDE)[0], local, tokens, steps, method).flops

    ratios = (1.0, 0.5, 0.25)
    single = [flops(Fjord(ratios=(ratio,), distill=False)) for ratio in ratios]
    assert flops(Fjord(ratios=ratios, distill=False)) == pytest.approx(sum(single) / 3, abs=1)
    teaching = steps * 4 * tokens * 2 * WIDE.vocab * WIDE.embed
    assert flops(Fjord(ratios=ratios)) == pytest.approx(single[0] + sum(single) / 3 + teaching, abs=1)


def test_a_first_step_has_no_states_yet_whatever_it_draws() -> None:
    """A price of one step is that of the dearest first step, not of a first and others after it."""
    method, local = Fjord(distill=False), Local(batch_size=4, steps=1)
    both = cost(WIDE, plans(method, network=WIDE)[0], local, 32, 1, method)
    widest = Fjord(distill=False, ratios=(1.0,))
    assert both.memory_bytes == cost(WIDE, plans(widest, network=WIDE)[0], local, 32, 1, widest).memory_bytes


@every_coding
@pytest.mark.parametrize("levers", [Levers(fused_update=True, recompute=True), Levers()])
def test_the_memory_of_coding_is_in_the_price(method: FederatedDropout, levers: Levers) -> None:
    """Where a batch is one token and gradients come one block at a time, coding the largest tensor is the peak."""
    network, local = replace(WIDE, vocab=3000), Local(optimizer="sgd", batch_size=1, steps=2)
    plan = replace(plans(method, network=network)[1], levers=levers)
    price = cost(network, plan, local, 1, 2, method).memory_bytes
    measured = sum(measure.watch(network, plan, local, 1, method).peak()[0].values())
    assert measured == pytest.approx(price, rel=0.005)
    plain = FederatedDropout(scope=method.scope)
    copies = 4 * sum(math.prod(plan.shape(model.layout(network), name)) for name in plan.trains)
    extra = price - cost(network, plan, local, 1, 2, plain).memory_bytes
    assert extra > copies if levers.fused_update else extra >= copies
