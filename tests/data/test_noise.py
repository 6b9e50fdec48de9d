"""Random tokens for any number of devices: `python -m pytest tests/data/test_noise.py`."""

import sys
import time
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from support import begin, outcome, spec, write_network, write_world

from lamina.data.noise import Noise
from lamina.errors import UserError
from lamina.job import Turn


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network of 96 symbols and 32 positions."""
    return write_network(tmp_path_factory.mktemp("noise"), 1)


def test_windows_are_functions_of_the_seed_and_the_device(folder: Path) -> None:
    config = Noise(devices=5, examples=7, tests=3, window=16)
    task, again, other = config.load(1, None, folder), config.load(1, None, folder), config.load(2, None, folder)
    assert len(task.train) == len(task.test) == len(task.names) == config.device_count() == 5
    assert [len(shard) for shard in task.train] == [7] * 5 == task.mix[:, 0].tolist()
    assert [len(shard) for shard in task.test] == [3] * 5
    shards = [*task.train, *task.test]
    drawn = {shard.batch(np.arange(3))[0].tobytes() for shard in shards}
    assert len(drawn) == len(shards)
    assert drawn == {shard.batch(np.arange(3))[0].tobytes() for shard in (*again.test, *again.train)}
    assert not drawn & {shard.batch(np.arange(3))[0].tobytes() for shard in (*other.train, *other.test)}
    assert task.digest == again.digest
    assert len({task.digest, other.digest, replace(config, examples=8).load(1, None, folder).digest}) == 3


def test_a_window_is_the_same_in_any_batch_and_turn(folder: Path) -> None:
    shard = Noise(window=16).load(0, None, folder).train[3]
    inputs, targets = shard.batch(np.arange(64))
    assert inputs.shape == targets.shape == (64, 16) and inputs.dtype == targets.dtype == np.int64
    assert np.array_equal(inputs[:, 1:], targets[:, :-1])
    assert set(range(96)) == set(inputs.ravel()) | set(targets.ravel())
    rows = np.array([60, 2, 2])
    assert np.array_equal(shard.batch(rows)[0], inputs[rows])
    assert shard.at(Turn(0, 9, 10, 3)) is shard
    with pytest.raises(IndexError):
        shard.batch(np.array([64]))


def test_devices_are_made_when_they_are_asked_for(folder: Path) -> None:
    """A million of them take no time and no memory."""
    tick = time.process_time()
    tracemalloc.start()
    task = Noise(devices=10**6, window=16).load(0, None, folder)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1_000_000 and time.process_time() - tick < 1
    assert sys.getsizeof(task.mix) < 1000 and task.mix.shape == (10**6, 1)
    assert task.names[-1] == "device 999999"
    assert list(task.names[2:8:3]) == ["device 2", "device 5"]
    assert task.train[-1] == task.train[10**6 - 1]
    for wrong in (10**6, -(10**6) - 1):
        with pytest.raises(IndexError):
            task.names[wrong]


def test_refusals(folder: Path, tmp_path: Path) -> None:
    network = spec(1)
    assert Noise(window=32).fit(network, folder) is network
    with pytest.raises(UserError, match=r"^network tiny-1 has 32 positions; task\.window = 33 needs as many$"):
        Noise(window=33).fit(network, folder)
    for other in (replace(network, causal=False), replace(network, labels=3, pool="last")):
        with pytest.raises(UserError, match=r"^network tiny-1 does not predict tokens; name a causal one for text$"):
            Noise(window=8).fit(other, folder)
    for key in ("devices", "examples", "tests", "window"):
        with pytest.raises(UserError, match=rf"^task\.{key} must be at least 1, got 0$"):
            Noise(**{key: 0})


def test_a_run_on_noise(tmp_path: Path) -> None:
    """Twice the same, by any number of workers."""
    table = write_world(tmp_path, cohort=5, rounds=2, fleet=[{"name": "all"}])
    table["task"] = {"name": "noise", "devices": 40, "examples": 12, "window": 16}
    folders = []
    for workers in (1, 2):
        run = begin(table | {"workers": workers}, tmp_path / str(workers))
        summary = run.play()
        folders.append(run.folder)
    assert summary["classes"][0]["devices"] == 40 and summary["totals"]["updates"] == 10
    assert outcome(folders[0]) == outcome(folders[1])
