"""The tensors of a Hugging Face folder: one safetensors file or several, read one tensor at a time.

Pickles are never opened. A file is mapped into memory for as long as one of its tensors is copied out of it, so that
reading takes the memory of what is kept and of one tensor. Headers, and whether values are finite, are read without
torch, which takes more memory than most of these networks.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from safetensors import SafetensorError, safe_open

from lamina.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

FILE, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""Of networks: the words of safetensors -> those of torch."""
_EXPONENTS = {
    "F32": ("<u4", np.uint32(0x7F800000)),
    "F16": ("<u2", np.uint16(0x7C00)),
    "BF16": ("<u2", np.uint16(0x7F80)),
}
_CHUNK = 1 << 22
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack")


@dataclass(frozen=True)
class Entry:
    """A tensor on disk.

    Attributes:
        name: In its file.
        path: The file.
        shape: As stored.
        dtype: In the words of safetensors, such as "F32".
        begin: First of its bytes in the file.
        end: The one after its last.
    """

    name: str
    path: Path
    shape: tuple[int, ...]
    dtype: str
    begin: int
    end: int

    @contextmanager
    def mapped(self) -> Iterator[Tensor]:
        """The tensor in the memory that the file is mapped into for as long as this lasts."""
        with safe_open(self.path, "pt") as file:
            yield file.get_tensor(self.name)

    def read(self) -> Tensor:
        """The tensor as it is stored, in memory of its own."""
        with self.mapped() as tensor:
            return tensor.clone()

    def chunks(self) -> Iterator[bytes]:
        """Its bytes, a piece at a time."""
        with open(self.path, "rb") as file:
            file.seek(self.begin)
            for start in range(self.begin, self.end, _CHUNK):
                yield file.read(min(_CHUNK, self.end - start))

    def is_finite(self) -> bool:
        """Whether all values are: whether in none of them all bits of the exponent are set."""
        kind, exponent = _EXPONENTS[self.dtype]
        return not any((np.frombuffer(chunk, kind) & exponent == exponent).any() for chunk in self.chunks())


def entries(folder: Path) -> dict[str, Entry]:
    """Every tensor in the weights of a folder by name, from the headers alone.

    Raises:
        UserError: There are none, only pickles, or a file is missing, truncated, or not what it should be.
    """
    if (folder / FILE).is_file():
        return {each.name: each for each in _headers(folder / FILE)}
    if (folder / INDEX).is_file():
        return _sharded(folder / INDEX)
    pickles = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
    if pickles:
        raise UserError(
            f"the weights in {folder} are in {pickles[0]}, and lamina opens safetensors only, since such files can run "
            "code when opened; convert them where you trust them: load the network with transformers, then "
            "save_pretrained(FOLDER, safe_serialization=True)"
        )
    raise UserError(f"no weights at {folder / FILE}")


def _headers(path: Path) -> Iterator[Entry]:
    try:
        with safe_open(path, "numpy"):  # which finds all that may be wrong with a header
            pass
        with open(path, "rb") as file:
            (size,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(size))
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is truncated or not a safetensors file ({error})") from error
    for name, about in header.items():
        if name != "__metadata__":
            begin, end = (8 + size + offset for offset in about["data_offsets"])
            yield Entry(name, path, tuple(about["shape"]), about["dtype"], begin, end)


def _sharded(index: Path) -> dict[str, Entry]:
    try:
        names = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        places = {str(name): str(file) for name, file in names.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{index} is not an index of shards: it has no table weight_map of tensors -> files") from error
    found: dict[str, Entry] = {}
    for shard in sorted(set(places.values())):
        if Path(shard).name != shard or not shard.endswith(".safetensors"):
            raise UserError(f"{index} names {shard!r}; a shard is a .safetensors file in the same folder")
        if not (index.parent / shard).is_file():
            raise UserError(f"{index} names {shard}, which is missing")
        there = {each.name: each for each in _headers(index.parent / shard)}
        for name in (name for name, file in places.items() if file == shard):
            if name not in there:
                raise UserError(f"{index} says that {name} is in {shard}, but it is not")
            found[name] = there[name]
    if not found:
        raise UserError(f"{index} names no tensors")
    return found


def merge(found: Mapping[str, Entry], path: Path) -> None:
    """Write tensors from any files into one, each as it is, a piece at a time."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    ordered = sorted(found.values(), key=lambda each: (-_bits(each.dtype), each.name))  # so that all lie aligned
    end = 0
    for each in ordered:
        begin, end = end, end + each.end - each.begin
        header[each.name] = {"dtype": each.dtype, "shape": each.shape, "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for each in ordered:
            file.writelines(each.chunks())


def _bits(dtype: str) -> int:
    """Of a number: BF16 has 16."""
    digits = re.search(r"\d+", dtype)
    return int(digits[0]) if digits else 8
