"""Pixels of vision networks, against `transformers`: `python -m pytest tests/test_pixels.py`."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from lamina import pixels
from lamina.data.decoding import resize
from lamina.errors import UserError
from lamina.pixels import Pixels

COLOUR = Pixels((0.4, 0.5, 0.6), (0.2, 0.25, 0.3), 12)


def write(folder: Path, **table: Any) -> Path:
    (folder / pixels.FILE).write_text(json.dumps(table), encoding="utf-8")
    return folder


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


@pytest.mark.parametrize("shape", [(12, 12), (30, 30), (7, 7)])
def test_transformers_makes_the_same_of_an_image(tmp_path: Path, shape: tuple[int, int]) -> None:
    """With the file that lamina writes; resized too, as it resizes to squares without cropping."""
    pixels.write(tmp_path, COLOUR)
    images = noise(3, *shape, 3)
    theirs = ViTImageProcessorPil.from_pretrained(tmp_path)(list(images), return_tensors="np")["pixel_values"]
    ours = pixels.read(tmp_path).normalise(resize(images, 12))
    assert ours.dtype == np.float32
    assert ours.shape == (3, 3, 12, 12)
    level = 1 / (255 * np.array(COLOUR.std)[:, None, None])  # resized values may be rounded to the next
    off = np.abs(ours - theirs)
    assert (off < 1e-6).mean() > (0.99 if shape != (12, 12) else 0.9999)
    assert (off < level + 1e-6).all()


def test_what_is_written_is_read(tmp_path: Path) -> None:
    for each in (COLOUR, Pixels((0.3,), (0.4,), 8)):
        pixels.write(tmp_path, each)
        assert pixels.read(tmp_path) == each


def test_grey_images_go_into_every_channel() -> None:
    grey = noise(2, 5, 5, 1)
    np.testing.assert_array_equal(COLOUR.normalise(grey), COLOUR.normalise(np.repeat(grey, 3, axis=3)))
    assert Pixels((0.5,), (0.5,)).normalise(grey).shape == (2, 1, 5, 5)


def test_a_folder_that_does_not_say_means_a_half(tmp_path: Path) -> None:
    assert pixels.read(tmp_path) == Pixels((0.5,) * 3, (0.5,) * 3)
    (tmp_path / "config.json").write_text('{"num_channels": 1}', encoding="utf-8")
    assert pixels.read(tmp_path) == Pixels((0.5,), (0.5,))


@pytest.mark.parametrize(
    ("table", "mean", "std"),
    [
        ({"image_mean": [0.1, 0.2, 0.3], "image_std": 0.5}, (0.1, 0.2, 0.3), (0.5, 0.5, 0.5)),
        ({"image_mean": 0.1, "image_std": [0.5, 0.6, 0.7]}, (0.1, 0.1, 0.1), (0.5, 0.6, 0.7)),
        ({"image_mean": [1], "image_std": [2], "rescale_factor": 2 / 255}, (0.5,), (1.0,)),
        ({"image_mean": [51], "image_std": [255], "do_rescale": False}, (0.2,), (1.0,)),
        ({"do_normalize": False, "image_mean": [0.1] * 3, "image_std": [0.1] * 3}, (0.0,) * 3, (1.0,) * 3),
    ],
)
def test_other_ways_to_say_it(
    tmp_path: Path, table: dict[str, Any], mean: tuple[float, ...], std: tuple[float, ...]
) -> None:
    found = pixels.read(write(tmp_path, **table))
    assert found.mean == pytest.approx(mean)
    assert found.std == pytest.approx(std)


@pytest.mark.parametrize(
    ("table", "side"),
    [
        ({"size": {"height": 32, "width": 32}}, 32),
        ({"size": {"shortest_edge": 48}, "crop_size": {"height": 40, "width": 40}}, 48),
        ({"size": {"shortest_edge": 48}, "crop_size": {"height": 40, "width": 40}, "do_center_crop": True}, 40),
        ({"size": 224}, 224),
        ({}, 0),
    ],
)
def test_sizes(tmp_path: Path, table: dict[str, Any], side: int) -> None:
    assert pixels.read(write(tmp_path, **table)).size == side


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"image_mean": ["a"]}, "image_mean must be a number, or one per channel, got ['a']"),
        ({"image_mean": []}, "image_mean must be a number, or one per channel, got []"),
        ({"image_std": [0.5, 0.0, 0.5]}, "image_std must be above 0, got [0.5, 0.0, 0.5]"),
        ({"image_std": float("nan")}, "image_std must be a number, or one per channel, got nan"),
        ({"rescale_factor": 0}, "rescale_factor must be a number above 0, got 0"),
        ({"image_mean": [0.5] * 3, "image_std": [1, 1]}, "image_mean and image_std must have as many numbers"),
    ],
)
def test_values_that_cannot_be(tmp_path: Path, table: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        pixels.read(write(tmp_path, **table))
    assert str(error.value).startswith(f"{tmp_path / pixels.FILE}: {message}")


@pytest.mark.parametrize(("content", "message"), [("{", "cannot be read as JSON"), ("[]", "must hold one JSON object")])
def test_a_file_that_is_no_object(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / pixels.FILE).write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=message):
        pixels.read(tmp_path)
