"""Our Transformer against transformers' GPT-2, and what cutting and adapting it does: `pytest tests/test_model.py`."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import GPT2Config, GPT2LMHeadModel

from lamina import checkpoint, model
from lamina.layout import Axis, Params
from lamina.ops import TORCH
from lamina.plan import Keep, Plan, narrow
from lamina.spec import LINEARS, Lora, Spec

RandomParams = Callable[[Spec, int], Params]

SPECS = {
    "plain": Spec(blocks=2, embed=16, heads=2, head_dim=8, ffn=64, vocab=13, positions=10),
    "one head, thin ffn": Spec(blocks=1, embed=12, heads=1, head_dim=12, ffn=20, vocab=30, positions=7),
    "deep, coarse norms": Spec(blocks=5, embed=24, heads=6, head_dim=4, ffn=48, vocab=9, positions=16, norm_eps=1e-2),
}


def draw_ids(spec: Spec, batch: int = 3, seed: int = 0) -> Tensor:
    return torch.randint(0, spec.vocab, (batch, spec.positions), generator=torch.Generator().manual_seed(seed))


def their_network(spec: Spec) -> GPT2LMHeadModel:
    """GPT-2 of transformers with random weights, biases and norms."""
    config = GPT2Config(
        n_layer=spec.blocks,
        n_embd=spec.embed,
        n_head=spec.heads,
        n_inner=spec.ffn,
        vocab_size=spec.vocab,
        n_positions=spec.positions,
        layer_norm_epsilon=spec.norm_eps,
        activation_function="gelu_new",
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=0,
    )
    network = GPT2LMHeadModel(config).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for tensor in network.parameters():
            tensor.add_(0.2 * torch.randn(tensor.shape, generator=generator))
    return network


def assert_close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def through_disk(network: GPT2LMHeadModel, folder: Path) -> tuple[Spec, Params]:
    network.save_pretrained(folder)
    return checkpoint.load(folder)


def everything(spec: Spec) -> frozenset[str]:
    return frozenset(model.layout(spec).params)


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_their_network_read_by_us_is_the_same_function(spec: Spec, tmp_path: Path) -> None:
    theirs, ids = their_network(spec), draw_ids(spec)
    found, params = through_disk(theirs, tmp_path)
    assert found == spec
    with torch.no_grad():
        assert_close(model.forward(spec, params, ids), theirs(ids).logits)


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_our_network_read_by_them_is_the_same_function(spec: Spec, tmp_path: Path, random_params: RandomParams) -> None:
    params, ids = random_params(spec, 0), draw_ids(spec)
    checkpoint.write(tmp_path, spec, params, torch.float32, {})
    with torch.no_grad():
        assert_close(model.forward(spec, params, ids), GPT2LMHeadModel.from_pretrained(tmp_path)(ids).logits)


def test_gradients_are_those_of_their_network(tmp_path: Path) -> None:
    """Their gradients are put in place of their weights, and so come to us by the same names."""
    spec = SPECS["plain"]
    theirs, ids = their_network(spec), draw_ids(spec)
    _, params = through_disk(theirs, tmp_path)
    params = {name: p.requires_grad_() for name, p in params.items()}
    targets = draw_ids(spec, seed=2)
    TORCH.cross_entropy(model.forward(spec, params, ids), targets).backward()  # type: ignore[no-untyped-call]
    F.cross_entropy(theirs(ids).logits.flatten(0, 1), targets.flatten()).backward()  # type: ignore[no-untyped-call]
    with torch.no_grad():
        for tensor in theirs.parameters():
            tensor.copy_(tensor.grad)
    _, expected = through_disk(theirs, tmp_path)
    for name, p in params.items():
        assert p.grad is not None
        assert p.grad.abs().max() > 0
        torch.testing.assert_close(p.grad, expected[name], rtol=1e-4, atol=1e-6)


def test_a_network_without_some_blocks_is_a_shallower_network(tiny: Spec, random_params: RandomParams) -> None:
    params, ids = random_params(tiny, 0), draw_ids(tiny)
    without = {name: p for name, p in params.items() if not name.startswith("h.1.")}
    assert model.found_blocks(tiny, without) == [0, 2]
    shallow = {name.replace("h.2.", "h.1."): p for name, p in without.items()}
    expected = model.forward(replace(tiny, blocks=2), shallow, ids)
    assert torch.equal(model.forward(tiny, without, ids), expected)
    assert not torch.allclose(model.forward(tiny, params, ids), expected)


def test_a_network_runs_in_pieces(tiny: Spec, random_params: RandomParams) -> None:
    params, ids = random_params(tiny, 0), draw_ids(tiny)
    x = model.run_blocks(tiny, params, model.embed(tiny, params, ids), [0])
    x = model.run_blocks(tiny, params, x, [1, 2])
    assert torch.equal(model.Output(x, tiny.blocks, params).logits(tiny), model.forward(tiny, params, ids))


def test_cut_heads_and_ffn_units_are_as_if_their_outputs_were_zero(tiny: Spec, random_params: RandomParams) -> None:
    spec = replace(tiny, heads=4, head_dim=4)
    params, ids = random_params(spec, 0), draw_ids(spec)
    keep = {
        Axis("h.0.heads"): Keep(2, start=3),  # heads 3 and 0
        Axis("h.1.heads"): Keep(1, units=(2,)),
        Axis("h.1.ffn"): Keep(5, start=21),  # units 21 to 23, 0 and 1
        Axis("h.2.ffn"): Keep(3, units=(7, 2, 11)),
    }
    device = narrow(params, model.layout(spec), Plan(everything(spec), frozenset(), keep))
    assert device["h.0.attn.q.weight"].shape == (2, 4, 16)
    assert device["h.1.ffn.down.weight"].shape == (16, 5)
    muted = {name: p.clone() for name, p in params.items()}
    muted["h.0.attn.o.weight"][:, [1, 2]] = 0
    muted["h.1.attn.o.weight"][:, [0, 1, 3]] = 0
    muted["h.1.ffn.down.weight"][:, 2:21] = 0
    muted["h.2.ffn.down.weight"][:, [u for u in range(24) if u not in (7, 2, 11)]] = 0
    assert_close(model.forward(spec, device, ids), model.forward(spec, muted, ids))
    assert not torch.allclose(model.forward(spec, device, ids), model.forward(spec, params, ids))


def test_a_hand_cut_block_computes_the_formula(random_params: RandomParams) -> None:
    """One block, one of two heads, two of five ffn units, every line of the Transformer written out."""
    spec = Spec(blocks=1, embed=6, heads=2, head_dim=3, ffn=5, vocab=7, positions=4)
    params, ids = random_params(spec, 0), draw_ids(spec, batch=1)
    keep = {Axis("h.0.heads"): Keep(1, start=1), Axis("h.0.ffn"): Keep(2, start=4)}
    device = narrow(params, model.layout(spec), Plan(everything(spec), frozenset(), keep))
    p = {name.removeprefix("h.0."): tensor.double() for name, tensor in params.items()}

    def norm(x: Tensor, name: str) -> Tensor:
        x = x - x.mean(-1, keepdim=True)
        return x / (x.square().mean(-1, keepdim=True) + spec.norm_eps).sqrt() * p[f"{name}.weight"] + p[f"{name}.bias"]

    x = p["embed.tokens"][ids[0]] + p["embed.positions"]
    y = norm(x, "norm1")
    q, k, v = (y @ p[f"attn.{short}.weight"][1].T + p[f"attn.{short}.bias"][1] for short in "qkv")
    scores = (q @ k.T / math.sqrt(3)).masked_fill(torch.ones(4, 4).triu(1).bool(), -math.inf)
    x = x + scores.softmax(-1) @ v @ p["attn.o.weight"][:, 1].T + p["attn.o.bias"]
    units = [4, 0]
    up = norm(x, "norm2") @ p["ffn.up.weight"][units].T + p["ffn.up.bias"][units]
    up = 0.5 * up * (1 + torch.tanh(math.sqrt(2 / math.pi) * (up + 0.044715 * up**3)))
    x = x + up @ p["ffn.down.weight"][:, units].T + p["ffn.down.bias"]
    logits = norm(x, "norm") @ p["head.weight"].T
    assert_close(model.forward(spec, device, ids)[0].double(), logits)


@pytest.mark.parametrize("axis", ["embed", "head_dim", "vocab", "positions"])
def test_any_axis_can_be_cut(tiny: Spec, random_params: RandomParams, axis: str) -> None:
    params = random_params(tiny, 0)
    device = narrow(params, model.layout(tiny), Plan(everything(tiny), frozenset(), {Axis(axis): Keep(5, start=6)}))
    logits = model.forward(tiny, device, draw_ids(tiny)[:, :5] % 5)
    assert logits.shape == (3, 5, 5 if axis == "vocab" else tiny.vocab)
    assert logits.isfinite().all()


def test_lora_starts_as_the_network_itself(tiny: Spec) -> None:
    spec = replace(tiny, lora=Lora(3, 6.0, LINEARS))
    params, ids = model.init(spec, torch.Generator().manual_seed(0)), draw_ids(tiny)
    plain = {name: p for name, p in params.items() if "lora" not in name}
    assert list(plain) == list(model.layout(tiny).params)
    assert torch.equal(model.forward(spec, params, ids), model.forward(tiny, plain, ids))
    assert all(params[name].abs().max() > 0 for name in params if name.endswith("lora_a"))


def test_lora_adds_its_product_to_the_weight(tiny: Spec, random_params: RandomParams) -> None:
    spec = replace(tiny, lora=Lora(3, 12.0, ("attn.v", "attn.o", "ffn.up")))
    params = random_params(spec, 0)
    plain_spec, plain = model.merged(spec, params)
    assert plain_spec == tiny
    assert list(plain) == list(model.layout(tiny).params)
    products = {"attn.v": "hkr,rd->hkd", "attn.o": "dr,rhk->dhk", "ffn.up": "fr,rd->fd"}
    for short, product in products.items():
        w, a, b = (params[f"h.1.{short}.{end}"].double() for end in ("weight", "lora_a", "lora_b"))
        expected = w + 12.0 / 3 * torch.einsum(product, b, a)
        assert_close(plain[f"h.1.{short}.weight"].double(), expected)
    assert plain["h.1.ffn.down.weight"] is params["h.1.ffn.down.weight"]


@pytest.mark.parametrize("targets", [LINEARS, ("attn.q", "attn.v")], ids=["all", "qv"])
def test_a_merged_network_is_the_same_function(
    tiny: Spec, random_params: RandomParams, targets: tuple[str, ...]
) -> None:
    spec = replace(tiny, lora=Lora(3, 1.5, targets))
    params, ids = random_params(spec, 0), draw_ids(tiny)
    assert_close(model.forward(*model.merged(spec, params), ids), model.forward(spec, params, ids))
    without = {name: p for name, p in params.items() if "lora" not in name}
    assert not torch.allclose(model.forward(spec, without, ids), model.forward(spec, params, ids), rtol=0.01)


def test_merging_a_network_without_lora_does_nothing(tiny: Spec, random_params: RandomParams) -> None:
    params = random_params(tiny, 0)
    assert model.merged(tiny, params) == (tiny, params)


def test_cut_ranks_are_as_if_they_were_zero(tiny: Spec, random_params: RandomParams) -> None:
    spec = replace(tiny, lora=Lora(4, 4.0, LINEARS))
    params, ids = random_params(spec, 0), draw_ids(spec)
    device = narrow(params, model.layout(spec), Plan(everything(spec), frozenset(), {Axis("rank"): Keep(2)}))
    muted = {name: p.clone() for name, p in params.items()}
    for name in muted:
        if name.endswith("lora_b"):
            muted[name][..., 2:] = 0
    assert_close(model.forward(spec, device, ids), model.forward(spec, muted, ids))


def test_no_token_sees_a_later_one(tiny: Spec, random_params: RandomParams) -> None:
    params, ids = random_params(tiny, 0), draw_ids(tiny)
    for place in (1, 5, 9):
        other = ids.clone()
        other[:, place] = (other[:, place] + 1) % tiny.vocab
        before, after = (model.forward(tiny, params, each) for each in (ids, other))
        assert torch.equal(before[:, :place], after[:, :place])
        assert (before[:, place:] != after[:, place:]).any(dim=-1).all()


def test_a_shorter_text_gives_the_same_logits(tiny: Spec, random_params: RandomParams) -> None:
    params, ids = random_params(tiny, 0), draw_ids(tiny)
    assert_close(model.forward(tiny, params, ids[:, :4]), model.forward(tiny, params, ids)[:, :4])


@pytest.mark.parametrize("backend", [SDPBackend.MATH, SDPBackend.FLASH_ATTENTION])
@pytest.mark.filterwarnings(
    # The fused kernel has no batching rule on the CPU: vmap computes device by device, with this warning.
    "ignore:There is a performance drop because we have not yet implemented the batching rule:UserWarning"
)
def test_a_stack_of_devices_computes_what_each_does(
    tiny: Spec, random_params: RandomParams, backend: SDPBackend
) -> None:
    spec = replace(tiny, lora=Lora(2, 4.0, ("attn.q", "ffn.down")))
    devices = [random_params(spec, seed) for seed in range(3)]
    ids = torch.stack([draw_ids(spec, batch=2, seed=seed) for seed in range(3)])
    stack = {name: torch.stack([device[name] for device in devices]) for name in devices[0]}
    with sdpa_kernel(backend):
        together = torch.func.vmap(lambda params, ids_BS: model.forward(spec, params, ids_BS))(stack, ids)
    for device, params in enumerate(devices):
        assert_close(together[device], model.forward(spec, params, ids[device]))


def test_cross_entropy_is_the_mean_over_all_positions() -> None:
    logits, targets = (
        torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0)),
        torch.tensor([[0, 4, 2], [1, 1, 3]]),
    )
    picked = logits.log_softmax(-1).gather(-1, targets[..., None])
    assert_close(TORCH.cross_entropy(logits, targets), -picked.mean())


def test_fresh_weights_are_those_of_gpt2() -> None:
    spec = Spec(
        blocks=8, embed=64, heads=4, head_dim=16, ffn=256, vocab=50, positions=40, lora=Lora(4, 8.0, ("attn.o",))
    )
    params = model.init(spec, torch.Generator().manual_seed(0))
    again, other = (model.init(spec, torch.Generator().manual_seed(seed)) for seed in (0, 1))
    assert all(torch.equal(params[name], again[name]) for name in params)
    assert not torch.equal(params["head.weight"], other["head.weight"])
    for name, p in params.items():
        if name.endswith(("bias", "lora_b")):
            assert not p.any()
        elif "norm" in name:
            assert (p == 1).all()
        elif name.endswith("lora_a"):
            assert 0.9 * 64**-0.5 < p.abs().max() <= 64**-0.5
        else:
            std = 0.02 / 4 if name.endswith(("attn.o.weight", "ffn.down.weight")) else 0.02
            assert p.std().item() == pytest.approx(std, rel=0.06)
