"""Fed2: what a group sees and learns from, which groups a device holds, and the paired average, against the paper."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support import (
    CLASSES,
    LOCAL,
    STEPS,
    TURN,
    WINDOW,
    Devices,
    begin,
    moved,
    play,
    spec,
    suited_task,
    weights,
    write_world,
)
from torch import Tensor

from lamina import checkpoint, client, measure, model
from lamina.cost import cost
from lamina.data.task import Pairs
from lamina.errors import UserError
from lamina.export import export
from lamina.job import Job, Local, Update
from lamina.layout import Axis, Params
from lamina.levers import Levers
from lamina.methods.groups import Fed2
from lamina.plan import Keep, Plan, narrow
from lamina.planner import Fleet
from lamina.spec import Groups, Spec, spec_from_json

GPT = Spec(3, embed=16, heads=4, head_dim=8, ffn=30, vocab=23, positions=12, labels=7, pool="last")
NETWORKS = {
    "gpt": GPT,
    "bert": replace(
        GPT, heads=5, head_dim=4, pool="first", pooler="tanh", causal=False, post_norm=True, final_norm=False,
        embed_norm=True, types=2, act="gelu", head_bias=True,
    ),
    "vit": replace(
        GPT, blocks=4, heads=3, vocab=0, positions=17, labels=10, pool="first_mean", causal=False, patch=2, image=8,
        leads=1, registers=2, layer_scale=True, head_bias=True,
    ),
    "llama": replace(
        GPT, heads=6, kv_heads=3, positions=0, labels=5, norm="rms", gated=True, act="silu", biases=("attn.q",),
        rotary=1e4, qk_norm=True,
    ),
}  # fmt: skip
every_network = pytest.mark.parametrize("network", NETWORKS.values(), ids=list(NETWORKS))
METHOD = Fed2(shared=0.4)
MIX = np.array([[9, 0, 1, 0, 0, 0, 4], [1, 1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 3, 0], [0, 2, 2, 2, 5, 0, 0]])
"""Four devices; groups of GPT are classes 0 and 1, 2 and 3, 4 and 5, and 6."""


def inputs(network: Spec, count: int = 3) -> Tensor:
    """Images or ids."""
    rng = torch.Generator().manual_seed(0)
    if network.patch:
        return torch.randn(count, network.channels, network.image, network.image, generator=rng)
    return torch.randint(network.vocab, (count, 9), generator=rng)


def shares(size: int, count: int) -> list[list[int]]:
    """Neighbours, as equal as can be."""
    return [part.tolist() for part in np.array_split(np.arange(size), count)]


def of_group(network: Spec, params: Params, first: int, count: int, group: int) -> tuple[Spec, Params, list[int]]:
    """A plain network with the heads, units and classes of one group alone; the norms and the trunk are all there."""
    heads, ffn = network.kv_heads or network.heads, network.ffn
    classes = shares(network.labels, count)[group]
    keep = {Axis("labels"): Keep(len(classes), units=tuple(classes))}
    for block in range(first, network.blocks):
        for part, size in (("heads", heads), ("ffn", ffn)):
            units = tuple(shares(size, count)[group])
            keep[Axis(f"h.{block}.{part}")] = Keep(len(units), units=units)
    names = frozenset(params)
    return network, narrow(params, model.layout(network), Plan(names, names, keep)), classes


def prepared(network: Spec = GPT, method: Fed2 = METHOD, mix: np.ndarray | None = MIX) -> tuple[Spec, Params]:
    """The network with groups, and the method's memory."""
    adapted = method.adapt(network)
    devices = 0 if mix is None else len(mix)
    fleet = Fleet([0] * devices, (None,), lambda group, plan: True, mix)
    return adapted, method.prepare(adapted, {}, fleet, TURN)


@every_network
def test_the_logits_of_a_group_are_those_of_a_network_of_its_own(network: Spec) -> None:
    """Of the blocks below, and of no other group's heads, units or classes."""
    adapted, x = METHOD.adapt(network), inputs(network)
    assert adapted.groups
    params = weights(adapted)
    logits = model.forward(adapted, params, x)[:, 0]
    assert logits.shape == (3, network.labels)
    first, count = adapted.groups.first_block, adapted.groups.count
    assert 0 < first < network.blocks and count == min(4, network.kv_heads or network.heads)
    for group in range(count):
        alone, cut, classes = of_group(network, params, first, count, group)
        expected = model.forward(alone, cut, x)[:, 0]
        torch.testing.assert_close(logits[:, classes], expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(logits, model.forward(network, params, x)[:, 0], atol=1e-3)


@every_network
def test_the_logit_of_a_class_has_no_gradient_in_other_groups(network: Spec) -> None:
    adapted = METHOD.adapt(network)
    assert adapted.groups
    layout, plans = model.layout(adapted), list(METHOD.plans(adapted, TURN, {}))
    for group in range(adapted.groups.count):
        params = {name: p.requires_grad_() for name, p in weights(adapted).items()}
        logits = model.forward(adapted, params, inputs(network))[:, 0]
        logits[:, shares(network.labels, adapted.groups.count)[group]].pow(2).sum().backward()  # type: ignore[no-untyped-call]
        own = METHOD._plan(adapted, (group,))
        assert own.keep.keys() == plans[-1].keep.keys()
        for name, p in params.items():
            assert p.grad is not None
            index = own.index(layout, name)
            if index is None:
                assert p.grad.any()
                continue
            inside = torch.zeros(p.shape, dtype=torch.bool)
            inside[index] = True
            assert not p.grad[~inside].any(), name
            assert p.grad[inside].any() or "k.bias" in name, name


def test_a_device_moves_its_own_groups_alone_and_others_logits_are_zero() -> None:
    adapted, params = METHOD.adapt(GPT), weights(METHOD.adapt(GPT))
    plan = METHOD._plan(adapted, (1, 3))
    network = plan.runs(adapted)
    arrays = METHOD.encode(params, adapted, plan, TURN, {})
    logits = model.forward(network, arrays, inputs(GPT))[:, 0]
    assert not logits[:, [0, 1, 4, 5]].any()
    whole = model.forward(adapted, params, inputs(GPT))[:, 0]
    torch.testing.assert_close(logits[:, [2, 3, 6]], whole[:, [2, 3, 6]])
    shard = Pairs(inputs(GPT, 8).numpy(), np.arange(8)[:, None] % 7)
    job = Job(TURN, plan, LOCAL, arrays, METHOD)
    update = client.train(job.owned(), shard, adapted)
    after, _ = METHOD.merge(params, adapted, [METHOD.decode(update, job, adapted)], TURN, {})
    changed = after["head.weight"] != params["head.weight"]
    assert changed.any(1).tolist() == [False, False, True, True, False, False, True]
    assert (after["h.1.ffn.up.weight"] != params["h.1.ffn.up.weight"]).any(1).nonzero().flatten().tolist() == [
        *range(8, 16), *range(23, 30),
    ]  # fmt: skip
    assert (after["h.2.attn.o.weight"] != params["h.2.attn.o.weight"]).any(2).any(0).tolist() == [0, 1, 0, 1]
    assert moved(params, after) == set(params)  # what is in no group learns from all examples


def test_the_loss_of_a_device_counts_examples_of_all_classes() -> None:
    """Where the class of an example is not held, its logit is 0 like those of all that are not."""
    adapted, params = METHOD.adapt(GPT), weights(METHOD.adapt(GPT))
    plan = METHOD._plan(adapted, (1,))
    arrays = METHOD.encode(params, adapted, plan, TURN, {})
    x, classes = inputs(GPT, 4), torch.tensor([2, 3, 0, 6])
    whole = model.forward(adapted, params, x)[:, 0]
    logits = torch.zeros_like(whole)
    logits[:, [2, 3]] = whole[:, [2, 3]]
    job = Job(TURN, plan, Local(steps=1, batch_size=4), arrays, METHOD)
    update = client.train(job.owned(), Pairs(x.numpy(), classes[:, None].numpy()), adapted)
    assert update.loss == pytest.approx(F.cross_entropy(logits, classes).item(), rel=1e-5)


def test_groups_are_averaged_with_their_pairs() -> None:
    """The paper's average: of each group over the nodes that have it, and of the shared part over all nodes.

    In numpy, group by group and node by node, from the new values of whole networks.
    """
    adapted, kept = prepared()
    assert adapted.groups
    layout, before = model.layout(adapted), {n: p.double().numpy() for n, p in weights(adapted).items()}
    rng, examples, votes, nodes = np.random.default_rng(0), [14, 7, 3, 11], [], []
    for device, held in enumerate([(0, 1, 3), (0, 1, 2, 3), (2,), (1, 2)]):
        turn = replace(TURN, device=device)
        plan = next(each for each in METHOD.plans(adapted, turn, kept) if each.label == f"{len(held)} of 4 groups")
        assert (plan.runs(adapted).groups or adapted.groups).held == held
        new = {name: (p + rng.standard_normal(p.shape)).astype(np.float32) for name, p in before.items()}
        nodes.append((held, new, examples[device]))
        arrays = narrow({name: torch.from_numpy(p) for name, p in new.items()}, layout, plan)
        job = Job(turn, plan, LOCAL, arrays, METHOD)
        votes.append(METHOD.decode(Update(turn, arrays, examples[device], STEPS, 0.0), job, adapted))
    after, memory = METHOD.merge(weights(adapted), adapted, votes, TURN, kept)
    assert memory is kept
    grouped = {Axis(f"h.{i}.{part}"): size for i in (1, 2) for part, size in (("heads", 4), ("ffn", 30))}
    grouped[Axis("labels")] = 7
    for name, row in layout.params.items():
        expected: np.ndarray = np.zeros_like(before[name])
        place = next((i for i, axis in enumerate(row.axes) if axis in grouped), None)
        parts = [range(1)] if place is None else shares(grouped[row.axes[place]], 4)
        for group, units in enumerate(parts):
            having = [(new, n) for held, new, n in nodes if place is None or group in held]
            mean = np.average([new[name].astype(float) for new, _ in having], axis=0, weights=[n for _, n in having])
            cut = (slice(None),) * (place or 0) + ((list(units),) if place is not None else ())
            expected[cut] = mean[cut]
        np.testing.assert_allclose(after[name].numpy(), expected, rtol=1e-5, atol=1e-6, err_msg=name)


def test_a_device_holds_the_groups_of_its_classes_those_with_most_examples_first() -> None:
    adapted, kept = prepared()
    assert kept["examples"].tolist() == [[9, 1, 0, 4], [2, 2, 2, 1], [0, 0, 3, 0], [2, 4, 5, 0]]
    found = []
    for device in range(4):
        plans = METHOD.plans(adapted, replace(TURN, device=device), kept)
        found.append([(plan.runs(adapted).groups or adapted.groups).held for plan in plans])  # type: ignore[union-attr]
    assert found == [
        [(0, 1, 3), (0, 3), (0,)],
        [(0, 1, 2, 3), (0, 1, 2), (0, 1), (0,)],
        [(2,)],
        [(0, 1, 2), (1, 2), (2,)],
    ]
    labels = [f"{count} of 4 groups" for count in (4, 3, 2, 1)]
    assert [plan.label for plan in METHOD.plans(adapted, replace(TURN, device=-1), kept)] == labels
    adapted, nothing = prepared(mix=None)
    assert nothing == {} and [plan.label for plan in METHOD.plans(adapted, TURN, nothing)] == labels


@pytest.mark.parametrize(
    ("settings", "groups"),
    [
        ({}, Groups(4, 1, (0, 1, 2, 3))),
        ({"groups": 3, "shared": 0.0}, Groups(3, 0, (0, 1, 2))),
        ({"groups": 99, "shared": 0.99}, Groups(4, 2, (0, 1, 2, 3))),  # as many as heads; the last block is split
    ],
    ids=str,
)
def test_how_many_groups_and_from_where(settings: dict[str, Any], groups: Groups) -> None:
    adapted = Fed2(**settings).adapt(GPT)
    assert adapted.groups == groups
    assert model.layout(adapted) == model.layout(GPT)  # all tensors are those of the pretrained network
    assert spec_from_json(json.loads(json.dumps(asdict(adapted)))) == adapted
    assert Fed2().adapt(replace(GPT, labels=3)).groups == Groups(3, 1, (0, 1, 2))
    assert Fed2().adapt(replace(GPT, heads=6, kv_heads=2)).groups == Groups(2, 1, (0, 1))


def test_parts_are_neighbours_and_all_there_is() -> None:
    assert [list(part) for part in Groups(3, 0, (0, 1, 2)).parts(7)] == [[0, 1, 2], [3, 4], [5, 6]]
    assert [list(part) for part in Groups(4, 0, (1, 3)).parts(10)] == [[3, 4, 5], [8, 9]]


LEVERS = {
    "none": Levers(),
    "fused, recompute": Levers(fused_update=True, recompute=True),
    "chunked, micro": Levers(chunked_loss=True, micro_batch=2),
}


@every_network
@pytest.mark.parametrize("levers", LEVERS.values(), ids=list(LEVERS))
def test_the_price_is_what_is_measured_in_every_family(network: Spec, levers: Levers) -> None:
    adapted = METHOD.adapt(network)
    for plan in METHOD.plans(adapted, TURN, {}):
        leaner = replace(plan, levers=levers)
        price = cost(adapted, leaner, LOCAL, 9, STEPS, METHOD)
        peak = measure.watch(adapted, leaner, replace(LOCAL, steps=2), 9, METHOD).peak()[0]
        assert sum(peak.values()) == pytest.approx(price.memory_bytes, rel=0.005)


def test_groups_compute_as_much_as_the_network_uncut_and_fewer_less() -> None:
    """All products are of the same weights; the head is written as one matrix that sees all streams."""
    adapted, names = METHOD.adapt(GPT), frozenset(model.layout(GPT).params)
    plain = cost(GPT, Plan(names, names), LOCAL, 9, STEPS).flops
    flops = [cost(adapted, plan, LOCAL, 9, STEPS, METHOD).flops for plan in METHOD.plans(adapted, TURN, {})]
    tokens = STEPS * LOCAL.batch_size
    pools = 2 * 2 * tokens * 9 * 16 * 3  # forward and backward, of three more streams
    head = 3 * 2 * tokens * 7 * 16 * 3
    assert flops[0] == plain + pools + head
    assert flops == sorted(flops, reverse=True) and len(set(flops)) == 4


@pytest.mark.parametrize("settings", [{"groups": 1}, {"shared": 1.0}, {"shared": -0.1}], ids=str)
def test_splits_that_mean_nothing_are_refused(settings: dict[str, Any]) -> None:
    (key,) = settings
    with pytest.raises(ValueError, match=f"^{key} must .*got {settings[key]}"):
        Fed2(**settings)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Texts of five classes on tiny-3; a class of devices without limits and one that fits one group of two."""
    folder = tmp_path_factory.mktemp("groups")
    table = write_world(folder, networks=[str(folder / "tiny-3")], method={"name": "fed2"})
    adapted = Fed2().adapt(replace(spec(3), labels=len(CLASSES), pool="last"))
    *_, cheapest = Fed2().plans(adapted, TURN, {})
    weak = cost(adapted, cheapest, LOCAL, WINDOW, STEPS, Fed2()).memory_bytes
    fleet = [{"name": "strong"}, {"name": "weak", "memory": weak}]
    return table | {"task": suited_task(Fed2(), table), "fleet": fleet, "cohort": 6}


def test_language_is_refused(world: dict[str, Any], tmp_path: Path) -> None:
    language = write_world(tmp_path, method={"name": "fed2"}, fleet=[{"name": "all"}])
    with pytest.raises(UserError, match=r"^method 'fed2' is for classification only; the task is language$"):
        begin(language, tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


def test_weak_devices_hold_the_group_of_which_they_have_most(world: dict[str, Any], tmp_path: Path) -> None:
    run = begin(world, tmp_path)
    devices = Devices(run)
    state, rows = play(run, devices)
    assert [row.rejected for row in rows] == [None] * 6
    names = [run.outlook.groups[row.group].name for row in rows]
    assert sorted({(name, row.plan) for name, row in zip(names, rows, strict=True)}) == [
        ("strong", "2 of 2 groups"),
        ("weak", "1 of 2 groups"),
    ]
    for job, row in zip(devices.jobs, rows, strict=True):
        if row.group:
            counts = run.task.mix[row.device]
            most = int(counts[3:].sum() > counts[:3].sum())
            assert job.plan.keep[Axis("labels")].units == ((0, 1, 2), (3, 4))[most]
    assert moved(run.state.params, state.params) == set(state.params)


def test_it_learns_and_what_it_leaves_says_what_it_is(world: dict[str, Any], tmp_path: Path) -> None:
    local = {"lr": 1e-2, "steps": 5, "batch_size": 8}
    run = begin(world | {"local": local, "rounds": 8, "fleet": [{"name": "all"}]}, tmp_path)
    summary = run.play()
    assert summary["accuracy"]["before"]["weighted"] < 0.5 < summary["accuracy"]["after"]["weighted"]
    folder = run.folder / "model"
    described, params = checkpoint.load_whole(folder)
    assert described == run.outlook.chosen.spec and described.groups
    assert moved(params, run.state.params) == set()
    shard = run.task.test[0]
    ids, targets = shard.batch(np.arange(len(shard)))
    with torch.no_grad():
        logits = model.forward(described, params, model.batch(described, ids))
    right = int((logits.argmax(-1).numpy() == targets).sum())
    assert right == (run.after.correct[0] if run.after else math.nan)
    with pytest.raises(UserError, match=r"^upper blocks in groups, as those of .*model, are in no class of transf"):
        export(run.folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()
