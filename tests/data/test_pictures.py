"""Views of pictures, crops and flips, and the digits: `python -m pytest tests/data/test_pictures.py`."""

from __future__ import annotations

import gzip
import lzma
import re
import runpy
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lamina import pixels
from lamina.data.decoding import resize
from lamina.data.digits import Digits
from lamina.data.pictures import Photos, Pictures, hold_out
from lamina.data.task import Shard
from lamina.errors import UserError
from lamina.job import Turn
from lamina.pixels import Pixels
from lamina.spec import Spec

BYTES = Pixels((0.0,) * 3, (1 / 255,) * 3)  # leaves the values as they are
VIT = Spec(2, embed=16, heads=2, head_dim=8, ffn=32, vocab=0, positions=5, causal=False, patch=4, image=8, leads=1)


def noise(count: int, side: int, channels: int = 3, seed: int = 0) -> Pictures:
    rng = np.random.default_rng(seed)
    return Pictures(rng.integers(0, 256, (count, side, side, channels), dtype=np.uint8), np.arange(count) % 7)


def photos(shard: Shard) -> Photos:
    assert isinstance(shard, Photos)
    return shard


def folder(tmp_path: Path, channels: int = 3) -> Path:
    pixels.write(tmp_path, Pixels((0.5,) * channels, (0.25,) * channels, 8))
    return tmp_path


def by_hand(image: np.ndarray, shift: int, move: np.ndarray) -> np.ndarray:
    """Pad, crop and mirror one image HWC."""
    down, right, mirrored = move
    padded = np.pad(image, ((shift, shift), (shift, shift), (0, 0)), mode="reflect")
    top, left = shift - down, shift - right
    cropped = padded[top : top + len(image), left : left + len(image)]
    return cropped[:, ::-1] if mirrored else cropped


@given(side=st.integers(2, 12), channels=st.sampled_from([1, 3]), data=st.data())
def test_crops_and_flips_are_those_of_padded_images(side: int, channels: int, data: st.DataObject) -> None:
    shift = data.draw(st.integers(0, side - 1))
    pictures = noise(9, side, channels)
    shard = Photos(pictures, np.array([8, 2, 2, 5]), Pixels((0.0,) * channels, (1 / 255,) * channels), shift, flip=True)
    view = shard.at(Turn(data.draw(st.integers(0, 99)), 2, 3, 1))
    rows = np.array([3, 0, 1, 2, 3])
    images, targets = view.batch(rows)
    assert view.moves is not None
    assert np.abs(view.moves[:, :2]).max() <= shift
    for row, image in zip(rows, images, strict=True):
        wanted = by_hand(pictures.images[shard.rows[row]], shift, view.moves[row])
        np.testing.assert_allclose(image, wanted.transpose(2, 0, 1), atol=1e-3)
    np.testing.assert_array_equal(targets, pictures.labels[shard.rows[rows]][:, None])


def test_an_example_is_the_same_all_through_a_round_and_another_in_the_next() -> None:
    shard = Photos(noise(50, 32), np.arange(50), BYTES, 4, flip=True)
    turn, all_rows = Turn(0, 1, 5, 3), np.arange(50)
    whole = shard.at(turn).batch(all_rows)[0]
    np.testing.assert_array_equal(shard.at(turn).batch(all_rows[[7, 3]])[0], whole[[7, 3]])
    for other in (replace(turn, round=2), replace(turn, device=4), replace(turn, seed=1)):
        assert (shard.at(other).batch(all_rows)[0] != whole).any(axis=(1, 2, 3)).mean() > 0.9
    np.testing.assert_array_equal(shard.at(turn).at(turn).batch(all_rows)[0], whole)


def test_all_moves_come_about_equally_often() -> None:
    moves = Photos(noise(1, 32), np.zeros(8100, np.int64), BYTES, 4, flip=True).at(Turn(0, 0, 1, 0)).moves
    assert moves is not None
    for axis in (0, 1):
        counts = np.bincount(moves[:, axis] + 4)
        assert len(counts) == 9
        assert np.abs(counts - 900).max() < 150
    assert abs(moves[:, 2].mean() - 0.5) < 0.03
    assert abs(np.corrcoef(moves.T) - np.eye(3)).max() < 0.05


def test_what_is_not_augmented_stays_as_it_is() -> None:
    shard = Photos(noise(5, 8), np.array([4, 1]), BYTES)
    assert shard.at(Turn(0, 0, 1, 0)) is shard
    images, targets = shard.batch(np.array([1]))
    np.testing.assert_allclose(images[0], shard.pictures.images[1].transpose(2, 0, 1), atol=1e-3)
    assert (str(images.dtype), str(targets.dtype), targets.tolist()) == ("float32", "int64", [[1]])


def test_augmenting_a_batch_takes_little_time() -> None:
    shard, rows = Photos(noise(500, 32), np.arange(500), BYTES, 4, flip=True), np.arange(32)
    view = shard.at(Turn(0, 0, 1, 0))
    best = float("inf")
    for _ in range(50):
        tick = time.thread_time()  # other processes have theirs
        view.batch(rows)
        best = min(best, time.thread_time() - tick)
    assert best < 1e-3


@given(sizes=st.lists(st.integers(0, 40), min_size=1, max_size=6), fraction=st.floats(0.01, 0.99))
def test_a_held_out_part_has_its_share_of_every_class(sizes: list[int], fraction: float) -> None:
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(len(sizes)), sizes))
    rest, held = hold_out(Pictures(np.arange(len(labels)), labels), fraction)
    assert sorted([*rest.images, *held.images]) == list(range(len(labels)))
    for part in (rest, held):
        np.testing.assert_array_equal(labels[part.images], part.labels)
    for label, size in enumerate(sizes):
        wanted = min(int(fraction * size + 0.5), max(0, size - 1))
        assert (held.labels == label).sum() == wanted


def test_digits(tmp_path: Path) -> None:
    task = Digits(devices=20, split="dirichlet").load(0, [0] * 20, folder(tmp_path, 1))
    train, test = photos(task.train[0]).pictures, photos(task.test[0]).pictures
    assert (len(train.labels), len(test.labels)) == (1438, 359)
    assert sum(map(len, task.train)) == 1438
    assert sum(map(len, task.test)) == 359
    assert np.bincount(np.concatenate([train.labels, test.labels])).tolist() == [
        178, 182, 177, 183, 181, 182, 181, 179, 174, 180,
    ]  # fmt: skip
    assert np.bincount(test.labels).tolist() == [36, 36, 35, 37, 36, 36, 36, 36, 35, 36]
    assert np.unique(train.images).tolist() == [round(255 * value / 16 + 1e-9) for value in range(17)]
    assert (task.scored, task.labels, task.kinds) == (1, tuple("0123456789"), tuple("0123456789"))
    for device, shard in enumerate(task.train):
        targets = shard.batch(np.arange(len(shard)))[1][:, 0]
        assert np.bincount(targets, minlength=10).tolist() == task.mix[device].tolist()


def test_a_digit_looks_like_one() -> None:
    """The mean 0 has a hole, the mean 1 has not; and neighbours are told apart by a nearest mean."""
    train, test = Digits().read()
    means = np.stack([train.images[train.labels == digit].mean(axis=0) for digit in range(10)])
    assert means[0][3:5, 3:5].mean() < 0.2 * means[1][3:5, 3:5].mean()
    distances = ((test.images[:, None].astype(float) - means) ** 2).sum(axis=(2, 3, 4))
    assert (distances.argmin(axis=1) == test.labels).mean() > 0.85


def test_digits_are_moved_and_never_mirrored(tmp_path: Path) -> None:
    for size, most in ((8, 1), (32, 4)):
        shard = photos(Digits(size=size, devices=2).load(0, [], folder(tmp_path)).train[0]).at(Turn(0, 0, 1, 0))
        assert shard.moves is not None
        assert np.abs(shard.moves).max(axis=0).tolist() == [most, most, 0]
        assert shard.batch(np.arange(3))[0].shape == (3, 3, size, size)  # grey, in every channel of the network
    still = Digits(augment=False, devices=2).load(0, [], folder(tmp_path)).train[0]
    assert photos(still).at(Turn(0, 0, 1, 0)) is still


def test_resized_digits_are_the_same_digits() -> None:
    (small, _), (large, _) = Digits().read(), Digits(size=32).read()
    np.testing.assert_array_equal(large.images, resize(small.images, 32))


def test_the_seed_decides_who_has_what_and_not_what_is_held_out(tmp_path: Path) -> None:
    first, again, other = (Digits(devices=5).load(seed, [], folder(tmp_path)) for seed in (0, 0, 1))
    assert first.digest == again.digest != other.digest
    pairs = zip(map(photos, (*first.train, *first.test)), map(photos, (*other.train, *other.test)), strict=True)
    assert all(np.array_equal(a.pictures.images, b.pictures.images) for a, b in pairs)


def test_a_network_gets_a_head_for_the_classes(tmp_path: Path) -> None:
    made = Digits().fit(VIT, folder(tmp_path))
    assert made == replace(VIT, labels=10, pool="first", head_bias=True)
    assert Digits().fit(replace(VIT, leads=0), folder(tmp_path)).pool == "mean"
    assert Digits().fit(replace(VIT, pool="first_mean"), folder(tmp_path)).pool == "first_mean"
    assert Digits(size=32).fit(replace(VIT, image=32), folder(tmp_path)).image == 32


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"patch": 0, "image": 0}, "takes text; a task of images needs"),
        ({"image": 32}, "takes images of 32 x 32 pixels, the task's are 8 x 8; task.size = 32 resizes them"),
        ({"channels": 1}, "takes 1 channels; preprocessor_config.json in its folder is for 3"),
    ],
)
def test_networks_that_do_not_fit(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(f"network {tmp_path.name} {message}")):
        Digits().fit(replace(VIT, **change), folder(tmp_path))


def test_what_a_task_reads_of_a_network(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in "abc"]
    for path, mean, size in zip(paths, (0.5, 0.5, 0.4), (8, 16, 8), strict=True):
        pixels.write(path, Pixels((mean,), (0.5,), size))
    first, second, third = map(Digits().reads, paths)
    assert first == second != third


def test_the_script_makes_the_digits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From lines as scikit-learn has them; lossless, and nothing else is taken for them."""
    root = Path(__file__).parents[2]
    asset = lzma.decompress((root / "src/lamina/assets/digits.xz").read_bytes())
    table = np.frombuffer(asset, np.uint8).reshape(-1, 65)
    with gzip.open(tmp_path / "digits.csv.gz", "wt", encoding="ascii") as file:
        np.savetxt(file, table, fmt="%.18e", delimiter=",")
    command = [str(tmp_path / "digits.csv.gz"), str(tmp_path / "made.xz")]
    script = runpy.run_path(str(root / "scripts/make_digits.py"))
    monkeypatch.setattr("sys.argv", ["make_digits.py", *command])
    script["main"]()
    assert lzma.decompress((tmp_path / "made.xz").read_bytes()) == asset
    with pytest.raises(SystemExit, match="another file"):
        script["pack"](table[:-1])


def test_digits_have_no_users() -> None:
    with pytest.raises(UserError, match='"natural" needs to know'):
        Digits(split="natural").device_count()
    assert (Digits().device_count(), Digits(devices=7).device_count()) == (100, 7)
    with pytest.raises(UserError, match=r"task\.size must be at least 1, got 0"):
        Digits(size=0)
