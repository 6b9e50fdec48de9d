"""Any number of devices: nothing grows with them or with the rounds but what is written down on purpose."""

import gc
import json
import os
import subprocess
import sys
import tracemalloc
import weakref
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import Table, begin, bits, lines, outcome, play, write_world

from lamina.engines.local import in_threads
from lamina.job import Job, Turn, Update
from lamina.plan import Plan
from lamina.run import Run, resume
from lamina.server import play_round
from lamina.state import Copies, State

DEVICES, COHORT = 2000, 50


class Alive:
    """How many of some objects there are.

    Attributes:
        most: That there were at a time.
    """

    def __init__(self) -> None:
        """None yet."""
        self.now = self.most = 0

    def add(self, each: object) -> None:
        """One more, until it is gone."""
        self.now += 1
        self.most = max(self.most, self.now)
        weakref.finalize(each, self._gone)

    def _gone(self) -> None:
        self.now -= 1


class Echo:
    """Devices that send what they were sent, a little louder, in order or against it.

    Attributes:
        updates: Those that are alive.
    """

    def __init__(self, reverse: bool = False, silent: int = -1) -> None:
        """All answer but the silent one."""
        self.reverse, self.silent, self.updates = reverse, silent, Alive()

    def run(self, jobs: Iterable[Job]) -> Iterator[Update]:
        """An update for each job."""
        for job in reversed(list(jobs)) if self.reverse else jobs:
            if job.turn.device == self.silent:
                continue
            factor = 1 + job.turn.device % 7 / 100
            update = Update(job.turn, {name: job.arrays[name] * factor for name in job.plan.trains}, 12, 3, 1.0)
            self.updates.add(update)
            yield update
            del update


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Table:
    """Random tokens for 2,000 devices of two classes; tiny-2."""
    folder = tmp_path_factory.mktemp("scale")
    world = write_world(folder, cohort=COHORT, rounds=24, eval_devices=20, networks=[str(folder / "tiny-2")])
    world["task"] = {"name": "noise", "devices": DEVICES, "examples": 12, "window": 16}
    return world


@pytest.fixture(scope="module")
def run(table: Table, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Before its first round; tests do not play it on."""
    return begin(table, tmp_path_factory.mktemp("runs"))


def after_rounds(run: Run, count: int, engine: Any) -> State:
    """The state after some rounds."""
    state, examples = run.state, [len(shard) for shard in run.task.train]
    for _ in range(count):
        state, _ = play_round(run.experiment, run.outlook, examples, engine, state)
    return state


def test_a_run_keeps_nothing_of_its_rounds(table: Table, tmp_path: Path) -> None:
    """Python's and numpy's memory after 16 more rounds of 2,000 devices; states on disk are as large as before."""
    run, sizes = begin(table, tmp_path), []

    def note(row: Any, devices: Any) -> None:
        if row.round in (7, 23):
            gc.collect()
            on_disk = (run.folder / "state.safetensors").stat().st_size
            sizes.append((tracemalloc.get_traced_memory()[0], on_disk))

    tracemalloc.start()
    run.play(note, engine=Echo())
    tracemalloc.stop()
    (before, on_disk), (after, on_disk_after) = sizes
    assert after - before < 48_000, sizes  # 16 rounds of 50 devices: 60 bytes for each, less than any object of theirs
    assert on_disk_after - on_disk < 16 * 2 * 4 * len(run.state.changed) + 1000  # a row for each round and plan


def test_updates_are_gone_once_they_are_merged(run: Run) -> None:
    engine = Echo()
    state = after_rounds(run, 1, engine)
    assert state.totals["updates"] == COHORT
    assert engine.updates.most <= 3 and not engine.updates.now


def test_jobs_are_made_when_the_engine_asks_for_them(table: Table, tmp_path: Path) -> None:
    """Those with tensors of their own, too."""
    run, starts = begin(table | {"method": {"name": "flora", "on_infeasible": "ignore"}}, tmp_path), Alive()

    class Counting(Echo):
        def run(self, jobs: Iterable[Job]) -> Iterator[Update]:
            return super().run(self.counted(jobs))

        def counted(self, jobs: Iterable[Job]) -> Iterator[Job]:
            for job in jobs:
                starts.add(next(job.arrays[name] for name in sorted(job.arrays) if name.endswith("lora_a")))
                yield job
                del job

    assert after_rounds(run, 1, Counting()).totals["updates"] == COHORT
    assert 1 <= starts.most < 25


@pytest.mark.parametrize("method", ["caff", "federated-dropout", "fedex-lora"])
def test_early_answers_wait_for_their_turn(method: str, table: Table, tmp_path: Path) -> None:
    """An order of arrival that turns the sums round, and a device that never answers, change no bit."""
    run = begin(table | {"method": {"name": method, "on_infeasible": "ignore"}}, tmp_path)
    drawn = [row.device for row in play(run, Echo())[1]]  # type: ignore[arg-type]
    for silent in (-1, drawn[0], drawn[20]):
        forth, back = (after_rounds(run, 1, Echo(reverse, silent)) for reverse in (False, True))
        assert forth.totals == back.totals
        assert forth.totals["updates"] == COHORT - (silent >= 0)
        assert bits(forth.params) == bits(back.params)


def test_a_method_need_not_ask_for_all_votes(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        type(run.experiment.method), "merge", lambda self, params, spec, votes, turn, memory: (params, memory)
    )
    assert after_rounds(run, 1, Echo()).totals["updates"] == COHORT


def test_what_devices_received_is_kept_by_version_and_in_shared_rows(run: Run) -> None:
    """A row per round for each set of tensors that was sent, at most; those that nobody has any more are gone."""
    state = after_rounds(run, 12, Echo())
    assert len(state.copies.rows) <= 1 + 12 * 2
    seen = {row.device for row in play(run, Echo(), state)[1]}  # type: ignore[arg-type]
    assert len(seen) == COHORT
    data, tensors = state.pack()
    again = State.unpack(json.loads(json.dumps(data)), tensors)
    assert [again.copies.of(device, 50).tolist() for device in range(DEVICES)] == [
        state.copies.of(device, 50).tolist() for device in range(DEVICES)
    ]


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_copies_are_a_table_of_devices_and_tensors(data: st.DataObject) -> None:
    """Against the plain table, with tensors that come to the server on the way."""
    plain, copies, tensors = np.full((5, 8), -1), Copies.none(5), 3
    for round_ in range(data.draw(st.integers(1, 8))):
        versions = np.array(data.draw(st.lists(st.integers(0, round_), min_size=tensors, max_size=tensors)), np.int32)
        received = data.draw(st.dictionaries(st.integers(0, 4), st.sets(st.integers(0, tensors - 1))))
        given = {device: np.array(sorted(each), np.int64) for device, each in received.items()}
        before, kept = copies, copies.rows.tobytes() + copies.row_of.tobytes()
        copies = copies.after(given, versions)
        assert before.rows.tobytes() + before.row_of.tobytes() == kept
        for device, each in given.items():
            plain[device, each] = versions[each]
        tensors += data.draw(st.integers(0, 1)) if tensors < 8 else 0
        assert [copies.of(device, 8).tolist() for device in range(5)] == plain.tolist()
        assert copies.rows.dtype == copies.row_of.dtype == np.int32
        assert set(copies.row_of) == set(range(len(copies.rows)))
        assert len(copies.rows) <= 5


def test_a_sample_of_the_devices_is_evaluated(table: Table, tmp_path: Path) -> None:
    """The same one all along, also after a stop; all where the sample would be as large."""
    table = table | {"rounds": 2, "eval_every": 1}
    run = begin(table, tmp_path / "once")
    summary = run.play(engine=Echo())
    assert summary["tested_devices"] == len(set(run.tested.tolist())) == 20
    assert run.tested.tolist() == sorted(run.tested) and run.tested[0] >= 0 and run.tested[-1] < DEVICES
    for score in (run.before, run.after):
        assert score and np.flatnonzero(score.total).tolist() == run.tested.tolist()
    assert f"Accuracy on held-out examples of 20 of the {DEVICES} devices" in (run.folder / "report.md").read_text()
    other = begin(table | {"seed": 1}, tmp_path / "other")
    assert other.tested.tolist() != run.tested.tolist()

    class Stop(Exception):
        """After the first round."""

    def stop(row: Any, devices: Any) -> None:
        raise Stop

    stopped = begin(table, tmp_path / "again")
    with pytest.raises(Stop):
        stopped.play(stop, engine=Echo())
    resume(stopped.folder).play(engine=Echo())
    assert outcome(stopped.folder) == outcome(run.folder)
    assert [line["accuracy"] is None for line in lines(run.folder / "rounds.jsonl")] == [False, False]
    small = table["task"] | {"devices": 60}
    assert begin(table | {"task": small, "eval_devices": 60}, tmp_path / "all").tested.tolist() == list(range(60))


def test_those_that_are_evaluated_are_those_that_are_personalised(table: Table, tmp_path: Path) -> None:
    changes = {"rounds": 1, "cohort": 2, "eval_devices": 3, "task": table["task"] | {"devices": 12}}
    run = begin(table | changes | {"method": {"name": "perfedmask", "personal_epochs": 1}}, tmp_path)
    told: list[tuple[int, int]] = []
    assert run.play(on_progress=lambda done, jobs: told.append((done, jobs)))["personalised"]
    assert run.own and np.flatnonzero(run.own.total).tolist() == run.tested.tolist()
    assert told[-3:] == [(1, 3), (2, 3), (3, 3)]


@pytest.mark.parametrize("workers", [1, 3])
def test_threads_take_jobs_a_few_ahead(workers: int) -> None:
    taken: list[int] = []

    def jobs() -> Iterator[Job]:
        for device in range(100):
            taken.append(device)
            yield Job(Turn(0, 0, 1, device), Plan(frozenset(), frozenset()), None, {})  # type: ignore[arg-type]

    for number, device in enumerate(in_threads(workers, lambda job: job.turn.device, jobs())):
        assert device == number
        assert len(taken) <= min(100, number + 2 * workers + 1)
    assert len(taken) == 100


_COUNT = """
import ctypes, torch
from pathlib import Path
from lamina.engines.local import in_threads

paths = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "libgomp" in line}
(gomp,) = map(ctypes.CDLL, paths)
torch.set_num_threads(1)
print([gomp.omp_get_max_threads(), *in_threads(2, lambda job: gomp.omp_get_max_threads(), range(4))])
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="torch comes with libgomp on Linux alone")
def test_threads_compute_with_one_thread_each() -> None:
    """Kernels that ask OpenMP would take all cores in each, and sum in an order that depends on their number."""
    environ = os.environ | {"OMP_NUM_THREADS": "3"}
    told = subprocess.run(
        [sys.executable, "-c", _COUNT], env=environ, capture_output=True, text=True, check=True
    ).stdout
    assert json.loads(told) == [1] * 5
