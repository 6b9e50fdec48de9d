"""Pretraining: growing, splitting, resuming and refusing: `python -m pytest tests/test_pretrain.py`."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support import finished

from lamina import checkpoint, files, model
from lamina.data.text import ALPHABET
from lamina.errors import UserError
from lamina.layout import Params
from lamina.ops import TORCH
from lamina.pretrain import Pretrain, PretrainText, Progress, grow, held_out, learning_rate, loop, pretrain, validate
from lamina.spec import Spec

RandomParams = Callable[[Spec, int], Params]
CPU = torch.device("cpu")
TEXT = "a rose is a rose is a rose, and so on. " * 120


@pytest.fixture
def job(tmp_path: Path) -> PretrainText:
    """Two depths, a few steps each; the deeper grows from the shallower."""
    (tmp_path / "text.txt").write_text(TEXT)
    return PretrainText(
        text=str(tmp_path / "text.txt"),
        out=str(tmp_path / "out"),
        name="toy",
        steps=(6, 5),
        lr=(1e-2, 5e-3),
        depths=(1, 3),
        embed=16,
        heads=2,
        positions=8,
        batch_size=4,
        warmup=2,
        checkpoint_every=2,
        device="cpu",
    )


@pytest.mark.parametrize("blocks", [1, 2, 3, 6])
def test_a_grown_network_is_the_same_function(tiny: Spec, random_params: RandomParams, blocks: int) -> None:
    """To the bit; two of three new output projections at zero give what is added exactly."""
    old = replace(tiny, blocks=blocks)
    params = random_params(old, 0)
    ids = torch.randint(0, tiny.vocab, (2, 10), generator=torch.Generator().manual_seed(0))
    expected = model.forward(old, params, ids)
    for target in range(blocks, 13):
        deeper = grow(params, blocks, target)
        new = replace(tiny, blocks=target)
        assert {name: tuple(p.shape) for name, p in deeper.items()} == {
            name: model.layout(new).shape(name) for name in model.layout(new).params
        }
        assert torch.equal(model.forward(new, deeper, ids), expected)


def test_new_blocks_are_spread_evenly_and_can_learn(tiny: Spec, random_params: RandomParams) -> None:
    params = random_params(tiny, 0)
    deeper = grow(params, 3, 6)
    silent = [i for i in range(6) if not deeper[f"h.{i}.attn.o.weight"].any()]
    assert silent == [i for i in range(6) if not deeper[f"h.{i}.ffn.down.bias"].any()] == [1, 3, 5]
    assert all(torch.equal(deeper[f"h.{2 * i + 1}.ffn.up.weight"], params[f"h.{i}.ffn.up.weight"]) for i in range(3))
    spec, deeper = replace(tiny, blocks=6), {name: p.requires_grad_() for name, p in deeper.items()}
    ids = torch.arange(10)[None] % tiny.vocab
    TORCH.cross_entropy(model.forward(spec, deeper, ids), ids).backward()  # type: ignore[no-untyped-call]
    for i in silent:
        for name in (f"h.{i}.attn.o.weight", f"h.{i}.ffn.down.weight"):
            grad = deeper[name].grad
            assert grad is not None and grad.abs().max() > 0


def test_growing_leaves_the_old_network_alone(tiny: Spec, random_params: RandomParams) -> None:
    params, again = random_params(tiny, 0), random_params(tiny, 0)
    deeper = grow(params, 3, 5)
    for name, tensor in deeper.items():
        if name.startswith("h."):
            tensor += 1
    assert all(torch.equal(params[name], again[name]) for name in again)


def test_learning_rate_rises_to_the_peak_and_falls(job: PretrainText) -> None:
    """Warm-up of 4 steps of 10: quarters up, then sixths down, the last step at a sixth."""
    job = replace(job, warmup=4, steps=(10, 10), lr=(1.2, 2.4))
    sixths = [learning_rate(job, 0, step) / 1.2 * 6 for step in range(10)]
    np.testing.assert_allclose(sixths, [1.5, 3, 4.5, 6, 6, 5, 4, 3, 2, 1])
    assert learning_rate(job, 1, 3) == 2.4
    assert learning_rate(replace(job, warmup=0), 0, 0) == 1.2
    longer = [learning_rate(replace(job, warmup=40), 0, step) for step in range(10)]
    assert longer == sorted(longer) and longer[-1] == pytest.approx(1.2 * 10 / 40)


@pytest.mark.parametrize("characters", [0, 1, 999, 1000, 1001, 54321])
def test_held_out_text_is_a_partition(characters: int) -> None:
    train, val = held_out(np.arange(characters))
    assert sorted([*train, *val]) == list(range(characters))
    assert abs(len(val) - characters / 100) <= 10
    assert (np.diff(train) > 0).all() and (np.diff(val) > 0).all()
    if characters == 54321:
        assert (np.diff(val) > 1).sum() == 9  # ten slices, one in the middle of every hundred
        assert val[0] == pytest.approx(characters * 0.05, abs=60)


def test_loss_falls_and_the_networks_can_be_loaded(job: PretrainText) -> None:
    points = list(pretrain(replace(job, steps=(50, 20), checkpoint_every=10, batch_size=16, lr=(2e-2, 1e-2))))
    assert [(point.depth, point.step) for point in points[:5]] == [(1, step) for step in (10, 20, 30, 40, 50)]
    assert [(point.depth, point.step) for point in points[5:]] == [(3, 10), (3, 20)]
    assert math.log(len(ALPHABET)) > points[0].train_loss > 3 > 0.8 > points[4].train_loss > 0
    assert points[0].val_loss > 1.8 > 1.5 > points[4].val_loss
    assert points[5].train_loss < 0.8  # the deeper network goes on where the shallower one stopped
    for depth, last in ((1, points[4]), (3, points[6])):
        folder = Path(job.out) / f"toy-{depth}"
        assert {path.name for path in folder.iterdir()} == {"config.json", "model.safetensors", "pretraining.json"}
        spec, params = checkpoint.load(folder)
        assert spec == job.read(CPU).spec(depth)
        assert checkpoint.read_alphabet(folder) == ALPHABET
        report = json.loads((folder / "pretraining.json").read_text())
        assert report["val_loss_nats"] == last.val_loss
        assert report["val_loss_nats_fp16_weights"] == pytest.approx(last.val_loss, abs=0.01)
        val = job.read(CPU).val_ids
        assert report["val_characters"] == len(val)
        assert validate(spec, params, val, job.positions) == pytest.approx(report["val_loss_nats_fp16_weights"])


def test_validation_is_the_mean_over_whole_windows(tiny: Spec, random_params: RandomParams) -> None:
    params, ids = random_params(tiny, 0), np.arange(40, dtype=np.uint8) % tiny.vocab
    losses = [
        TORCH.cross_entropy(
            model.forward(tiny, params, torch.from_numpy(ids[i : i + 6].astype(np.int64))[None]),
            torch.from_numpy(ids[i + 1 : i + 7].astype(np.int64))[None],
        ).item()
        for i in range(0, 36, 6)
    ]
    for batch in (1, 4, 64):
        assert validate(tiny, params, ids, 6, batch=batch) == pytest.approx(np.mean(losses))
    assert validate(tiny, params, ids, 6, windows=2) == pytest.approx((losses[0] + losses[-1]) / 2)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_stopped_and_resumed_training_is_the_same_to_the_bit(
    job: PretrainText, tmp_path: Path, precision: Any
) -> None:
    job = replace(job, precision=precision)
    whole = list(pretrain(job))
    assert [(point.depth, point.step) for point in whole] == [(1, 2), (1, 4), (1, 6), (3, 2), (3, 4), (3, 5)]
    for stop in (1, 2, 3, 5, 6):  # 3 and 6: after the last step of a depth, before it is finished
        other = replace(job, out=str(tmp_path / f"stopped-{stop}"))
        first = take(other, stop)
        second = list(pretrain(other))
        assert [(p.depth, p.step, p.train_loss, p.val_loss) for p in first + second] == [
            (p.depth, p.step, p.train_loss, p.val_loss) for p in whole
        ]
        assert finished(other.out) == finished(job.out)


def take(job: PretrainText, points: int) -> list[Progress]:
    """Train to a checkpoint, then stop."""
    training = pretrain(job)
    taken = [next(training) for _ in range(points)]
    training.close()  # type: ignore[attr-defined]
    return taken


def test_a_stop_between_checkpoints_goes_back_to_the_last(
    job: PretrainText, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    list(pretrain(job))
    other = replace(job, out=str(tmp_path / "stopped"))

    def stop(job: Pretrain, index: int, step: int) -> float:
        if step == 3:
            raise KeyboardInterrupt
        return learning_rate(job, index, step)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(loop, "learning_rate", stop)
        list(pretrain(other))
    assert {(point.depth, point.step) for point in pretrain(other)} == {(1, 4), (1, 6), (3, 2), (3, 4), (3, 5)}
    assert finished(other.out) == finished(job.out)


def test_what_is_finished_is_not_trained_again(job: PretrainText) -> None:
    list(pretrain(job))
    before = finished(job.out)
    assert list(pretrain(job)) == []
    assert finished(job.out) == before


def test_without_growth_a_depth_depends_on_no_other(job: PretrainText, tmp_path: Path) -> None:
    list(pretrain(replace(job, grow=False)))
    alone = replace(job, grow=False, depths=(3,), steps=(5,), lr=(5e-3,), out=str(tmp_path / "alone"))
    list(pretrain(alone))
    weights = [(Path(out) / "toy-3" / "model.safetensors").read_bytes() for out in (job.out, alone.out)]
    assert weights[0] == weights[1]


@pytest.mark.parametrize("change", [{"lr": (1e-3, 5e-3)}, {"seed": 1}, {"batch_size": 5}, {"text": "other.txt"}])
def test_a_state_of_another_recipe_is_refused(job: PretrainText, tmp_path: Path, change: dict[str, Any]) -> None:
    take(job, 1)
    if "text" in change:
        (tmp_path / "other.txt").write_text(TEXT + "and on")
        change = {"text": str(tmp_path / "other.txt")}
    state = Path(job.out) / "toy-1" / "state.safetensors"
    before = state.read_bytes()
    with pytest.raises(UserError) as caught:
        next(pretrain(replace(job, **change)))
    assert str(caught.value) == (
        f"{state.parent} was made by another recipe; move the folder away or restore the recipe"
    )
    assert state.read_bytes() == before


def test_the_folder_is_no_part_of_the_recipe(job: PretrainText, tmp_path: Path) -> None:
    take(job, 1)
    Path(job.out).rename(tmp_path / "moved")
    (tmp_path / "text.txt").rename(tmp_path / "moved" / "text.txt")
    moved = replace(job, out=str(tmp_path / "moved"), text=str(tmp_path / "moved" / "text.txt"), device="auto")
    assert take(moved, 1)[0].step == 4


def test_a_damaged_state_is_refused(job: PretrainText) -> None:
    take(job, 1)
    state = Path(job.out) / "toy-1" / "state.safetensors"
    state.write_bytes(state.read_bytes()[:-10])
    with pytest.raises(UserError, match=r"state\.safetensors is truncated or not a state of lamina"):
        next(pretrain(job))


def test_too_little_text_is_refused(job: PretrainText) -> None:
    """1 % of 799 characters are at most 8, as many as a sequence has, without the target of the last."""
    Path(job.text).write_text(TEXT[:799])
    with pytest.raises(UserError) as caught:
        next(pretrain(job))
    assert str(caught.value) == f"{job.text}: 799 characters are too few; a hundredth must exceed 8"
    Path(job.text).write_text(TEXT[:1000])
    assert next(pretrain(job)).step == 2


def test_missing_text_and_device_are_refused(job: PretrainText, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"does not exist; did you mean .*text\.txt\?"):
        next(pretrain(replace(job, text=job.text.replace("text.txt", "test.txt"))))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="torch sees no CUDA device"):
        next(pretrain(replace(job, device="cuda")))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"depths": (3, 1)}, "depths must be ascending positive integers, got [3, 1]"),
        ({"depths": (3, 3)}, "depths must be ascending positive integers, got [3, 3]"),
        ({"depths": (0, 1)}, "depths must be ascending positive integers, got [0, 1]"),
        ({"depths": ()}, "depths must be ascending positive integers, got []"),
        ({"steps": (5,)}, "steps needs one positive number per depth (2), got [5]"),
        ({"lr": (0.1, 0.0)}, "lr needs one positive number per depth (2), got [0.1, 0.0]"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"heads": 3}, "embed (16) must be a multiple of heads (3)"),
    ],
)
def test_impossible_recipes_are_refused(job: PretrainText, change: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError) as caught:
        PretrainText(**(asdict(job) | change))
    assert str(caught.value) == says


def test_a_finished_network_of_another_recipe_is_refused(job: PretrainText) -> None:
    list(pretrain(job))
    shutil.rmtree(Path(job.out) / "toy-3")
    with pytest.raises(UserError, match="another recipe"):
        list(pretrain(replace(job, seed=1)))


def test_a_stop_while_finishing_is_made_good(job: PretrainText, monkeypatch: pytest.MonkeyPatch) -> None:
    write = files.write

    def full(path: Path, content: bytes | str) -> None:
        if path.name == "config.json":
            raise OSError("No space left on device")
        write(path, content)

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
        patch.setattr(files, "write", full)
        list(pretrain(job))
    list(pretrain(job))
    assert checkpoint.read_spec(Path(job.out) / "toy-1") == job.read(CPU).spec(1)


def test_a_finished_family_can_get_a_deeper_member(job: PretrainText) -> None:
    """What a network depends on is its own recipe and that of those it grew from, not that of deeper ones."""
    shallow = replace(job, depths=job.depths[:1], steps=job.steps[:1], lr=job.lr[:1])
    list(pretrain(shallow))
    assert {point.depth for point in pretrain(job)} == set(job.depths[1:])
    with pytest.raises(UserError, match="another recipe"):
        list(pretrain(replace(job, lr=(2 * job.lr[0], *job.lr[1:]))))


@pytest.mark.parametrize("key", ["warmup", "weight_decay", "clip", "seed"])
def test_negative_settings_are_refused(key: str, job: PretrainText) -> None:
    with pytest.raises(ValueError, match=f"{key} must not be negative, got -1"):
        PretrainText(**(asdict(job) | {key: -1}))
