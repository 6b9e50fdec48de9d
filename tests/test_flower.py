"""The engine on a grid that is played, with devices that are real but for the wire: same weights, and every fault."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from threading import Event, Lock
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, RecordDict
from flwr.proto.node_pb2 import NodeInfo
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity
from support import Table, bits, lines, memory, outcome, write_world

from lamina import client, config, deployed, files, networks, toml, wire
from lamina.deployed import engine_of, in_real_time
from lamina.engines import flower
from lamina.engines.flower import FlowerEngine, Peer, Peers, parts, record
from lamina.errors import UserError
from lamina.experiment import devices as roster_of
from lamina.fleet import RESOURCES, assign
from lamina.job import Failure, Job
from lamina.run import Run, resume, start
from lamina.server import DeviceRow, play_round
from lamina.state import State
from lamina.traces import Traces
from lamina.turn import generator

Replies = Iterable[tuple[float, Message]]
Bend = Callable[["Link", Message, Message], Replies]


class Clock(SimpleNamespace):
    """Time that passes when somebody sleeps."""

    def __init__(self) -> None:
        super().__init__(now=1000.0)

    def monotonic(self) -> float:
        return float(self.now)

    time = monotonic

    def sleep(self, seconds: float) -> None:
        self.now += seconds


class Link(Grid):
    """Flower's part: nodes with settings, each answering as its app does; `bend` makes other replies, and when.

    Attributes:
        nodes: Node -> node config.
        since: Node -> when it connected, as Flower says.
        broken: Replies that cannot be put together, and why.
        stuck: Replies of which a part has come, and when the rest does.
        bend: Given the question and the honest reply: replies, each after some seconds.
        pushed: Messages, in order.
    """

    def __init__(self, nodes: Mapping[int, Mapping[str, Any]], clock: Clock) -> None:
        self.nodes, self.clock = dict(nodes), clock
        self.bend: Bend = lambda link, question, reply: [(0.0, reply)]
        self.pushed: list[Message] = []
        self.broken: dict[Message, Exception] = {}
        self.stuck: dict[Message, Event] = {}
        self.one = Lock()
        self.since: dict[int, str] = {}
        self.replies: list[tuple[float, Message]] = []

    def set_run(self, run: Any) -> None: ...

    @property
    def run(self) -> Any:
        return None

    def create_message(self, *args: Any, **kwargs: Any) -> Message:
        raise NotImplementedError

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        raise NotImplementedError

    def get_node_ids(self) -> Iterable[int]:
        return list(self.nodes)

    def get_nodes(self) -> Iterable[NodeInfo]:
        return [NodeInfo(node_id=node, last_activated_at=self.since.get(node)) for node in self.get_node_ids()]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        found = []
        for message in messages:
            message.metadata.__dict__["_message_id"] = f"m{len(self.pushed)}"
            self.pushed.append(message)
            found.append(message.metadata.message_id)
            settings = self.nodes[message.metadata.dst_node_id]
            app = deployed.hello if message.metadata.message_type == "query" else deployed.answer
            now = self.clock.now + float(generator("way", len(self.pushed)).random())  # no order is kept
            self.replies += [(now + after, reply) for after, reply in self.bend(self, message, app(message, settings))]
        return found

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """By threads of the engine, one for each message."""
        (key,) = message_ids
        with self.one:
            due = [each for each in self.replies if each[0] <= self.clock.now]
            due = [each for each in due if each[1].metadata.reply_to_message_id == key]
            self.replies = [each for each in self.replies if not any(each is other for other in due)]
        for _, reply in due:
            if reply in self.broken:
                raise self.broken[reply]
            if reply in self.stuck:
                self.stuck[reply].wait(20)
        return [reply for _, reply in due]


def played(monkeypatch: pytest.MonkeyPatch) -> None:
    """What Flower knows of itself in a process of its own."""
    for name in ("_run_id", "_node_id", "_task_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)


@pytest.fixture(autouse=True)
def identity(monkeypatch: pytest.MonkeyPatch) -> None:
    played(monkeypatch)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(flower, "time", found)
    monkeypatch.setattr("lamina.node.time", found)
    return found


class World:
    """An experiment, its file, and three devices with node configs of their own."""

    def __init__(self, folder: Path, time: Clock, **changes: Any) -> None:
        self.folder, self.clock = folder, time
        table = write_world(folder, engine="serial", rounds=2, cohort=3) | changes
        table["task"] |= {"devices": 3}
        self.file = folder / "x.toml"
        self.file.write_text(toml.dump(table), encoding="utf-8")
        self.experiment = config.load_experiment(self.file)
        self.link = Link({10 + i: self.settings(i) for i in range(3)}, time)

    def settings(self, device: int, **more: Any) -> Table:
        """Node config of a device."""
        paths = {"experiment": str(self.file), "cache": str(self.folder / f"cache-{device}")}
        return {"device": device} | paths | more

    def begin(self, name: str = "real") -> tuple[Run, FlowerEngine]:
        """The run, and what carries its jobs."""
        return self.real(start(self.experiment, self.folder, name))

    def real(self, run: Run) -> tuple[Run, FlowerEngine]:
        """What makes a run one of real devices; what people are told goes to `told`."""
        self.told: list[str] = []
        engine = engine_of(run, Peers(self.link, 3, 30.0, self.told.append))
        run.experiment = in_real_time(run.experiment)
        return run, engine

    def play(self, name: str = "real") -> tuple[Run, FlowerEngine]:
        """A run from begin to end."""
        run, engine = self.begin(name)
        run.play(engine=engine)
        return run, engine


@pytest.fixture
def world(tmp_path: Path, clock: Clock) -> World:
    return World(tmp_path, clock)


def lost(folder: Path) -> list[str]:
    """What the last round rejected, and why."""
    return list(lines(folder / "rounds.jsonl")[-1]["rejected"])


def second(question: Message) -> bool:
    """Whether it is a job of the second round for device 1."""
    if question.metadata.message_type != "train":
        return False
    turn = wire.unpack(*parts(question.content)).head["turn"]
    return bool(turn["round"] == 1 and turn["device"] == 1)


@pytest.mark.parametrize(
    "method",
    [
        {"name": "caff"},
        {"name": "lora"},
        {"name": "heterofl"},
        {"name": "depthfl", "alpha": 0.1},
    ],
    ids=lambda method: method["name"],
)
def test_weights_and_books_are_those_of_the_simulation_bit_for_bit(tmp_path: Path, clock: Clock, method: Table) -> None:
    fleet = [{"name": "strong"}, {"name": "weak"}] if method["name"] in ("lora", "depthfl") else None
    world = World(tmp_path, clock, rounds=3, method=method, **({"fleet": fleet} if fleet else {}))
    run, engine = world.play()
    here = start(world.experiment, tmp_path, "here")
    here.play()
    kept = [outcome(each.folder) for each in (run, here)]
    for each in kept:  # what a device keeps is on its own disk
        for key in [key for key in each["state"] if key.startswith("device:")]:
            del each["state"][key]
        del each["manifest"]["sha256"], each["manifest"]["tensors"]
    assert kept[0] == kept[1]
    predicted, messages = outcome(run.folder)["summary"]["totals"], len(world.link.pushed)
    index = 2048 + 170 * len(run.state.params)  # as docs/engines.md says
    for way, key in (("sent", "down_bytes"), ("received", "up_bytes")):
        assert predicted[key] <= engine.peers.traffic[way] <= 1.02 * predicted[key] + messages * index


def test_frozen_tensors_are_sent_once(tmp_path: Path, clock: Clock) -> None:
    world = World(tmp_path, clock, fleet=[{"name": "weak", "memory": memory(3, 1)}])
    run, _ = world.play()
    plan = run.outlook.chosen.choices[0].plan
    sent = [wire.unpack(*parts(each.content)) for each in world.link.pushed if each.metadata.message_type == "train"]
    assert plan and plan.holds > plan.trains
    assert [set(each.tensors) for each in sent] == [plan.holds] * 3 + [plan.trains] * 3
    assert all(set(each.rows) == plan.holds for each in sent)


def test_a_cache_that_was_lost_or_is_damaged_is_filled_again(world: World) -> None:
    def damage(link: Link, question: Message, reply: Message) -> Replies:
        if question.metadata.message_type == "train":
            kept = sorted((world.folder / "cache-1" / "tensors").iterdir())
            if len(kept) > 3:
                kept[0].unlink()
                kept[1].write_bytes(b"no")
                kept[2].write_bytes(kept[3].read_bytes())
        return [(0.0, reply)]

    world.link.bend = damage
    run, _ = world.play()
    here = start(world.experiment, world.folder, "here")
    here.play()
    assert bits(run.state.params) == bits(here.state.params)


def replied(question: Message, head: Table, tensors: Mapping[str, torch.Tensor] | None = None) -> Message:
    return Message(record(*wire.pack(head, tensors)), reply_to=question)


def changed(change: Callable[[wire.Message], tuple[Table, Mapping[str, Any]]]) -> Bend:
    """Device 1 sends another update in the second round."""

    def bend(link: Link, question: Message, reply: Message) -> Replies:
        if second(question):
            head, tensors = change(wire.unpack(*parts(reply.content)))
            return [(0.0, replied(question, head, tensors))]
        return [(0.0, reply)]

    return bend


def tensor(change: Callable[[torch.Tensor], torch.Tensor]) -> Bend:
    """Another first tensor."""

    def altered(message: wire.Message) -> tuple[Table, Mapping[str, Any]]:
        first = next(iter(message.tensors))
        return dict(message.head), message.tensors | {first: change(message.tensors[first])}

    return changed(altered)


def instead(make: Callable[[Message, Message], Message]) -> Bend:
    """Another reply of device 1 in the second round."""
    return lambda link, question, reply: [(0.0, make(question, reply) if second(question) else reply)]


def flipped(question: Message, reply: Message) -> Message:
    text, data = parts(reply.content)
    return Message(record(text, data[:-1] + bytes([data[-1] ^ 1])), reply_to=question)


def cut(question: Message, reply: Message) -> Message:
    text, data = parts(reply.content)
    return Message(record(text, data[: len(data) // 2]), reply_to=question)


def bomb(question: Message, reply: Message) -> Message:
    text = wire.pack({"answer": "update"}, {"x": torch.zeros(1)})[0].partition("\n")[2].replace("[1]", "[10000000000]")
    return Message(record(f"{files.digest(text.encode())}\n{text}", b""), reply_to=question)


def pickled(question: Message, reply: Message) -> Message:
    """What would run a program, were it loaded, in the place of numbers."""
    text, data = parts(reply.content)
    bad = b"cposix\nsystem\n(S'touch canary'\ntR.".ljust(len(data), b".")
    array = Array(dtype="object", shape=(1,), stype="numpy.ndarray", data=bad)
    content = RecordDict({"lamina": ArrayRecord({"lamina": array}), "index": ConfigRecord({"index": text})})
    return Message(content, reply_to=question)


FAULTS: dict[str, tuple[Bend, str]] = {
    "gone": (instead(lambda q, r: Message(Error(5, "secret"), reply_to=q)), "its node is gone"),
    "killed": (instead(lambda q, r: Message(Error(8, "secret"), reply_to=q)), "its client was ended"),
    "raised": (instead(lambda q, r: Message(Error(2, "secret"), reply_to=q)), "its client failed"),
    "cut off": (instead(lambda q, r: Message(Error(3, "secret"), reply_to=q)), "its answer did not arrive whole"),
    "unknown": (instead(lambda q, r: Message(Error(77, "secret"), reply_to=q)), "Flower reports error 77"),
    "rubbish": (instead(lambda q, r: Message(RecordDict(), reply_to=q)), "not a message of lamina"),
    "index of a number": (
        instead(lambda q, r: Message(RecordDict({"index": ConfigRecord({"index": 3})}), reply_to=q)),
        "not a message of lamina",
    ),
    "flipped": (instead(flipped), "is not what was sent"),
    "cut": (instead(cut), "bytes, "),
    "pickled": (instead(pickled), "is not what was sent"),
    "bomb": (instead(bomb), "take 40000000000 bytes, 0 came"),
    "nan": (tensor(lambda t: t * np.nan), "holds values that are not finite"),
    "infinite": (tensor(lambda t: t / 0), "holds values that are not finite"),
    "one": (tensor(lambda t: t.reshape(-1)[:1]), "against its plan"),
    "number": (tensor(lambda t: t.reshape(-1)[0]), "against its plan"),
    "none": (tensor(lambda t: t[:0]), "against its plan"),
    "axis": (tensor(lambda t: t[None]), "against its plan"),
    "double": (tensor(lambda t: t.double()), "against its plan"),
    "whole numbers": (tensor(lambda t: t.int()), "against its plan"),
    "extra": (changed(lambda m: (dict(m.head), m.tensors | {"more": torch.ones(1)})), "has tensor more"),
    "missing": (changed(lambda m: (dict(m.head), dict(list(m.tensors.items())[1:]))), "lacks tensor"),
    "negative": (changed(lambda m: (dict(m.head) | {"examples": -9}, m.tensors)), "says it used -9 examples"),
    "zero": (changed(lambda m: (dict(m.head) | {"examples": 0}, m.tensors)), "says it used 0 examples"),
    "huge": (changed(lambda m: (dict(m.head) | {"examples": 10**30}, m.tensors)), "says it used 1000"),
    "not a number": (
        changed(lambda m: (dict(m.head) | {"examples": math.nan}, m.tensors)),
        "examples must be int, got",
    ),
    "no steps": (changed(lambda m: (dict(m.head) | {"steps": 0}, m.tensors)), "in 0 steps"),
    "bool": (changed(lambda m: (dict(m.head) | {"examples": True}, m.tensors)), "examples must be int, got True"),
    "list": (changed(lambda m: (dict(m.head) | {"steps": [1]}, m.tensors)), "steps must be int"),
    "loss": (changed(lambda m: (dict(m.head) | {"loss": float("nan")}, m.tensors)), "training loss is not finite"),
    "state": (changed(lambda m: (dict(m.head) | {"state": "a"}, m.tensors)), "state must be bool"),
    "round": (
        changed(lambda m: (dict(m.head) | {"turn": m.head["turn"] | {"round": 0}}, m.tensors)),
        "answers another job",
    ),
    "device": (
        changed(lambda m: (dict(m.head) | {"turn": m.head["turn"] | {"device": 2}}, m.tensors)),
        "answers another job",
    ),
    "lacks": (changed(lambda m: ({"answer": "lacks", "known": {}}, {})), "lacks tensors that it was sent"),
    "lacks oddly": (changed(lambda m: ({"answer": "lacks", "known": {"a": 3}}, {})), "known must be tensors"),
}


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> tuple[World, Run, bytes]:
    """A run after its first round, and the state after a second in which device 1 does not answer."""
    with pytest.MonkeyPatch.context() as patch:
        played(patch)
        world = World(tmp_path_factory.mktemp("half"), Clock())
        patch.setattr(flower, "time", world.clock)
        run, engine = world.begin()
        run.state, _ = one_round(run, engine)

        def silent(jobs: Iterable[Job]) -> Iterator[Any]:
            return (answer for answer in engine.run(jobs) if answer.turn.device != 1)

        return world, run, b"".join(bits(one_round(run, SimpleNamespace(run=silent))[0].params).values())


def one_round(run: Run, engine: Any) -> tuple[State, list[DeviceRow]]:
    return play_round(run.experiment, run.outlook, [len(each) for each in run.task.train], engine, run.state)


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_costs_the_update_of_its_device_alone(
    half: tuple[World, Run, bytes], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    world, run, expected = half
    monkeypatch.setattr(flower, "time", world.clock)
    world.link.bend, reason = FAULTS[name]
    state, rows = one_round(run, engine_of(run, Peers(world.link, 3, 30.0, world.told.append)))
    assert [row.loss is None for row in rows] == [False, True, False]
    assert reason in str(rows[1].rejected) and "secret" not in str(rows[1].rejected)
    assert b"".join(bits(state.params).values()) == expected


def test_a_device_that_is_late_is_not_waited_for_and_not_used_later(tmp_path: Path, clock: Clock) -> None:
    fleet = [{"name": "only", "speed": "1 TFLOP/s"}]
    world = World(tmp_path, clock, rounds=3, clock={"deadline": 20.0}, fleet=fleet)
    world.link.bend = lambda link, q, reply: [(45.0 if second(q) else 1.0, reply)]
    begin = clock.now
    run, _ = world.play()
    rejected = [each["rejected"] for each in lines(run.folder / "rounds.jsonl")]
    assert rejected == [[], ["device 1: late"], []]
    assert clock.now - begin < 20 + 10
    jobs = [each for each in world.link.pushed if each.metadata.message_type == "train"]
    assert {each.metadata.ttl for each in jobs} == {20.0}  # what comes later, Flower does not take


def test_a_round_of_more_than_are_wanted_ends_when_they_have_answered(tmp_path: Path, clock: Clock) -> None:
    fleet = [{"name": "only", "speed": "1 TFLOP/s"}]
    world = World(tmp_path, clock, cohort=2, clock={"over_selection": 1.5}, fleet=fleet)
    world.link.bend = lambda link, q, reply: [(1e6 if second(q) else 0.0, reply)]
    run, _ = world.play()
    rows = lines(run.folder / "rounds.jsonl")
    assert [row["updates"] for row in rows] == [2, 2]
    assert rows[1]["rejected"] == ["device 1: late"]


def test_an_answer_that_stays_away_half_sent_does_not_hold_up_the_others(tmp_path: Path, clock: Clock) -> None:
    """Flower waits for the rest of it; the round ends by its deadline without it, and it is not used later."""
    fleet = [{"name": "only", "speed": "1 TFLOP/s"}]
    world, rest = World(tmp_path, clock, rounds=3, clock={"deadline": 2.0}, fleet=fleet), Event()

    def stick(link: Link, question: Message, reply: Message) -> Replies:
        if second(question):
            link.stuck[reply] = rest
        return [(0.0, reply)]

    world.link.bend = stick
    run, engine = world.begin()
    run.play(lambda row, devices: rest.set() if row.round == 2 else None, engine=engine)
    assert [each["rejected"] for each in lines(run.folder / "rounds.jsonl")] == [[], ["device 1: late"], []]


@pytest.mark.parametrize("error", [KeyError("arraychunk_ids"), ValueError("secret"), MemoryError()], ids=repr)
def test_an_answer_that_flower_cannot_put_together_costs_its_device_alone(world: World, error: Exception) -> None:
    def spoil(link: Link, question: Message, reply: Message) -> Replies:
        if second(question):
            link.broken[reply] = error
        return [(0.0, reply)]

    world.link.bend = spoil
    run, _ = world.play()
    assert lost(run.folder) == ["device 1: its answer is refused: it cannot be put together"]
    assert run.state.totals["updates"] == 5


def test_a_server_that_cannot_be_reached_is_no_fault_of_a_device(world: World) -> None:
    def away(message_ids: Iterable[str]) -> Iterable[Message]:
        raise httpx.ConnectError("gone")

    run, engine = world.begin()
    engine.peers.gather()
    world.link.pull_messages = away  # type: ignore[method-assign]
    with pytest.raises(httpx.ConnectError):
        run.play(engine=engine)


def test_a_device_that_was_started_again_has_no_job_any_more(tmp_path: Path, clock: Clock) -> None:
    """Even if it was back before anybody saw that it was gone; Flower would wait for its answer for hours."""
    fleet = [{"name": "only", "speed": "1 TFLOP/s"}]
    world = World(tmp_path, clock, rounds=3, clock={"deadline": 100.0}, fleet=fleet)

    def die(link: Link, question: Message, reply: Message) -> Replies:
        if not second(question):
            return [(0.0, reply)]
        link.since[11] = "later"
        return []

    world.link.bend = die
    begin = clock.now
    run, engine = world.play()
    rejected = [each["rejected"] for each in lines(run.folder / "rounds.jsonl")]
    assert rejected == [[], ["device 1: its node is gone"], []]
    assert clock.now - begin < 15
    assert engine.peers.here[1].since == "later"


def test_what_comes_twice_counts_once(world: World) -> None:
    world.link.bend = lambda link, question, reply: [(0.0, reply), (0.0, reply), (1.0, reply), (5.0, reply)]
    run, _ = world.play()
    here = start(world.experiment, world.folder, "here")
    here.play()
    assert bits(run.state.params) == bits(here.state.params)
    assert run.state.totals["updates"] == 6


def test_a_device_that_comes_back_as_another_node_is_the_same_device(tmp_path: Path, clock: Clock) -> None:
    world = World(tmp_path, clock, rounds=4)

    def die(link: Link, question: Message, reply: Message) -> Replies:
        if not second(question):
            return [(0.0, reply)]
        del link.nodes[11]
        return [(2.0, Message(Error(5, ""), reply_to=question))]

    world.link.bend = die
    run, engine = world.begin()

    def back(row: Any, devices: Any) -> None:
        if row.round == 3:
            world.link.nodes[99] = world.settings(1)

    run.play(back, engine=engine)
    rejected = [each["rejected"] for each in lines(run.folder / "rounds.jsonl")]
    assert rejected == [[], ["device 1: its node is gone"], ["device 1: not connected"], []]
    assert engine.peers.here[1].node == 99


def test_too_few_devices_are_waited_for_and_then_named(tmp_path: Path, clock: Clock) -> None:
    world = World(tmp_path, clock, clock={"min_updates": 2})
    del world.link.nodes[11], world.link.nodes[12]
    run, engine = world.begin()
    begin = clock.now
    with pytest.raises(UserError, match=r"round 1: devices 1, 2 have not connected within 30 s.* than 2; start them"):
        run.play(engine=engine)
    assert 30 <= clock.now - begin < 35
    world.link.nodes[11] = world.settings(1)  # and the run goes on with those who came
    run, engine = world.real(resume(run.folder))
    run.play(engine=engine)
    assert [row["rejected"] for row in lines(run.folder / "rounds.jsonl")] == [["device 2: not connected"]] * 2


def test_who_is_waited_for_and_comes_takes_part(world: World) -> None:
    nodes, world.link.nodes = world.link.nodes, {}
    run, engine = world.begin()
    asked = world.link.get_node_ids

    def come() -> Iterable[int]:
        if world.clock.now > 1010:
            world.link.nodes = nodes
        return asked()

    world.link.get_node_ids = come  # type: ignore[method-assign]
    run.play(engine=engine)
    assert run.state.totals["updates"] > 0 and not lost(run.folder)


@pytest.mark.parametrize("point", [0, 1, 2])
def test_a_server_that_is_killed_goes_on_from_the_last_round(tmp_path: Path, clock: Clock, point: int) -> None:
    """With a method whose devices keep state, which the round that is played twice must not meet twice."""
    fleet = [{"name": "only"}]
    method = {"name": "depthfl", "alpha": 0.1}
    world = World(tmp_path, clock, rounds=3, method=method, fleet=fleet)
    whole, _ = world.play("whole")

    class Killed(Exception):
        pass

    def kill(jobs: Iterable[Job]) -> Iterator[Any]:
        for answer in engine.run(jobs):
            if answer.turn.round == 1 and answer.turn.device == point:
                raise Killed
            yield answer

    for device in range(3):
        world.link.nodes[10 + device] = world.settings(device, cache=str(tmp_path / f"other-{device}"))
    run, engine = world.begin("killed")
    with pytest.raises(Killed):
        run.play(engine=SimpleNamespace(run=kill))
    run, engine = world.real(resume(run.folder))
    run.play(engine=engine)
    assert bits(run.state.params) == bits(whole.state.params)


def test_runs_that_share_devices_do_not_share_what_these_keep(tmp_path: Path, clock: Clock) -> None:
    world = World(tmp_path, clock, method={"name": "depthfl", "alpha": 0.1}, fleet=[{"name": "only"}])
    whole, _ = world.play("whole")
    one, engine = world.begin("one")
    one.state, _ = one_round(one, engine)
    other, theirs = world.begin("other")
    other.state, _ = one_round(other, theirs)
    other.state, _ = one_round(other, theirs)
    one.state, _ = one_round(one, engine)
    assert bits(one.state.params) == bits(whole.state.params) == bits(other.state.params)


def said(world: World, device: int, settings: Mapping[str, Any]) -> tuple[dict[int, Any], list[str]]:
    """Who is there, and what people are told, when a device has other settings."""
    world.link.nodes[10 + device] = settings
    _, engine = world.begin("said")
    return dict(engine.peers.gather()), world.told


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"device": 0}, "says that it is device 0, which is another node's"),
        ({"device": 7, "shard": 1}, "says that it is device 7; there are 3"),
        ({"device": "1"}, "node config: device = '1' is not accepted"),
        ({"devise": 1}, "unknown key 'devise'; did you mean 'device'?"),
        ({"shard": 3}, "shard 3 of 3"),
        ({"experiment": "/nowhere/x.toml"}, "is not a file"),
        ({"class-name": "weka"}, "no class 'weka'; did you mean 'weak'?"),
        ({"class-name": "weak", "profile": "x"}, "take one of them"),
    ],
)
def test_a_device_that_does_not_take_part_is_told_of(world: World, change: Table, told: str) -> None:
    found, notes = said(world, 1, world.settings(1) | change)
    assert sorted(found) == [0, 2]
    assert len(notes) == 1 and told in notes[0] and "does not take part" in notes[0]


def test_devices_say_what_they_have(world: World) -> None:
    profile = world.folder / "profile.toml"
    profile.write_text('[[fleet]]\nname = "pi"\nmemory = "3 MB"\nuplink = 1000\n', encoding="utf-8")
    found, notes = said(world, 1, world.settings(1, profile=str(profile)))
    assert not notes and sorted(found) == [0, 1, 2]
    assert found[1].budget == {"memory_bytes": 3_000_000, "up_bytes": 1000, "down_bytes": None, "flops": None}
    weak = said(world, 2, world.settings(2, **{"class-name": "weak"}))[0][2]
    assert weak.class_name == "weak"
    assert weak.budget["memory_bytes"] == roster_of(world.experiment).budgets[1].memory_bytes
    assert found[0].budget == dict.fromkeys(found[1].budget)
    assert [peer.examples for peer in found.values()] == [len(each) for each in world.begin()[0].task.train]


def as_said(world: World, *said: tuple[str, int | None]) -> Table | None:
    """The fleet's classes, memories and devices, when devices say a class and its memory; None if it is as it was."""
    budgets = [dict.fromkeys(RESOURCES) | {"memory_bytes": memory} for _, memory in said]
    peers = {i: Peer(10 + i, "", i, said[i][0], budgets[i], 9, {}) for i in range(len(said))}
    found = deployed.as_said(world.experiment, peers)
    if found == world.experiment:
        return None
    assert assign(found.fleet, 3, 0) and not isinstance(found.fleet, Traces)  # type: ignore[arg-type]
    assert config.experiment(found.to_table(), "again") == found
    return {each.name: (each.memory, each.devices) for each in found.fleet}


def test_the_fleet_is_what_devices_say(world: World) -> None:
    drawn = roster_of(world.experiment)
    weak = drawn.budgets[1].memory_bytes
    as_drawn = [(drawn.names[i], drawn.budgets[i].memory_bytes) for i in drawn.class_of]
    assert as_said(world) is as_said(world, ("", None), ("", None)) is as_said(world, *as_drawn) is None
    assert as_said(world, *[("weak", weak)] * 3) == {"weak": (weak, (0, 1, 2))}
    assert as_said(world, ("strong", None), ("weak", weak), ("weak", weak)) == {
        "strong": (None, (0,)),
        "weak": (weak, (1, 2)),
    }
    assert as_said(world, ("pi", 10**6), ("weak", 7), ("pi", 10**6)) == {
        "pi": (10**6, (0, 2)),
        "weak of device 1": (7, (1,)),
    }


def test_a_run_is_planned_from_what_devices_say(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    for device in range(3):
        world.link.nodes[10 + device] = world.settings(device, **{"class-name": "weak", "shard": 2})
    summary = deployed.play(world.link, {"experiment": str(world.file), "out": str(world.folder), "name": "said"})
    assert [(row["name"], row["devices"]) for row in summary["classes"]] == [("weak", 3)]
    assert summary["totals"]["updates"] == 6
    fleet = config.load_experiment(world.folder / "said" / "config.toml").fleet
    assert isinstance(fleet, tuple) and fleet[0].devices == (0, 1, 2)
    train = world.begin()[0].task.train
    note = f"note: device 0 has {len(train[2])} examples; the plan is made for {len(train[0])}"
    assert note in capsys.readouterr().out


def test_clocks_that_differ_are_told_of(world: World) -> None:
    def skew(seconds: float) -> Bend:
        def bend(link: Link, question: Message, reply: Message) -> Replies:
            head = dict(wire.unpack(*parts(reply.content)).head)
            if head.get("device") == 1:
                head["seconds"] += seconds
            return [(3.2, replied(question, head))]

        return bend

    for seconds, note in ((600.0, "device 1 differs by 596 s"), (-600.0, "device 1 differs by -600 s"), (60.0, "")):
        world.link.bend = skew(seconds)
        found, notes = said(world, 1, world.settings(1))
        assert sorted(found) == [0, 1, 2]
        assert [note in each for each in notes] == [True] * bool(note)


def refused(world: World, device: int, settings: Mapping[str, Any]) -> str:
    """Why a device gives no update; the others do."""
    world.link.nodes[10 + device] = settings
    run, _ = world.play()
    assert run.state.totals["updates"] == 4
    found = lost(run.folder)
    assert len(found) == 1 and found[0].startswith(f"device {device}: ")
    return found[0]


def test_a_device_refuses_a_plan_over_its_own_budget(world: World) -> None:
    profile = world.folder / "profile.toml"
    profile.write_text('[[fleet]]\nname = "tiny"\nmemory = "50 KiB"\nuplink = "900 KiB"\n', encoding="utf-8")
    reason = refused(world, 1, world.settings(1, profile=str(profile)))
    assert "refuses a plan that needs" in reason and "of memory, its budget is 50.0 KiB" in reason
    assert "uplink" not in reason


def test_a_device_refuses_a_network_that_it_does_not_know(world: World) -> None:
    other = world.folder / "other"
    other.mkdir()
    table = config.load_experiment(world.file).to_table()
    write_world(other)
    for name in ("tiny-2", "tiny-3"):
        path = other / name / "model.safetensors"
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(bytes(content))
    table["networks"] = [str(other / "tiny-2"), str(other / "tiny-3")]
    (other / "x.toml").write_text(toml.dump(table), encoding="utf-8")
    reason = refused(world, 1, world.settings(1, experiment=str(other / "x.toml")))
    assert "base mismatch" in reason
    known = {networks.digest(world.folder / f"tiny-{i}") for i in (2, 3)}
    assert any(each in reason for each in known)


def test_what_goes_wrong_on_a_device_stays_there(
    world: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    train = client.train

    def fail(job: Job, *args: Any) -> Any:
        if job.turn.device == 1:
            raise ValueError("to be or not to be")
        return train(job, *args)

    monkeypatch.setattr(client, "train", fail)
    assert refused(world, 1, world.settings(1)) == "device 1: its client failed: ValueError"
    assert "to be or not to be" in capsys.readouterr().err


def test_a_device_shows_that_it_is_at_work_and_does_one_job_at_a_time(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By that `lamina.deploy.keep` sees that the process of a job was killed."""
    train, seen = client.train, list[bool]()

    def look(job: Job, *args: Any) -> Any:
        cache = world.folder / f"cache-{job.turn.device}"
        seen.extend(((cache / files._MARK).exists(), files.is_locked(cache), not files.was_killed(cache)))
        return train(job, *args)

    monkeypatch.setattr(client, "train", look)
    world.play()
    assert len(seen) == 18 and all(seen)
    assert not [*world.folder.glob(f"cache-*/{files._MARK}")]
    with files.lock(world.folder / "cache-1"):
        run, engine = world.begin("again")
        rows = one_round(run, engine)[1]
    assert [row.rejected is None for row in rows] == [True, False, True]
    assert "another process is working in" in str(rows[1].rejected)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda head, tensors: (head | {"turn": head["turn"] | {"device": 0}}, tensors), "is for device 0, this is"),
        (lambda head, tensors: (head, tensors | {"more": torch.ones(1)}), "has tensor more, against its plan"),
        (lambda head, tensors: (head, {"head.bias": torch.ones(2), **tensors} | {"head.bias": torch.ones(2)}), "plan"),
        (lambda head, tensors: ({key: head[key] for key in head if key != "plan"}, tensors), "not a job"),
        (lambda head, tensors: ({key: head[key] for key in head if key != "base"}, tensors), "base must be str"),
    ],
)
def test_a_device_refuses_jobs_that_are_not_sound(world: World, change: Any, reason: str) -> None:
    run, engine = world.begin()
    jobs: list[Job] = []

    def listen(asked: Iterable[Job]) -> Iterator[Any]:
        jobs.extend(asked)
        return iter([Failure(job.turn, "") for job in jobs])

    run.play(engine=SimpleNamespace(run=listen))
    job = jobs[1]
    head = wire.job_to_json(job, engine.spec) | {"base": engine.base, "run": "r", "state": -1}
    message = Message(record(*wire.pack(*change(head, dict(job.arrays)))), dst_node_id=11, message_type="train")
    said = wire.unpack(*parts(deployed.answer(message, world.settings(1)).content)).head
    assert said["answer"] == "failure" and reason in said["reason"]


def test_the_app_plays_a_run_from_its_run_config(
    world: World, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    settings = {
        "experiment": str(world.file),
        "overrides": '["rounds=1"]',
        "out": str(tmp_path / "out"),
        "name": "mine",
    }
    summary = deployed.play(world.link, settings)
    assert summary["totals"]["rounds"] == 1 and (tmp_path / "out" / "mine" / "summary.json").is_file()
    out = capsys.readouterr().out
    assert "round   1: loss" in out and "bytes received" in out
    with pytest.raises(UserError, match="is finished"):
        deployed.play(world.link, {"resume": str(tmp_path / "out" / "mine")})
    assert "error: the run in" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"overrides": "rounds=1"}, "overrides must be a list in JSON"),
        ({"overrides": "[1]"}, "overrides must be a list of key=value"),
        ({"experimant": ""}, "did you mean 'experiment'?"),
        ({"experiment": "/nowhere.toml"}, "is not a file"),
        (
            {"overrides": json.dumps(["clock.availability=diurnal", "fleet.strong.speed=1 GFLOP/s"])},
            "is for simulated devices",
        ),
    ],
)
def test_a_run_config_that_is_not_accepted_is_told_of(world: World, change: Table, reason: str) -> None:
    with pytest.raises(UserError, match=reason.replace("?", r"\?")):
        deployed.play(world.link, {"experiment": str(world.file)} | change)
