"""Writing files so that a reader finds the old content or the new, never half of it."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lamina.errors import UserError

NAME_BYTES = 200
"""Longest part of a file name that users choose: file systems take 255 bytes, and there is something around it."""
_LOCK, _MARK = ".lock", ".at-work"


def write(path: Path, content: bytes | str, mode: int = 0o644) -> None:
    """Replace `path` by `content` atomically: temporary file beside it, fsync, rename, fsync of the folder."""
    data = content.encode() if isinstance(content, str) else content
    handle, temporary = _temporary(path)
    try:
        with _named(path):
            with os.fdopen(handle, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, mode)
            os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    if sys.platform != "win32":  # where a folder cannot be opened
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def demand_place(path: Path) -> None:
    """Make the folder of a file, and raise the OSError that `write` would raise there, before there is work done."""
    handle, temporary = _temporary(path)
    os.close(handle)
    os.unlink(temporary)


def write_json(path: Path, value: Any) -> None:
    """Replace `path` by indented JSON; NaN and infinity are refused, as JSON has neither."""
    write(path, json.dumps(value, indent=2, allow_nan=False, ensure_ascii=False) + "\n")


@contextmanager
def new_folder(path: Path, replaces: str | None = None) -> Iterator[Path]:
    """A folder to fill, which then appears as `path`, whole or not at all.

    Args:
        path: Where it goes.
        replaces: A folder there is replaced if it has a file of this name; None: there must be nothing.

    Raises:
        UserError: There is something that is not to be replaced.
    """
    if path.exists() or path.is_symlink():
        if replaces is None:
            raise UserError(f"{path} exists already; take another name, or --force to replace it")
        if not (path / replaces).is_file() or path.is_symlink():
            raise UserError(f"{path} is not replaced: it is no folder with a {replaces}")
    path.parent.mkdir(parents=True, exist_ok=True)
    with _named(path):
        made = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    try:
        yield made
        made.chmod(0o755)
        if path.exists():
            old = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
            os.replace(path, old)
            os.replace(made, path)
            shutil.rmtree(old)
        else:
            os.replace(made, path)
    except BaseException:
        shutil.rmtree(made, ignore_errors=True)
        raise


def digest(content: bytes | memoryview) -> str:
    """SHA-256 in hex."""
    return hashlib.sha256(content).hexdigest()


@contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Keep other processes from working in `folder`; the system lets go of the lock when the process ends.

    Raises:
        UserError: There is no such folder, or another process holds it.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder")
    with open(folder / _LOCK, "w") as file:
        try:
            _lock(file.fileno())
        except OSError as error:
            raise UserError(f"another process is working in {folder}") from error
        yield


@contextmanager
def claim(folder: Path) -> Iterator[None]:
    """`lock` a folder, made if it is missing; what was made goes again if nothing is written there.

    Raises:
        UserError: As `lock`, or the folder cannot be made.
    """
    made = [each for each in (folder, *folder.parents) if not each.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder} cannot be made: {error.strerror}") from error
    with lock(folder):
        try:
            yield
        finally:
            if made and [each.name for each in folder.iterdir()] == [_LOCK]:
                with contextlib.suppress(OSError):  # another process has come, or the system keeps a file that is open
                    (folder / _LOCK).unlink()
                    for each in made:
                        each.rmdir()


@contextmanager
def at_work(folder: Path) -> Iterator[None]:
    """Keep other processes from working in `folder`, and leave a mark there while this one does: see `was_killed`.

    Raises:
        UserError: As `lock`.
    """
    mark = folder / _MARK
    with lock(folder):
        mark.touch()
        try:
            yield
        finally:
            mark.unlink(missing_ok=True)


def was_killed(folder: Path) -> bool:
    """Whether a process that was `at_work` in `folder` has ended without leaving that; says so once."""
    mark = folder / _MARK
    if not mark.exists() or is_locked(folder):
        return False
    with contextlib.suppress(FileNotFoundError):  # it has just left
        mark.unlink()
        return True
    return False


def is_locked(folder: Path) -> bool:
    """Whether another process works in `folder`."""
    if not folder.is_dir():
        return False
    try:
        with lock(folder):
            return False
    except UserError:
        return True


def _temporary(path: Path) -> tuple[int, str]:
    """A new file beside `path`, open, in a folder that is made if it is not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    with _named(path):
        return tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """An OSError in this tells of `path`, not of the temporary file beside it."""
    try:
        yield
    except OSError as error:
        error.filename, error.filename2 = str(path), None
        raise


def _lock(handle: int) -> None:
    if sys.platform == "win32":
        import msvcrt

        msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
    else:
        import fcntl

        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
