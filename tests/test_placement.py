"""Devices that train on a card, a pretended one: nothing is forgotten on the host, and numbers are the host's."""

import gc
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from pretended import CARD, HOST, LAUNCHED, OnCard, pretended
from specs import SPECS
from support import Table, begin, bits, lines, outcome, spec, weights, write_world
from test_methods_families import Server, shard
from test_stacked import SGD, assert_alike, caff_jobs, texts
from torch import Tensor

from lamina import client, config, model
from lamina.data.task import Shard
from lamina.engines.local import LocalEngine
from lamina.engines.prefix import Prefixes
from lamina.engines.stacked import StackedEngine, stackable, stacks, train_stack
from lamina.errors import UserError
from lamina.job import Job, Local, Turn, Update
from lamina.levers import Levers
from lamina.methods import METHODS, Method
from lamina.placement import Placement, place
from lamina.plan import Gradient, Plan
from lamina.spec import Spec

SHARDS = [texts(5, seed=0), texts(3, seed=1)]
ONCE = replace(SGD, lr=1e-3, epochs=1, clip=0.5)


def alone(job: Job, shards: Sequence[Shard], network: Spec) -> Update:
    """A device as `engine = "serial"` simulates it on the card."""
    with pretended():
        (update,) = LocalEngine(network, shards, 1, CARD).run([job])
    return update


def together(
    jobs: list[Job], shards: Sequence[Shard], network: Spec, dtype: torch.dtype = torch.float32
) -> list[Update]:
    """Devices as `engine = "auto"` simulates them on the card."""
    with pretended():
        return list(StackedEngine(network, shards, 1, Prefixes(0, 0), dtype, CARD).run(jobs))


def assert_same(mine: Update, theirs: Update) -> None:
    """To the bit, as the same kernels compute."""
    assert (mine.turn, mine.steps, mine.loss) == (theirs.turn, theirs.steps, theirs.loss)
    assert (bits(mine.arrays), bits(mine.state)) == (bits(theirs.arrays), bits(theirs.state))


@pytest.mark.parametrize(("number", "name"), list(enumerate(METHODS)), ids=list(METHODS))
def test_every_method_trains_on_a_card(number: int, name: str) -> None:
    """A device by itself, and two as a stack, on one of the families that it can do; all families come up."""
    kinds = {"language": ("gpt2", "llama", "qwen3"), "classification": ("bert", "vit", "dinov2")}
    able = [kinds[kind][number % 3] for kind in METHODS[name].tasks]
    server = Server(name, able[number % len(able)])
    shards = [shard(server.spec, size, seed) for seed, size in enumerate((5, 3))]
    turns = [replace(server.turn, device=device) for device in range(2)]
    jobs = [replace(server.job(server.plans[-1]), turn=turn, local=ONCE) for turn in turns]
    wanted = [client.train(job.owned(), each, server.spec) for job, each in zip(jobs, shards, strict=True)]
    assert_same(alone(jobs[0], shards, server.spec), wanted[0])
    if stackable(jobs[0]):
        assert_alike(together(jobs, shards, server.spec), wanted, jobs)


@pytest.mark.parametrize("family", ["gpt2", "llama", "roberta", "vit"])
def test_everything_trains_in_one_stack(family: str) -> None:
    """Embeddings, norms and heads of three devices, of which one takes fewer steps."""
    network = SPECS[family]
    names, method, params = frozenset(model.layout(network).params), Method(), weights(network)
    shards = [shard(network, size, seed) for seed, size in enumerate((6, 2, 5))]
    jobs = [Job(Turn(0, 0, 9, device), Plan(names, names), ONCE, params, method) for device in range(3)]
    wanted = [client.train(job.owned(), each, network) for job, each in zip(jobs, shards, strict=True)]
    assert_alike(together(jobs, shards, network), wanted, jobs)


def test_devices_share_launches() -> None:
    """What costs time on a card: another device in a stack costs few of them. One by one, each costs all of its own."""
    launched = []
    for devices in (2, 12):
        jobs, shards = caff_jobs(spec(3), [2] * devices, local=replace(ONCE, steps=8)), [texts(6)] * devices
        together(jobs, shards, spec(3))
        launched.append((len(jobs), LAUNCHED.total()))
    alone(jobs[0], shards, spec(3))
    (few, fewer), (many, more) = launched
    assert (more - fewer) / (many - few) < LAUNCHED.total() / 10


@pytest.mark.parametrize("gradient", ["forward", "zeroth"])
def test_directions_are_drawn_on_the_host(gradient: Gradient) -> None:
    (job,) = caff_jobs(spec(2), [1], local=ONCE)
    job = replace(job, plan=replace(job.plan, gradient=gradient))
    assert_same(alone(job, SHARDS[:1], spec(2)), client.train(job.owned(), SHARDS[0], spec(2)))


@pytest.mark.parametrize(
    "levers",
    [
        Levers(chunked_loss=True, fused_update=True, prefix_cache="disk", micro_batch=2, recompute=True),
        Levers(prefix_cache="ram", cache_bits=16, frozen_bits=8),
        Levers(frozen_bits=16, optimizer="adamw8"),
        Levers(optimizer="adafactor"),
    ],
    ids=lambda levers: "+".join(levers.names()),
)
def test_levers_on_a_card(levers: Levers) -> None:
    network = replace(spec(2), embed=64, ffn=80)  # large enough for matrices to be packed
    (job,) = caff_jobs(network, [1], local=Local(batch_size=4, clip=0.5))
    job = replace(job, plan=replace(job.plan, levers=levers))
    assert_same(alone(job, SHARDS[:1], network), client.train(job.owned(), SHARDS[0], network))
    jobs = [replace(job, turn=replace(job.turn, device=device)) for device in range(2)]
    if stackable(job):
        found = together(jobs, SHARDS, network)
        assert [update.loss for update in found] == pytest.approx(
            [client.train(each.owned(), SHARDS[each.turn.device], network).loss for each in jobs], rel=1e-5
        )


def test_fewer_bits_on_a_card() -> None:
    """Matrices in 16 bits, AdamW, frozen tensors that devices do not share, and one that finishes before the other."""
    frozen, both = {"h.1.ffn.up.weight", "norm.weight"}, caff_jobs(spec(2), [1, 1], local=Local(batch_size=2, clip=0.5))
    plan = replace(both[0].plan, trains=both[0].plan.trains - frozen)
    jobs = [replace(job, plan=plan, arrays=weights(spec(2), seed)) for seed, job in enumerate(both)]
    wanted = train_stack(jobs, SHARDS, spec(2), Prefixes(0, 0), torch.bfloat16)
    for mine, theirs in zip(together(jobs, SHARDS, spec(2), torch.bfloat16), wanted, strict=True):
        assert (mine.turn, mine.steps) == (theirs.turn, theirs.steps)
        assert mine.loss == pytest.approx(theirs.loss, rel=1e-2)


def kept_on(device: torch.device, ram_bytes: int, disk_bytes: int) -> tuple[list[dict[str, bytes]], int, set[str]]:
    """Updates of two rounds, of which the second moved what trains; what was found, and where rows were kept."""
    prefixes, params, found = Prefixes(ram_bytes, disk_bytes), weights(spec(2)), []
    engine = StackedEngine(spec(2), SHARDS, 1, prefixes, device=device)
    for _ in range(2):
        jobs = caff_jobs(spec(2), [1, 1], params, ONCE)
        updates = list(engine.run(jobs))
        found += [bits(update.arrays) for update in updates]
        params = params | updates[0].arrays
    rows = (entry.rows.read(np.arange(2)) for entry in prefixes._entries.values())
    return found, prefixes.found, {str(each.device) for each in rows}


@pytest.mark.parametrize(("ram_bytes", "disk_bytes"), [(2**20, 0), (0, 2**20)], ids=["on the card", "in a file"])
def test_a_frozen_prefix_runs_once_on_a_card(ram_bytes: int, disk_bytes: int) -> None:
    with pretended():
        updates, found, where = kept_on(CARD, ram_bytes, disk_bytes)
        assert (updates, where) == (kept_on(CARD, 0, 0)[0], {"cuda:0"})
    assert found == kept_on(HOST, 2**20, 0)[1] == 5 + 3


def test_a_tensor_is_copied_once_and_goes_with_the_servers() -> None:
    placement, params = Placement(CARD), weights(spec(2))
    jobs = caff_jobs(spec(2), [1, 2], params)
    with pretended():
        first, second = (placement.job(job).arrays for job in jobs)
        assert all(first[name] is second[name] and first[name].is_cuda for name in params)
        assert len(placement._copies) == len(params)
        params = params | {"head.weight": params["head.weight"] + 1}
        later = placement.job(caff_jobs(spec(2), [1], params)[0]).arrays
        assert {name for name in params if later[name] is not first[name]} == {"head.weight"}
        del jobs, params
        gc.collect()
        assert len(placement._copies) == 0
    assert {name: p.device for name, p in Placement(HOST).job(caff_jobs(spec(2), [1])[0]).arrays.items()} != {}


def test_what_a_device_keeps_is_copied_for_its_job_alone() -> None:
    placement, job = Placement(CARD), caff_jobs(spec(1), [1])[0]
    with pretended():
        placed = placement.job(replace(job, arrays={}, state={"mine": torch.ones(2)}))
        assert placed.state["mine"].is_cuda and len(placement._copies) == 0


def test_a_card_takes_a_cohort_as_one_stack() -> None:
    jobs, shards = caff_jobs(spec(2), [1] * 20), [texts(4)] * 20
    assert [len(stack) for stack in stacks(jobs, spec(2), shards, CARD)] == [20]
    assert max(len(stack) for stack in stacks(jobs, spec(2), shards)) == 3
    many = [replace(job, local=Local(batch_size=2**13)) for job in jobs]  # 2^13 8 tokens, nearly 100 letters: 25 MB
    assert [len(stack) for stack in stacks(many, spec(2), [texts(2**13)] * 20, CARD)] == [10, 10]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Table:
    """Two rounds of three devices; two are evaluated."""
    local = {"optimizer": "sgd", "lr": 0.1, "steps": 2, "batch_size": 4}
    return write_world(tmp_path_factory.mktemp("world"), rounds=2, cohort=3, eval_every=1, eval_devices=2, local=local)


def test_a_run_on_a_card_is_the_run_on_the_host(world: Table, tmp_path: Path) -> None:
    world = world | {"engine": "serial", "method": {"name": "perfedmask", "personal_epochs": 1}}
    host = begin(world, tmp_path)
    host.play()
    with pretended():
        card = begin(world | {"device": "auto"}, tmp_path)
        assert (card.workers, str(card.device)) == (1, "cuda:0")
        card.play()
    assert outcome(card.folder) == outcome(host.folder)
    assert config.load_experiment(card.folder / "config.toml").device == "cuda:0"
    cards = [json.loads((run.folder / "env.json").read_text())["card"] for run in (card, host)]
    assert cards == ["pretended", None]


def test_stacks_on_a_card_make_the_run_of_the_host(world: Table, tmp_path: Path) -> None:
    host = begin(world, tmp_path)
    host.play()
    with pretended():
        card = begin(world | {"device": "cuda"}, tmp_path)
        card.play()
    for mine, theirs in zip(*(lines(run.folder / "rounds.jsonl") for run in (card, host)), strict=True):
        assert mine["prefix_reused"] == theirs["prefix_reused"] and mine["updates"] == theirs["updates"]
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
    for name, p in card.state.params.items():
        torch.testing.assert_close(p, host.state.params[name], rtol=1e-4, atol=1e-6)


def refusal(call: Callable[[], object]) -> str:
    with pytest.raises((UserError, ValueError)) as caught:
        call()
    return str(caught.value)


def test_refusals(world: Table, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    accepted = "accepted: auto, cpu, cuda, cuda:1"
    for given, near in (("tpu", "cpu"), ("coda", "cuda"), ("cuda:", "cuda:1")):
        wrong = refusal(lambda given=given: config.experiment(world | {"device": given}, "x"))  # type: ignore[misc]
        assert wrong == f"x: device: unknown {given!r}; did you mean {near!r}? {accepted}"
    assert refusal(lambda: config.experiment(world | {"device": "cuda", "enforce": True}, "x")) == (
        "x: enforce = true goes with device = \"cpu\", whose memory it limits; got 'cuda'"
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert refusal(lambda: begin(world | {"device": "cuda"}, tmp_path)) == (
        'device is "cuda", but torch sees no CUDA device; use "cpu" or "auto"'
    )
    assert not any(tmp_path.iterdir())
    assert place("auto") == place("cpu") == HOST
    with pretended():
        assert place("auto") == place("cuda") == place("cuda:0") == CARD
        assert refusal(lambda: place("cuda:1")) == (
            'device is "cuda:1", but the last card that torch sees is "cuda:0"; use "cpu" or "auto"'
        )


MIXED: dict[str, Callable[[Tensor, Tensor], object]] = {
    "add": lambda card, host: card + host,
    "mm": lambda card, host: torch.mm(host, card),
    "cat": lambda card, host: torch.cat([card, host]),
    "out": lambda card, host: torch.mm(card, card, out=host),
    "in place": lambda card, host: host.mul_(card),
    "index_select": lambda card, host: card.index_select(0, host[0].long()),
    "brackets": lambda card, host: host[card[0].long()],
    "stack": lambda card, host: torch.stack([card[0, 0], host[0, 0]]),
    "numpy": lambda card, host: card.numpy(),
}


@pytest.mark.parametrize("mixed", MIXED.values(), ids=MIXED)
def test_a_tensor_that_is_forgotten_is_found(mixed: Callable[[Tensor, Tensor], object]) -> None:
    with pretended():
        card, host = torch.ones(2, 2, device=CARD), torch.ones(2, 2)
        with pytest.raises((RuntimeError, TypeError)):
            mixed(card, host)
        host[0] = card[1] * 2 + host[0, 0]
        assert isinstance(card[host[0].long() - 3], OnCard) and host.tolist() == [[3, 3], [1, 1]]
