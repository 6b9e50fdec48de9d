"""Files of tensors on a device's disk, and rows kept in memory or in a file."""

from __future__ import annotations

import gc
import json
import os
import struct
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from support import bits
from torch import Tensor

from lamina.flash import Flash, Kept, Pages
from lamina.ops import HOST, TORCH


def tensors() -> dict[str, Tensor]:
    """Of one to four dimensions, with values that are easily lost."""
    rng = torch.Generator().manual_seed(0)
    made = {f"{len(shape)}d": torch.randn(shape, generator=rng) for shape in [(7,), (5, 3), (4, 2, 6), (2, 3, 2, 2)]}
    made["odd"] = torch.tensor([[0.0, -0.0, 1e-42], [float("inf"), float("-inf"), float("nan")]])
    return made


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Those tensors, as safetensors writes them."""
    save_file(tensors(), tmp_path / "x.safetensors", {"about": "a test"})
    return tmp_path / "x.safetensors"


def write(path: Path, header: Any, data: bytes = bytes(64), length: int | None = None) -> Path:
    """A file with any header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def row(**changes: Any) -> dict[str, Any]:
    return {"a": {"dtype": "F32", "shape": [4, 4], "data_offsets": [0, 64]} | changes}


def test_tensors_are_those_that_were_written(path: Path) -> None:
    flash = Flash(path)
    assert set(flash) == set(tensors())
    assert len(flash) == len(tensors())
    assert bits(dict(flash)) == bits(tensors())
    for name, tensor in tensors().items():
        assert flash.shape(name) == tuple(tensor.shape)
        assert flash[name].dtype == torch.float32
        assert flash[name].is_contiguous()
    assert "__metadata__" not in flash
    with pytest.raises(KeyError):
        flash["missing"]


@pytest.mark.parametrize("name", list(tensors()))
def test_rows_are_those_of_the_tensor(name: str, path: Path) -> None:
    flash, whole = Flash(path), tensors()[name]
    last = len(whole) - 1
    for picked in ([0], [last], [last, 0], [1, 1, 0, 1], list(range(len(whole))), []):
        assert bits({"": flash.rows(name, picked)}) == bits({"": whole[torch.tensor(picked, dtype=torch.int64)]})
        assert flash.rows(name, picked).shape == (len(picked), *whole.shape[1:])
        assert bits({"": TORCH.rows(flash, name, np.array(picked, dtype=np.int64))}) == bits(
            {"": TORCH.rows(tensors(), name, np.array(picked, dtype=np.int64))}
        )


def test_each_access_is_new_memory(path: Path) -> None:
    flash = Flash(path)
    first, second = flash["2d"], flash["2d"]
    rows = flash.rows("2d", [0, 1])
    assert len({each.untyped_storage().data_ptr() for each in (first, second, rows)}) == 3
    first.zero_()
    rows.zero_()
    assert torch.equal(second, tensors()["2d"])
    assert torch.equal(flash["2d"], tensors()["2d"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.int32, torch.uint8])
def test_other_dtypes_are_refused(dtype: torch.dtype, tmp_path: Path) -> None:
    save_file({"fine": torch.zeros(8), "not": torch.zeros(3, 4, dtype=dtype)}, tmp_path / "x")
    with pytest.raises(ValueError, match=r"x: not is not an fp32 tensor within the file$"):
        Flash(tmp_path / "x")


def test_files_that_are_cut_short_are_refused(path: Path) -> None:
    """Wherever they end."""
    whole = path.read_bytes()
    Flash(path)
    for size in (*range(0, len(whole), 7), len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError):
            Flash(path)


@pytest.mark.parametrize("length", [65 + 64, 2**31, 2**63, 2**64 - 1])
def test_headers_longer_than_the_file_are_refused(length: int, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"is not a safetensors file$"):
        Flash(write(tmp_path / "x", row(), b"", length))


@pytest.mark.parametrize(
    "header",
    [b"", b"\xff\xfe{", b"{", b'{"a": ', row(shape=[4, 5]), row(data_offsets=[4, 68]), row(dtype="F16")],
    ids=str,
)
def test_headers_that_lie_are_refused(header: Any, tmp_path: Path) -> None:
    Flash(write(tmp_path / "x", row()))
    with pytest.raises(ValueError):
        Flash(write(tmp_path / "x", header))


def test_a_file_that_shrinks_meanwhile_is_an_error(tmp_path: Path) -> None:
    """Never numbers that were not written."""
    x = torch.randn(100, 500)
    save_file({"x": x}, tmp_path / "x")
    flash = Flash(tmp_path / "x")
    os.truncate(tmp_path / "x", 4 * 60 * 500)
    assert torch.equal(flash.rows("x", [50]), x[50:51])
    reads: list[Callable[[], Tensor]] = [
        lambda: flash["x"],
        lambda: flash.rows("x", [1, 70]),
        lambda: flash.rows("x", [59]),
    ]
    for read in reads:
        with pytest.raises(OSError, match=r"x ends before byte \d+$"):
            read()


@pytest.mark.filterwarnings("error::ResourceWarning")
def test_files_are_closed_when_dropped(path: Path) -> None:
    """Those of refused files too."""
    flash = Flash(path)
    files = [flash._file]
    pages = kept("disk", 1, (2,), torch.float32)
    assert isinstance(pages, Pages)
    files.append(pages._file)  # type: ignore[arg-type]
    pages.write(0, torch.ones(1, 2))
    assert not any(file.closed for file in files)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        del flash, pages
        gc.collect()
    assert all(file.closed for file in files)


def kept(place: str, rows: int, shape: tuple[int, ...], dtype: torch.dtype) -> Kept | Pages:
    return Kept(rows, shape, dtype, HOST) if place == "ram" else Pages(tempfile.TemporaryFile(), shape, dtype, HOST)


@given(
    place=st.sampled_from(["ram", "disk"]),
    dtype=st.sampled_from([torch.float32, torch.float16]),
    shape=st.sampled_from([(1,), (3,), (2, 5), (3, 1, 2)]),
    parts=st.permutations([(0, 1), (1, 4), (4, 6), (6, 7), (7, 12)]),
    picked=st.lists(st.integers(0, 11), max_size=15),
)
@settings(max_examples=60)
def test_rows_come_back_in_any_order(
    place: str, dtype: torch.dtype, shape: tuple[int, ...], parts: list[tuple[int, int]], picked: list[int]
) -> None:
    """Also when written a second time, and when what is written is part of another tensor."""
    rng = torch.Generator().manual_seed(0)
    old, new = torch.randn(12, *shape, generator=rng), torch.randn(*reversed(shape), 12, generator=rng)
    new = new.permute(*reversed(range(new.dim())))  # not contiguous
    rows = kept(place, 12, shape, dtype)
    rows.write(0, old)
    for start, stop in parts:
        rows.write(start, new[start:stop])
        assert torch.equal(rows.read(np.arange(start, stop)), new[start:stop].to(dtype).float())
    got = rows.read(np.array(picked, dtype=np.int64))
    assert got.dtype == torch.float32
    assert torch.equal(got, new[torch.tensor(picked, dtype=torch.int64)].to(dtype).float())
    for count in range(1, shape[0] + 1):
        beginnings = rows.read(np.array(picked, dtype=np.int64), count)
        assert torch.equal(beginnings, got[:, :count]) and beginnings.is_contiguous()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("place", ["ram", "disk"])
def test_what_is_read_is_new_memory_and_what_was_written_is_not_held(place: str, dtype: torch.dtype) -> None:
    rows, x = kept(place, 3, (2,), dtype), torch.ones(3, 2)
    rows.write(0, x)
    x.zero_()
    rows.read(np.arange(3)).zero_()
    assert torch.equal(rows.read(np.arange(3)), torch.ones(3, 2))


def test_pages_end_where_nothing_was_written() -> None:
    pages = kept("disk", 3, (4,), torch.float16)
    pages.write(0, torch.ones(2, 4))
    with pytest.raises(OSError, match=r"ends before byte 24$"):
        pages.read(np.array([2]))


@pytest.mark.parametrize("bits_", [16, 32])
@pytest.mark.parametrize("place", ["ram", "disk"])
def test_a_cache_is_of_the_kind_that_is_asked_for(place: str, bits_: int) -> None:
    cache = TORCH.cache(5, (3, 2), place, bits_)
    assert isinstance(cache, Kept if place == "ram" else Pages)
    x = torch.full((5, 3, 2), 1 + 2**-12)
    cache.write(0, x)
    assert torch.equal(cache.read(np.arange(5)), x if bits_ == 32 else torch.ones(5, 3, 2))
    if isinstance(cache, Kept):
        assert cache._rows.nbytes == 5 * 3 * 2 * bits_ // 8
    else:
        cache._file.seek(0, os.SEEK_END)
        assert cache._file.tell() == 5 * 3 * 2 * bits_ // 8
