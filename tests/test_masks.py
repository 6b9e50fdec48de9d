"""PerFedMask: the objective, the search, what fits, what devices then train, and networks of their own at the end."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import lru_cache
from itertools import combinations, product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support import LOCAL, STEPS, TURN, WINDOW, Table, begin, bits, moved, outcome, play, spec, weights, write_world

from lamina import model, personal, tables
from lamina.cost import cost
from lamina.job import Local, Turn
from lamina.layout import Params
from lamina.methods.masks import PerFedMask, most_blocks, objective, search
from lamina.planner import Fleet
from lamina.run import Run, resume
from lamina.spec import Spec
from lamina.turn import generator

SPEC = spec(3)
LAYOUT = model.layout(SPEC)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Table:
    """An experiment on tiny-3 alone, in which all devices take part in every round."""
    folder = tmp_path_factory.mktemp("masks")
    return write_world(folder, networks=[str(folder / "tiny-3")], cohort=6)


def transcribed(masks: list[list[int]], can: list[int]) -> float:
    """The formula, with loops, in elements: blocks have 7 each; then in blocks."""
    devices, blocks, size = range(len(masks)), range(len(masks[0])), 7.0
    total = size * len(blocks)
    value = 0.0
    for c in devices:
        shares = []
        for k in blocks:
            of_all = sum(masks[other][k] for other in devices)
            shares.append(masks[c][k] / of_all if of_all else 0.0)
        rest = can[c] * size - sum(masks[c][k] * size for k in blocks)
        value += total * max(shares) - sum(share * size for share in shares) + rest
    return value / size


def drawn_limits(seed: int, devices: int, blocks: int) -> np.ndarray:
    """Limits as budgets make them: fewer blocks fit the lower the lowest is, and perhaps none above some."""
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(devices):
        steps = rng.integers(0, 2, blocks).tolist()
        row = [1]
        for step in steps[1:]:
            row.insert(0, max(0, min(row[0] + step - int(rng.random() < 0.3), len(row) + 1)))
        rows.append(row)
    return np.array(rows)


def allowed(limit: np.ndarray) -> Iterator[tuple[int, ...]]:
    """All masks of a device."""
    for mask in product((0, 1), repeat=len(limit)):
        if any(mask) and sum(mask) <= limit[mask.index(1)]:
            yield mask


@pytest.mark.parametrize("seed", range(8))
def test_the_objective_is_that_of_the_paper(seed: int) -> None:
    limits = drawn_limits(seed, 4, 5)
    rng = np.random.default_rng(seed)
    masks = rng.random((3, 4, 5)) < 0.5
    masks[0, :, 2] = False  # a block that nobody trains
    found = objective(masks, limits)
    for one, value in zip(masks, found, strict=True):
        assert value == pytest.approx(transcribed(one.astype(int).tolist(), limits.max(1).tolist()), abs=1e-12)
        assert objective(one, limits) == value


@pytest.mark.parametrize("seed", range(12))
def test_the_search_finds_the_best_masks_of_a_small_fleet(seed: int) -> None:
    limits = drawn_limits(seed, 3, 4)
    found = search(limits, generator("test", seed), 50)
    for mask, limit in zip(found.astype(int).tolist(), limits, strict=True):
        assert tuple(mask) in set(allowed(limit))
    best = min(float(objective(np.array(masks), limits)) for masks in product(*map(allowed, limits)))
    assert float(objective(found, limits)) == pytest.approx(best, abs=1e-9)


def test_devices_that_are_alike_train_the_same_blocks() -> None:
    """Two of four each: apart, sum_c l max_k K_ck - sum_k K_ck is 6 * 4 / 3 - 4 = 4 at best; together 6 * 4 / 6 - 2."""
    limits = np.tile([2, 2, 2, 1], (6, 1))
    for starts in (1, 100):
        found = search(limits, generator("test"), starts)
        assert float(objective(found, limits)) == pytest.approx(2)
        assert found.sum(0).tolist() == [0, 0, 6, 6]


HETEROGENEOUS = np.array([[min(most, 12 - lowest) for lowest in range(12)] for most in (9, 6, 3) for _ in range(4)])


def test_devices_that_are_not_train_others_than_the_last_blocks() -> None:
    last = np.array([[block >= 12 - most for block in range(12)] for most in HETEROGENEOUS.max(1)])
    improved = search(HETEROGENEOUS, generator(0), 1)
    assert float(objective(improved, HETEROGENEOUS)) < float(objective(last, HETEROGENEOUS)) - 0.5
    assert (improved.sum(1) <= HETEROGENEOUS.max(1)).all()


def test_the_same_generator_gives_the_same_masks() -> None:
    found = [search(HETEROGENEOUS, generator(i), 50) for i in range(4)]
    assert (search(HETEROGENEOUS, generator(3), 50) == found[3]).all()
    assert len({masks.tobytes() for masks in found}) > 1


def test_groups_of_devices_move_together() -> None:
    """Weak and middling devices share nine blocks: 4 * 12 * (1/8 + 1/8 + 1/8) - 9 = 9, which single moves miss."""
    reached = [float(objective(search(HETEROGENEOUS, generator(i), 1), HETEROGENEOUS)) for i in range(8)]
    assert min(reached) == pytest.approx(9)


def test_devices_also_move_alone_and_exchange_blocks() -> None:
    """Without either, the mean is at least 10.9."""
    limits = np.repeat(HETEROGENEOUS, 2, 0)
    reached = [float(objective(search(limits, generator(i), 30), limits)) for i in range(4)]
    assert np.mean(reached) < 10.5


@pytest.mark.parametrize("seed", [0, 7, 9])
def test_the_best_random_start_is_improved_too(seed: int) -> None:
    limits = drawn_limits(seed, 6, 6)
    few, many = (min(float(objective(search(limits, generator(i), n), limits)) for i in range(3)) for n in (1, 200))
    assert many < few - 0.4


SMALL = Spec(5, embed=32, heads=2, head_dim=16, ffn=128, vocab=50, positions=16)


@lru_cache
def priced(local: Local) -> dict[tuple[int, ...], int]:
    """Memory for every mask."""
    every = [mask for count in range(1, 6) for mask in combinations(range(5), count)]
    method = PerFedMask()
    return {m: cost(SMALL, method._plan(SMALL, m), local, WINDOW, STEPS).memory_bytes for m in every}


@pytest.mark.parametrize(("batch", "dearer"), [(8, (0, 1, 2)), (1, (0, 3, 4))])
def test_every_mask_that_is_allowed_fits_and_others_do_not(batch: int, dearer: tuple[int, ...]) -> None:
    """For all budgets; right above the lowest block or at the top, what is dearer depends on the batch."""
    prices = priced(Local(batch_size=batch))
    assert prices[dearer] > min(prices[0, 1, 2], prices[0, 3, 4])
    for budget in sorted(set(prices.values())):
        most = most_blocks(5, lambda blocks, budget=budget: prices[tuple(sorted(blocks))] <= budget)  # type: ignore[misc]
        for lowest in range(5):
            for mask, price in prices.items():
                if mask[0] == lowest and len(mask) <= most[lowest]:
                    assert price <= budget
            larger = [price for mask, price in prices.items() if mask[0] == lowest and len(mask) == most[lowest] + 1]
            assert not larger or max(larger) > budget


@pytest.mark.parametrize("count", [0, 1, 2, 7, 12])
def test_few_questions_are_asked(count: int) -> None:
    asked: list[set[int]] = []

    def fits(blocks: Iterable[int]) -> bool:
        asked.append(set(blocks))
        return len(asked[-1]) <= count

    assert most_blocks(12, fits) == [min(count, 12 - lowest) for lowest in range(12)]
    assert len(asked) <= 3 * 12


def masked(world: Table, folder: Path, fleet: list[Table], **settings: Any) -> tuple[Run, np.ndarray]:
    run = begin(world | {"method": {"name": "perfedmask", "starts": 30} | settings, "fleet": fleet}, folder)
    return run, run.state.memory["masks"].numpy()


def up_bytes(blocks: int) -> int:
    return 4 * blocks * sum(LAYOUT.numel(name) for name, row in LAYOUT.params.items() if row.block == 0)


def test_devices_train_the_blocks_of_their_masks_in_every_round(world: Table, tmp_path: Path) -> None:
    fleet = [{"name": "two", "uplink": up_bytes(2)}, {"name": "one", "uplink": up_bytes(1)}]
    run, masks = masked(world, tmp_path, fleet)
    classes = np.array(run.outlook.class_of)
    assert masks.shape == (6, 3) and masks.dtype == bool
    assert masks.sum(1).tolist() == (2 - classes).tolist()
    begun = run.state.params
    for _ in range(2):
        run.state, rows = play(run)
        assert [list(row.blocks) for row in rows] == [np.flatnonzero(mask).tolist() for mask in masks]
        assert [row.up_bytes for row in rows] == [up_bytes(int(mask.sum())) for mask in masks]
    trained = {n for n, row in LAYOUT.params.items() if row.block is not None and masks[:, row.block].any()}
    assert moved(begun, run.state.params) == trained
    assert bits(run.state.memory) == bits({"masks": torch.from_numpy(masks)})


def test_masks_depend_on_the_seed_of_the_run(world: Table, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    network = spec(12)
    fleet = Fleet(
        [0, 1, 2] * 4, (None,) * 3, lambda group, plan: len(plan.blocks(model.layout(network))) <= (9, 6, 3)[group]
    )

    def masks(turn: Turn) -> bytes:
        return PerFedMask(starts=20).prepare(network, {}, fleet, turn)["masks"].numpy().tobytes()

    assert len({masks(Turn(seed, 0, 1)) for seed in range(4)}) > 1
    assert masks(Turn(3, 0, 1)) == masks(Turn(3, 0, 1))
    turns: list[Turn] = []
    prepare = PerFedMask.prepare

    def noted(self: PerFedMask, spec: Spec, params: Params, fleet: Fleet, turn: Turn) -> Params:
        turns.append(turn)
        return prepare(self, spec, params, fleet, turn)

    monkeypatch.setattr(PerFedMask, "prepare", noted)
    masked(world | {"seed": 7}, tmp_path, [{"name": "all"}])
    assert turns == [Turn(7, 0, 3)]


def test_devices_that_fit_nothing_have_no_mask_and_do_not_count(world: Table, tmp_path: Path) -> None:
    fleet: list[Table] = [{"name": "all"}, {"name": "none", "memory": 1000}]
    run, masks = masked(world, tmp_path, fleet, on_infeasible="drop")
    classes = np.array(run.outlook.class_of)
    assert not masks[classes == 1].any() and masks[classes == 0].all()
    _, rows = play(run)
    assert {row.group for row in rows} == {0}


def test_the_head_trains_only_if_asked_for() -> None:
    fleet = Fleet([0], (None,), lambda group, plan: True)
    tail = {"norm.weight", "norm.bias", "head.weight"}
    for train_head in (False, True):
        method = PerFedMask(train_head=train_head, starts=3)
        memory = method.prepare(SPEC, weights(SPEC), fleet, TURN)
        memory["masks"] = torch.tensor([[True, False, True]])
        first, second = method.plans(SPEC, Turn(0, 0, 1, 0), memory)
        blocks = {name for name, row in LAYOUT.params.items() if row.block in (0, 2)}
        assert first.trains == (blocks | tail if train_head else blocks)
        assert {LAYOUT.params[name].block for name in second.trains - tail} == {2}
        assert (first.label, second.label) == ("0, 2 of 3", "2 of 3")
        assert first.holds == second.holds == set(LAYOUT.params)


def test_before_there_are_masks_the_last_blocks_stand_for_them() -> None:
    plans = list(PerFedMask().plans(SPEC, TURN, {}))
    assert [plan.blocks(LAYOUT) for plan in plans] == [(0, 1, 2), (1, 2), (2,)]
    assert [plan.label for plan in plans] == ["up to 3 of 3", "up to 2 of 3", "up to 1 of 3"]


@pytest.mark.parametrize(
    "settings", [{"starts": 0}, {"personal_epochs": -1}, {"personal_epochs": 10**9}, {"personal_lr": 0.0}], ids=str
)
def test_settings_that_mean_nothing_are_refused(settings: Table) -> None:
    (key,) = settings
    with pytest.raises(ValueError, match=f"^{key} must .*got {settings[key]}"):
        PerFedMask(**settings)


# Networks of their own


def own_accuracy(run: Run, epochs: int, lr: float) -> list[float]:
    """Of every device, with torch's own optimizer."""
    network, params = run.deployed()
    found = []
    for device, (train, test) in enumerate(zip(run.task.train, run.task.test, strict=True)):
        own = {name: p.clone().requires_grad_() for name, p in params.items()}
        optimizer = torch.optim.SGD(list(own.values()), lr, momentum=0.9, weight_decay=5e-4)
        batches = Local(batch_size=4, epochs=epochs).batches(Turn(0, 3, 3, device), len(train))
        assert sum(map(len, batches)) == epochs * len(train)
        for rows in batches:
            ids, targets = map(torch.from_numpy, train.batch(rows))
            optimizer.zero_grad()
            F.cross_entropy(model.forward(network, own, ids).flatten(0, 1), targets.flatten()).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        ids, targets = map(torch.from_numpy, test.batch(np.arange(len(test))))
        right = model.forward(network, own, ids)[:, -run.task.scored :].argmax(-1) == targets[:, -run.task.scored :]
        found.append(float(right.double().mean()))
    return found


PERSONAL = {"personal_epochs": 4, "personal_lr": 0.03}


def test_each_device_finetunes_what_was_deployed_for_itself(world: Table, tmp_path: Path) -> None:
    """Against the same in plain torch; the network that is handed out is that without it."""
    fleet = [{"name": "all", "uplink": up_bytes(1)}]
    run, _ = masked(world, tmp_path, fleet, **PERSONAL)
    told: list[tuple[int, int]] = []
    summary = run.play(on_progress=lambda done, jobs: told.append((done, jobs)))
    each = own_accuracy(run, 4, 0.03)
    assert summary["personalised"]["mean_over_devices"] == pytest.approx(np.mean(each))
    assert summary["personalised"]["p10"] == pytest.approx(np.percentile(each, 10))
    assert summary["personalised"]["mean_over_devices"] > summary["accuracy"]["after"]["mean_over_devices"] + 0.03
    assert told[-6:] == [(done, 6) for done in range(1, 7)]
    plain, _ = masked(world, tmp_path, fleet)
    assert plain.play() | {"personalised": None, "folder": 0, "totals": 0} == summary | {
        "personalised": None,
        "folder": 0,
        "totals": 0,
    }
    assert bits(plain.state.params) == bits(run.state.params)
    rows = [row for row in tables.outcome(summary).rows if row[0].startswith("each*")]
    assert [row[-2] for row in rows] == [f"{summary['personalised'][key]:.1%}" for key in summary["personalised"]]
    report = (run.folder / "report.md").read_text()
    assert "| each*, mean over devices |" in report and "beyond its budget" in report


def test_the_settings_of_the_paper_for_networks_of_their_own() -> None:
    wanted = Local(lr=1e-3, optimizer="sgd", momentum=0.9, weight_decay=5e-4, batch_size=4, epochs=5)
    assert PerFedMask(personal_epochs=5).personal(replace(LOCAL, clip=1.0, schedule="cosine")) == wanted


def test_a_stop_while_devices_personalise_loses_nothing_else(world: Table, tmp_path: Path) -> None:
    fleet = [{"name": "all"}]
    whole, _ = masked(world, tmp_path, fleet, **PERSONAL)
    whole.play()
    stopped, _ = masked(world, tmp_path, fleet, **PERSONAL)

    def stop(done: int, jobs: int) -> None:
        if stopped.state.round == 3 and done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped.play(on_progress=stop)
    assert not (stopped.folder / "summary.json").exists()
    resume(stopped.folder).play()
    assert outcome(stopped.folder) == outcome(whole.folder)


def test_nothing_is_personalised_unless_asked_for(
    world: Table, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(personal, "evaluate", None)
    run, _ = masked(world, tmp_path, [{"name": "all"}])
    assert run.play()["personalised"] is None
    assert json.loads((run.folder / "summary.json").read_text())["personalised"] is None
    assert PerFedMask().personal(LOCAL) is None
    shown = tables.outcome(run.summary())
    assert "*" not in shown.title and not any("*" in row[0] for row in shown.rows)
