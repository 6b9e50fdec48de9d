"""Writing all or nothing, and one process to a folder: `python -m pytest tests/test_files.py`."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from lamina import files
from lamina.errors import UserError

HOLD = """
import sys
from pathlib import Path
from lamina import files
with files.lock(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_write_replaces_the_content_and_makes_the_folders(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "file"
    for content in ("longer than the next", "caf\u00e9", b"\x00\xff"):
        files.write(path, content)
        assert path.read_bytes() == (content.encode() if isinstance(content, str) else content)
    assert [each.name for each in path.parent.iterdir()] == ["file"]
    assert path.stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize("call", ["replace", "fsync", "chmod"])
@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()], ids=["disk full", "interrupt"])
def test_a_failed_write_leaves_the_old_content_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, error: BaseException
) -> None:
    path = tmp_path / "file"
    files.write(path, "old")

    def fail(*args: Any) -> None:
        raise error

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(type(error)):
        files.write(path, "new")
    assert path.read_text() == "old"
    assert [each.name for each in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("call", ["replace", "fsync"])
def test_an_error_tells_of_the_file_that_was_to_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    def fail(*args: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", *args)

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(PermissionError) as caught:
        files.write(tmp_path / "file", "new")
    assert (caught.value.filename, caught.value.filename2) == (str(tmp_path / "file"), None)


def test_a_place_is_tried_before_there_is_work_done(tmp_path: Path) -> None:
    files.demand_place(tmp_path / "a" / "file")
    assert not any((tmp_path / "a").iterdir())
    for place, named, error in (
        (tmp_path / "a", tmp_path / "a", IsADirectoryError),
        (Path(__file__) / "file", Path(__file__), FileExistsError),
    ):
        for use in (files.demand_place, partial(files.write, content="new")):
            with pytest.raises(error) as caught:
                use(place)
            assert caught.value.filename == str(named)
    assert not any((tmp_path / "a").iterdir())


def test_a_name_is_given_to_whole_and_synced_content_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, calls = tmp_path / "file", []
    fsync, replace = os.fsync, os.replace
    files.write(path, "old")

    def watched_fsync(handle: int) -> None:
        calls.append("fsync")
        fsync(handle)

    def watched_replace(source: str, target: Path) -> None:
        calls.append("replace")
        assert (Path(source).read_text(), Path(target).read_text()) == ("new", "old")
        assert Path(source).parent == path.parent  # else it would be no rename but a copy
        replace(source, target)

    monkeypatch.setattr(os, "fsync", watched_fsync)
    monkeypatch.setattr(os, "replace", watched_replace)
    files.write(path, "new")
    assert calls == ["fsync", "replace", "fsync"]
    assert path.read_text() == "new"


def test_json_is_readable_and_has_no_nan(tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    files.write_json(path, {"name": "caf\u00e9", "loss": 0.1})
    assert path.read_text(encoding="utf-8") == '{\n  "name": "caf\u00e9",\n  "loss": 0.1\n}\n'
    for value in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="not JSON compliant"):
            files.write_json(path, {"loss": value})
    assert "caf\u00e9" in path.read_text(encoding="utf-8")


def test_digest_is_sha256() -> None:
    assert files.digest(b"abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_a_second_process_is_refused_until_the_first_is_gone(tmp_path: Path) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLD, tmp_path], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    with holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(UserError) as caught, files.lock(tmp_path):
            pass
        assert str(caught.value) == f"another process is working in {tmp_path}"
        holder.kill()
    with files.lock(tmp_path):
        second = subprocess.run([sys.executable, "-c", HOLD, tmp_path], capture_output=True, stdin=subprocess.DEVNULL)
        assert second.returncode == 1
        assert b"another process is working in" in second.stderr
    with files.lock(tmp_path):
        pass


def test_a_lock_is_let_go_after_an_error(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), files.lock(tmp_path):
        raise ZeroDivisionError
    with files.lock(tmp_path):
        pass


def test_a_missing_folder_cannot_be_locked(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere is not a folder"), files.lock(tmp_path / "nowhere"):
        pass


WORK = """
import sys
from pathlib import Path
from lamina import files
with files.at_work(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.mark.parametrize("killed", [True, False])
def test_who_was_killed_at_work_is_told_from_who_went(killed: bool, tmp_path: Path) -> None:
    command = [sys.executable, "-c", WORK, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as worker:
        assert worker.stdout and worker.stdin
        assert worker.stdout.readline() == "held\n"
        assert files.is_locked(tmp_path) and not files.was_killed(tmp_path)
        if killed:
            worker.kill()
        worker.communicate()
    assert [files.was_killed(tmp_path), files.was_killed(tmp_path)] == [killed, False]
    assert not files.is_locked(tmp_path)
