"""What a machine can spare: memory that is free within its cgroups, and the speed of the real client."""

import itertools
import json
import sys
import tomllib
from pathlib import Path

import pytest

from lamina import cli, client, profile
from lamina.checkpoint import read_spec
from lamina.config import experiment
from lamina.cost import cost
from lamina.data.task import Shard
from lamina.deploy import way
from lamina.deploy.kit import make
from lamina.errors import UserError
from lamina.fleet import DeviceClass, rate
from lamina.job import Job, Update
from lamina.model import layout
from lamina.networks import find
from lamina.ops import TORCH, Ops
from lamina.plan import Plan
from lamina.profile import LOCAL, NETWORK, TOKENS, Free, Profile, free_memory, speed_of
from lamina.spec import Spec

GIB = 2**30
GROUPS = {
    "version 2": ("0::/a/b\n", "a", "memory.max", "memory.current", "inactive_file"),
    "version 1": (
        "4:memory:/a/b\n",
        "memory/a",
        "memory.limit_in_bytes",
        "memory.usage_in_bytes",
        "total_inactive_file",
    ),
}


def machine(root: Path, files: dict[str, str]) -> Path:
    """A machine with 4 GiB free."""
    for name, text in ({"proc/meminfo": f"MemTotal: 9 kB\nMemAvailable: {4 * GIB // 1024} kB\n"} | files).items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


@pytest.mark.parametrize(("own", "folder", "limit", "use", "droppable"), GROUPS.values(), ids=list(GROUPS))
def test_a_limit_of_a_group_above_counts(
    own: str, folder: str, limit: str, use: str, droppable: str, tmp_path: Path
) -> None:
    """Less what is used, without pages of files that the system drops when it needs them."""
    group = f"sys/fs/cgroup/{folder}"
    files = {
        "proc/self/cgroup": "8:pids:/\n" + own,
        f"{group}/{limit}": f"{2 * GIB}\n",
        f"{group}/{use}": f"{GIB}\n",
        f"{group}/memory.stat": f"anon 5\n{droppable} {GIB // 4}\n",
        f"{group}/b/{limit}": "max\n",
    }
    found = free_memory(machine(tmp_path, files))
    assert (found.size_bytes, found.bound) == (2 * GIB - GIB + GIB // 4, "cgroup /a/b")


def test_the_system_counts_where_no_group_limits(tmp_path: Path) -> None:
    assert free_memory(machine(tmp_path, {})) == Free(4 * GIB, "system")
    loose = {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/memory.max": "max\n"}
    assert free_memory(machine(tmp_path, loose)) == Free(4 * GIB, "system")


def test_a_group_that_is_over_its_limit_leaves_nothing(tmp_path: Path) -> None:
    files = {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/memory.max": "7\n", "sys/fs/cgroup/memory.current": "9\n"}
    assert free_memory(machine(tmp_path, files)).size_bytes == 0


def test_a_system_that_does_not_tell_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="needs Linux: write the class by hand"):
        free_memory(tmp_path)


def test_the_speed_is_the_predicted_work_over_the_time_of_the_client(monkeypatch: pytest.MonkeyPatch) -> None:
    real = client.train
    trained: list[Ops] = []

    def train(job: Job, shard: Shard, spec: Spec, ops: Ops = TORCH) -> Update:
        trained.append(ops)
        return real(job, shard, spec, ops)

    monkeypatch.setattr(client, "train", train)
    ticks = (2.0 * step for step in itertools.count())
    speed, rounds = speed_of(lambda: next(ticks), 7.0)
    spec = read_spec(find(NETWORK))
    names = frozenset(layout(spec).params)
    assert speed == cost(spec, Plan(names, names), LOCAL, TOKENS, LOCAL.steps).flops / 2.0
    assert (rounds, trained.count(TORCH)) == (4, 5)  # one more warms up


@pytest.mark.parametrize("speed", [26_558_670_829.9, 999_999_999.9, 123_456.0])
def test_the_class_is_rounded_down_and_read_by_experiments(speed: float) -> None:
    found = Profile("pi", Free(GIB + 5, "system"), 24 * 2**20, speed, 3)
    (table,) = tomllib.loads(found.toml())["fleet"]
    made = DeviceClass(**table)
    assert made == found.device_class()
    assert (made.name, made.budget.memory_bytes) == ("pi", 1000 * 2**20)
    assert made.speed is not None and 0.99 * speed < rate("speed", made.speed) <= speed
    settings = {"name": "x", "rounds": 1, "cohort": 1, "networks": [NETWORK], "fleet": [table]}
    assert experiment(settings, "test").fleet == (made,)


def test_without_memory_to_spare_there_is_no_class(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profile, "speed_of", lambda clock, seconds: (1e9, 3))
    root = machine(tmp_path, {})
    assert profile.profile("pi", GIB, root=root).to_table()["memory"] == "3072 MiB"
    with pytest.raises(UserError, match=r"4\.0 GiB of memory are free \(system\), no more than the reserve"):
        profile.profile("pi", 4 * GIB, root=root)


def test_the_command_prints_the_table_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        profile, "profile", lambda name, reserve_bytes: Profile(name, Free(GIB, "system"), reserve_bytes, 2e9, 3)
    )
    printed = []
    for flags in ([], ["--json"]):
        monkeypatch.setattr(sys, "argv", ["lamina", "profile", "--name", "pi", "--reserve", "512 MiB", *flags])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        out, err = capsys.readouterr()
        assert not stop.value.code and "training a small network" in err
        printed.append(out)
    expected = {"name": "pi", "memory": "512 MiB", "speed": "2000 MFLOP/s"}
    assert tomllib.loads(printed[0])["fleet"] == [expected]
    assert json.loads(printed[1])["class"] == expected


def test_the_way_to_the_server_is_part_of_the_class(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made = make(tmp_path / "kit", "localhost", 8443, 2, force=False)
    found = Profile("pi", Free(GIB, "system"), GIB // 2, 2e9, 3)
    monkeypatch.setattr(profile, "profile", lambda name, reserve_bytes: found)
    monkeypatch.setattr(way, "rates", lambda device: (device.device * 123_456.0, 1e9))
    printed = []
    for flags in ([], ["--json"]):
        command = ["lamina", "profile", "--server", str(made.folder / "devices" / "1"), *flags]
        monkeypatch.setattr(sys, "argv", command)
        with pytest.raises(SystemExit) as stop:
            cli.main()
        assert not stop.value.code
        printed.append(capsys.readouterr().out)
    (table,) = tomllib.loads(printed[0])["fleet"]
    assert (table["up_rate"], table["down_rate"]) == ("0.987 Mbit/s", "8000 Mbit/s")
    assert DeviceClass(**table).rates[2] == pytest.approx(123_456, rel=1e-3)
    assert json.loads(printed[1])["class"] == table and json.loads(printed[1])["not_measured"] == []


def test_a_reserve_that_is_no_quantity_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["lamina", "profile", "--reserve", "lots"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2 and "--reserve must be a quantity above 0" in capsys.readouterr().err
