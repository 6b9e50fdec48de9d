"""What is special about methods on networks that are not GPT-2's: heads that share, exits, poolers, classes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, cast

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from specs import SPECS, TOKENS
from support import LOCAL, STEPS, weights
from test_methods_families import shard
from torch import Tensor

from lamina import client, measure, model, packed
from lamina.cost import cost
from lamina.job import Job, Turn
from lamina.kernels import Mix
from lamina.layout import Axis, Params
from lamina.methods import METHODS, Method
from lamina.methods.blocks import Caff, CocoFl
from lamina.methods.depth import DepthFL, first_blocks
from lamina.methods.forward import Mezo, Spry
from lamina.methods.growth import ProgFed, Slt
from lamina.methods.lowrank import FedHM, Flanc
from lamina.methods.width import FederatedDropout, FedRolex, Fjord, HeteroFL, Width
from lamina.model import Batch, Output
from lamina.ops import TORCH
from lamina.plan import Keep, Plan, narrow
from lamina.planner import Fleet
from lamina.spec import Spec, as_matrix

TURN = Turn(0, 0, 3, 0)
every_family = pytest.mark.parametrize("family", SPECS)


def given(spec: Spec) -> Batch:
    """Four examples."""
    return model.batch(spec, shard(spec, 4, 7).inputs)


def forward(spec: Spec, params: Mapping[str, Tensor]) -> Tensor:
    return model.forward(spec, params, given(spec))


def equipped(method: Method, spec: Spec) -> tuple[Spec, Params, Params]:
    """The adapted network, its tensors, and the pretrained ones."""
    adapted, pretrained = method.adapt(spec), weights(spec)
    common = {name: pretrained[name] for name in model.layout(adapted).params.keys() & pretrained.keys()}
    return adapted, method.equip(adapted, weights(adapted) | common, pretrained), pretrained


def fleet(plan: Plan | None) -> Fleet:
    """Of one device that has this plan and can train anything."""
    return Fleet([0], (plan,), lambda group, plan: True)


WIDTHS: list[Any] = [HeteroFL(scaler=False), HeteroFL(scope="inner", scaler=False), Fjord(), Fjord(scope="full")]


@every_family
@pytest.mark.parametrize("method", WIDTHS, ids=["heterofl", "heterofl inside", "fjord", "fjord in full"])
def test_the_narrow_network_that_is_handed_out_is_that_of_the_widest_device(method: Any, family: str) -> None:
    """At every width: its sizes are those of its tensors, and it predicts what a device's network does."""
    spec, params = SPECS[family], weights(SPECS[family])
    plans = list(method.plans(spec, TURN, {}))
    assert len(plans) > 2
    for plan in plans[1:]:
        memory = method.prepare(spec, params, fleet(plan), TURN)
        narrower, handed_out = method.deploy(spec, params, TURN, memory)
        shapes = {name: tuple(p.shape) for name, p in handed_out.items()}
        layout = model.layout(narrower)
        assert shapes == {name: layout.shape(name) for name in layout.params}
        assert narrower.heads * spec.kv_heads == narrower.kv_heads * spec.heads  # as many queries share a key
        of_device = forward(spec, narrow(params, model.layout(spec), plan))
        assert torch.allclose(forward(narrower, handed_out), of_device, atol=1e-6)


@every_family
def test_heads_are_cut_whole_where_their_dimensions_belong_together(family: str) -> None:
    """And otherwise inside, by the methods that do."""
    spec = SPECS[family]
    together = bool(spec.rotary or spec.qk_norm)
    for method in (HeteroFL(), FedRolex()):
        *_, plan = method.plans(spec, TURN, {})
        assert (Axis("head_dim") in plan.keep) != together
        assert (Axis("h.0.heads") in plan.keep) == together
        assert Axis("queries") not in plan.keep
        assert (Axis("pooled") in plan.keep) == bool(spec.pooler)


def test_a_window_of_heads_takes_the_queries_with_their_keys() -> None:
    spec, params = SPECS["llama"], weights(SPECS["llama"])
    *_, plan = FedRolex().plans(spec, replace(TURN, round=1), {})
    assert plan.keep[Axis("h.1.heads")] == Keep(1, 1)  # the second of two
    held = narrow(params, model.layout(spec), plan)
    stream = (torch.arange(2) + 1) % 24
    assert torch.equal(held["h.1.attn.q.weight"], params["h.1.attn.q.weight"][1:][..., stream])
    assert held["h.1.attn.q.weight"].shape == (1, 3, 4, 2)
    assert torch.equal(held["h.1.attn.v.weight"], params["h.1.attn.v.weight"][1:][..., stream])
    assert torch.equal(held["h.1.attn.o.weight"], params["h.1.attn.o.weight"][:, 1:][stream])


@every_family
def test_widths_are_the_whole_network_on_the_units_they_keep(family: str) -> None:
    """Cutting random units inside, with zeros for them in the whole network, is the same function."""
    spec, params = SPECS[family], weights(SPECS[family])
    layout = model.layout(spec)
    for plan in list(FederatedDropout().plans(spec, TURN, {}))[1:3]:
        padded = dict(params)
        for name in layout.params:
            if (index := plan.index(layout, name)) is not None:
                padded[name] = torch.zeros_like(params[name])
                padded[name][index] = params[name][index]
        assert torch.allclose(forward(spec, padded), forward(spec, narrow(params, layout, plan)), atol=1e-5)


@every_family
def test_later_blocks_of_slt_are_zero_where_they_are_cut(family: str) -> None:
    method = Slt(widths=4)
    spec, params = SPECS[family], weights(SPECS[family])
    memory = {"configurations": torch.tensor([[0.0, 0.5], [2.0, 0.5]], dtype=torch.float64)}
    for round_ in (0, 2):
        turn = replace(TURN, round=round_)
        plan = next(method.plans(spec, turn, memory))
        of_device = forward(spec, narrow(params, model.layout(spec), plan))
        assert torch.allclose(forward(*method.deploy(spec, params, turn, memory)), of_device, atol=1e-5)


@every_family
@pytest.mark.parametrize("method", [DepthFL(), ProgFed(stages=3)], ids=["depthfl", "progfed"])
def test_an_exit_ends_as_the_network_does(method: Any, family: str) -> None:
    """With its norm, its pooler and its head, of which it starts with copies."""
    spec, params, pretrained = equipped(method, SPECS[family])
    rows = model.layout(spec).params
    whole = forward(SPECS[family], pretrained)
    before = method.deploy(spec, params, replace(TURN, round=-1), {})
    assert before[0] == SPECS[family] and torch.equal(forward(*before), whole)
    for depth in (1, 2):
        exits = {name.split(".", 2)[2] for name, row in rows.items() if row.part == "exit" and row.block == depth - 1}
        end = {name for name, row in rows.items() if row.block is None and row.part != "embed"}
        assert exits == end
        assert all(torch.equal(params[f"exit.{depth - 1}.{name}"], pretrained[name]) for name in end)
        short, held = first_blocks(spec, params, depth)
        expected = forward(replace(SPECS[family], blocks=depth), {name: pretrained[name] for name in held})
        assert torch.equal(forward(short, held), expected)
    drawn = weights(spec, 5)  # exits of their own now
    alone = [forward(*first_blocks(spec, drawn, depth)) for depth in (1, 2, 3)]
    assert torch.allclose(forward(spec, drawn), torch.stack(alone).mean(0), atol=1e-5)


@pytest.mark.parametrize("family", ["bert", "dinov2", "qwen3, classes"])
@pytest.mark.parametrize("chunked", [False, True])
def test_exits_that_classify_learn_from_one_another(family: str, chunked: bool) -> None:
    """sum_i CE(y, p_i) + m sum_{j != i} KL(p_j || p_i), with one prediction per example."""
    spec = DepthFL().adapt(SPECS[family])
    params, batch = weights(spec), given(spec)
    x_BSD, outputs = model.embed(spec, params, batch.x), []
    for block in range(3):
        x_BSD = model.run_blocks(spec, params, x_BSD, [block], hides=batch.hides(spec, x_BSD.shape[1], TORCH))
        outputs.append(Output(x_BSD, (*spec.exits, spec.blocks)[block], params, lengths_B=batch.lengths_B))
    targets = torch.from_numpy(shard(spec, 4, 7).targets)
    mutual = 0.3
    mix = Mix((1.0,) * 3, tuple(tuple(mutual * (i != j) for j in range(3)) for i in range(3)))
    logs = [output.logits(spec)[:, 0].log_softmax(-1) for output in outputs]
    expected = sum(F.nll_loss(each, targets[:, 0]) for each in logs)
    for i, student in enumerate(logs):
        for j, teacher in enumerate(logs):
            if i != j:
                expected = expected + mutual * F.kl_div(student, teacher, reduction="batchmean", log_target=True)
    assert model.loss(spec, outputs, targets, mix, None, chunked).item() == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("family", ["bert", "vit", "gpt2, classes", "llama"])
@pytest.mark.parametrize("method", [HeteroFL(), FedRolex(own_labels=True)], ids=["heterofl", "fedrolex"])
def test_a_device_says_nothing_about_classes_that_it_does_not_have(method: Any, family: str) -> None:
    """Its rows of the head for them get no gradient, and do not count; of texts, nor do their rows of the embedding."""
    spec, params = SPECS[family], weights(SPECS[family])
    plan = next(method.plans(spec, TURN, {}))
    examples = shard(spec, 3, 1)
    job = Job(TURN, plan, LOCAL, method.encode(params, spec, plan, TURN, {}), method)
    update = client.train(job.owned(), examples, spec)
    own = torch.zeros(spec.outputs, dtype=torch.bool)
    own[torch.from_numpy(np.unique(examples.targets))] = True
    assert 0 < own.sum() < spec.outputs
    assert torch.equal(update.arrays["labels"], own)
    assert torch.equal(update.arrays["head.weight"][~own], params["head.weight"][~own])
    vote = method.decode(update, job, spec)
    louder = replace(vote, weight=5.0, arrays={name: p + 1 for name, p in vote.arrays.items()})
    after, _ = method.merge(params, spec, [vote, louder], TURN, {})
    for name in ("head.weight", *["head.bias"] * spec.head_bias):
        assert torch.equal(after[name][~own], params[name][~own])
        assert not torch.equal(after[name][own], params[name][own])
    if not spec.labels:
        assert torch.equal(after["embed.tokens"][~own], params["embed.tokens"][~own])


@every_family
@pytest.mark.parametrize("method", [Spry(), Mezo()], ids=["spry", "mezo"])
def test_without_backward_a_head_trains_where_it_classifies(method: Any, family: str) -> None:
    spec = method.adapt(SPECS[family])
    layout = model.layout(spec)
    (plan,) = method.plans(spec, TURN, {})
    head = {name for name, row in layout.params.items() if row.part == "head"}
    assert plan.trains & head == (head if spec.labels else set())
    assert {layout.params[name].part for name in plan.trains - head} == {"lora"}


@every_family
def test_flanc_at_full_rank_is_the_network_itself_and_cuts_keys_with_their_queries(family: str) -> None:
    method = Flanc()
    spec, params, pretrained = equipped(method, SPECS[family])
    assert torch.allclose(forward(spec, params), forward(SPECS[family], pretrained), atol=1e-4)
    memory = method.prepare(spec, params, fleet(None), TURN)
    for network in method.networks(spec).values():
        plan = next(plan for plan in method.plans(spec, TURN, memory) if plan.runs(spec) == network)
        held = method.encode(params, spec, plan, TURN, memory)
        groups, ffn = model.layout(network).sizes[Axis("h.0.heads")], network.ffn
        keep = {Axis(f"h.{i}.heads"): Keep(groups) for i in range(3)} | {
            Axis(f"h.{i}.ffn"): Keep(ffn) for i in range(3)
        }
        names = frozenset(pretrained)
        cut = narrow(pretrained, model.layout(SPECS[family]), Plan(names, names, keep))
        assert torch.allclose(forward(network, held), forward(SPECS[family], cut), atol=1e-4)


@every_family
def test_factors_of_full_rank_are_the_network_itself(family: str) -> None:
    """Of keys and values that are shared, that is already so from their own number on."""
    method, spec = FedHM(ratios=(1, 4)), SPECS[family]
    params = weights(spec)
    _, low = method.plans(spec, TURN, {})
    assert low.network and low.network.factored
    rank = low.network.factored.rank
    arrays = method.encode(params, spec, low, TURN, {})
    for short in spec.linears:
        whole = as_matrix(short, params[f"h.1.{short}.weight"])
        assert arrays[f"h.1.{short}.basis"].shape[0] == min(rank, *whole.shape)
        assert arrays[f"h.1.{short}.coef"].shape[-1] == min(rank, *whole.shape)
    full = replace(low.network, factored=replace(low.network.factored, rank=10**6))
    names = frozenset(model.layout(full).params)
    arrays = method.encode(params, spec, Plan(names, names, network=full), TURN, {})
    assert torch.allclose(forward(full, arrays), forward(spec, params), atol=1e-4)


@every_family
@pytest.mark.parametrize("gradient", ["backward", "forward", "zeroth"])
def test_frozen_tables_in_eight_bits(family: str, gradient: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """All that is frozen, however small: the first loss is nearly that of 32 bits, and the memory what was foreseen."""
    monkeypatch.setattr(packed, "SMALLEST", 16)
    method = CocoFl(fallback="zeroth" if gradient == "zeroth" else "forward")  # a key of its own for prices
    spec, examples = replace(SPECS[family], norm_eps=1.5e-6), shard(SPECS[family], 6, 2)
    params, losses = weights(spec), []
    runs = {plan.label: plan for plan in method.plans(spec, TURN, {})}
    plan = replace(runs["block 2 of 3"], gradient=gradient)
    for bits in (8, 32):
        each = replace(plan, levers=replace(plan.levers, frozen_bits=cast(Any, bits)))
        job = Job(TURN, each, replace(LOCAL, steps=1), dict(params), method)
        update = client.train(job.owned(), examples, spec)
        losses.append(update.loss)
    assert losses[0] != losses[1] and losses[0] == pytest.approx(losses[1], rel=0.05)
    price = cost(spec, plan, LOCAL, TOKENS, 2, method)
    found = measure.watch(spec, plan, replace(LOCAL, steps=2), TOKENS, method).peak()[0]
    assert sum(found.values()) == pytest.approx(price.memory_bytes, rel=0.02)


FALLING = [name for name, cls in METHODS.items() if not cls.for_fleet and cls not in (Spry, Mezo)]


@pytest.mark.parametrize("gradient", ["forward", "zeroth"])
@pytest.mark.parametrize("name", FALLING)
def test_every_method_falls_back_on_classes(name: str, gradient: Any) -> None:
    """In the memory that was foreseen; where outputs teach one another, too."""
    method = replace(METHODS[name](), fallback=gradient)
    spec, params, _ = equipped(method, SPECS["bert"])
    plan = next(method.last_resort(spec, TURN, {}))
    memory = method.prepare(spec, params, fleet(plan), TURN)
    job = Job(TURN, plan, LOCAL, method.encode(params, spec, plan, TURN, memory), method)
    update = client.train(job.owned(), shard(spec, 6, 0), spec)
    assert np.isfinite(update.loss)
    sent = {name: (tuple(array.shape), array.dtype) for name, array in update.arrays.items()}
    assert sent == method.sends(spec, plan, STEPS)
    price = cost(spec, plan, LOCAL, TOKENS, STEPS, method)
    found = measure.watch(spec, plan, replace(LOCAL, steps=2), TOKENS, method).peak()[0]
    assert sum(found.values()) == pytest.approx(price.memory_bytes, rel=0.02)


def test_every_width_that_is_cut_in_full_cuts_the_pooler() -> None:
    for cls in (FederatedDropout, HeteroFL, FedRolex, Fjord):
        width: Width = cls(scope="full")
        *_, plan = width.plans(SPECS["bert"], TURN, {})
        assert Axis("pooled") in plan.keep and Axis("labels") not in plan.keep


def test_caff_on_classes_trains_pooler_and_head() -> None:
    spec = SPECS["bert"]
    *_, last = Caff().plans(spec, TURN, {})
    block = {name for name in model.layout(spec).params if name.startswith("h.2.")}
    assert last.trains == block | {"head.pool.weight", "head.pool.bias", "head.weight", "head.bias"}
