"""Images as arrays: PNG, JPEG and WebP files read by Pillow, cropped and resized on tensors."""

from __future__ import annotations

import io
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lamina.errors import UserError
from lamina.units import human

if TYPE_CHECKING:
    import PIL.Image

ENDINGS = (".png", ".jpg", ".jpeg", ".webp")
LIMIT_BYTES = 4 * 2**30
"""Most that the images of a training or a test set may take in memory."""

_FORMATS = ("PNG", "JPEG", "WEBP")
_GREY, _COLOUR = ("1", "L", "LA"), ("P", "RGB", "RGBA", "CMYK", "YCbCr", "PA", "RGBX")  # modes of 8 bits and fewer
_ORIENTATION, _ON_THEIR_SIDE = 0x0112, (5, 6, 7, 8)  # EXIF tag, and its values for images that lie on their side
_SLICE = 256  # images resized at a time


@dataclass(frozen=True, slots=True)
class Encoded:
    """An image that is not decoded yet.

    Attributes:
        name: In messages.
        content: Its file, or the bytes of one.
    """

    name: str
    content: Path | bytes


@dataclass(frozen=True, slots=True)
class Head:
    """What the first bytes of an image say.

    Attributes:
        name: Of the image.
        width: In pixels, held upright.
        height: In pixels.
        grey: Whether it has no colours.
    """

    name: str
    width: int
    height: int
    grey: bool


def read_all(files: Iterable[Encoded], size: int | None) -> np.ndarray:
    """All images in one array.

    Args:
        files: To decode; gone through twice, first for the sizes alone.
        size: Side that the middle square of each image is resized to. None: all must be squares of one size.

    Returns:
        uint8 [images, side, side, channels], one channel if no image has colours, else three.

    Raises:
        UserError: An image is damaged or of another kind, the sizes differ, or all take more than `LIMIT_BYTES`.
    """
    heads = [head(file) for file in files]
    mode = "L" if all(each.grey for each in heads) else "RGB"
    side = common_side(heads) if size is None else size
    return stack((decode(file, mode)[None] for file in files), len(heads), side, len(mode))


def head(file: Encoded) -> Head:
    """Size and kind of an image, without decoding it.

    Raises:
        UserError: It is damaged or of another kind.
    """
    with _opened(file) as image:
        if image.mode not in _GREY + _COLOUR:
            raise UserError(
                f"{file.name} has pixels of more than 8 bits (mode {image.mode}); 8 bits per channel are read"
            )
        # Without the first condition a PNG would be decoded, in search of EXIF data behind its pixels.
        upright = "exif" not in image.info or image.getexif().get(_ORIENTATION) not in _ON_THEIR_SIDE
        width, height = image.size if upright else image.size[::-1]
        return Head(file.name, width, height, image.mode in _GREY)


def decode(file: Encoded, mode: str) -> np.ndarray:
    """One image, held upright; what is transparent gets the colour that lies below.

    Args:
        file: To decode.
        mode: "L" for grey, "RGB" for colours.

    Returns:
        uint8 [height, width, channels].

    Raises:
        UserError: It is damaged or of another kind.
    """
    from PIL import ImageOps

    with _opened(file) as image:
        pixels = np.asarray(ImageOps.exif_transpose(image).convert(mode))
    return pixels.reshape(*pixels.shape[:2], len(mode))


def common_side(heads: Iterable[Head]) -> int:
    """The side of images that are all squares of one size, in pixels.

    Raises:
        UserError: They are not.
    """
    found: dict[tuple[int, int], str] = {}
    counts: Counter[tuple[int, int]] = Counter()
    for each in heads:
        found.setdefault((each.width, each.height), each.name)
        counts[each.width, each.height] += 1
    (width, height), _ = counts.most_common(1)[0]
    cure = "set task.size, for example task.size = 32, to crop and resize them to squares of one size"
    if len(counts) > 1:
        listed = [f"{count} of {w} x {h} ({found[w, h]})" for (w, h), count in counts.most_common(3)]
        more = f" and {len(counts) - 3} more sizes" if len(counts) > 3 else ""
        raise UserError(f"the images differ in size: {', '.join(listed)}{more}; {cure}")
    if width != height:
        raise UserError(
            f"the images are {width} x {height} pixels (such as {found[width, height]}), not square; {cure}"
        )
    return width


def stack(chunks: Iterable[np.ndarray], count: int, side: int, channels: int) -> np.ndarray:
    """One array of images from many, resized.

    Args:
        chunks: uint8 [some images, height, width, channels] each.
        count: Of the images in all chunks.
        side: Of the images in the array, in pixels.
        channels: Of the images.

    Returns:
        uint8 [count, side, side, channels].

    Raises:
        UserError: They take more than `LIMIT_BYTES`.
    """
    needed_bytes = count * side * side * channels
    if needed_bytes > LIMIT_BYTES:
        raise UserError(
            f"{count} images of {side} x {side} pixels take {human('memory_bytes', needed_bytes)} of memory; the limit"
            f" is {human('memory_bytes', LIMIT_BYTES)}; lower task.size, or take fewer images"
        )
    images, done = np.empty((count, side, side, channels), np.uint8), 0
    for chunk in chunks:
        for start in range(0, len(chunk), _SLICE):
            part = resize(chunk[start : start + _SLICE], side)
            images[done : done + len(part)] = part
            done += len(part)
    return images


def resize(images: np.ndarray, side: int) -> np.ndarray:
    """The middle square of each image, resized with bilinear interpolation and, where that shrinks it, averaging.

    Args:
        images: uint8 [images, height, width, channels].
        side: Of the result, in pixels.

    Returns:
        uint8 [images, side, side, channels].
    """
    height, width = images.shape[1:3]
    short = min(height, width)
    top, left = (height - short) // 2, (width - short) // 2
    squares = images[:, top : top + short, left : left + short]
    if short == side:
        return squares
    import torch  # here, so that what only looks at a folder does without
    import torch.nn.functional as F

    pixels = torch.from_numpy(np.array(squares)).permute(0, 3, 1, 2)
    resized: np.ndarray = F.interpolate(pixels, (side, side), mode="bilinear", antialias=True).numpy()
    return resized.transpose(0, 2, 3, 1)


@contextmanager
def _opened(file: Encoded) -> Iterator[PIL.Image.Image]:
    """An image of which the head alone is read; whatever goes wrong with it becomes a UserError."""
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError as error:
        raise UserError("reading images needs Pillow; install it with: pip install 'lamina[images]'") from error
    source = io.BytesIO(file.content) if isinstance(file.content, bytes) else file.content
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(source, formats=_FORMATS) as image:
                yield image
    except UnidentifiedImageError as error:
        raise UserError(f"{file.name} is not a PNG, JPEG or WebP image, or is damaged") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise UserError(f"{file.name} is too large an image: {error}") from error
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        raise UserError(f"{file.name} cannot be read as an image: {error}") from error
