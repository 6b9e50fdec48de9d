"""What a vision network takes: mean and spread of its pixels, as preprocessor_config.json in its folder has them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lamina import files
from lamina.errors import UserError

FILE = "preprocessor_config.json"

_UNKNOWN = 0.5  # mean and standard deviation where the folder does not say, as in `transformers`


@dataclass(frozen=True)
class Pixels:
    """How a vision network wants its images.

    Attributes:
        mean: Of the values in [0, 1] of each channel.
        std: Their standard deviation.
        size: Side of the images it was trained on in pixels; 0 where that is not known.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    size: int = 0

    def normalise(self, images: np.ndarray) -> np.ndarray:
        """(value / 255 - mean) / std.

        Args:
            images: uint8 BHWC, with as many channels as the network takes, or one that all of these get.

        Returns:
            float32 BCHW.
        """
        mean, std = (np.array(each, np.float32)[:, None, None] for each in (self.mean, self.std))
        batch, height, width, _ = images.shape
        normal = np.empty((batch, len(self.mean), height, width), np.float32)
        np.multiply(images.transpose(0, 3, 1, 2), 1 / (255 * std), out=normal)
        normal -= mean / std
        return normal


def read(folder: Path) -> Pixels:
    """The pixels that the network in `folder` was trained on.

    Where the file is missing, means and standard deviations are 0.5; where it has one number for all channels, the
    `num_channels` of config.json, or else 3, says how many there are.

    Raises:
        UserError: A file is not JSON, or a value in it is not one that images can be normalised with.
    """
    path, table = folder / FILE, _read(folder / FILE)
    mean, std = (_numbers(path, table, key) for key in ("image_mean", "image_std"))
    if not table.get("do_normalize", True):
        mean, std = (0.0,) * len(mean), (1.0,) * len(std)
    # v * factor instead of v / 255 is the same as other means and standard deviations.
    factor = table.get("rescale_factor", 1 / 255) if table.get("do_rescale", True) else 1
    _demand(path, "rescale_factor", factor, _is_number(factor) and factor > 0, "a number above 0")
    _demand(path, "image_std", list(std), min(std) > 0, "above 0")
    channels = max(len(mean), len(std))
    if channels == 1:
        default = 1 if isinstance(table.get("image_mean"), list) else 3
        channels = _read(folder / "config.json").get("num_channels", default)
        _demand(folder / "config.json", "num_channels", channels, type(channels) is int and channels > 0, "above 0")
    unit = 1.0 if math.isclose(255 * factor, 1) else 255 * factor
    mean, std = (tuple(value / unit for value in _spread(path, each, channels)) for each in (mean, std))
    return Pixels(mean, std, _side(table))


def write(folder: Path, pixels: Pixels) -> None:
    """Write the file of a network for images of side `pixels.size`; to `transformers` it is a ViTImageProcessor."""
    table = {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": pixels.size, "width": pixels.size},
        "resample": 2,  # bilinear, as in `lamina.data.decoding`
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(pixels.mean),
        "image_std": list(pixels.std),
    }
    files.write_json(folder / FILE, table)


def _read(path: Path) -> dict[str, Any]:
    """The JSON object in a file; empty where there is no file."""
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(table, dict):
        raise UserError(f"{path} must hold one JSON object")
    return table


def _numbers(path: Path, table: Mapping[str, Any], key: str) -> tuple[float, ...]:
    """One number per channel, or one for all."""
    value = table.get(key)
    numbers = [_UNKNOWN] if value is None else value if isinstance(value, list) else [value]
    _demand(path, key, value, bool(numbers) and all(map(_is_number, numbers)), "a number, or one per channel")
    return tuple(map(float, numbers))


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _spread(path: Path, values: tuple[float, ...], channels: int) -> tuple[float, ...]:
    """The same number for every channel where there is but one."""
    if len(values) not in (1, channels):
        raise UserError(f"{path}: image_mean and image_std must have as many numbers, got {len(values)} and {channels}")
    return values * (channels // len(values))


def _side(table: Mapping[str, Any]) -> int:
    """Side of the images that come out of it, in pixels; 0 where it does not say."""
    size = table.get("crop_size" if table.get("do_center_crop") else "size")
    side = size.get("height", size.get("shortest_edge")) if isinstance(size, dict) else size
    return side if isinstance(side, int) else 0


def _demand(path: Path, key: str, value: object, holds: bool, rule: str) -> None:
    """Raise a UserError that names the file and the key unless the rule holds."""
    if not holds:
        raise UserError(f"{path}: {key} must be {rule}, got {value!r}")
