"""Devices in processes of their own: the same update, no more memory than the budget, and what happens to the dead."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support import TURN, Table, begin, bits, lines, moved, outcome, prices, write_world

from lamina import client, limits, measure, model, server
from lamina.cost import Cost, cost
from lamina.data.task import Pairs
from lamina.device import Devices, Outcome
from lamina.engines import enforced
from lamina.engines.enforced import EnforcedEngine
from lamina.errors import UserError
from lamina.fleet import Budget
from lamina.job import Failure, Job, Local, Turn, Update
from lamina.levers import Levers
from lamina.limits import lacks_memory, limited, resident_peak, slack_bytes, start_count
from lamina.methods import Method
from lamina.methods.blocks import Caff
from lamina.methods.lora import FedLora
from lamina.plan import Plan
from lamina.shapes import FLOAT_BYTES
from lamina.spec import Spec

MIB = 2**20


@pytest.fixture(scope="module")
def devices() -> Iterator[Devices]:
    """One process for all tests that need one; it takes seconds to start."""
    found = Devices()
    yield found
    found.close()


@dataclass(frozen=True)
class Cell:
    """A job, its price, and who it is for."""

    method: Method
    levers: Levers
    local: Local
    embed: int = 32
    blocks: int = 2
    tokens: int = 32
    trained: int = 1

    @property
    def spec(self) -> Spec:
        return self.method.adapt(Spec(self.blocks, self.embed, 2, self.embed // 2, 4 * self.embed, 96, self.tokens))

    @property
    def plan(self) -> Plan:
        layout = model.layout(self.spec)
        plans = {plan.trained_blocks(layout): plan for plan in self.method.plans(self.spec, TURN, {})}
        return replace(plans[self.trained], levers=self.levers)

    @property
    def price(self) -> Cost:
        return cost(self.spec, self.plan, self.local, self.tokens, self.local.steps)

    def job(self) -> tuple[Job, Pairs]:
        return measure.work(self.spec, self.plan, self.local, self.tokens)


EXACT = Levers(chunked_loss=True, fused_update=True, prefix_cache="disk", micro_batch=2, recompute=True)
PACKED = Levers(prefix_cache="ram", cache_bits=16, frozen_bits=8, optimizer="adamw8")
STEPS = Local(lr=0.01, batch_size=4, steps=2)
SAME = {
    "plain": Cell(Caff(), Levers(), replace(STEPS, optimizer="sgd", momentum=0.9, weight_decay=0.1), trained=2),
    "exact levers": Cell(Caff(), EXACT, replace(STEPS, clip=0.5)),
    "packed": Cell(Caff(), PACKED, STEPS, embed=64),
    "lora": Cell(FedLora(rank=2, alpha=3.0, targets="qv", depth="budget"), Levers(), STEPS),
}


def same(one: Update | Failure, other: Update | Failure) -> None:
    """Bit for bit, and in all that is said beside."""
    assert isinstance(one, Update) and isinstance(other, Update)
    assert bits(one.arrays) == bits(other.arrays)
    assert (one.turn, one.examples, one.steps, one.loss) == (other.turn, other.examples, other.steps, other.loss)


@pytest.mark.parametrize("cell", SAME.values(), ids=list(SAME))
def test_a_child_trains_as_this_process_does(
    cell: Cell, devices: Devices, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And leaves nothing behind, neither in the job nor in the folder for temporary files."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    job, shard = cell.job()
    shard = Pairs(shard.inputs[:7], shard.targets[:7])  # an odd number, so that the second step begins a new epoch
    job = replace(job, turn=Turn(3, 1, 5, 11), local=replace(job.local, schedule="cosine"))
    before = bits(job.arrays)
    found = devices.run(job, shard, cell.spec)
    assert bits(job.arrays) == before
    assert not list(tmp_path.iterdir())
    here = client.train(job.owned(), shard, cell.spec)
    same(found.answer, here)
    assert moved({name: job.arrays[name] for name in here.arrays}, here.arrays)
    assert (found.watched, found.allocator_bytes) == (None, 0)
    assert found.rss_bytes > 0


TIGHT = {
    "the last block": Cell(Caff(), Levers(), Local(batch_size=8, steps=2), embed=192, tokens=128),
    "levers": Cell(
        Caff(),
        Levers(chunked_loss=True, fused_update=True, micro_batch=4, prefix_cache="disk"),
        Local(batch_size=8, steps=2),
        embed=192,
        tokens=128,
        blocks=3,
        trained=2,
    ),
}


@pytest.mark.parametrize("cell", TIGHT.values(), ids=list(TIGHT))
def test_the_predicted_peak_is_enough_and_less_is_not(cell: Cell, devices: Devices) -> None:
    """15 % less fails; the same process goes on, and what then grows is what was predicted."""
    need, (job, shard), server = cell.price.memory_bytes, cell.job(), devices._process.pid
    assert need > 20 * MIB
    limit = int(0.85 * need)
    short = devices.run(job, shard, cell.spec, limit)
    assert short.answer == Failure(job.turn, f"exceeded its memory budget of {limit / MIB:.1f} MiB")
    enough = devices.run(job, shard, cell.spec, need)
    same(enough.answer, client.train(job.owned(), shard, cell.spec))
    assert enough.rss_bytes == pytest.approx(need, rel=0.15, abs=MIB)
    assert devices._process.pid == server


def child_of(pid: int) -> int:
    """Id of the process that another one starts, as soon as it does."""
    give_up = time.monotonic() + 60
    while not (found := Path(f"/proc/{pid}/task/{pid}/children").read_text().split()):
        assert time.monotonic() < give_up
        time.sleep(0.001)
    return int(found[0])


def while_it_runs(devices: Devices, cell: Cell, act: Callable[[int], None]) -> Outcome:
    """The outcome of a job during which something was done to its child."""
    thread = threading.Thread(target=lambda: act(child_of(devices._process.pid)))
    thread.start()
    try:
        return devices.run(*cell.job(), cell.spec)
    finally:
        thread.join()


def test_a_child_that_is_killed_is_a_failure(devices: Devices) -> None:
    """Of its own job alone, by its signal's name."""
    server, cell = devices._process.pid, SAME["plain"]
    found = while_it_runs(devices, cell, lambda child: os.kill(child, signal.SIGSEGV))
    assert found == Outcome(Failure(cell.job()[0].turn, "its process was ended by SIGSEGV"))
    assert devices._process.pid == server


def test_a_process_that_is_killed_is_replaced(devices: Devices) -> None:
    """In the middle of a job; its child does not live on, and the next job is done by the next process."""
    cell, seen = SAME["plain"], []
    job, shard = cell.job()
    here = client.train(job.owned(), shard, cell.spec)
    same(devices.run(job, shard, cell.spec).answer, here)
    old = devices._process

    def kill(child: int) -> None:
        seen.append(child)
        os.kill(old.pid, signal.SIGKILL)

    assert while_it_runs(devices, cell, kill) == Outcome(Failure(job.turn, "its process was ended"))
    assert old.returncode == -signal.SIGKILL
    assert ends(seen[0])
    same(devices.run(job, shard, cell.spec).answer, here)
    assert devices._process.pid != old.pid


def ends(pid: int) -> bool:
    """Whether a process is gone, or will be in a moment."""
    give_up = time.monotonic() + 60
    while time.monotonic() < give_up:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return True
        if state in "ZX":
            return True
        time.sleep(0.001)
    return False


def test_another_error_is_a_bug(devices: Devices) -> None:
    """Than of memory, under a limit, too; it is raised here, and the process goes on."""
    cell, process = SAME["plain"], devices._process.pid
    job, shard = cell.job()
    job = replace(job, turn=replace(job.turn, device=7))
    cut = replace(job, arrays={name: p[..., :1].clone() for name, p in job.arrays.items()})
    with pytest.raises(RuntimeError, match=r"^the process of device 7 failed; see what it wrote above$"):
        devices.run(cut, shard, cell.spec, 64 * MIB)
    assert devices._process.pid == process


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Let a shell script be the process of devices that start from now on."""
    real = subprocess.Popen

    def use(script: str) -> None:
        def start(command: list[str], **settings: Any) -> subprocess.Popen[str]:
            assert (command[0], command[-2:]) == (sys.executable, ["-m", "lamina.worker"])
            return real(["sh", "-c", script], **settings)

        monkeypatch.setattr(subprocess, "Popen", start)

    return use


def test_a_closed_one_leaves_no_process(stand_in: Callable[[str], None]) -> None:
    """Neither does one that is dropped, nor one that is gone already; nor do their children live on."""
    stand_in("sleep 60 & wait")
    closed, dropped, gone = Devices(), Devices(), Devices()
    processes = [each._process for each in (closed, dropped, gone)]
    sleeping = [child_of(process.pid) for process in processes]
    assert all(process.poll() is None for process in processes)
    closed.close()
    closed.close()
    del dropped
    gone._process.kill()
    gone.close()
    assert [process.returncode for process in processes] == [-signal.SIGKILL] * 3
    assert all(map(ends, sleeping))


@pytest.mark.parametrize("script", ["exit 3", "read line; exit 3"], ids=["before", "after"])
def test_one_that_cannot_start_says_so(script: str, stand_in: Callable[[str], None]) -> None:
    """Whether it ends before it is asked for something or after."""
    stand_in(script)
    cell, broken = SAME["plain"], Devices()
    if script == "exit 3":
        broken._process.wait()
    with pytest.raises(UserError, match=r"^the process that runs the devices did not start; see what it wrote above$"):
        broken.run(*cell.job(), cell.spec)
    assert broken._process.returncode == 3


def test_measuring_agrees_with_the_price(devices: Devices) -> None:
    """Live tensors but for three numbers or a hundredth, the allocator and the process but for what kernels take."""
    small, server = SAME["lora"], devices._process.pid
    found = measure.measure(small.spec, small.plan, small.local, small.tokens, devices=devices)
    assert found.memory.total == pytest.approx(small.price.memory_bytes, abs=3 * FLOAT_BYTES)
    cell = TIGHT["levers"]
    price = cell.price
    found = measure.measure(cell.spec, cell.plan, replace(cell.local, steps=5), cell.tokens, 5, devices=devices)
    assert found.memory.total == pytest.approx(price.memory_bytes, rel=0.01)
    assert found.moment == price.moment == "backward"
    assert found.allocator_bytes == pytest.approx(price.memory_bytes, rel=0.1)
    assert found.rss_bytes == pytest.approx(price.memory_bytes, rel=0.15, abs=MIB)
    assert found.to_json().keys() == {"memory", "peak_bytes", "peak_moment", "allocator_bytes", "rss_bytes"}
    assert found.to_json()["memory"].keys() == price.to_json()["memory"].keys()
    assert json.loads(json.dumps(found.to_json())) == found.to_json()
    assert devices._process.pid == server


class Losing:
    """Devices that lose every job."""

    def __init__(self) -> None:
        self.closed = False

    def run(self, job: Job, *_: Any, **__: Any) -> Outcome:
        return Outcome(Failure(job.turn, "its process was ended by SIGKILL"))

    def close(self) -> None:
        self.closed = True


def test_what_cannot_be_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process of its own is closed, a given one is not."""
    cell, given, own = SAME["plain"], Losing(), Losing()
    plan, work = replace(cell.plan, label="last 1 of 2"), (cell.local, cell.tokens, 2)
    monkeypatch.setattr(measure, "Devices", lambda: own)
    for devices in (given, None):
        with pytest.raises(UserError, match=r"^'last 1 of 2' could not be measured: its process was ended by SIGKILL$"):
            measure.measure(cell.spec, plan, *work, devices=devices)  # type: ignore[arg-type]
    assert (given.closed, own.closed) == (False, True)


def test_a_limit_holds_as_long_as_it_is_entered() -> None:
    """What fits is given, what does not is refused, and afterwards all is as before."""
    before, limit = resource.getrlimit(resource.RLIMIT_DATA), 64 * MIB
    with limited(limit):
        fits = torch.empty(limit, dtype=torch.uint8)
        with pytest.raises(RuntimeError) as refused:
            torch.empty(limit, dtype=torch.uint8)  # so large that malloc always asks for it
        del fits
    assert lacks_memory(refused.value)
    assert resource.getrlimit(resource.RLIMIT_DATA) == before
    assert len(torch.empty(2 * limit, dtype=torch.uint8)) == 2 * limit
    with pytest.raises(ZeroDivisionError), limited(limit):
        _ = 1 // 0
    assert resource.getrlimit(resource.RLIMIT_DATA) == before
    with limited(None):
        assert resource.getrlimit(resource.RLIMIT_DATA) == before


FAULTS = """
import resource, torch
from lamina import limits

def faults():
    def step():
        parts = [torch.ones(2**20) for _ in range(4)]
    for _ in range(10):
        step()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        step()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

with limits.traceless():
    pass
given_back = faults()
limits.keep_freed()
print(given_back, faults())
"""


def test_what_is_freed_is_kept_for_the_next_step() -> None:
    """Where it is given back, as in the processes that have budgets, every step has its 4,096 pages cleared anew."""
    said = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True).stdout
    given_back, kept = map(int, said.split())
    assert given_back > 4096 * 5 * 0.9 and kept < 50


def test_the_slack_is_small() -> None:
    assert [slack_bytes(size * MIB) for size in (0, 50, 1000)] == [768 * 1024, 768 * 1024 + MIB, 768 * 1024 + 20 * MIB]


def test_what_says_that_memory_could_not_be_had() -> None:
    """Errors of torch, numpy and Python as they are, and others that are not."""
    errors: list[tuple[Callable[[], object], bool]] = [
        (lambda: torch.empty(2**60), True),
        (lambda: np.empty(2**60, dtype=np.uint8), True),
        (lambda: bytearray(2**60), True),
        (lambda: torch.ones(3) @ torch.ones(4), False),
        (lambda: torch.ones(3)[4], False),
        (lambda: int("memory"), False),
    ]
    for raising, expected in errors:
        with pytest.raises((MemoryError, RuntimeError, IndexError, ValueError)) as caught:
            raising()
        assert lacks_memory(caught.value) == expected, caught.value
    assert lacks_memory(RuntimeError("std::bad_alloc"))
    assert lacks_memory(RuntimeError("[enforce fail at"))
    assert not lacks_memory(RuntimeError("no [enforce fail"))


def test_resident_memory_is_counted_from_the_start() -> None:
    first = start_count()
    held = torch.ones(64 * MIB, dtype=torch.uint8)
    assert resident_peak() - first == pytest.approx(64 * MIB, rel=0.1)
    del held
    assert resident_peak() - first == pytest.approx(64 * MIB, rel=0.1)
    assert start_count() - first < 32 * MIB


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Table:
    """Two rounds of two devices, one of them of the weak class."""
    folder = tmp_path_factory.mktemp("enforced")
    fleet = [{"name": "strong"}, {"name": "weak", "uplink": prices(Caff(), 3)[1].up_bytes}]
    return write_world(folder, networks=[str(folder / "tiny-3")], rounds=2, cohort=2, fleet=fleet)


@pytest.fixture
def shared(devices: Devices, monkeypatch: pytest.MonkeyPatch) -> list[Devices]:
    """Engines take the process that there is; here is who took it."""
    taken: list[Devices] = []

    def take() -> Devices:
        taken.append(devices)
        return devices

    monkeypatch.setattr(enforced, "Devices", take)
    return taken


def test_enforcing_changes_no_bit(world: Table, shared: list[Devices], tmp_path: Path) -> None:
    plain = begin(world | {"engine": "serial"}, tmp_path / "plain")
    limited = begin(world | {"enforce": True}, tmp_path / "limited")
    plain.play()
    limited.play()
    assert len(shared) == 1  # the workers of the experiment
    assert outcome(limited.folder) == outcome(plain.folder)
    assert moved(begin(world, tmp_path / "new").state.params, plain.state.params)


def test_the_limit_is_what_the_device_has_in_the_round(
    world: Table, shared: list[Devices], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fleet = [each | {"memory": "64 MiB", "drift": 0.5} for each in world["fleet"]]
    made = begin(world | {"enforce": True, "fleet": fleet}, tmp_path)
    limits = dict[tuple[int, int], int | None]()
    train = Devices.run

    def noted(self: Devices, job: Job, shard: Any, spec: Spec, limit: int | None = None, **rest: Any) -> Outcome:
        limits[job.turn.round, job.turn.device] = limit
        return train(self, job, shard, spec, limit, **rest)

    monkeypatch.setattr(Devices, "run", noted)
    made.play()
    assert len(set(limits.values())) > 3
    for (round_, device), limit in limits.items():
        turn = Turn(made.experiment.seed, round_, made.experiment.rounds, device)
        assert limit == made.outlook.budget_in(turn).memory_bytes


@pytest.mark.parametrize(
    ("place", "name", "value"),
    [(sys, "platform", "darwin"), (limits, "_status", lambda key: 0)],
    ids=["Linux", "/proc"],
)
def test_limits_need_linux_with_proc(
    place: Any, name: str, value: Any, world: Table, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is said before anything is left behind."""
    with monkeypatch.context() as patch:
        patch.setattr(place, name, value)
        with pytest.raises(UserError, match=r"^enforce limits the memory of processes, which needs Linux with /proc;"):
            begin(world | {"enforce": True}, tmp_path / "runs")
        assert not (tmp_path / "runs").exists()
        begin(world, tmp_path / "runs")
    begin(world | {"enforce": True}, tmp_path / "runs")


def test_a_class_that_needs_too_much_loses_its_updates_and_no_other(
    world: Table, shared: list[Devices], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine gives it less than its plan needs; batches are large, since there is some slack."""
    run = begin(world | {"local": {"lr": 0.02, "steps": 2, "batch_size": 64}, "rounds": 1}, tmp_path)
    strong, weak = (run.outlook.class_of.index(group) for group in (0, 1))
    monkeypatch.setattr(server, "draw_cohort", lambda *_: sorted((strong, weak)))
    before = dict(run.state.params)
    budgets = {strong: Budget(), weak: Budget(memory_bytes=MIB)}
    summary = run.play(
        engine=EnforcedEngine(run.outlook.chosen.spec, run.task.train, lambda turn: budgets[turn.device], 1)
    )
    rows = {row["device"]: row for row in lines(run.folder / "devices.jsonl")}
    reason = "exceeded its memory budget of 1.0 MiB"
    assert (rows[weak]["rejected"], rows[weak]["loss"]) == (reason, None)
    assert rows[strong]["rejected"] is None and rows[strong]["loss"] > 0
    (line,) = lines(run.folder / "rounds.jsonl")
    assert (line["updates"], line["rejected"]) == (1, [f"device {weak}: {reason}"])
    assert (summary["totals"]["updates"], summary["totals"]["rejected_updates"]) == (1, 1)
    assert moved(before, run.state.params)
