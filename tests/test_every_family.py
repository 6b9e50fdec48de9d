"""Every family under every lever: padding and levers change nothing, and prices are what is measured."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from specs import SPECS, TOKENS
from support import TURN, counting, weights
from torch import Tensor

from lamina import client, measure, model, ops, packed
from lamina.cost import cost
from lamina.job import Job, Local, Turn
from lamina.layout import Params
from lamina.levers import Levers
from lamina.plan import Plan
from lamina.shapes import FLOAT_BYTES
from lamina.source import run_prefix
from lamina.spec import LINEARS, Lora, Spec

RAGGED = [name for name, spec in SPECS.items() if spec.ragged]
LEVERS = {
    "chunked": Levers(chunked_loss=True),
    "fused": Levers(fused_update=True),
    "ram": Levers(prefix_cache="ram"),
    "disk": Levers(prefix_cache="disk"),
    "micro 1": Levers(micro_batch=1),
    "micro 3": Levers(micro_batch=3),
    "recompute": Levers(recompute=True),
    "fused, recompute": Levers(fused_update=True, recompute=True),
    "all": Levers(chunked_loss=True, fused_update=True, prefix_cache="disk", micro_batch=1, recompute=True),
    "all, micro 3": Levers(chunked_loss=True, fused_update=True, prefix_cache="ram", micro_batch=3, recompute=True),
}
every_family = pytest.mark.parametrize("name", SPECS)


@dataclass(frozen=True)
class Examples:
    """Random examples as a shard gives them to a network: tokens, texts of different lengths, or images."""

    spec: Spec
    examples: int = 9

    def __len__(self) -> int:
        return self.examples

    def batch(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        spec, rng = self.spec, np.random.default_rng(3)
        labels = rng.integers(0, max(1, spec.labels), (self.examples, 1))
        if spec.patch:
            size = (self.examples, spec.channels, spec.image, spec.image)
            return rng.standard_normal(size, dtype=np.float32)[rows], labels[rows]
        ids = rng.integers(0, spec.vocab, (2, self.examples, TOKENS))
        if not spec.labels:
            return ids[0, rows], ids[1, rows]
        lengths = np.concatenate([[TOKENS, 1], rng.integers(2, TOKENS, self.examples - 2)])[rows]
        ragged = np.where(np.arange(TOKENS) < lengths[:, None], ids[0, rows], -1)
        return ragged[:, : lengths.max()], labels[rows]

    def at(self, turn: Turn) -> Examples:
        return self


def plans(spec: Spec) -> dict[str, tuple[Spec, Plan]]:
    """The last block, the upper two, everything; low-rank additions to all linears, or of the last, with the head."""
    layout = model.layout(spec)
    names = frozenset(layout.params)
    lora = replace(spec, lora=Lora(2, 4.0, LINEARS))
    rows = model.layout(lora).params
    added = frozenset(name for name, row in rows.items() if row.part in ("lora", "head"))
    return {
        "last": (spec, Plan(names, layout.tail(1))),
        "upper": (spec, Plan(names, layout.tail(2))),
        "everything": (spec, Plan(names, names)),
        "lora": (lora, Plan(frozenset(rows), added)),
        "lora, last": (lora, Plan(frozenset(rows), added & model.layout(lora).tail(1))),
    }


PLANS = ("last", "upper", "everything", "lora", "lora, last")
every_plan = pytest.mark.parametrize("which", PLANS)


@cache
def params_of(spec: Spec) -> Params:
    return weights(spec, 5)


def trained(spec: Spec, plan: Plan, local: Local) -> tuple[float, Params]:
    """Mean loss of a round, and what was trained; two texts or images at a time where few are to run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ops, "SLICE_TOKENS", 2 * spec.length(TOKENS))
        update = client.train(Job(TURN, plan, local, params_of(spec)).owned(), Examples(spec), spec)
    return update.loss, update.arrays


def close(got: Params, expected: Params, atol: float) -> None:
    assert set(got) == set(expected)
    for name, tensor in expected.items():
        assert torch.allclose(got[name], tensor, rtol=1e-4, atol=atol), (name, (got[name] - tensor).abs().max())


@every_family
def test_examples_are_given_as_the_network_takes_them(name: str) -> None:
    spec = SPECS[name]
    shard = Examples(spec)
    given = model.batch(spec, shard.batch(np.array([2, 5, 3]))[0])
    logits = model.forward(spec, params_of(spec), given)
    assert logits.shape == (3, 1 if spec.labels else TOKENS, spec.outputs)
    assert logits.isfinite().all() and logits.std() > 1e-3
    assert (given.lengths_B is not None) == (name in RAGGED)


@pytest.mark.parametrize("name", RAGGED)
def test_padding_changes_nothing(name: str) -> None:
    """A text alone is what it is among longer ones, however long the padding is and whatever a model makes of it."""
    spec, params = SPECS[name], params_of(SPECS[name])
    inputs = Examples(spec).batch(np.arange(9))[0]
    together = model.forward(spec, params, model.batch(spec, inputs))
    wider = np.pad(inputs[:, :-1], ((0, 0), (0, 2)), constant_values=-1)[1:]
    assert (inputs[1:, -1] == -1).all()
    torch.testing.assert_close(model.forward(spec, params, model.batch(spec, wider)), together[1:])
    for text, logits in zip(inputs, together, strict=True):
        alone = model.forward(spec, params, torch.from_numpy(text[None, text >= 0]))
        torch.testing.assert_close(alone[0], logits)


def gradient(spec: Spec, trains: frozenset[str], rows: np.ndarray) -> tuple[float, Params]:
    """Mean over examples, each in a pass of its own, unpadded, with the graph over the whole network."""
    leaves = {name: p.clone().requires_grad_(name in trains) for name, p in params_of(spec).items()}
    total = 0.0
    for row in rows:
        inputs, targets = Examples(spec).batch(np.array([row]))
        logits = model.forward(spec, leaves, torch.from_numpy(inputs))
        loss = F.cross_entropy(logits.flatten(0, 1), torch.from_numpy(targets).flatten()) / len(rows)
        loss.backward()  # type: ignore[no-untyped-call]
        total += loss.item()
    return total, {name: leaves[name].grad for name in trains}  # type: ignore[misc]


@cache
def gradient_of(name: str, which: str) -> tuple[float, Params]:
    spec, plan = plans(SPECS[name])[which]
    return gradient(spec, plan.trains, LOCAL.batches(TURN, 9)[0])


LOCAL = Local(lr=1.0, optimizer="sgd", steps=1, batch_size=5)


@every_family
@pytest.mark.parametrize("key", LEVERS)
def test_a_step_is_along_the_gradient_of_each_example_alone(name: str, key: str) -> None:
    """Also where texts of different lengths are one batch. With SGD at lr = 1, the step is the gradient."""
    which = PLANS[(list(LEVERS).index(key) + list(SPECS).index(name)) % len(PLANS)]
    spec, plan = plans(SPECS[name])[which]
    loss, arrays = trained(spec, replace(plan, levers=LEVERS[key]), LOCAL)
    expected, gradients = gradient_of(name, which)
    assert loss == pytest.approx(expected, rel=1e-5)
    close({n: params_of(spec)[n] - p for n, p in arrays.items()}, gradients, 1e-6)
    assert all(g.abs().max() > 1e-6 for n, g in gradients.items() if not n.endswith(("k.bias", "types")))


@cache
def without(name: str, which: str, local: Local) -> tuple[float, Params]:
    return trained(*plans(SPECS[name])[which], local)


@every_family
@pytest.mark.parametrize("key", ["disk", "all, micro 3"])
def test_exact_levers_leave_a_round_as_it_is(name: str, key: str) -> None:
    """Batches of different lengths, with clipping, the last of an epoch smaller."""
    local = Local(lr=0.1, optimizer="sgd", momentum=0.9, batch_size=4, clip=0.5)
    for which in ("upper", "lora"):
        spec, plan = plans(SPECS[name])[which]
        expected, tensors = without(name, which, local)
        loss, arrays = trained(spec, replace(plan, levers=LEVERS[key]), local)
        assert loss == pytest.approx(expected, rel=1e-5)
        close(arrays, tensors, 1e-5)


@every_family
@pytest.mark.parametrize("bits", [16, 32])
@pytest.mark.parametrize("place", ["ram", "disk"])
def test_a_cached_prefix_is_what_the_prefix_makes_of_each_batch(name: str, place: Any, bits: Any) -> None:
    """Up to the end of its longest text, in memory of its own; what is beyond the end of a text does not matter."""
    spec, plan = plans(SPECS[name])["last"]
    shard, params = Examples(spec), params_of(spec)
    job = Job(TURN, replace(plan, levers=Levers(prefix_cache=place, cache_bits=bits)), LOCAL, params)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ops, "SLICE_TOKENS", 2 * spec.length(TOKENS))
        source = run_prefix(job, shard, spec, np.array([0, 1, 2, 4, 5, 7, 8]), ops.TORCH)
    for rows in ([4], [1], [5, 2, 8], [7, 0, 1, 4]):
        given, targets = source.batch(np.array(rows))
        plain = model.batch(spec, shard.batch(np.array(rows))[0])
        x_BSD = model.embed(spec, params, plain.x)
        x_BSD = model.run_blocks(spec, params, x_BSD, [0, 1], hides=plain.hides(spec, x_BSD.shape[1], ops.TORCH))
        assert torch.equal(targets, torch.from_numpy(shard.batch(np.array(rows))[1]))
        assert given.x.dtype == torch.float32 and given.x.shape == x_BSD.shape and given.x.is_contiguous()
        if plain.lengths_B is not None and given.lengths_B is not None:
            assert torch.equal(given.lengths_B, plain.lengths_B)
        for text, (mine, other) in enumerate(zip(given.x, x_BSD, strict=True)):
            end = len(mine) if plain.lengths_B is None else int(plain.lengths_B[text])
            near = 1e-5 if bits == 32 else 2e-3
            torch.testing.assert_close(mine[:end], other[:end], rtol=near, atol=near)


PRICED = {"none": Levers(), "frozen 8": Levers(frozen_bits=8), "frozen 16": Levers(frozen_bits=16)} | {
    key: LEVERS[key] for key in ("chunked", "fused, recompute", "ram", "disk", "micro 3", "all, micro 3")
}


@pytest.fixture
def all_packed() -> Iterator[None]:
    """However small."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packed, "SMALLEST", 1)
        yield


@every_family
@pytest.mark.parametrize("key", PRICED)
@pytest.mark.usefixtures("all_packed")
def test_the_peak_is_the_one_that_is_measured(name: str, key: str) -> None:
    """By category, to a few scalars; where weights count most, and where activations do."""
    turn = list(PRICED).index(key) + list(SPECS).index(name)
    spec = SPECS[name] if turn // 4 % 2 else replace(SPECS[name], embed=60, ffn=100)
    spec, plan = plans(spec)[PLANS[turn % len(PLANS)]]
    plan, local = replace(plan, levers=PRICED[key]), Local(lr=0.1, batch_size=9 if turn // 4 % 2 else 2, steps=2)
    predicted = cost(spec, plan, local, TOKENS, 2).memory
    measured = measure.watch(spec, plan, local, TOKENS).peak()[0]
    for category, size in asdict(predicted).items():
        assert abs(size - measured.get(category, 0)) <= 3 * FLOAT_BYTES, category


@every_family
@every_plan
def test_what_is_kept_and_computed_is_what_torch_keeps_and_counts(name: str, which: str) -> None:
    spec, plan = plans(SPECS[name])[which]
    local = Local(batch_size=4, steps=1)
    job, shard = measure.work(spec, plan, local, TOKENS)
    given = {tensor.untyped_storage().data_ptr() for tensor in job.arrays.values()}
    kept: dict[int, Tensor] = {}

    def note(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in given:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    price = cost(spec, plan, local, TOKENS, 1)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        client.train(job, shard, spec)
    assert price.saved_bytes == sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    with counting() as counter:
        client.train(job, shard, spec)
    assert price.flops == counter.get_total_flops()


@every_family
@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.usefixtures("all_packed")
def test_coarse_frozen_tensors_train_nearly_alike(name: str, bits: Any) -> None:
    """All that is frozen and no vector: tables of positions, types, leads, patches, and heads."""
    local = Local(lr=0.1, optimizer="sgd", batch_size=4, steps=2)
    spec, plan = plans(SPECS[name])["last" if bits == 8 else "lora"]
    plan = replace(plan, trains=frozenset(n for n in plan.trains if not n.startswith("head.")))
    expected, _ = trained(spec, plan, local)
    for lever in (Levers(frozen_bits=bits), Levers(frozen_bits=bits, chunked_loss=True, recompute=True)):
        loss, _ = trained(spec, replace(plan, levers=lever), local)
        assert loss == pytest.approx(expected, rel=0.02 if bits == 8 else 1e-3)
        assert loss != expected
