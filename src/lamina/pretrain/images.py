"""Pretraining on images: vision Transformers that learn the classes of a set of images."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from lamina import checkpoint, model, pixels
from lamina.data.images import Images
from lamina.data.pictures import Pictures
from lamina.errors import UserError
from lamina.layout import Params
from lamina.ops import TORCH
from lamina.pixels import Pixels
from lamina.pretrain.job import Material, Pretrain, Progress, logits
from lamina.spec import Spec, as_matrix
from lamina.turn import generator

_QUICK_IMAGES = 2500
_MOMENT_IMAGES = 10000


@dataclass(frozen=True, kw_only=True)
class PretrainImages(Pretrain):
    """A family of vision Transformers; see `Pretrain` for the other keys.

    Attributes:
        images: Any set that the task `images` reads, such as FOLDER/NAME for sheets; its test set validates.
        patch: Side of a patch in pixels, which must divide the side of the images.
        augment: Whether training images are moved by up to an eighth of their side, the border mirroring what is inside
            (He et al. 2016, section 4.2, has zeros there), and half of them mirrored; anew whenever one is seen.
    """

    source: ClassVar[str] = "images"
    counts: ClassVar[tuple[str, ...]] = (*Pretrain.counts, "patch")

    images: str
    patch: int = 4
    augment: bool = True

    def read(self, device: torch.device) -> Gallery:
        """The images, on the device as bytes."""
        found = Images(path=self.images)
        (train, test), names = found.read(), found.classes()
        side = train.images.shape[1]
        if side % self.patch:
            raise UserError(
                f"{self.images}: the side of its images, {side} pixels, is no multiple of patch = {self.patch}"
            )
        return Gallery(self, train, test, names, device)


@dataclass(frozen=True)
class ImageProgress(Progress):
    """One validation point.

    Attributes:
        val_top1: Part of the validation images whose class got the highest logit.
        images_per_second: Of training.
    """

    val_top1: float
    images_per_second: float

    def told(self) -> str:
        """What else was measured, in words."""
        return f"top-1 {self.val_top1:.2%}, {self.images_per_second:,.0f} images/s"


class Gallery(Material):
    """Images and their classes, on the device that trains."""

    point, unit = ImageProgress, "images"

    def __init__(
        self, job: PretrainImages, train: Pictures, val: Pictures, names: tuple[str, ...], device: torch.device
    ) -> None:
        """Copy the images to the device, as bytes."""
        self.job, self.names = job, names
        side, channels = train.images.shape[1], max(part.images.shape[3] for part in (train, val))
        self.pixels = _pixels(train.images, channels)
        self.batch_units, self.val_units = job.batch_size, len(val.labels)
        self.facts = {
            "images_sha256": _digest(train, val),
            "train_images": len(train.labels),
            "classes": len(names),
            "side": side,
            "channels": channels,
        }
        self._train, self._val = (
            (torch.from_numpy(part.images).to(device), torch.from_numpy(part.labels).to(device))
            for part in (train, val)
        )

    def spec(self, depth: int) -> Spec:
        """Sizes of the network of one depth; the epsilon is that of `transformers`' ViT."""
        job, side = self.job, self.pixels.size
        return Spec(
            blocks=depth,
            embed=job.embed,
            heads=job.heads,
            head_dim=job.embed // job.heads,
            ffn=4 * job.embed,
            vocab=0,
            positions=(side // job.patch) ** 2 + 1,
            norm_eps=1e-12,
            act="gelu",
            causal=False,
            patch=job.patch,
            image=side,
            channels=len(self.pixels.mean),
            leads=1,
            labels=len(self.names),
            pool="first",
            head_bias=True,
        )

    def init(self, spec: Spec, generator: torch.Generator) -> Params:
        """Fresh weights: those of patches and blocks with variance 1 / inputs (LeCun et al. 1998, section 4.6).

        At a width of 96 that is a deviation of 0.1, not 0.02. Outputs of blocks are scaled as in `model.init`.
        """
        params = model.init(spec, generator)
        for stem in ("embed.patches", *(f"h.{i}.{short}" for i in range(spec.blocks) for short in spec.linears)):
            weight = params[f"{stem}.weight"]
            branches = 2 * spec.blocks if stem.endswith(("attn.o", "ffn.down")) else 1
            weight.normal_(0, 1 / math.sqrt(as_matrix(stem, weight).shape[1] * branches), generator=generator)
        return params

    def batch(self, depth: int, step: int) -> tuple[Tensor, Tensor]:
        """Images BCYX and their classes B1: epoch after epoch, each in an order of its own."""
        job, (images, labels) = self.job, self._train
        rows = torch.from_numpy(self._rows(depth, step)).to(images.device)
        chosen = images[rows]
        if job.augment:
            chosen = _moved(chosen, generator(job.seed, "augment", depth, step))
        return self._normalised(chosen), labels[rows, None]

    def _rows(self, depth: int, step: int) -> np.ndarray:
        """Which images are in a batch, int64 [batch]; one may have the end of an epoch and the start of the next."""
        size, count = self.job.batch_size, len(self._train[0])
        places = np.arange(step * size, (step + 1) * size)
        rows = np.empty(size, np.int64)
        for epoch in range(places[0] // count, places[-1] // count + 1):
            here = places // count == epoch
            rows[here] = _order(self.job.seed, depth, epoch, count)[places[here] % count]
        return rows

    def _normalised(self, images: Tensor) -> Tensor:
        """uint8 BYXC -> float32 BCYX, (value / 255 - mean) / std."""
        known = self.pixels
        mean, std = (torch.tensor(each, device=images.device)[:, None, None] for each in (known.mean, known.std))
        return (images.permute(0, 3, 1, 2) / 255 - mean) / std

    @torch.no_grad()
    def validate(self, spec: Spec, params: Params, whole: bool, batch: int = 250) -> dict[str, float]:
        """Mean loss in nats, and top-1, of evenly spaced or of all validation images."""
        images, labels = self._val
        count = len(labels) if whole else min(len(labels), _QUICK_IMAGES)
        chosen = torch.from_numpy(np.linspace(0, len(labels), count, endpoint=False).astype(np.int64)).to(labels.device)
        loss, right = 0.0, 0
        for rows in torch.split(chosen, batch):
            found, wanted = logits(spec, params, self._normalised(images[rows]), "fp32"), labels[rows, None]
            loss += TORCH.cross_entropy(found, wanted).item() * len(rows)
            right += int((found.argmax(-1) == wanted).sum())
        return {"val_loss": loss / count, "val_top1": right / count}

    def write(self, folder: Path, spec: Spec, half: Params) -> None:
        """Write the network with the names of its classes, and beside it how it wants its pixels."""
        pixels.write(folder, self.pixels)
        label2id = {name: i for i, name in enumerate(self.names)}
        id2label = {str(i): name for name, i in label2id.items()}
        checkpoint.write(folder, spec, half, torch.float16, {"id2label": id2label, "label2id": label2id})


@lru_cache(maxsize=2)
def _order(seed: int, depth: int, epoch: int, count: int) -> np.ndarray:
    """The images of an epoch, int64 [count]."""
    return generator(seed, "epoch", depth, epoch).permutation(count)


def _pixels(images: np.ndarray, channels: int) -> Pixels:
    """Mean and standard deviation of each channel of evenly spaced images, to four digits; grey counts for all."""
    some = images[np.linspace(0, len(images), min(len(images), _MOMENT_IMAGES), endpoint=False).astype(int)]
    values = np.arange(256) / 255
    shares = [np.bincount(some[..., at].reshape(-1), minlength=256) / some[..., at].size for at in range(some.shape[3])]
    means = [float(share @ values) for share in shares]
    stds = [math.sqrt(share @ (values - mean) ** 2) for share, mean in zip(shares, means, strict=True)]
    mean, std = (tuple(round(value, 4) for value in each) * (channels // len(each)) for each in (means, stds))
    return Pixels(mean, std, images.shape[1])


def _digest(*parts: Pictures) -> str:
    """SHA-256 of all bytes of images and labels."""
    found = hashlib.sha256()
    for part in parts:
        for array in (part.images, part.labels):
            found.update(np.ascontiguousarray(array).data)
    return found.hexdigest()


def _moved(images_BYXC: Tensor, rng: np.random.Generator) -> Tensor:
    """The images, each moved by up to an eighth of its side and, half of them, mirrored."""
    batch, side = images_BYXC.shape[:2]
    shifts = rng.integers(-(side // 8), side // 8, (2, batch, 1), endpoint=True)
    places = np.arange(side) - shifts  # where each line and each column comes from, before the border
    places = (side - 1) - np.abs((side - 1) - np.abs(places))
    mirrored = rng.integers(0, 2, (batch, 1)) == 1
    places[1] = np.where(mirrored, places[1, :, ::-1], places[1])
    down, across = torch.from_numpy(places).to(images_BYXC.device)
    each = torch.arange(batch, device=images_BYXC.device)[:, None, None]
    return images_BYXC[each, down[:, :, None], across[:, None, :]]
