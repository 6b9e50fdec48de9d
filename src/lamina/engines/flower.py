"""Devices on real machines, over Flower: it carries bytes, tells devices apart, and says who is there.

Beutel et al. (2020), "Flower: A Friendly Federated Learning Research Framework". Nothing of its strategies is used.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent import futures
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid

from lamina import wire
from lamina.clock import LATE
from lamina.errors import UserError
from lamina.job import Failure, Job, Update
from lamina.node import STATE
from lamina.spec import Spec
from lamina.units import duration
from lamina.wire import WireError

POLL_SECONDS, PULLS_PER_SECOND = 0.5, 20
"""How often answers are asked for, each for itself, but not more of them: a SuperLink can do three times that."""
LOOK_SECONDS = 5.0
"""How often a round looks whether its devices are still there."""
HELLO_SECONDS = 60.0
"""How long a round waits for a device that has just connected to say who it is."""
SKEW_SECONDS = 120.0
"""Difference of clocks from which on people are told; Flower refuses devices from 300 s on."""
_CONTENT = "lamina"
_ERRORS = {
    1: "its app did not load",
    2: "its client failed",
    3: "its answer did not arrive whole",
    4: "its answer did not arrive whole",
    5: "its node is gone",
    7: "its app is not the server's",
    8: "its client was ended",
}


def record(index: str, data: bytes) -> RecordDict:
    """What Flower carries of a message: one array of bytes, and a text."""
    array = Array(dtype="uint8", shape=(len(data),), stype="bytes", data=data)
    return RecordDict({_CONTENT: ArrayRecord({_CONTENT: array}), "index": ConfigRecord({"index": index})})


def parts(content: RecordDict) -> tuple[str, bytes]:
    """Index and bytes of a message, unchecked but for being there.

    Raises:
        WireError: They are not.
    """
    try:
        return content.config_records["index"]["index"], content.array_records[_CONTENT][_CONTENT].data  # type: ignore[return-value]
    except (KeyError, TypeError, AttributeError) as error:
        raise WireError("it is not a message of lamina") from error


@dataclass
class Peer:
    """A device that is connected.

    Attributes:
        node: Flower's number of it.
        since: When it connected, as Flower says it: a node that was started again has no job any more.
        device: Its index.
        class_name: As it says.
        budget: As it says: resource -> amount or None.
        examples: That it has.
        known: Tensors that it has, and their SHA-256.
    """

    node: int
    since: str
    device: int
    class_name: str
    budget: Mapping[str, int | None]
    examples: int
    known: dict[str, str]


@dataclass
class Peers:
    """The devices of a grid: who is connected, and what has come from them.

    Attributes:
        grid: Of a ServerApp.
        devices: How many there are.
        wait_seconds: How long devices are waited for.
        say: Told what people should know.
        traffic: Bytes of messages "sent" and "received", without what Flower and the network add.
        here: Those that are connected, by index.
    """

    grid: Grid
    devices: int
    wait_seconds: float = 300.0
    say: Callable[[str], None] = print
    traffic: Counter[str] = field(default_factory=Counter)
    here: dict[int, Peer] = field(default_factory=dict)
    _hellos: dict[str, tuple[int, float]] = field(default_factory=dict)
    _seen: dict[int, str] = field(default_factory=dict)
    _pulls: dict[str, Future[list[Message | None]]] = field(default_factory=dict)
    _pool: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(32, "pull"))

    def gather(self) -> Mapping[int, Peer]:
        """Wait for all devices, but not for ever; returns those that are connected."""
        self.wait(lambda: len(self.here) >= self.devices, self.wait_seconds)
        return dict(sorted(self.here.items()))

    def look(self) -> None:
        """See who is there, and let those who have just come say who they are."""
        self.watch()
        self.wait(lambda: not self._hellos, HELLO_SECONDS)

    def wait(self, enough: Callable[[], bool], seconds: float) -> bool:
        """Look who is there until there are enough; False if that took too long."""
        end = time.monotonic() + seconds
        while not enough():
            if time.monotonic() >= end:
                return False
            time.sleep(POLL_SECONDS)
            self.watch()
            if self._hellos:
                self.pull(())
        return True

    def push(self, node: int, kind: str, index: str, data: bytes, ttl_seconds: float | None = None) -> str:
        """Send a message; returns its id."""
        self.traffic["sent"] += len(index.encode()) + len(data)
        message = Message(record(index, data), dst_node_id=node, message_type=kind, ttl=ttl_seconds)
        return next(iter(self.grid.push_messages([message])))

    def pull(self, asked: Iterable[str]) -> list[tuple[str, Message | None]]:
        """What has come for the given messages; None for an answer that Flower cannot put together.

        Flower waits for the rest of an answer of which a part has come, for minutes if the device is cut off meanwhile.
        Each is therefore pulled by a thread of its own: it does not hold up the others, nor the end of a round.
        """
        for key in (*asked, *self._hellos):
            if key not in self._pulls:
                self._pulls[key] = self._pool.submit(self._pull, key)
        futures.wait(self._pulls.values(), POLL_SECONDS)
        done = [key for key, pull in self._pulls.items() if pull.done()]
        found = [(key, reply) for key in done for reply in self._pulls.pop(key).result()]
        for key, reply in found:
            if sent := self._hellos.pop(key, None):
                self._welcome(reply, *sent)
        return found

    def _pull(self, key: str) -> list[Message | None]:
        try:
            return list(self.grid.pull_messages([key]))
        except (ArithmeticError, AttributeError, LookupError, MemoryError, RecursionError, TypeError, ValueError):
            return [None]

    def unpack(self, reply: Message | None) -> wire.Message:
        """What a reply says.

        Raises:
            WireError: It is not what it should be.
        """
        if reply is None:
            raise WireError("it cannot be put together")
        if reply.has_error():
            raise WireError(told(reply))
        index, data = parts(reply.content)
        self.traffic["received"] += len(index) + len(data)
        return wire.unpack(index, data)

    def watch(self) -> None:
        """Ask who is new, or was started again, what it is, and forget who has gone."""
        nodes = {node.node_id: node.last_activated_at for node in self.grid.get_nodes()}
        same = {node for node, since in nodes.items() if self._seen.get(node) == since}
        self.here = {device: peer for device, peer in self.here.items() if peer.node in same}
        self._hellos = {key: sent for key, sent in self._hellos.items() if sent[0] in same}
        self._seen = nodes
        for node in sorted(nodes.keys() - same):
            self._hellos[self.push(node, "query", *wire.pack({}))] = (node, time.time())

    def _welcome(self, reply: Message | None, node: int, sent: float) -> None:
        """Take in what a device says of itself."""
        try:
            message = self.unpack(reply)
            if "reason" in message.head:
                raise WireError(wire.short(message.get("reason", str), 300, plain=True))
            device, examples = message.get("device", int), message.get("examples", int)
            budget = _budget(message.get("budget", dict))
            if not 0 <= device < self.devices:
                raise WireError(f"it says that it is device {device}; there are {self.devices}, counted from 0")
            if examples < 1:
                raise WireError(f"device {device} has no examples")
            if device in self.here:
                raise WireError(
                    f"it says that it is device {device}, which is another node's; each needs its own index"
                )
            peer = Peer(node, self._seen[node], device, message.get("class", str), budget, examples, known(message))
            skew = _skew(message.get("seconds", float), sent)
        except WireError as error:
            self.say(f"note: node {node} does not take part: {error}")
            return
        self.here[device] = peer
        if abs(skew) > SKEW_SECONDS:
            self.say(f"note: the clock of device {device} differs by {skew:.0f} s from the server's")


Asked = tuple[Job, Peer]
"""A job, and whom it was given."""


@dataclass
class FlowerEngine:
    """Carries jobs to devices and updates back, in the order in which they come.

    Attributes:
        peers: The devices.
        spec: The server's network.
        base: Digest of the pretrained network, see `networks.digest`.
        run_id: Under which devices keep state for the method.
        wanted: A round ends when so many have answered; None: when all have.
        deadline_seconds: After which a round ends; 0: none.
        min_updates: With fewer devices connected, a round waits.
    """

    peers: Peers
    spec: Spec
    base: str
    run_id: str
    wanted: int | None = None
    deadline_seconds: float = 0.0
    min_updates: int = 1

    def run(self, jobs: Iterable[Job]) -> Iterator[Update | Failure]:
        """Answers as they come; who did not answer in time, or is not connected, is a failure.

        Raises:
            UserError: Fewer than `min_updates` devices are connected, and waiting for the others was in vain.
        """
        self.peers.look()
        asked, absent = dict[str, Asked](), list[Job]()
        for job in jobs:
            if job.turn.device in self.peers.here:
                asked |= self._ask(job)
            else:
                absent.append(job)
        if absent and len(asked) < self.min_updates:
            self._wait(absent, self.min_updates - len(asked))
            for job in absent:
                asked |= self._ask(job) if job.turn.device in self.peers.here else {}
        waiting = {job.turn.device for job, _ in asked.values()}
        yield from (Failure(job.turn, "not connected") for job in absent if job.turn.device not in waiting)
        yield from self._answers(asked)

    def _wait(self, absent: Sequence[Job], wanted: int) -> None:
        """Wait until so many of them are connected."""
        devices, seconds = [job.turn.device for job in absent], self.peers.wait_seconds
        if not self.peers.wait(lambda: len(self.peers.here.keys() & set(devices)) >= wanted, seconds):
            missing = ", ".join(str(device) for device in devices if device not in self.peers.here)
            raise UserError(
                f"round {absent[0].turn.round + 1}: devices {missing} have not connected within {duration(seconds)}, "
                f"and without them there are fewer than {self.min_updates}; start them, then go on with --resume"
            )

    def _answers(self, asked: dict[str, Asked]) -> Iterator[Update | Failure]:
        """What comes in answer, until the round is over."""
        begun, again, used = time.monotonic(), set[int](), 0
        end, look = begun + (self.deadline_seconds or math.inf), begun + LOOK_SECONDS
        while asked and (self.wanted is None or used < self.wanted) and time.monotonic() < end:
            for key, reply in self.peers.pull(asked):
                if key not in asked or used == self.wanted:  # answered before, or too late
                    continue
                job, peer = asked.pop(key)
                answer = self._read(reply, job)
                if answer is None and job.turn.device not in again and job.turn.device in self.peers.here:
                    again.add(job.turn.device)
                    asked |= self._ask(job)
                    continue
                used += isinstance(answer, Update)
                yield answer or Failure(job.turn, "lacks tensors that it was sent")
            if time.monotonic() > look:
                self.peers.watch()
                look = time.monotonic() + LOOK_SECONDS
            for key, (job, peer) in list(asked.items()):
                if self.peers.here.get(job.turn.device) is not peer:
                    del asked[key]
                    yield Failure(job.turn, _ERRORS[5])
            if asked:
                time.sleep(max(POLL_SECONDS, len(asked) / PULLS_PER_SECOND))
        yield from (Failure(job.turn, LATE) for job, _ in asked.values())

    def _read(self, reply: Message | None, job: Job) -> Update | Failure | None:
        """The answer to a job, checked; None if the device lacks tensors of it."""
        if reply and reply.has_error():
            return Failure(job.turn, told(reply))
        try:
            message = self.peers.unpack(reply)
            if message.head.get("answer") == "lacks":
                if peer := self.peers.here.get(job.turn.device):
                    peer.known = known(message)
                return None
            answer = wire.read_answer(message, job.turn)
            if isinstance(answer, Update) and message.get(STATE, bool):
                answer = replace(answer, state={"round": torch.tensor([job.turn.round])})
            return answer
        except WireError as error:
            return Failure(job.turn, f"its answer is refused: {error}")

    def _ask(self, job: Job) -> dict[str, Asked]:
        """Send a job to its device; by the id of the message, what was asked of whom."""
        peer = self.peers.here[job.turn.device]
        kept = int(job.state["round"]) if job.state else -1
        head = wire.job_to_json(job, self.spec) | {"base": self.base, "run": self.run_id, STATE: kept}
        index, data = wire.pack(head, job.arrays, frozenset(peer.known.values()))
        peer.known |= {name: row.sha256 for name, row in wire.read_index(index)[1].items()}
        return {self.peers.push(peer.node, "train", index, data, self.deadline_seconds or None): (job, peer)}


def told(reply: Message) -> str:
    """What an error of Flower means. Its text stays where it is: it may tell of the data."""
    return _ERRORS.get(reply.error.code, f"Flower reports error {reply.error.code}")


def known(message: wire.Message) -> dict[str, str]:
    """Tensors that a device says it has, and their SHA-256.

    Raises:
        WireError: It says something else.
    """
    found = message.get("known", dict)
    if not all(type(value) is str for value in found.values()):
        raise WireError("known must be tensors and their SHA-256")
    return dict(found)


def _budget(given: dict[str, Any]) -> dict[str, int | None]:
    if not all(value is None or (type(value) is int and value > 0) for value in given.values()):
        raise WireError(f"its budget is not made of amounts above 0: {wire.short(given)}")
    return given


def _skew(theirs: float, sent: float) -> float:
    """Seconds by which their clock is ahead, as far as the time between question and answer tells."""
    now = time.time()
    return max(theirs - now, 0.0) or min(theirs - sent, 0.0)
