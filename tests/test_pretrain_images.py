"""Pretraining on images: batches, moves, top-1, growing, resuming, refusing."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from support import finished

from lamina import checkpoint, config, model, pixels
from lamina.errors import UserError
from lamina.layout import Params
from lamina.pretrain import ImageProgress, PretrainImages, grow, images, pretrain
from lamina.spec import Spec

RandomParams = Callable[[Spec, int], Params]
CPU = torch.device("cpu")
SIDE, COLUMNS, NAMES = 8, 50, ("red", "green", "blue", "none")


def write_sheet(path: Path, pictures: np.ndarray) -> None:
    """Square images, 50 in a row, as one file."""
    rows = pictures.reshape(-1, COLUMNS, *pictures.shape[1:]).swapaxes(1, 2)
    Image.fromarray(rows.reshape(-1, COLUMNS * pictures.shape[2], 3)).save(path)


@pytest.fixture
def sheets(tmp_path: Path) -> Path:
    """Noise, brighter in the channel of its class: 100 training images and 50 for validation; FOLDER/NAME of them."""
    rng = np.random.default_rng(0)
    for part, count in (("train", 100), ("val", 50)):
        labels = rng.integers(0, len(NAMES), count)
        pictures = rng.integers(0, 160, (count, SIDE, SIDE, 3))
        for row, label in zip(pictures, labels, strict=True):
            row[..., label : label + 1] += 95  # of "none", no channel
        write_sheet(tmp_path / f"toy_{part}_00.png", pictures.astype(np.uint8))
        np.save(tmp_path / f"toy_{part}_labels.npy", labels)
    (tmp_path / "toy_classes.json").write_text(json.dumps(NAMES))
    return tmp_path / "toy"


@pytest.fixture
def job(sheets: Path) -> PretrainImages:
    """Two depths, a few steps each; the deeper grows from the shallower."""
    return PretrainImages(
        images=str(sheets),
        out=str(sheets.parent / "out"),
        name="vit",
        steps=(6, 5),
        lr=(1e-2, 5e-3),
        depths=(1, 3),
        embed=16,
        heads=2,
        batch_size=30,
        warmup=2,
        checkpoint_every=2,
        device="cpu",
    )


def by_hand(sheets: Path, part: str) -> tuple[np.ndarray, np.ndarray]:
    """The images of a sheet, uint8 [images, side, side, 3], and their labels."""
    sheet = np.asarray(Image.open(f"{sheets}_{part}_00.png"))
    found = [
        sheet[top : top + SIDE, left : left + SIDE]
        for top in range(0, sheet.shape[0], SIDE)
        for left in range(0, sheet.shape[1], SIDE)
    ]
    return np.array(found), np.load(f"{sheets}_{part}_labels.npy")


def test_the_networks_learn_and_say_how_well(job: PretrainImages, sheets: Path) -> None:
    """What is recorded is what the written folder does to the validation images, counted one by one."""
    points = list(pretrain(replace(job, steps=(40, 20), checkpoint_every=20)))
    assert all(isinstance(point, ImageProgress) for point in points)
    pictures, labels = by_hand(sheets, "val")
    train, _ = by_hand(sheets, "train")
    for depth, last in zip(job.depths, (points[1], points[2]), strict=True):
        folder = Path(job.out) / f"vit-{depth}"
        spec, params = checkpoint.load(folder)
        assert spec == job.read(CPU).spec(depth)
        assert (spec.blocks, spec.labels, spec.positions, spec.pool, spec.causal) == (depth, 4, 5, "first", False)
        assert checkpoint.read_labels(folder) == NAMES
        wanted = pixels.read(folder)
        np.testing.assert_allclose(wanted.mean, (train / 255).mean((0, 1, 2)), atol=5.1e-5)
        np.testing.assert_allclose(wanted.std, (train / 255).std((0, 1, 2)), atol=5.1e-5)
        assert wanted.size == SIDE
        right, loss = 0, 0.0
        for picture, label in zip(pictures, labels, strict=True):
            logits = model.forward(spec, params, torch.from_numpy(wanted.normalise(picture[None])))[0, 0]
            right += int(logits.argmax()) == label
            loss -= logits.log_softmax(0)[label].item()
        report = json.loads((folder / "pretraining.json").read_text())
        assert report["val_top1_fp16_weights"] == right / 50
        assert report["val_loss_nats_fp16_weights"] == pytest.approx(loss / 50, rel=1e-5)
        assert report["val_top1"] == last.val_top1 == pytest.approx(right / 50, abs=0.021)  # type: ignore[attr-defined]
        assert report["val_images"] == 50 and report["recipe"]["images"] == "toy" and "device" not in report["recipe"]
        assert not (folder / "state.safetensors").exists()
    assert points[0].val_loss < 1.3 and points[2].val_top1 > 0.7  # type: ignore[attr-defined]


def test_a_part_of_the_validation_images_stands_for_all(
    job: PretrainImages, sheets: Path, monkeypatch: pytest.MonkeyPatch, random_params: RandomParams
) -> None:
    """Ten of 50 are every fifth; batches of any size give the same."""
    gallery = job.read(CPU)
    spec = gallery.spec(1)
    params = random_params(spec, 0)
    pictures, labels = by_hand(sheets, "val")
    with torch.no_grad():
        logits = model.forward(spec, params, torch.from_numpy(gallery.pixels.normalise(pictures)))[:, 0]
    right = (logits.argmax(1).numpy() == labels).astype(float)
    loss = torch.nn.functional.cross_entropy(logits, torch.from_numpy(labels), reduction="none").numpy()
    monkeypatch.setattr(images, "_QUICK_IMAGES", 10)
    for batch in (7, 50):
        assert gallery.validate(spec, params, True, batch) == pytest.approx(
            {"val_loss": loss.mean(), "val_top1": right.mean()}, rel=1e-5
        )
        assert gallery.validate(spec, params, False, batch) == pytest.approx(
            {"val_loss": loss[::5].mean(), "val_top1": right[::5].mean()}, rel=1e-5
        )


def test_every_epoch_has_every_image_once(job: PretrainImages, sheets: Path) -> None:
    """Of 10 batches of 30, three epochs of 100: batches that lie across two are made of both."""
    gallery = replace(job, augment=False).read(CPU)
    pictures, labels = by_hand(sheets, "train")
    normal = gallery.pixels.normalise(pictures)
    order: list[int] = []
    for step in range(10):
        inputs, targets = gallery.batch(3, step)
        assert (inputs.dtype, inputs.shape, targets.shape) == (torch.float32, (30, 3, SIDE, SIDE), (30, 1))
        for image, target in zip(inputs.numpy(), targets[:, 0].tolist(), strict=True):
            differences = np.abs(normal - image).max((1, 2, 3))
            order.append(int(differences.argmin()))
            assert differences.min() < 1e-5 and labels[order[-1]] == target
    epochs = [order[start : start + 100] for start in (0, 100, 200)]
    assert all(sorted(epoch) == list(range(100)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert not torch.equal(gallery.batch(1, 0)[0], gallery.batch(3, 0)[0])


def test_images_are_moved_by_an_eighth_and_mirrored(job: PretrainImages) -> None:
    """Each is one of the 18 that a border that mirrors gives, and all of these occur about as often."""
    moved, still = (replace(job, augment=augment, batch_size=100).read(CPU) for augment in (True, False))
    seen: Counter[tuple[int, int, bool]] = Counter()
    for step in range(9):
        inputs, same = moved.batch(1, step), still.batch(1, step)
        assert torch.equal(inputs[1], same[1])
        assert torch.equal(inputs[0], moved.batch(1, step)[0])
        for image, plain in zip(inputs[0].numpy(), same[0].numpy(), strict=True):
            wide = np.pad(plain, ((0, 0), (1, 1), (1, 1)), mode="reflect")
            found = [
                (down, right, mirror)
                for down in range(3)
                for right in range(3)
                for mirror in (False, True)
                if np.array_equal(wide[:, down : down + SIDE, right : right + SIDE][..., :: -1 if mirror else 1], image)
            ]
            assert len(found) == 1
            seen[found[0]] += 1
    assert len(seen) == 18 and all(20 < count < 90 for count in seen.values())


@pytest.mark.parametrize("blocks", [1, 3])
def test_a_grown_network_is_the_same_function(job: PretrainImages, random_params: RandomParams, blocks: int) -> None:
    gallery = job.read(CPU)
    params = random_params(gallery.spec(blocks), 0)
    inputs, _ = gallery.batch(1, 0)
    expected = model.forward(gallery.spec(blocks), params, inputs)
    for target in (blocks, blocks + 1, 6):
        assert torch.equal(model.forward(gallery.spec(target), grow(params, blocks, target), inputs), expected)


def test_a_deeper_network_starts_as_the_shallower_one(job: PretrainImages) -> None:
    """With a learning rate that is next to nothing, it ends as it too."""
    points = list(pretrain(replace(job, lr=(1e-2, 1e-12))))
    assert points[-1].val_loss == pytest.approx(points[2].val_loss, abs=1e-3)  # 16-bit weights lie between


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_stopped_and_resumed_training_is_the_same_to_the_bit(
    job: PretrainImages, tmp_path: Path, precision: Any
) -> None:
    job, timeless = replace(job, precision=precision), {"images_per_second": 0}
    whole = list(pretrain(job))
    assert [(point.depth, point.step) for point in whole] == [(1, 2), (1, 4), (1, 6), (3, 2), (3, 4), (3, 5)]
    for stop in (1, 3, 5):  # 3: after the last step of a depth, before it is finished
        other = replace(job, out=str(tmp_path / f"stopped-{stop}"))
        training = pretrain(other)
        points = [next(training) for _ in range(stop)]
        training.close()  # type: ignore[attr-defined]
        assert [asdict(point) | timeless for point in [*points, *pretrain(other)]] == [
            asdict(point) | timeless for point in whole
        ]
        assert finished(other.out) == finished(job.out)


def test_products_in_bfloat16_are_near_but_not_the_same(job: PretrainImages) -> None:
    losses = [
        next(pretrain(replace(job, precision=precision, out=job.out + precision))).train_loss
        for precision in ("fp32", "bf16")
    ]
    assert losses[0] != losses[1] == pytest.approx(losses[0], rel=1e-2)


def test_fresh_weights_keep_the_variance_of_what_goes_in(job: PretrainImages) -> None:
    """Patches of 4 x 4 x 3 = 48 values, 96 and 4 * 96 inputs; what goes into the residual stream is divided."""
    gallery = replace(job, embed=96, heads=3).read(CPU)
    params = gallery.init(gallery.spec(3), torch.Generator().manual_seed(0))
    wanted = {"embed.patches": 48, "h.1.attn.v": 96, "h.2.ffn.up": 96, "h.0.attn.o": 6 * 96, "h.2.ffn.down": 6 * 384}
    for stem, inputs in wanted.items():
        assert params[f"{stem}.weight"].std().item() == pytest.approx(inputs**-0.5, rel=0.05)
    assert params["head.weight"].std().item() == pytest.approx(0.02, rel=0.1)
    assert not params["h.0.ffn.up.bias"].any()


@pytest.mark.parametrize("what", ["patch", "augment", "labels"])
def test_a_state_of_another_recipe_is_refused(job: PretrainImages, sheets: Path, what: str) -> None:
    next(pretrain(job))
    if what == "labels":
        labels = np.load(f"{sheets}_val_labels.npy")
        np.save(f"{sheets}_val_labels.npy", (labels + 1) % len(NAMES))
    else:
        job = replace(job, patch=8) if what == "patch" else replace(job, augment=False)
    with pytest.raises(UserError, match=r"vit-1 was made by another recipe; move the folder away"):
        next(pretrain(job))


def test_grey_images_train_a_network_of_one_channel(job: PretrainImages, tmp_path: Path) -> None:
    for at in range(20):
        folder = tmp_path / "grey" / "ab"[at % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((SIDE, SIDE), 12 * at, np.uint8)).save(folder / f"{at}.png")
    list(pretrain(replace(job, images=str(tmp_path / "grey"), steps=(1, 1))))
    spec, _ = checkpoint.load(Path(job.out) / "vit-3")
    assert (spec.channels, spec.labels, len(pixels.read(Path(job.out) / "vit-3").mean)) == (1, 2, 1)


def test_what_cannot_be_cut_or_found_is_refused(job: PretrainImages) -> None:
    with pytest.raises(UserError) as caught:
        next(pretrain(replace(job, patch=3)))
    assert str(caught.value) == f"{job.images}: the side of its images, 8 pixels, is no multiple of patch = 3"
    with pytest.raises(UserError, match="toys does not exist: "):
        next(pretrain(replace(job, images=f"{job.images}s")))
    with pytest.raises(ValueError, match="patch must be at least 1, got 0"):
        replace(job, patch=0)
    assert not Path(job.out).exists()


def test_a_file_says_text_or_images(tmp_path: Path) -> None:
    path = tmp_path / "pretrain.toml"
    rest = 'out = "o"\nname = "n"\nsteps = [1]\nlr = [0.1]\ndepths = [1]\n'
    path.write_text(f'images = "toy"\npatch = 8\n{rest}', encoding="utf-8")
    wanted = PretrainImages(images="toy", patch=8, out="o", name="n", steps=(1,), lr=(0.1,), depths=(1,))
    assert config.load_pretrain(path) == wanted
    with pytest.raises(UserError, match="unknown key 'positions'"):
        config.load_pretrain(path, ["positions=8"])
    for overrides, given in (([], "neither"), (["text=a.txt", "images=toy"], "both")):
        path.write_text(rest, encoding="utf-8")
        with pytest.raises(UserError) as caught:
            config.load_pretrain(path, overrides)
        assert str(caught.value) == f"{path}: what to learn from is given as text or images; got {given}"
