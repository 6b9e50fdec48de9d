"""Tensors on a device's disk, of which only what is needed is in memory, and only while it is needed."""

from __future__ import annotations

import json
import math
import weakref
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor


class Flash(Mapping[str, Tensor]):
    """The fp32 tensors of a safetensors file. Each access reads the tensor anew, into memory of its own."""

    def __init__(self, path: Path) -> None:
        """Read the header.

        Raises:
            ValueError: The file holds something else than fp32 tensors within its length.
        """
        self.path = path
        self._file = open(path, "rb")  # noqa: SIM115  # open as long as this is
        weakref.finalize(self, self._file.close)
        length = int.from_bytes(self._file.read(8), "little")
        self._start, end = 8 + length, path.stat().st_size
        if self._start > end:
            raise ValueError(f"{path} is not a safetensors file")
        try:
            header = json.loads(self._file.read(length))
            header.pop("__metadata__", None)
            self._rows = {
                name: (tuple(map(int, row["shape"])), int(row["data_offsets"][0])) for name, row in header.items()
            }
            types = {name: row["dtype"] for name, row in header.items()}
        except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
            raise ValueError(f"{path} is not a safetensors file: {error!r}") from error
        for name, (shape, offset) in self._rows.items():
            last = self._start + offset + 4 * math.prod(shape)
            if types[name] != "F32" or min((offset, *shape)) < 0 or last > end:
                raise ValueError(f"{path}: {name} is not an fp32 tensor within the file")

    def __getitem__(self, name: str) -> Tensor:
        """One tensor."""
        shape, offset = self._rows[name]
        out = torch.empty(shape)
        _read(self._file, self._start + offset, out)
        return out

    def shape(self, name: str) -> tuple[int, ...]:
        """Sizes of a tensor."""
        return self._rows[name][0]

    def rows(self, name: str, indices: Sequence[int]) -> Tensor:
        """Some rows of a tensor.

        Raises:
            IndexError: It has no such row.
        """
        shape, offset = self._rows[name]
        if len(indices) and not 0 <= min(indices) <= max(indices) < shape[0]:
            raise IndexError(f"{name} has {shape[0]} rows, asked for {min(indices)} to {max(indices)}")
        out = torch.empty((len(indices), *shape[1:]))
        for i, index in enumerate(indices):
            _read(self._file, self._start + offset + int(index) * 4 * math.prod(shape[1:]), out[i])
        return out

    def __iter__(self) -> Iterator[str]:
        """Names, as in the file."""
        return iter(self._rows)

    def __len__(self) -> int:
        """Number of tensors."""
        return len(self._rows)


class Pages:
    """Rows of equal shape in a temporary file."""

    def __init__(self, file: BinaryIO, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
        """Keep rows of `shape` as `dtype` in a file of its own, for use on `device`."""
        self._file, self._shape, self._dtype, self._device = file, shape, dtype, device
        weakref.finalize(self, file.close)
        self._row_bytes = math.prod(shape) * dtype.itemsize

    def write(self, first: int, x: Tensor) -> None:
        """Rows from `first` on."""
        self._file.seek(first * self._row_bytes)
        self._file.write(x.to(self._dtype).contiguous().cpu().numpy().data)

    def read(self, rows: np.ndarray, count: int | None = None) -> Tensor:
        """The given rows, or what they begin with, `count` long, in fp32, in memory of their own."""
        size = self._shape if count is None else (count, *self._shape[1:])
        out = torch.empty((len(rows), *size), dtype=self._dtype)
        for i, row in enumerate(rows):
            _read(self._file, int(row) * self._row_bytes, out[i])
        return out.to(self._device).float()


class Kept:
    """Rows of equal shape in memory."""

    def __init__(self, rows: int, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
        """Room for so many rows on `device`."""
        self._rows = torch.empty((rows, *shape), dtype=dtype, device=device)

    def write(self, first: int, x: Tensor) -> None:
        """Rows from `first` on."""
        self._rows[first : first + len(x)] = x

    def read(self, rows: np.ndarray, count: int | None = None) -> Tensor:
        """The given rows, or what they begin with, `count` long, in fp32, in memory of their own."""
        return self._rows[:, :count].index_select(0, torch.from_numpy(rows).to(self._rows.device)).float()


def _read(file: BinaryIO, at: int, out: Tensor) -> None:
    if not out.numel():
        return
    file.seek(at)
    view = out.numpy().data.cast("B")
    if file.readinto(view) != len(view):  # type: ignore[attr-defined]
        raise OSError(f"{getattr(file, 'name', 'file')} ends before byte {at + len(view)}")
