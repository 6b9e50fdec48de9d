"""Methods that cut depth, each against its rule written out: `pytest tests/test_depth.py`."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from support import TURN, WINDOW, Devices, Table, begin, bits, lines, moved, play, spec, weights, write_world
from torch import Tensor

from lamina import checkpoint, client, measure, model, ops
from lamina.cost import cost
from lamina.data.task import Pairs
from lamina.job import Job, Local, Turn
from lamina.layout import Params
from lamina.levers import Levers
from lamina.methods import Method, to_table
from lamina.methods.depth import DepthFL, first_blocks
from lamina.methods.full import FedAvg
from lamina.methods.growth import ProgFed, Slt
from lamina.plan import Plan, Vote, narrow
from lamina.planner import Fleet
from lamina.run import Run
from lamina.spec import Spec

SGD = Local(lr=1.0, optimizer="sgd", steps=1, batch_size=5)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Table:
    """An experiment on tiny-4 alone, with classes of devices without limits."""
    folder = tmp_path_factory.mktemp("depth")
    return write_world(folder, networks=[str(folder / "tiny-4")], cohort=6, fleet=[{"name": "strong"}])


def on(world: Table, method: Method, *memory: int, **changes: Any) -> Table:
    """The experiment with a method, and with classes of this much memory besides the one without limits."""
    weak = [{"name": f"weak{i}", "memory": size} for i, size in enumerate(memory)]
    return world | {"method": to_table(method), "fleet": [*world["fleet"], *weak]} | changes


def labelled(method: Method, blocks: int, memory: Params | None = None, turn: Turn = TURN) -> dict[str, Plan]:
    return {plan.label: plan for plan in method.plans(method.adapt(spec(blocks)), turn, memory or {})}


def price(method: Method, plan: Plan, local: Local, blocks: int = 4) -> int:
    return cost(method.adapt(spec(blocks)), plan, local, WINDOW, local.steps, method).memory_bytes


def local_of(world: Table) -> Local:
    return Local(**world["local"])


def playing(table: Table, folder: Path, rounds: int) -> tuple[Run, list[Devices]]:
    """A run after so many rounds, and the devices of each."""
    run, engines = begin(table, folder), []
    for _ in range(rounds):
        engines.append(Devices(run))
        run.state, _ = play(run, engines[-1])
    return run, engines


# Exits on a device


def written_out(network: Spec, params: Mapping[str, Tensor], batch: Tensor, ramp: float) -> Tensor:
    """sum_i CE(y, p_i) + ramp / (K - 1) sum_i sum_{j != i} KL(p_j || p_i), p_j constant where it teaches.

    The batch is inputs and targets.
    """
    (ids, targets), logs = batch, list[Tensor]()
    x = model.embed(network, params, ids)
    for i in model.found_blocks(network, params):
        x = model.run_blocks(network, params, x, [i])
        if f"exit.{i}.head.weight" in params:
            logs.append(model.Output(x, i, params).logits(network).log_softmax(-1).flatten(0, 1))
    if "head.weight" in params:
        logs.append(model.Output(x, network.blocks, params).logits(network).log_softmax(-1).flatten(0, 1))
    loss = sum((F.nll_loss(each, targets.flatten()) for each in logs), torch.zeros((), dtype=x.dtype))
    for i, student in enumerate(logs):
        for j, teacher in enumerate(logs):
            if i != j:
                p = teacher.detach().exp()
                loss = loss + ramp / (len(logs) - 1) * (p * (teacher.detach() - student)).sum(-1).mean()
    return loss


EVERY_BLOCK = DepthFL(alpha=0.0).adapt(spec(4))


def only(*prefixes: str, holds: int = 4) -> Plan:
    """Train what begins so; hold the first so many blocks with their exits."""
    layout = model.layout(EVERY_BLOCK)
    names = frozenset(n for n, row in layout.params.items() if holds == 4 or (row.block or 0) < holds)
    names -= layout.tail(0) if holds < 4 else frozenset()
    return Plan(names, frozenset(name for name in names if name.startswith(prefixes)), label=" ".join(prefixes))


PLANS = labelled(DepthFL(), 4) | {
    plan.label: plan
    for plan in (
        only("exit.0.", "exit.2.", "head."),
        only("exit.0.", "h.2."),
        only("exit.1.", "h.2.", "h.3.", "norm."),
        only("h.1.", "exit.1.norm", holds=3),
        only("h.0.attn", "exit.2.head"),
    )
}
STAGED = {
    "none": Levers(),
    "chunked": Levers(chunked_loss=True),
    "fused": Levers(fused_update=True),
    "recompute": Levers(recompute=True),
    "all": Levers(chunked_loss=True, fused_update=True, recompute=True),
}


@pytest.mark.parametrize("lever", STAGED.values(), ids=list(STAGED))
@pytest.mark.parametrize("plan", PLANS.values(), ids=list(PLANS))
def test_exits_get_the_gradient_of_the_loss_written_out(
    plan: Plan, lever: Levers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In double precision, in chunks of three tokens and slices of two sequences; with SGD at lr = 1 the step is it."""
    monkeypatch.setattr(ops, "SLICE_TOKENS", 14)
    monkeypatch.setattr(ops, "_CHUNK_ELEMENTS", 3 * EVERY_BLOCK.vocab)
    monkeypatch.setattr(ops, "_CHUNK_TOKENS", 1)
    params = {name: p.double() for name, p in weights(EVERY_BLOCK).items() if name in plan.holds}
    rows = np.random.default_rng(0).integers(0, EVERY_BLOCK.vocab, (2, 5, 7))
    turn = Turn(0, 1, 10)  # T = 3
    job = Job(turn, replace(plan, levers=lever), SGD, params, DepthFL(alpha=0.0))
    update = client.train(job.owned(), Pairs(*rows), EVERY_BLOCK)
    leaves = {name: p.clone().requires_grad_(name in plan.trains) for name, p in params.items()}
    seen = leaves if plan.first_trained(model.layout(EVERY_BLOCK)) < 2 else without_exit(leaves, 0)
    loss = written_out(EVERY_BLOCK, seen, torch.from_numpy(rows), math.exp(-5 * (1 - 1 / 3) ** 2))
    loss.backward()  # type: ignore[no-untyped-call]
    assert update.loss == pytest.approx(loss.item(), rel=1e-12)
    assert set(update.arrays) == plan.trains
    for name in plan.trains:
        grad = leaves[name].grad
        assert grad is not None and (grad.abs().max() > 1e-6 or name.endswith("k.bias")), name
        torch.testing.assert_close(params[name] - update.arrays[name], grad, rtol=1e-9, atol=1e-14, msg=name)


def without_exit(params: Params, at: int) -> Params:
    """An exit in the frozen part below all that trains has no say."""
    return {name: p for name, p in params.items() if not name.startswith(f"exit.{at}.")}


@pytest.mark.parametrize("lever", [Levers(), Levers(prefix_cache="ram"), Levers(fused_update=True, micro_batch=2)])
def test_a_frozen_prefix_ends_in_an_exit(lever: Levers) -> None:
    """Whose gradient needs nothing of the blocks below, cached or not."""
    plan, params = PLANS["exit.1. h.2. h.3. norm."], weights(EVERY_BLOCK)
    rows = np.random.default_rng(0).integers(0, EVERY_BLOCK.vocab, (2, 5, 7))
    leaves = without_exit({n: p.double().requires_grad_() for n, p in params.items()}, 0)
    loss = written_out(EVERY_BLOCK, leaves, torch.from_numpy(rows), 1.0)
    loss.backward()  # type: ignore[no-untyped-call]
    job = Job(TURN, replace(plan, levers=lever), SGD, params, DepthFL(alpha=0.0, ramp=0.0))
    arrays = client.train(job.owned(), Pairs(*rows), EVERY_BLOCK).arrays
    for name in plan.trains - {f"h.{i}.attn.k.bias" for i in range(4)}:
        grad = leaves[name].grad
        assert grad is not None
        torch.testing.assert_close((params[name] - arrays[name]).double(), grad, rtol=1e-4, atol=3e-7, msg=name)


def test_of_a_cached_prefix_no_exit_comes_into_memory() -> None:
    """Each tensor of the device is read once: those of the prefix there, and the others when it is through."""
    plan, read = replace(PLANS["exit.1. h.2. h.3. norm."], levers=Levers(prefix_cache="ram")), Counter[str]()

    class Noted(dict[str, Tensor]):
        def __getitem__(self, name: str) -> Tensor:
            read[name] += 1
            return super().__getitem__(name)

    rows = np.random.default_rng(0).integers(0, EVERY_BLOCK.vocab, (2, 5, 7))
    client.train(Job(TURN, plan, SGD, Noted(weights(EVERY_BLOCK)), DepthFL(alpha=0.0)), Pairs(*rows), EVERY_BLOCK)
    assert read == dict.fromkeys(plan.holds, 1)


NETWORKS = {  # network, batch, tokens
    "wide": (Spec(3, embed=48, heads=3, head_dim=16, ffn=192, vocab=70, positions=64), 4, 64),
    "wordy": (Spec(2, embed=32, heads=2, head_dim=16, ffn=64, vocab=1200, positions=64), 5, 64),
}
PRICED = STAGED | {
    "micro 3": Levers(micro_batch=3),
    "micro 1, chunked": Levers(micro_batch=1, chunked_loss=True),
    "everything": Levers(True, True, "disk", micro_batch=1, recompute=True, frozen_bits=8, optimizer="adafactor"),
}


@pytest.mark.parametrize("name", PRICED)
@pytest.mark.parametrize("method", [DepthFL(), DepthFL(alpha=0.0), ProgFed(), Slt(widths=3)], ids=repr)
def test_the_price_is_what_is_measured(method: Method, name: str) -> None:
    """Category by category; with exits, FedDyn, thin blocks, a head in the middle."""
    for i, (network, batch, tokens) in enumerate(NETWORKS.values()):
        adapted, local = method.adapt(network), Local(lr=0.1, batch_size=batch, steps=2, clip=float(i))
        plans = list(method.plans(adapted, TURN, {}))
        plan = replace(plans[i * (len(plans) // 2)], levers=PRICED[name])
        predicted = cost(adapted, plan, local, tokens, 2, method).memory
        measured = measure.watch(adapted, plan, local, tokens, method).peak()[0]
        assert sum(measured.values()) == pytest.approx(predicted.total, rel=0.001), plan.label
        for category, size in asdict(predicted).items():
            assert measured.get(category, 0) == pytest.approx(size, abs=0.002 * predicted.total), (category, plan.label)


# DepthFL


@pytest.mark.parametrize(("every", "exits"), [(1, (0, 1, 2)), (2, (1,)), (3, (2,)), (4, ()), (9, ())])
def test_depthfl_holds_and_trains_the_first_blocks_and_their_exits(every: int, exits: tuple[int, ...]) -> None:
    method = DepthFL(every=every)
    adapted = method.adapt(spec(4))
    assert adapted.exits == exits
    depths = [4, *(i + 1 for i in reversed(exits))]
    plans = list(method.plans(adapted, TURN, {}))
    assert [plan.label for plan in plans] == ["all 4", *(f"first {depth} of 4" for depth in depths[1:])]
    own = {"norm.weight", "norm.bias", "head.weight"}
    for depth, plan in zip(depths, plans, strict=True):
        assert (method.kept(adapted, plan), DepthFL(alpha=0.0).kept(adapted, plan)) == (plan.trains, frozenset())
        wanted = {
            n for i in range(depth) for n in model.layout(adapted).params if n.startswith((f"h.{i}.", f"exit.{i}."))
        }
        assert (
            plan.holds == plan.trains == wanted | {"embed.tokens", "embed.positions"} | (own if depth == 4 else set())
        )


def test_exits_start_as_the_pretrained_head(world: Table, tmp_path: Path) -> None:
    for method in (DepthFL(), ProgFed()):
        params = begin(on(world, method), tmp_path).state.params
        found = [name for name in params if name.startswith("exit.")]
        assert len(found) == 9
        for name in found:
            source = params[name.split(".", 2)[2]]
            assert torch.equal(params[name], source) and params[name].data_ptr() != source.data_ptr()


@pytest.mark.parametrize(
    ("ramp", "rounds", "expected"),
    [
        (0.3, 10, [0, 1 / 3, 2 / 3, 1, 1]),
        (1.0, 4, [0, 1 / 4, 1 / 2, 3 / 4]),
        (0.0, 9, [1, 1]),
        (0.3, 1000, [0, 1 / 300]),
    ],
)
def test_distillation_ramps_up(ramp: float, rounds: int, expected: list[float]) -> None:
    for t, done in enumerate(expected):
        job = Job(Turn(0, t, rounds), PLANS["all 4"], SGD, {}, DepthFL(ramp=ramp))
        assert job.method.objective(job).mutual == pytest.approx(math.exp(-5 * (1 - done) ** 2), rel=1e-12)


def test_depthfl_predicts_with_the_mean_of_its_exits(world: Table, tmp_path: Path) -> None:
    run, _ = playing(on(world, DepthFL()), tmp_path, 1)
    network, params = run.deployed()
    ids = torch.arange(12).reshape(2, 6)
    heads, x = [], model.embed(network, params, ids)
    for i in range(4):
        x = model.run_blocks(network, params, x, [i])
        heads.append(model.Output(x, i if i < 3 else network.blocks, params).logits(network))
    torch.testing.assert_close(model.forward(network, params, ids), (heads[0] + heads[1] + heads[2] + heads[3]) / 4)


def device_by_hand(
    run: Run, job: Job, w: dict[str, np.ndarray], h: dict[str, np.ndarray], alpha: float, ramp: float
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Descend on F(w) - <h, w> + alpha / 2 |w - w_t|^2; then h - alpha (w - w_t). NumPy but for the gradient of F."""
    start, shard, network = dict(w), run.task.train[job.turn.device], run.outlook.chosen.spec
    for rows in job.local.batches(job.turn, len(shard)):
        leaves = {name: torch.from_numpy(p).requires_grad_() for name, p in w.items()}
        batch = torch.from_numpy(np.stack(shard.batch(rows)))
        written_out(network, leaves, batch, ramp).backward()  # type: ignore[no-untyped-call]
        grads = {name: leaf.grad.numpy() for name, leaf in leaves.items() if leaf.grad is not None}
        w = {n: p - job.local.lr * (grads[n] - h[n] + alpha * (p - start[n])) for n, p in w.items()}
    return w, {n: h[n] - alpha * (p - start[n]) for n, p in w.items()}


@pytest.mark.parametrize("drifts", [False, True])
@pytest.mark.parametrize("absent", ["skip", "keep"])
def test_depthfl_by_hand(absent: str, drifts: bool, world: Table, tmp_path: Path) -> None:
    """Four rounds of cohorts of four out of six devices, of which three hold two blocks, in double precision.

    With absent = "keep" those who did not train a tensor count as having sent it back, in the mean and in n. Where
    memory differs from round to round, these three hold two blocks or all, and keep h_c of what they do not hold.
    """
    alpha, method = 0.7, DepthFL(alpha=0.7, ramp=0.5, absent=absent)  # type: ignore[arg-type]
    local = Local(lr=0.1, optimizer="sgd", steps=2, batch_size=4)
    weak = price(method, labelled(method, 4)["first 2 of 4"], local)
    table = on(world, method, weak, local=asdict(local), cohort=4, rounds=4)
    if drifts:
        best = 2 * price(method, labelled(method, 4)["all 4"], local)
        table["fleet"] = [table["fleet"][0], table["fleet"][1] | {"memory": best, "drift": 1 - (weak + 1) / best}]
    run, engines = playing(table, tmp_path, 4)
    plans = {(job.turn.device, job.plan.label) for each in engines for job in each.jobs}
    assert {label for _, label in plans} - {"first 3 of 4"} == {"all 4", "first 2 of 4"}
    assert (len({device for device, _ in plans}) < len(plans)) == drifts
    w = {name: p.double().numpy() for name, p in begin(run.experiment.to_table(), tmp_path).state.params.items()}
    server = {name: np.zeros_like(p) for name, p in w.items()}
    devices: dict[int, dict[str, np.ndarray]] = {}
    for t, engine in enumerate(engines):
        ramp, answers = math.exp(-5 * (1 - min(t, 2) / 2) ** 2), []
        for job in engine.jobs:
            held = {name: w[name] for name in w if name in job.plan.trains}
            before = devices.get(job.turn.device, {})
            h = {name: before.get(name, np.zeros_like(p)) for name, p in held.items()}
            answer, now = device_by_hand(run, job, held, h, alpha, ramp)
            devices[job.turn.device] = before | now
            answers.append(answer)
        for name in {name for answer in answers for name in answer}:
            sent = [answer.get(name, w[name]) for answer in answers if absent == "keep" or name in answer]
            mean = sum(sent) / len(sent)
            server[name] = server[name] - alpha * len(sent) * (mean - w[name]) / 6
            w[name] = mean - server[name] / alpha
    assert sorted(run.state.devices) == sorted(devices)
    for name, p in w.items():
        torch.testing.assert_close(run.state.params[name].double(), torch.from_numpy(p), rtol=1e-4, atol=2e-5, msg=name)
        got = run.state.memory[name].double()
        torch.testing.assert_close(got, torch.from_numpy(server[name]), rtol=1e-4, atol=2e-5, msg=name)
        for device, state in devices.items():
            if name in state:
                got = run.state.devices[device][name].double()
                torch.testing.assert_close(got, torch.from_numpy(state[name]), rtol=1e-4, atol=2e-5, msg=name)


def test_depthfl_leaves_what_nobody_trained(world: Table, tmp_path: Path) -> None:
    """Also where h would move it."""
    method = DepthFL()
    weak = price(method, labelled(method, 4)["first 1 of 4"], local_of(world))
    run = begin(on(world, method, weak), tmp_path)
    state, _ = play(run)
    answers = {device: group for device, group in enumerate(run.outlook.class_of)}
    only_weak = Devices(run, lambda update: [update] if answers[update.turn.device] else [])
    after, _ = play(run, only_weak, state)
    shallow = labelled(method, 4)["first 1 of 4"].trains
    assert moved(state.params, after.params) == shallow
    assert moved(state.memory, after.memory) == shallow
    assert float(state.memory["h.3.ffn.up.weight"].abs().max()) > 0


def test_depthfl_counts_the_devices_that_take_part(world: Table, tmp_path: Path) -> None:
    method = DepthFL(on_infeasible="drop")
    assert begin(on(world, method), tmp_path).state.memory["devices"] == 6
    assert begin(on(world, method, 1000), tmp_path).state.memory["devices"] == 3


def test_depthfl_without_alpha_is_plain_averaging(world: Table, tmp_path: Path) -> None:
    method = DepthFL(alpha=0.0)
    run, (engine,) = playing(on(world, method), tmp_path, 1)
    assert not run.state.memory and not run.state.devices
    answers = [engine.train(job).arrays for job in engine.jobs]
    for name, p in run.state.params.items():
        mean = torch.stack([answer[name].double() for answer in answers]).mean(0)
        torch.testing.assert_close(p.double(), mean, rtol=1e-6, atol=1e-7, msg=name)


def test_a_device_changes_no_state_but_its_own(world: Table, tmp_path: Path) -> None:
    """What it was given stays, so that an update that is not used leaves no trace."""
    engine = playing(on(world, DepthFL()), tmp_path, 2)[1][1]
    job = engine.jobs[0]
    before = bits(job.state)
    assert before and bits(engine.train(job).state) != before == bits(job.state)


# ProgFed


def stages(method: ProgFed, rounds: int, blocks: int = 4, reached: int = 4) -> list[str]:
    memory = {"stages": torch.tensor(reached)}
    return [next(iter(labelled(method, blocks, memory, Turn(0, t, rounds)))) for t in range(rounds)]


def test_the_network_grows_as_in_the_paper() -> None:
    """3000 rounds, four stages that begin every 375 = 3000 / (2 * 4) of them, the first 25 of which warm up."""
    found = stages(ProgFed(), 3000)
    changes = [0, *(t for t in range(1, 3000) if found[t] != found[t - 1])]
    assert {t: found[t] for t in changes} == {
        0: "first 1 of 4",
        375: "first 2 of 4, new ones alone",
        400: "first 2 of 4",
        750: "first 3 of 4, new ones alone",
        775: "first 3 of 4",
        1125: "all 4, new ones alone",
        1150: "all 4",
    }


@pytest.mark.parametrize(
    ("method", "rounds", "blocks", "reached", "expected"),
    [
        (ProgFed(), 10, 4, 4, "1 1 2 3 4* 4 4 4 4 4"),  # a stage takes 1.25; those of one round have no warm-up
        (ProgFed(), 20, 4, 4, "1 1 1 2* 2 3* 3 3 4* 4 4 4 4 4 4 4 4 4 4 4"),
        (ProgFed(stages=2, warmup=0.4), 10, 4, 2, "2 2 2 4* 4 4 4 4 4 4"),
        (ProgFed(stages=2, growth=1.0, warmup=0.4), 10, 4, 2, "2 2 2 2 2 4* 4* 4 4 4"),
        (ProgFed(stages=2, growth=0.0), 3, 4, 2, "4* 4 4"),
        (ProgFed(warmup=0.0), 10, 4, 2, "1 1 2 2 2 2 2 2 2 2"),  # of four stages, all can do two
        (ProgFed(stages=3, warmup=0.0), 6, 7, 3, "2 4 7 7 7 7"),
        (ProgFed(stages=9, warmup=0.0), 4, 2, 2, "1 2 2 2"),  # no more stages than blocks
        (ProgFed(), 1, 4, 4, "1"),
        (ProgFed(stages=2, growth=0.14, warmup=0.0), 100, 4, 2, " ".join("2" * 7 + "4" * 93)),  # 0.14 * 100 > 14
    ],
)
def test_stages_of_short_runs(method: ProgFed, rounds: int, blocks: int, reached: int, expected: str) -> None:
    found = [label.replace("all", "first").split() for label in stages(method, rounds, blocks, reached)]
    assert " ".join(words[1].rstrip(",") + "*" * ("alone" in words) for words in found) == expected


def test_a_stage_holds_its_blocks_and_has_a_head_of_its_own() -> None:
    method, memory = ProgFed(stages=2), {"stages": torch.tensor(2)}
    adapted = method.adapt(spec(4))
    assert adapted.exits == (1,)
    layout = model.layout(adapted)

    def found(*prefixes: str) -> set[str]:
        return {name for name in layout.params if name.startswith(prefixes)}

    first, warm, last = (next(method.plans(adapted, Turn(0, t, 40), memory)) for t in (0, 10, 39))
    assert first.holds == first.trains == found("embed.", "h.0.", "h.1.", "exit.1.")
    assert warm.holds == last.holds == last.trains == found("embed.", "h.", "norm.", "head.")
    assert warm.trains == found("h.2.", "h.3.", "norm.", "head.")
    assert method.peak_rounds(40) == (39,)


def test_the_fleet_stops_growing_where_a_class_cannot_follow(world: Table, tmp_path: Path) -> None:
    """The network that is handed out is that of the last stage, in memory and on disk."""
    method = ProgFed(warmup=0.0)
    of_stage = {name: price(method, plan, local_of(world)) for name, plan in labelled(method, 4).items()}
    table = on(world, method, of_stage["first 3 of 4"], of_stage["first 2 of 4"] + 1, rounds=6)
    run, engines = playing(table, tmp_path, 6)
    assert run.state.memory == {"stages": 2}
    assert [{job.plan.label for job in engine.jobs} for engine in engines] == 1 * [{"first 1 of 4"}] + 5 * [
        {"first 2 of 4"}
    ]
    whole = begin(table, tmp_path)
    whole.play()
    network, params = checkpoint.load(whole.folder / "model")
    assert network == spec(2)
    deployed, wanted = whole.deployed()
    assert deployed == network and bits(params) == bits(wanted)
    assert not (whole.folder / "model" / checkpoint.OURS).exists()
    assert whole.state.params["exit.1.head.weight"].equal(params["head.weight"])


def test_what_is_handed_out_is_what_a_device_of_the_stage_trains() -> None:
    method, memory = ProgFed(), {"stages": torch.tensor(4)}
    adapted = method.adapt(spec(4))
    params, ids = weights(adapted), torch.arange(12).reshape(2, 6)
    for t in range(10):
        plan = next(method.plans(adapted, Turn(0, t, 10), memory))
        of_device = model.forward(adapted, narrow(params, model.layout(adapted), plan), ids)
        assert torch.equal(model.forward(*method.deploy(adapted, params, Turn(0, t, 10), memory), ids), of_device)


def test_heads_of_stages_that_are_over_stay(world: Table, tmp_path: Path) -> None:
    run, _ = playing(on(world, ProgFed(stages=2), rounds=4), tmp_path, 1)
    first = run.state.params
    for _ in range(3):
        run.state, _ = play(run)
    assert moved(first, run.state.params) == {name for name in first if not name.startswith("exit.")}


# Successive layer training


def fleet_of(method: Slt, blocks: int, *budgets: int | None, local: Local) -> Fleet:
    """Classes of one device each with these budgets."""

    def fits(group: int, plan: Plan) -> bool:
        limit = budgets[group]
        return limit is None or price(method, plan, local, blocks) <= limit

    plans = tuple(next((p for p in labelled(method, blocks).values() if fits(g, p)), None) for g in range(len(budgets)))
    return Fleet(list(range(len(budgets))), plans, fits)


def configurations(method: Slt, fleet: Fleet, blocks: int = 4) -> list[tuple[int, float]]:
    memory = method.prepare(spec(blocks), {}, fleet, TURN)
    return [(int(whole), width) for whole, width in memory["configurations"].tolist()]


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("share", [0.55, 0.7, 0.8, 0.9])
def test_widths_are_the_largest_that_fit_the_weakest(share: float, depth: int, world: Table) -> None:
    """Against trying all widths of each configuration; none is wider than the next, and the first whole one ends."""
    method, local = Slt(widths=16, training_depth=depth), replace(local_of(world), batch_size=2)
    full = price(FedAvg(), labelled(FedAvg(), 4)["all 4"], local)
    fleet = fleet_of(method, 4, None, int(share * full), full, local=local)
    widest: dict[int, int] = {}
    for whole in range(5):
        plans = {k: method._plan(spec(4), whole, k / 16, depth) for k in range(1, 17)}
        fitting = [k for k, plan in plans.items() if price(method, plan, local) <= int(share * full)]
        if fitting:
            widest[whole] = max(fitting)
    expected = [(whole, min(k for other, k in widest.items() if other >= whole) / 16) for whole in widest]
    ends = [i for i, (_, width) in enumerate(expected) if width == 1]
    found = configurations(method, fleet)
    assert found == expected[: ends[0] + 1 if ends else None]
    assert found[0][0] == 0 and found[0][1] < 1
    assert all(lower <= upper for (_, lower), (_, upper) in pairwise(found))


def test_configurations_that_a_class_cannot_train_are_left_out(world: Table) -> None:
    method, local = Slt(widths=8), replace(local_of(world), batch_size=2)
    thinnest = price(method, list(labelled(method, 4).values())[-1], local)
    for whole in (1, 2, 3):
        assert price(method, method._plan(spec(4), whole, 1 / 8, 1), local) > thinnest
    assert configurations(method, fleet_of(method, 4, thinnest, local=local)) == [(0, 1 / 8), (4, 1.0)]
    with_nobody = fleet_of(method, 4, None, thinnest - 1, local=local)
    assert with_nobody.plans[1] is None
    assert configurations(method, with_nobody) == [(0, 1.0)]


def test_what_a_configuration_holds_and_trains() -> None:
    """Two of four blocks whole: the last of them trains, then the thin ones and the head."""
    layout = model.layout(spec(4))
    memory = {"configurations": torch.tensor([[0, 0.5], [2, 0.6]], dtype=torch.float64)}
    first, *none = Slt().plans(spec(4), Turn(0, 0, 10), memory)
    assert not none and first.trains == first.holds == set(layout.params)
    assert first.label == "all 4, the last 4 at 50%"
    deeper, plan = Slt().plans(spec(4), Turn(0, 9, 10), memory)
    assert plan.holds == deeper.holds == set(layout.params)
    tail = {"norm.weight", "norm.bias", "head.weight"}
    assert plan.trains == {n for n in layout.params if n.startswith(("h.1.", "h.2.", "h.3."))} | tail
    assert deeper.trains == set(layout.params)  # a stronger device trains more of the whole blocks
    assert plan.label == "last 3 of 4, the last 2 at 60%"
    for each in (deeper, plan):  # of two heads both, as of 64 units 39, since shares are rounded up
        assert {axis: kept.count for axis, kept in each.keep.items()} == {"h.2.ffn": 39, "h.3.ffn": 39}
    assert {axis: kept.count for axis, kept in first.keep.items()} == {
        f"h.{i}.{axis}": count for i in range(4) for axis, count in (("heads", 1), ("ffn", 32))
    }
    assert all(kept.start == 0 and kept.units is None for kept in first.keep.values())


def test_no_width_is_listed_twice() -> None:
    """Of 100 widths, 64 units and two heads: each is cheaper than the one before."""
    prices = [price(Slt(), plan, SGD) for plan in Slt().plans(spec(4), TURN, {})]
    assert len(prices) == 64 and all(cheaper < richer for richer, cheaper in pairwise(prices))


def test_rounds_of_configurations_by_hand() -> None:
    """Widths 1/2, 1/2, 3/4 and 1 of 64 units and two heads, 100 rounds.

    The final norm and the head have 1568 scalars, the embeddings 2048.
    """
    memory = {"configurations": torch.tensor([[0, 0.5], [1, 0.5], [2, 0.75], [3, 1.0]], dtype=torch.float64)}

    def block(heads: int, units: int) -> int:
        query_key_value, out = 3 * (8 * heads * 16 + 8 * heads), 16 * 8 * heads + 16
        return query_key_value + out + (units * 16 + units) + (16 * units + 16) + 4 * 16

    assert block(2, 64) == 3280
    sizes = [
        2048 + 4 * block(1, 32) + 1568,
        2048 + block(2, 64) + 3 * block(1, 32) + 1568,  # nothing lies below the one whole block
        block(2, 64) + 2 * block(2, 48) + 1568,
        block(2, 64) + block(2, 64) + 1568,
    ]
    for first, alone, shared in (("width", 50, sizes[1:]), ("share", 0, sizes)):
        method = Slt(first=first)  # type: ignore[arg-type]
        ends = [alone + (100 - alone) * part // sum(shared) for part in np.cumsum(shared).tolist()]
        ends = [alone, *ends] if first == "width" else ends
        found = [method._configuration(spec(4), Turn(0, t, 100), memory)[0] for t in range(100)]
        assert found == [sum(t >= end for end in ends) for t in range(100)]
        assert set(found) == {0, 1, 2, 3}


def test_what_is_handed_out_is_the_thin_network(tmp_path: Path) -> None:
    """As the device has it, and after a detour through the Hugging Face layout, in which all blocks are alike."""
    memory = {"configurations": torch.tensor([[0, 0.3], [2, 0.4], [3, 1.0]], dtype=torch.float64)}
    method, params, ids = Slt(), weights(spec(4)), torch.arange(12).reshape(2, 6)
    for t, thin in ((0, True), (5, True), (9, False)):
        plan = list(method.plans(spec(4), Turn(0, t, 10), memory))[-1]
        network, padded = method.deploy(spec(4), params, Turn(0, t, 10), memory)
        held = narrow(params, model.layout(spec(4)), plan)
        logits = model.forward(spec(4), held, ids)
        torch.testing.assert_close(model.forward(network, padded, ids), logits, rtol=1e-5, atol=1e-6)
        assert thin == (not torch.allclose(model.forward(spec(4), params, ids), logits, atol=1e-3))
        checkpoint.write(tmp_path / str(t), network, padded, torch.float32, {})
        loaded = model.forward(*checkpoint.load(tmp_path / str(t)), ids)
        torch.testing.assert_close(loaded, logits, rtol=1e-5, atol=1e-6)
    assert bits(params) == bits(weights(spec(4)))


def test_block_after_block_trains_and_freezes(world: Table, tmp_path: Path) -> None:
    """A fleet of a weak and a strong class; what a configuration leaves out does not move in its rounds."""
    method = Slt(widths=8, first="share")
    local = replace(local_of(world), batch_size=2)
    full = price(FedAvg(), labelled(FedAvg(), 4)["all 4"], local)
    table = on(world, method, int(0.75 * full), local=world["local"] | {"batch_size": 2}, rounds=12)
    run = begin(table, tmp_path)
    found = [tuple(each) for each in run.state.memory["configurations"].tolist()]
    assert len(found) > 2 and found[-1][1] == 1 > found[0][1]
    layout, seen = model.layout(spec(4)), []
    for t in range(12):
        engine, before = Devices(run), run.state.params
        run.state, rows = play(run, engine)
        whole, width = method._configuration(spec(4), Turn(0, t, 12), run.state.memory)
        seen.append((whole, width))
        deepest = {group: max(row.trained_blocks for row in rows if row.group == group) for group in (0, 1)}
        assert deepest == {0: 4, 1: 4 - max(0, whole - 1)}
        assert moved(before, run.state.params) == set().union(*(job.plan.trains for job in engine.jobs))
        for name, plan in ((name, job.plan) for job in engine.jobs for name in job.plan.trains):
            index, outside = plan.index(layout, name), torch.ones(before[name].shape, dtype=torch.bool)
            outside[... if index is None else index] = False
            assert torch.equal(before[name][outside], run.state.params[name][outside])
    assert [each for i, each in enumerate(seen) if i == 0 or each != seen[i - 1]] == found


def test_slt_without_limits_is_federated_averaging(world: Table, tmp_path: Path) -> None:
    slt, _ = playing(on(world, Slt()), tmp_path, 2)
    fedavg, _ = playing(on(world, FedAvg(weighting="uniform")), tmp_path, 2)
    assert bits(slt.state.params) == bits(fedavg.state.params)


# All of them


@pytest.mark.parametrize("method", [DepthFL(), ProgFed(), Slt()], ids=["depthfl", "progfed", "slt"])
def test_before_the_first_round_there_is_the_pretrained_network(method: Method, world: Table, tmp_path: Path) -> None:
    network, params = begin(on(world, method), tmp_path).deployed()
    assert network == spec(4)
    assert bits(params) == bits(checkpoint.load(Path(world["networks"][0]))[1])


@pytest.mark.parametrize("method", [DepthFL(), ProgFed(), Slt(widths=4)], ids=["depthfl", "progfed", "slt"])
def test_the_loss_falls_and_the_network_is_written(method: Method, world: Table, tmp_path: Path) -> None:
    """Exits go beside it, and are left out where it is read."""
    middle = list(labelled(method, 4).values())[2]
    local = world["local"] | {"lr": 0.01, "steps": 6}
    weak = price(method, middle, Local(**local))
    run = begin(on(world, method, weak, local=local, rounds=6), tmp_path)
    run.play()
    losses = [line["loss"] for line in lines(run.folder / "rounds.jsonl")]
    assert losses[-1] < losses[0] - 0.2
    network, params = run.deployed()
    folder = run.folder / "model"
    assert bits(checkpoint.load(folder)[1]) == bits(first_blocks(network, params, network.blocks)[1])
    assert (folder / checkpoint.OURS).exists() == bool(network.exits) == isinstance(method, DepthFL)
    if network.exits:
        beside = load_file(folder / checkpoint.OURS)
        assert bits(beside) == bits({name: p for name, p in params.items() if name.startswith("exit.")})


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        *((DepthFL, each) for each in ({"every": 0}, {"alpha": -0.1}, {"ramp": -0.1}, {"ramp": 1.1})),
        *((ProgFed, each) for each in ({"stages": 0}, {"growth": -0.1}, {"growth": 1.1}, {"warmup": 1.0})),
        *((ProgFed, {"warmup": -0.1}), (Slt, {"training_depth": 0}), (Slt, {"widths": 0})),
    ],
    ids=str,
)
def test_values_that_mean_nothing_are_refused(method: type[Method], settings: dict[str, Any]) -> None:
    ((key, value),) = settings.items()
    with pytest.raises(ValueError, match=rf"^{key} must .*, got {value}$"):
        method(**settings)


def test_server_step_of_depthfl_in_five_numbers() -> None:
    """N = 4, alpha = 1/2, w = 1; two devices send 3 and 7: m = 5, h = 0 - 1/2 * 2 * 4 / 4 = -1, w = 5 + 2 = 7.

    Then one sends 3: m = 3, h = -1 - 1/2 * 1 * (3 - 7) / 4 = -1/2, w = 3 + 1 = 4.
    """
    method, name = DepthFL(alpha=0.5), "h.0.attn.q.bias"
    adapted = method.adapt(spec(1))
    params = {n: torch.ones_like(p) for n, p in weights(adapted).items()}
    memory: Params = {n: torch.zeros_like(p) for n, p in params.items()} | {"devices": torch.tensor(4)}
    plan = Plan(frozenset(params), frozenset({name}))
    for sent, h, w in (((3.0, 7.0), -1.0, 7.0), ((3.0,), -0.5, 4.0)):
        votes = [Vote(i, plan, {name: torch.full_like(params[name], value)}, 1.0) for i, value in enumerate(sent)]
        params, memory = method.merge(params, adapted, votes, TURN, memory)
        assert set(memory[name].flatten().tolist()) == {h}
        assert set(params[name].flatten().tolist()) == {w}
    assert all(set(p.flatten().tolist()) == {1.0} for n, p in params.items() if n != name)
