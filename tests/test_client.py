"""The device against steps written by hand, and the batches it runs through."""

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support import TURN, VARIANTS, begin, bits, moved, spec, suited, weights, write_world
from torch import Tensor

from lamina import client, model, optim
from lamina.data.task import Pairs, Shard
from lamina.job import Job, Local, Turn, Update
from lamina.layout import Params
from lamina.levers import Levers
from lamina.methods.blocks import Caff
from lamina.plan import Plan, narrow

SGD = Local(lr=0.3, optimizer="sgd", steps=1, batch_size=4)
SPEC, PARAMS = spec(3), weights(spec(3))
PLANS = {plan.label: plan for plan in Caff().plans(SPEC, TURN, {})}
every_plan = pytest.mark.parametrize("plan", PLANS.values(), ids=list(PLANS))


@pytest.fixture(scope="module")
def shard(tmp_path_factory: pytest.TempPathFactory) -> Shard:
    """The windows of one device."""
    folder = tmp_path_factory.mktemp("client")
    return begin(write_world(folder), folder / "runs").task.train[0]


def job(plan: Plan, local: Local, turn: Turn = TURN) -> Job:
    return Job(turn, plan, local, narrow(PARAMS, model.layout(SPEC), plan))


def batches(shard: Shard, local: Local, turn: Turn = TURN) -> list[tuple[Tensor, Tensor]]:
    """The device's batches, inputs and targets."""
    picked = (shard.batch(rows) for rows in local.batches(turn, len(shard)))
    return [(torch.from_numpy(ids), torch.from_numpy(targets)) for ids, targets in picked]


def gradient(params: Params, plan: Plan, batch: tuple[Tensor, Tensor]) -> tuple[Params, float]:
    """Gradient and loss with the graph over the whole network."""
    leaves = {name: p.detach().clone().requires_grad_() for name, p in params.items()}
    logits_BSV = model.forward(SPEC, leaves, batch[0])
    loss = F.cross_entropy(logits_BSV.transpose(1, 2), batch[1])
    loss.backward()  # type: ignore[no-untyped-call]
    grads = {name: leaf.grad for name, leaf in leaves.items() if name in plan.trains}
    return {name: grad for name, grad in grads.items() if grad is not None}, loss.item()


def agree(update: Update, expected: Params) -> None:
    assert set(update.arrays) == set(expected)
    for name, tensor in update.arrays.items():
        assert torch.allclose(tensor, expected[name], rtol=1e-5, atol=1e-6), name


@every_plan
def test_a_step_of_sgd_by_hand(plan: Plan, shard: Shard) -> None:
    """w - lr (g + decay w), for what the plan trains."""
    local = replace(SGD, weight_decay=0.1)
    update = client.train(job(plan, local).owned(), shard, SPEC)
    grads, loss = gradient(PARAMS, plan, batches(shard, local)[0])
    agree(update, {name: PARAMS[name] - 0.3 * (g + 0.1 * PARAMS[name]) for name, g in grads.items()})
    assert update.loss == pytest.approx(loss, rel=1e-6)
    assert (update.turn, update.examples, update.steps) == (TURN, len(shard), 1)


@dataclass(frozen=True)
class Turning:
    """Windows that are read from elsewhere in each turn, as images that are moved and turned over."""

    windows: Pairs
    first: int = 0

    def __len__(self) -> int:
        return len(self.windows)

    def batch(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return self.windows.batch((rows + self.first) % len(self))

    def at(self, turn: Turn) -> "Turning":
        return Turning(self.windows, 1 + turn.round)


@pytest.mark.parametrize("levers", [Levers(), Levers(prefix_cache="ram")], ids=["plain", "cached"])
def test_examples_are_those_of_the_turn(levers: Levers, shard: Shard) -> None:
    plan, turning = replace(PLANS["last 1 of 3"], levers=levers), Turning(Pairs(*shard.batch(np.arange(len(shard)))))
    asked = job(plan, replace(SGD, steps=2), Turn(seed=0, round=3, rounds=5))
    update = client.train(asked.owned(), turning, SPEC)
    agree(update, client.train(asked.owned(), Pairs(*turning.at(asked.turn).batch(np.arange(len(shard)))), SPEC).arrays)
    assert "head.weight" in moved(update.arrays, client.train(asked.owned(), turning.windows, SPEC).arrays)


def test_momentum_by_hand(shard: Shard) -> None:
    """v <- 0.9 v + g; w <- w - lr v, three times from v = 0; the loss is the mean over the steps."""
    local, plan = replace(SGD, momentum=0.9, steps=3, lr=0.1), PLANS["last 2 of 3"]
    update = client.train(job(plan, local).owned(), shard, SPEC)
    params, velocity, losses = dict(PARAMS), dict.fromkeys(plan.trains, torch.zeros(())), []
    for batch in batches(shard, local):
        grads, loss = gradient(params, plan, batch)
        velocity = {name: 0.9 * velocity[name] + g for name, g in grads.items()}
        params |= {name: params[name] - 0.1 * v for name, v in velocity.items()}
        losses.append(loss)
    agree(update, {name: params[name] for name in plan.trains})
    assert update.loss == pytest.approx(np.mean(losses), rel=1e-5)
    assert update.steps == 3


def test_a_step_of_adamw_by_hand(shard: Shard) -> None:
    """Both moments are bias-corrected to g and g^2 at the first step: w (1 - lr decay) - lr g / (|g| + 1e-8)."""
    local, plan = Local(lr=0.01, steps=1, batch_size=4, weight_decay=0.5), PLANS["last 1 of 3"]
    update = client.train(job(plan, local).owned(), shard, SPEC)
    grads, _ = gradient(PARAMS, plan, batches(shard, local)[0])
    expected = {name: PARAMS[name] * (1 - 0.01 * 0.5) - 0.01 * g / (g.abs() + 1e-8) for name, g in grads.items()}
    large = {name for name, g in grads.items() if g.abs().min() > 1e-6}  # elsewhere rounding decides the sign
    assert len(large) > 3
    agree(replace(update, arrays={name: update.arrays[name] for name in large}), {n: expected[n] for n in large})


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_weight_decay_never_touches_what_is_frozen(optimizer: Any, shard: Shard) -> None:
    local, plan = Local(lr=0.1, optimizer=optimizer, steps=4, batch_size=4, weight_decay=0.9), PLANS["last 1 of 3"]
    asked = job(plan, local)
    before = bits(asked.arrays)
    with_decay = client.train(asked.owned(), shard, SPEC)
    without = client.train(replace(asked, local=replace(local, weight_decay=0.0)).owned(), shard, SPEC)
    assert bits(asked.arrays) == before
    assert set(with_decay.arrays) == plan.trains < plan.holds
    assert sum(p.norm() for p in with_decay.arrays.values()) < sum(p.norm() for p in without.arrays.values())


@every_plan
def test_clipping_bounds_the_whole_step(plan: Plan, shard: Shard) -> None:
    """With SGD at lr = 1 the step is the clipped gradient."""
    local = replace(SGD, lr=1.0, clip=0.05)
    update = client.train(job(plan, local).owned(), shard, SPEC)
    grads, _ = gradient(PARAMS, plan, batches(shard, local)[0])
    norm = math.sqrt(sum(float(g.square().sum()) for g in grads.values()))
    assert norm > 0.05
    agree(update, {name: PARAMS[name] - g * 0.05 / norm for name, g in grads.items()})


def test_clipping_leaves_shorter_gradients_alone(shard: Shard) -> None:
    plain, clipped = (
        client.train(job(PLANS["all 3"], replace(SGD, steps=3, clip=clip)).owned(), shard, SPEC) for clip in (0.0, 1e6)
    )
    assert bits(plain.arrays) == bits(clipped.arrays)


def test_a_round_uses_the_learning_rate_of_the_round(shard: Shard) -> None:
    local, turn = replace(SGD, schedule="cosine"), Turn(seed=0, round=4, rounds=5, device=0)
    update = client.train(job(PLANS["all 3"], local, turn).owned(), shard, SPEC)
    constant = replace(local, schedule="constant", lr=local.round_lr(turn))
    assert bits(update.arrays) == bits(client.train(job(PLANS["all 3"], constant, turn).owned(), shard, SPEC).arrays)
    assert constant.lr == pytest.approx(0.03)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "adamw8", "adafactor"])
@pytest.mark.parametrize("fused", [False, True])
def test_the_head_may_have_a_rate_of_its_own(shard: Shard, optimizer: Any, fused: bool) -> None:
    plan = replace(PLANS["all 3"], levers=replace(PLANS["all 3"].levers, fused_update=fused))
    turn = Turn(seed=0, round=0, rounds=2, device=0)

    def trained(lr: float, head_lr: float = 0) -> Params:
        local = Local(lr, head_lr, optimizer, steps=1, batch_size=4)
        return client.train(job(plan, local, turn).owned(), shard, SPEC).arrays

    fast, slow, both = trained(lr=0.03), trained(lr=0.001), trained(lr=0.001, head_lr=0.03)
    assert bits(both) == bits({name: (fast if name == "head.weight" else slow)[name] for name in both})
    assert bits(fast) != bits(slow)


def test_the_cosine_goes_from_lr_to_a_tenth_of_it() -> None:
    local = Local(lr=2.0, schedule="cosine")
    rates = [local.round_lr(Turn(0, round_, 9)) for round_ in range(9)]
    assert [rates[0], rates[4], rates[8]] == pytest.approx([2.0, 1.1, 0.2])
    assert rates == sorted(rates, reverse=True)
    assert local.round_lr(Turn(0, 0, 1)) == 2.0
    assert Local(lr=2.0).round_lr(Turn(0, 7, 9)) == 2.0
    assert replace(local, head_lr=20.0).round_lr(Turn(0, 8, 9), head=True) == pytest.approx(2.0)


def test_devices_are_stateless(shard: Shard) -> None:
    asked = job(PLANS["last 2 of 3"], Local(lr=0.01, steps=3, batch_size=4))
    first, second = (client.train(asked.owned(), shard, SPEC) for _ in range(2))
    assert bits(first.arrays) == bits(second.arrays)
    assert first.loss == second.loss
    other = client.train(replace(asked, turn=replace(TURN, round=1)).owned(), shard, SPEC)
    assert moved(first.arrays, other.arrays) == set(first.arrays)


@pytest.mark.parametrize("method", VARIANTS.values(), ids=list(VARIANTS))
def test_training_lowers_the_loss(method: Any, shard: Shard) -> None:
    network = suited(method, SPEC)
    adapted = method.adapt(network)
    if network.labels:  # of which there is one for each text
        inputs, targets = shard.batch(np.arange(len(shard)))
        shard = Pairs(inputs, targets[:, :1] % network.labels)
    plan = next(iter(method.plans(adapted, TURN, {})))
    asked = Job(TURN, plan, Local(lr=0.01, steps=1, batch_size=len(shard)), weights(plan.runs(adapted)))
    first = client.train(asked.owned(), shard, adapted)
    many = client.train(replace(asked, local=replace(asked.local, steps=8)).owned(), shard, adapted)
    assert many.loss < first.loss


@pytest.mark.parametrize(
    ("examples", "batch_size", "epochs"), [(14, 4, 1), (14, 4, 3), (8, 4, 2), (3, 8, 2), (1, 1, 1)]
)
def test_an_epoch_takes_every_row_once(examples: int, batch_size: int, epochs: int) -> None:
    local = Local(lr=1.0, batch_size=batch_size, epochs=epochs)
    rows = local.batches(TURN, examples)
    per_epoch = math.ceil(examples / batch_size)
    assert len(rows) == local.round_steps(examples) == epochs * per_epoch
    last = examples - (per_epoch - 1) * batch_size
    assert [len(each) for each in rows] == epochs * [*(per_epoch - 1) * [batch_size], last]
    for epoch in range(epochs):
        part = np.concatenate(rows[epoch * per_epoch : (epoch + 1) * per_epoch])
        assert sorted(part) == list(range(examples))


@pytest.mark.parametrize(("examples", "batch_size", "steps"), [(14, 4, 3), (14, 4, 9), (3, 8, 5), (1, 2, 2)])
def test_steps_run_through_the_shard_in_full_batches(examples: int, batch_size: int, steps: int) -> None:
    local = Local(lr=1.0, batch_size=batch_size, steps=steps, epochs=7)
    rows = local.batches(TURN, examples)
    assert len(rows) == local.round_steps(examples) == steps
    assert {len(each) for each in rows} == {batch_size}
    flat = np.concatenate(rows)
    for start in range(0, len(flat), examples):
        part = flat[start : start + examples]
        assert len(set(part)) == len(part)
        assert set(part) <= set(range(examples))


def test_batches_depend_on_seed_round_and_device_alone() -> None:
    local = Local(lr=1.0, batch_size=50, epochs=2)

    def order(*fields: int) -> list[int]:
        return [int(row) for rows in local.batches(Turn(*fields), 50) for row in rows]

    base = order(0, 0, 9, 0)
    assert base == order(0, 0, 7, 0)
    assert base[:50] != base[50:]  # a new shuffle per epoch
    stepwise = np.concatenate(Local(lr=1.0, batch_size=50, steps=2).batches(TURN, 50)).tolist()
    assert stepwise[:50] != stepwise[50:]
    orders = [base, order(1, 0, 9, 0), order(0, 1, 9, 0), order(0, 0, 9, 1)]
    assert len(set(map(tuple, orders))) == 4


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": 0.0}, "lr must be above 0, got 0.0"),
        ({"lr": math.nan}, "lr must be above 0, got nan"),
        ({"momentum": 0.9}, "momentum goes with optimizer = \"sgd\", got 'adamw'"),
        ({"optimizer": "sgd", "momentum": 1.0}, r"momentum must be in \[0, 1\), got 1.0"),
        ({"weight_decay": -1.0}, "weight_decay must not be negative, got -1.0"),
        ({"clip": -1.0}, "clip must not be negative, got -1.0"),
        ({"steps": -1}, "steps must not be negative, got -1"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"epochs": 0}, "epochs must be at least 1, got 0"),
    ],
    ids=str,
)
def test_settings_that_cannot_train_are_refused(settings: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        Local(**({"lr": 1.0} | settings))


OPTIMIZERS: list[dict[str, Any]] = [{"optimizer": "sgd"}, {"optimizer": "sgd", "momentum": 0.5}]
OPTIMIZERS += [{"optimizer": kind} for kind in ("adamw", "adamw8", "adafactor")]


@pytest.mark.parametrize("shape", [(3,), (5, 4), (3, 5, 300), (40, 200)], ids=str)
@pytest.mark.parametrize("settings", OPTIMIZERS, ids=str)
def test_optimizer_states_are_counted(settings: dict[str, Any], shape: tuple[int, ...]) -> None:
    local = Local(lr=0.1, **settings)
    p = torch.zeros(shape, requires_grad=True)
    p.grad = torch.ones(shape)
    optimizer = optim.build({0.1: [p]}, local, local.kind)
    optimizer.step()
    kept = [value for value in optimizer.state[p].values() if isinstance(value, torch.Tensor)]
    assert optim.state_bytes(local.kind, shape) == sum(each.numel() * each.element_size() for each in kept)
