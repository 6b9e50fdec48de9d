"""`lamina bench`: the same weights from all systems, what is measured, and what happens to those that fail."""

import ast
import io
import json
import math
import subprocess
import sys
import time
import venv
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pretended import LAUNCHED, pretended
from safetensors.torch import load_file
from torch import Tensor

from lamina import checkpoint, cli, tables
from lamina.bench import contest, play, systems, workloads
from lamina.bench.contest import TOLERANCE, Contest, difference
from lamina.bench.play import PlayError
from lamina.bench.runners import lean, loop, ours, processes, training
from lamina.bench.runners import request as requests
from lamina.bench.runners.request import Request, read
from lamina.bench.runners.rounds import CHECKED, WEIGHTS, Rounds
from lamina.bench.workloads import WORKLOADS, Workload, prepare
from lamina.errors import UserError
from lamina.spec import Spec

TINY = Workload(
    about="two classes, last 1 or 3 of 3 blocks",
    spec=Spec(3, 16, 2, 8, 64, vocab=50, positions=80),
    trained=(1, 3),
    devices=6,
    cohort=4,
    examples=4,
    local={"batch_size": 2, "epochs": 2},
)
Runner = Callable[[Request, Rounds], None]


@pytest.fixture(scope="module")
def request_(tmp_path_factory: pytest.TempPathFactory) -> Request:
    """The rounds of the tiny workload, as a runner reads them."""
    folder = tmp_path_factory.mktemp("request")
    prepare(TINY, "tiny", folder, CHECKED, 1, ["local.lr=0.002"])
    return read(folder)


@pytest.fixture(autouse=True)
def _no_environments(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test makes an environment by mistake, which takes minutes and a network."""

    def refuse(*given: object, **named: object) -> None:
        raise AssertionError(f"an environment is made: {given}")

    monkeypatch.setattr(venv, "create", refuse)


def weights(folder: Path, request: Request, runner: Runner) -> dict[str, Tensor]:
    """What a system has after the rounds."""
    folder.mkdir()
    runner(request, Rounds(io.StringIO(), folder))
    return load_file(folder / WEIGHTS)


def test_all_systems_end_with_the_same_weights(request_: Request, tmp_path: Path) -> None:
    start = load_file(request_.network / WEIGHTS)
    found = {each.__name__: weights(tmp_path / each.__name__, request_, each.play) for each in (ours, lean, loop)}
    first = found.pop(ours.__name__)
    assert all(not torch.equal(first[name], start[name]) for name in start if "attn.c_attn.bias" not in name)
    for others in found.values():
        assert difference(start, first, others) < TOLERANCE / 10
    for wrong in (
        replace(request_, lr=1.01 * request_.lr),
        replace(request_, rows=request_.rows[:, :, ::-1]),
        replace(request_, blocks=request_.blocks[:, ::-1]),
    ):
        out = tmp_path / f"wrong-{len(list(tmp_path.iterdir()))}"
        assert difference(start, first, weights(out, wrong, lean.play)) > TOLERANCE


def test_the_loop_plays_on_a_card(request_: Request, tmp_path: Path) -> None:
    """A pretended one, with the numbers of the host."""
    here = weights(tmp_path / "here", request_, lean.play)
    with pretended():
        there = weights(tmp_path / "there", replace(request_, device="cuda:0"), lean.play)
    assert LAUNCHED.total() > 1000
    torch.testing.assert_close(there, here, rtol=0, atol=1e-6)


def test_a_request_is_what_the_server_would_draw(request_: Request) -> None:
    assert (request_.rounds, request_.cohort, request_.devices, request_.lr) == (CHECKED, 4, 6, 0.002)
    assert request_.rows.shape == (CHECKED, 4, 4, 2)
    assert set(request_.blocks.flatten().tolist()) == {1, 3}
    for place in request_.places:
        assert len(set(place.tolist())) == 4
    ids = request_.ids
    assert ids.shape[1:] == (4, 81) and len({each.tobytes() for each in ids}) == len(ids)
    inputs, targets = next(request_.client(0, 1).batches())
    rows = ids[request_.places[0, 1]][request_.rows[0, 1, 0]]
    assert inputs.tolist() == rows[:, :-1].tolist() and targets.tolist() == rows[:, 1:].tolist()


def test_only_the_tail_of_a_device_is_trained(request_: Request) -> None:
    network = lean.Lean(request_.network, "cpu")
    before = {name: tensor.clone() for name, tensor in network.tensors.items()}
    clients = {client.blocks: client for client in request_.clients(0)}
    training.train(network, clients[1], 0.01, 0.0)
    moved = {name for name, tensor in network.tensors.items() if not torch.equal(tensor, before[name])}
    assert moved == network.trained(1) < network.trained(3) == before.keys()


def test_the_protocol_has_a_line_for_each_round(tmp_path: Path) -> None:
    said, saved = io.StringIO(), list[Path]()
    rounds = Rounds(said, tmp_path)
    for number in range(1, 4):
        rounds.begin()
        tick = time.process_time()
        while time.process_time() - tick < 0.02:
            pass
        rounds.end(saved.append)
        assert len(saved) == (number >= CHECKED)
    lines = [json.loads(line) for line in said.getvalue().splitlines()]
    assert [line["round"] for line in lines] == [1, 2, 3] and saved == [tmp_path]
    assert all(0.02 <= line["cpu_seconds"] < 1 and line["wall_seconds"] >= 0.019 for line in lines)


def test_the_difference_of_weights() -> None:
    start = {"wte.weight": torch.zeros(4, 2), "h.0.attn.c_attn.bias": torch.zeros(6)}
    one = {"wte.weight": torch.ones(4, 2), "h.0.attn.c_attn.bias": torch.tensor([1.0, 1, 1, 1, 1, 1])}
    keys = one | {"h.0.attn.c_attn.bias": torch.tensor([1.0, 1, 5, 7, 1, 1])}
    assert difference(start, one, one) == difference(start, start, start) == 0
    assert difference(start, one, keys) == 0
    queries = one | {"h.0.attn.c_attn.bias": torch.tensor([1.0, 2, 1, 1, 1, 1])}
    assert difference(start, one, queries) == difference(start, queries, one) == pytest.approx(1 / math.sqrt(15))
    assert difference(start, one, start) == 1
    assert difference(start, one, {"wte.weight": one["wte.weight"]}) == math.inf
    assert difference(start, one, one | {"wte.weight": torch.full((4, 2), math.nan)}) == math.inf


def test_runners_of_peers_import_nothing_of_lamina() -> None:
    folder = Path(training.__file__).parent
    for path in folder.glob("*.py"):
        nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
        names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
        names |= {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom) and not node.level}
        ours_alone = any(name.partition(".")[0] == "lamina" for name in names)
        assert ours_alone == (path.stem in ("lean", "ours")), path.name
        assert all(node.level == 1 for node in nodes if isinstance(node, ast.ImportFrom) and node.level)


@pytest.mark.parametrize(("name", "package"), [("ours", "lamina.bench.runners"), ("flower", "runners")])
def test_what_a_runner_is_started_with(name: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "mine")
    arguments, variables = systems.command(name, Path("python"), Path("request"), Path("out"))
    assert arguments == ["python", "-m", package, name, "request", "out"]
    assert variables["OMP_NUM_THREADS"] == "1" and variables["FLWR_TELEMETRY_ENABLED"] == "0"
    assert (variables["PYTHONPATH"] == "mine") == (name == "ours")
    assert name == "ours" or (Path(variables["PYTHONPATH"]) / "runners" / "flower.py").is_file()


BUSY = "import time\nwhile time.process_time() < 0.3: pass\n"
LINE = """print('{"round": %d, "cpu_seconds": 2.5, "wall_seconds": 0.5}', flush=True)\n"""


def python(code: str, *more: str) -> list[str]:
    return [sys.executable, "-S", "-c", code, *more]


def test_a_tree_of_processes(tmp_path: Path) -> None:
    before = processes.cpu_seconds()
    subprocess.run(python(BUSY), check=True)
    assert 0.3 <= processes.cpu_seconds() - before < 2
    inner = f"{BUSY}x = bytearray(50 << 20)\nprint(1, flush=True)\ninput()"
    outer = "import subprocess, sys\nsubprocess.run([sys.executable, '-S', '-c', sys.argv[1]])"
    with subprocess.Popen(python(outer, inner), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout and process.stdin
        process.stdout.readline()
        parent, child = processes.tree(process.pid)
        assert (parent.number, child.parent) == (process.pid, process.pid)
        assert child.resident_bytes > 50 << 20 > parent.resident_bytes
        assert child.cpu_seconds >= 0.25 and processes.cpu_seconds() - before >= 0.55  # in ticks of 10 ms
        process.communicate("\n")
    assert processes.tree(process.pid) == []


def play_(code: str, out: Path, rounds: int = 2, on_round: Callable[[], None] = lambda: None) -> play.Played:
    return play.play(python(code), {}, rounds, out, on_round)


def test_what_is_told_of_a_system_that_plays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And what it leaves running is ended."""
    monkeypatch.setattr(play, "_GRACE_SECONDS", 0.0)
    leave = "import subprocess\nchild = subprocess.Popen(['sleep', '60'], stdout=subprocess.DEVNULL)\n"
    tell = f"print(child.pid, file=open({str(tmp_path / 'pid')!r}, 'w'))\nx = bytearray(100 << 20)\n"
    wait = "import time\ntime.sleep(0.4)\n"
    told: list[None] = []
    found = play_(leave + tell + wait + LINE % 1 + LINE % 2 + wait, tmp_path, on_round=lambda: told.append(None))
    assert (found.cpu_seconds, found.wall_seconds, len(told)) == ([2.5, 2.5], [0.5, 0.5], 2)
    assert 0.4 <= found.first_seconds < 10
    assert 100 << 20 < found.peak_rss_bytes < 200 << 20
    deadline = time.monotonic() + 10
    while (left := processes.table().get(int((tmp_path / "pid").read_text()))) and left.resident_bytes:
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        (f"{LINE % 1}raise ValueError('no such layer')", "exit code 1 after 1 of 2 rounds: ValueError: no such layer"),
        (LINE % 1, "exit code 0 after 1 of 2 rounds: it said nothing"),
        ("import time\ntime.sleep(60)", "nothing was heard of it for 0 s"),
    ],
)
def test_a_system_that_does_not_play(code: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(play, "_SILENCE_SECONDS", 0.3 if "sleep" in code else 60.0)
    with pytest.raises(PlayError, match=reason):
        play_(code, tmp_path)


@pytest.fixture(scope="module")
def held(tmp_path_factory: pytest.TempPathFactory) -> tuple[Mapping[str, Any], Path, str]:
    """A contest as the command line holds it, with a system that cannot play: its JSON, its record, what it said."""
    path = tmp_path_factory.mktemp("record") / "bench.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(WORKLOADS, "tiny", TINY)
        patch.setitem(systems.SYSTEMS, "loop", systems.System("nowhere", "one that is not there"))
        code, said, errors = lamina(
            "bench",
            "tiny",
            "--against",
            "loop-lean,loop",
            "--rounds",
            1,
            "--settle",
            1,
            "--repeats",
            1,
            "--record",
            path,
            "--json",
        )
    assert code == 0, errors
    return json.loads(said), path, errors


def lamina(*arguments: object) -> tuple[Any, str, str]:
    """Exit code, standard output and standard error of the command."""
    out, errors = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(sys, "argv", ["lamina", *map(str, arguments)])
        patch.setattr(sys, "stdout", out)
        patch.setattr(sys, "stderr", errors)
        cli.main()
    return stop.value.code, out.getvalue(), errors.getvalue()


def test_the_result_of_a_contest(held: tuple[Mapping[str, Any], Path, str]) -> None:
    result, path, said = held
    assert (result["schema"], result["label"], result["workload"]["about"]) == (
        "lamina.bench/1",
        "tiny, settle=1",
        TINY.about,
    )
    assert result["settings"] == {
        "overrides": [], "rounds": 1, "warmup": 1, "settle": 1, "repeats": 1, "workers": 1, "device": "cpu",
        "tolerance": TOLERANCE,
    }  # fmt: skip
    assert {"cpu", "cores", "memory_bytes", "torch", "load_before"} <= result["machine"].keys()
    rows = result["systems"]
    assert list(rows) == ["ours", "loop-lean", "loop"]
    assert rows["ours"]["weights_differ"] == 0 and set(rows["ours"]["to_ours"].values()) == {1.0}
    row = rows["loop-lean"]
    assert 0 < row["weights_differ"] < TOLERANCE / 10
    for key in ("cpu_seconds", "wall_seconds"):
        (timed,) = row["rounds"][key]
        assert [row[key]] == timed and row["to_ours"][key] == row[key] / rows["ours"][key]
    assert row["peak_rss_bytes"] > 100 << 20 and row["start_seconds"] > 0.2
    failed = rows["loop"]
    assert "No module named 'lamina.bench.runners.nowhere'" in failed["fault"] and failed["cpu_seconds"] is None
    assert "ours, turn 1/1" in said and "loop, turn 1/1: ended with exit code 1 after 0 of 2 rounds" in said
    table = tables.contest(result)
    assert [line[:3] for line in table.rows][2] == ("loop", "1", "no result")
    assert all(len(line) == len(table.head) for line in table.rows)
    assert json.loads(path.read_text())["results"] == {"tiny, settle=1": result}


def test_weights_that_differ_are_an_error(
    held: tuple[Mapping[str, Any], Path, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    result = json.loads(json.dumps(held[0]))
    monkeypatch.setattr(contest, "hold", lambda *given: result)
    assert lamina("bench", "A")[0] == 0
    for differ in (1.5e-3, math.nan):
        result["systems"]["loop-lean"]["weights_differ"] = differ
        code, said, errors = lamina("bench", "A")
        assert code == 1 and "loop-lean" in said
        assert f"the weights of loop-lean differ from ours by {differ:.1e}, more than --tolerance 0.001" in errors


def test_a_record_keeps_other_results(held: tuple[Mapping[str, Any], Path, str], tmp_path: Path) -> None:
    path, result = tmp_path / "bench.json", dict(held[0])
    contest.record(path, result)
    contest.record(path, result | {"label": "A, workers=2"})
    contest.record(path, result | {"workload": {}})
    found = json.loads(path.read_text())["results"]
    assert list(found) == ["A, workers=2", "tiny, settle=1"] and found["tiny, settle=1"]["workload"] == {}
    path.write_text('{"schema": "lamina.summary/1"}')
    with pytest.raises(UserError, match=r"bench\.json holds no results of lamina bench"):
        contest.record(path, result)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["G"], "no workload 'G'; accepted: A, B, C, D, E, F"),
        (["A", "--against", "flowr"], "--against: no system 'flowr'; did you mean 'flower'?"),
        (["A", "--against", "ours"], "--against: no system 'ours'"),
        (["A", "--rounds", "0"], "--rounds must be at least 1, got 0"),
        (["A", "--settle", "-1"], "--settle must not be negative, got -1"),
        (["A", "--tolerance", "nan"], "--tolerance must be above 0, got nan"),
        (["C", "--set", "workers=2"], "take --rounds, --warmup, --workers and --device"),
        (["C", "--set", "device=cuda"], "take --rounds, --warmup, --workers and --device"),
        (["C", "--device", "card"], "--device: unknown 'card'; accepted: auto, cpu, cuda, cuda:1"),
        (["C", "--device", "cuda"], 'device is "cuda", but torch sees no CUDA device'),
        (["C", "--device", "cuda", "--against", "loop,pfl"], "pfl plays on the cpu alone; with --device, take loop or"),
        (["C", "--set", "local.steps=0", "--set", "local.batch_size=3"], "let local.batch_size divide task.examples"),
        (["C", "--set", "local.leaning=1"], "unknown key 'leaning'"),
    ],
)
def test_what_is_refused(arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(WORKLOADS, "C", replace(TINY, local={"batch_size": 2}))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    code, _, errors = lamina("bench", *arguments)
    assert code == 2 and message in errors


def test_every_workload_is_an_experiment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the table of the issue has it; only the plans are looked at."""
    asked: dict[str, Any] = {}
    monkeypatch.setattr(workloads, "_drawn", lambda experiment, *more: experiment)
    monkeypatch.setattr(requests, "write", lambda request: None)
    monkeypatch.setattr(checkpoint, "write", lambda *given: None)
    for name, workload in WORKLOADS.items():
        experiment: Any = prepare(workload, name, tmp_path, 2, 1, [])
        steps = experiment.local.round_steps(workload.examples)
        asked[name] = (workload.spec.embed, workload.spec.blocks, workload.trained, workload.cohort, workload.devices)
        asked[name] += (steps, experiment.local.batch_size)
    assert asked == {
        "A": (256, 6, (2,), 10, 100, 4, 16),
        "B": (256, 12, (2,), 10, 100, 20, 16),
        "C": (64, 4, (2,), 100, 1000, 4, 8),
        "D": (256, 12, (1, 3, 6), 30, 300, 4, 16),
        "E": (256, 6, (6,), 10, 100, 4, 16),
        "F": (64, 4, (2,), 1000, 100_000, 4, 8),
    }


def test_an_environment_is_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With torch first, anew when its packages change, and not at all if something cannot be installed."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    made, installed = list[Path](), list[list[str]]()
    monkeypatch.setattr(venv, "create", lambda folder, **options: made.append(folder))
    monkeypatch.setattr(systems, "_install", lambda python, packages: installed.append(packages))
    folder, torch_ = tmp_path / "lamina" / "bench" / "pfl", f"torch=={torch.__version__.partition('+')[0]}"
    assert systems.missing("pfl") and not systems.missing("ours") and not systems.missing("loop-lean")
    assert systems.environment("pfl") == systems.environment("pfl") == folder / "bin" / "python"
    assert made == [folder] and not systems.missing("pfl")
    assert installed == [[torch_], [torch_, "transformers==5.23.0", "pfl[pytorch]==0.6.0"]]
    assert systems.environment("loop-lean") == Path(sys.executable)
    monkeypatch.setitem(systems.SYSTEMS, "pfl", systems.System("pfl", "newer", ("pfl==9",)))
    assert systems.missing("pfl")
    (folder / "lib").mkdir()

    def fail(python: Path, packages: list[str]) -> None:
        raise subprocess.CalledProcessError(1, "pip", stderr="WARNING: slow\nERROR: no pfl==9\nERROR: none\n")

    monkeypatch.setattr(systems, "_install", fail)
    with pytest.raises(UserError, match=r"^the environment of pfl could not be made: no pfl==9$"):
        systems.environment("pfl")
    assert systems.missing("pfl") and not (folder / "lib").exists()


def test_a_system_without_an_environment_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """pip is really asked, for what it cannot have."""
    said: list[str] = []

    class Teller:
        def say(self, text: str) -> None:
            said.append(text)

        def advance(self, note: str, rounds: int) -> None:
            raise AssertionError

    def environment(name: str) -> Path:
        with pytest.raises(subprocess.CalledProcessError) as stop:
            systems._install(Path(sys.executable), ["./nowhere"])
        raise UserError(systems._reason(stop.value))

    monkeypatch.setattr(systems, "environment", environment)
    entry = contest._entered("loop-lean", Teller())
    assert entry.fault and "./nowhere" in entry.fault and said == [f"warning: {entry.fault}"]
    row = contest._measured(Contest("A"), entry)
    assert (row["fault"], row["cpu_seconds"], row["rounds"]) == (entry.fault, None, None)
