"""Linear layers in two factors: the function they compute, and what they cost."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support import TURN, bits, spec, weights
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from lamina import checkpoint, client, measure, model
from lamina.cost import cost
from lamina.job import Local
from lamina.layout import Params
from lamina.levers import Levers
from lamina.methods import Method
from lamina.methods.lowrank import FedHM, Flanc
from lamina.ops import TORCH
from lamina.plan import Plan
from lamina.spec import Factored, Spec

SPEC = spec(3)
ODD = Spec(2, embed=12, heads=3, head_dim=2, ffn=10, vocab=13, positions=9)
FACTORED = {
    "low rank": replace(SPEC, factored=Factored(3)),
    "rank above all sides": replace(SPEC, factored=Factored(99)),
    "last blocks": replace(SPEC, factored=Factored(5, first_block=1)),
    "groups": replace(SPEC, factored=Factored(3, inputs=4)),
    "groups as large as the width": replace(SPEC, factored=Factored(7, inputs=16)),
    "groups of one": replace(SPEC, factored=Factored(1, inputs=1)),
    "odd shapes": replace(ODD, factored=Factored(7)),
    "odd shapes, groups": replace(ODD, factored=Factored(2, inputs=2, first_block=1)),
}
factored = pytest.mark.parametrize("network", FACTORED.values(), ids=list(FACTORED))


def near(got: Tensor, expected: Any, tolerance: float = 1e-5) -> None:
    """Equal but for rounding, on the scale of the largest element."""
    expected = torch.as_tensor(expected).double()
    assert got.shape == expected.shape
    assert (got.double() - expected).abs().max() <= tolerance * expected.abs().max().clamp(min=1e-9)


def logits(network: Spec, params: Params) -> Tensor:
    return model.forward(network, params, torch.arange(2 * 8).reshape(2, 8) % network.vocab)


def by_hand(network: Spec, params: Params, stem: str) -> np.ndarray:
    """The weight of a linear layer, [C_1 B, ..., C_G B] group by group."""
    outputs = params[f"{stem}.bias"].numel()
    if f"{stem}.weight" in params:
        return params[f"{stem}.weight"].reshape(outputs, -1).double().numpy()
    basis = params[f"{stem}.basis"].flatten(1).double().numpy()
    coef = params[f"{stem}.coef"].reshape(outputs, -1).double().numpy()
    rank = len(basis)
    return np.concatenate([coef[:, i : i + rank] @ basis for i in range(0, coef.shape[1], rank)], 1)


def linears(network: Spec) -> list[str]:
    return [f"h.{i}.{short}" for i in range(network.blocks) for short in network.linears]


@factored
def test_two_factors_are_the_weight_they_multiply_out_to(network: Spec, tmp_path: Path) -> None:
    """In the forward pass, in `product`, and in a network that was written and read."""
    params = weights(network)
    plain, whole = model.merged(network, params)
    assert plain == replace(network, factored=None)
    assert {name: tuple(p.shape) for name, p in whole.items()} == {
        name: model.layout(plain).shape(name) for name in model.layout(plain).params
    }
    for stem in linears(network):
        expected = by_hand(network, params, stem)
        near(model.product(network, params, stem), expected, 1e-6)
        near(whole[f"{stem}.weight"].reshape(expected.shape), expected, 1e-6)
    near(logits(network, params), logits(plain, whole))
    if network.head_dim * network.heads == network.embed:
        checkpoint.write(tmp_path, network, params, torch.float32, {})
        read, loaded = checkpoint.load(tmp_path)
        assert read == plain
        assert bits(loaded) == bits(whole)


@factored
def test_factors_are_not_without_effect(network: Spec) -> None:
    params = weights(network)
    before = logits(network, params)
    for name in params:
        if name.endswith((".basis", ".coef")):
            assert not torch.equal(logits(network, params | {name: 20 * params[name]}), before), name


def test_shapes_of_factors() -> None:
    """Rank 3 of 16 inputs as one; and 4 groups of 4 (16 of the hidden units); what is before the first block stays."""
    one, many = model.layout(FACTORED["low rank"]), model.layout(replace(SPEC, factored=Factored(3, 4, 1)))
    shapes = {
        "h.2.attn.q": ((3, 16), (2, 8, 3), (3, 4), (2, 8, 12)),
        "h.2.attn.o": ((3, 2, 8), (16, 3), (3, 4), (16, 12)),
        "h.1.ffn.up": ((3, 16), (64, 3), (3, 4), (64, 12)),
        "h.1.ffn.down": ((3, 64), (16, 3), (3, 4), (16, 48)),
    }
    for stem, expected in shapes.items():
        found = [layout.shape(f"{stem}.{end}") for layout in (one, many) for end in ("basis", "coef")]
        assert tuple(found) == expected
        assert f"{stem}.weight" not in one.params
        for layout in (one, many):
            part, block = layout.params[f"{stem}.bias"].part, layout.params[f"{stem}.bias"].block
            assert all(
                (layout.params[f"{stem}.{end}"].part, layout.params[f"{stem}.{end}"].block) == (part, block)
                for end in ("basis", "coef")
            )
    assert {name for name in many.params if name.startswith("h.0.")} == {
        name for name in model.layout(SPEC).params if name.startswith("h.0.")
    }
    assert model.layout(FACTORED["rank above all sides"]).shape("h.0.ffn.up.coef") == (64, 16)
    assert model.layout(FACTORED["odd shapes"]).shape("h.0.attn.q.basis") == (6, 12)  # 3 heads of 2 outputs
    with pytest.raises(ValueError, match=r"^factored inputs must divide the 16 inputs of h\.0\.attn\.q, got 5$"):
        model.layout(replace(SPEC, factored=Factored(3, 5)))


@pytest.mark.parametrize("rows", [True, False])
def test_kernels_of_penalties(rows: bool) -> None:
    x, y = torch.randn(3, 5, dtype=torch.float64), torch.randn(5, 7, dtype=torch.float64)
    near(TORCH.gram(x, rows), x.numpy() @ x.numpy().T if rows else x.numpy().T @ x.numpy(), 1e-14)
    p = torch.randn(3, 7, 1, dtype=torch.float64, requires_grad=True)
    p.grad = before = torch.randn_like(p)
    expected = before.numpy()[..., 0] - 0.5 * x.numpy() @ y.numpy()
    TORCH.pull_product(p, x, y, -0.5)
    assert p.grad is before
    near(p.grad[..., 0], expected, 1e-14)


WIDE = Spec(3, embed=48, heads=3, head_dim=16, ffn=192, vocab=70, positions=64)
CASES: dict[str, tuple[Method, int]] = {  # method, plan
    "fedhm, rank 24": (FedHM(), 1),
    "fedhm, rank 6 from block 1 on": (FedHM(first_block=1), 3),
    "flanc": (Flanc(), 0),
    "flanc, half": (Flanc(n_basis=0.5, basis_fraction=0.17), 2),
}
LEVERS = {
    "none": Levers(),
    "fused": Levers(fused_update=True),
    "recompute, micro": Levers(recompute=True, micro_batch=3),
    "all": Levers(chunked_loss=True, fused_update=True, prefix_cache="disk", micro_batch=1, recompute=True),
    "adafactor": Levers(fused_update=True, optimizer="adafactor"),
}


def planned(name: str) -> tuple[Method, Spec, Plan]:
    method, number = CASES[name]
    network = method.adapt(WIDE)
    return method, network, list(method.plans(network, TURN, {}))[number]


@pytest.mark.parametrize("lever", LEVERS.values(), ids=list(LEVERS))
@pytest.mark.parametrize("case", CASES)
def test_the_price_is_what_is_measured(case: str, lever: Levers) -> None:
    method, network, plan = planned(case)
    plan, local = replace(plan, levers=lever), Local(lr=0.1, batch_size=4, steps=2)
    for tokens in (3, 40):  # weights dominate, and activations
        predicted = cost(network, plan, local, tokens, 2, method).memory
        measured = measure.watch(network, plan, local, tokens, method).peak()[0]
        for category, size in asdict(predicted).items():
            assert abs(size - measured.get(category, 0)) <= 0.002 * predicted.total, category


@pytest.mark.parametrize("frozen_bits", [8, 16, 32])
@pytest.mark.parametrize("factors", [Factored(48), Factored(24, inputs=32)], ids=["one group", "groups"])
def test_frozen_factors_can_be_packed(factors: Factored, frozen_bits: Any) -> None:
    """The last block trains: the others run on packed factors, at the price of those, to nearly the same loss."""
    network, local = replace(WIDE, embed=96, head_dim=32, factored=factors), Local(lr=1e-3, batch_size=4, steps=2)
    layout = model.layout(network)
    plan = Plan(frozenset(layout.params), layout.tail(1), levers=Levers(frozen_bits=frozen_bits))
    predicted = cost(network, plan, local, 24, 2).memory_bytes
    assert predicted == pytest.approx(sum(measure.watch(network, plan, local, 24).peak()[0].values()), rel=0.005)
    whole = replace(plan, levers=Levers())
    assert (predicted < cost(network, whole, local, 24, 2).memory_bytes) == (frozen_bits < 32)
    job, shard = measure.work(network, plan, local, 24)
    packed, plain = (client.train(replace(job, plan=each).owned(), shard, network) for each in (plan, whole))
    assert packed.loss == pytest.approx(plain.loss, rel=1e-3)
    assert (bits(packed.arrays) == bits(plain.arrays)) == (frozen_bits == 32)


@pytest.mark.parametrize("case", CASES)
def test_operations_are_those_torch_counts(case: str) -> None:
    """Those of the penalties too: 2 n m^2 for the Gram of m rows of n, as many for a product with it."""
    method, network, plan = planned(case)
    local = Local(lr=0.1, batch_size=4, steps=3)
    job, shard = measure.work(network, plan, local, 12, method)

    def in_place(of_p: Any, of_x: Any, of_y: Any, **other: Any) -> int:
        """Of addmm_, which torch's counter does not know."""
        return 2 * int(of_x[0] * of_x[1] * of_y[1])

    counter = FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: in_place})
    with sdpa_kernel(SDPBackend.MATH), counter:
        client.train(job.owned(), shard, network)
    assert cost(network, plan, local, 12, 3, method).flops == counter.get_total_flops()
