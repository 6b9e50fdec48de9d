"""Messages between the server and a device: one array of bytes, and a JSON index that says what is in it.

The index is a line with the SHA-256 of the rest, and then JSON: what the message says, and a row per tensor with name,
dtype, shape and SHA-256. Tensors that the other side has already are named and not sent. Nothing is pickled, and
nothing is computed with before all of it has been checked.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from lamina import files
from lamina.job import Failure, Job, Local, Turn, Update
from lamina.layout import Params
from lamina.methods import from_table, to_table
from lamina.plan import Plan
from lamina.spec import Spec, spec_from_json

SCHEMA = "lamina.wire/1"
INDEX_BYTES = 2**20
"""Most bytes of an index: it takes less than 64 MiB to read, and is enough for 6,000 tensors."""
_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        *(torch.float32, torch.float16, torch.bfloat16, torch.float64),
        *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
    )
}
_AXES = 8


class WireError(Exception):
    """A message is not what it should be; the text says in what."""


@dataclass(frozen=True)
class Row:
    """A tensor of a message.

    Attributes:
        dtype: Of its numbers.
        shape: Its sizes.
        sha256: Of it, see `digest`.
        sent: Whether they are in the message.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    sha256: str
    sent: bool

    @property
    def bytes(self) -> int:
        """Of its numbers."""
        return self.dtype.itemsize * math.prod(self.shape)


@dataclass(frozen=True)
class Message:
    """What has been received, and checked.

    Attributes:
        head: What it says.
        rows: All of its tensors, by name.
        tensors: Those that were sent.
    """

    head: Mapping[str, Any]
    rows: Mapping[str, Row]
    tensors: Params

    def get(self, key: str, kind: type) -> Any:
        """What it says of `key`.

        Raises:
            WireError: Nothing, or nothing of that kind.
        """
        found = self.head.get(key)
        if type(found) is not kind:  # a bool is no int here
            raise WireError(f"{key} must be {kind.__name__}, got {short(found)}")
        return found


def pack(
    head: Mapping[str, Any], tensors: Mapping[str, Tensor] | None = None, known: Collection[str] = ()
) -> tuple[str, bytes]:
    """Index and bytes of a message.

    Args:
        head: What it says, as JSON takes it.
        tensors: What goes along.
        known: SHA-256 of tensors that the other side has: they are named and not sent.
    """
    rows, parts = [], []
    for name, tensor in (tensors or {}).items():
        content, sha256 = to_bytes(tensor), digest(tensor)
        sent = sha256 not in known
        rows.append([name, str(tensor.dtype).removeprefix("torch."), list(tensor.shape), sha256, sent])
        parts += [content] * sent
    body = json.dumps({"schema": SCHEMA, "head": head, "tensors": rows}, separators=(",", ":"))
    return f"{files.digest(body.encode())}\n{body}", b"".join(parts)


def unpack(index: str, data: bytes) -> Message:
    """What `pack` made, checked: sizes before anything is allocated, then every byte.

    Raises:
        WireError: It is damaged, too large, or not a message of this version.
    """
    head, rows = read_index(index)
    if not isinstance(data, bytes):
        raise WireError("its tensors are not bytes")
    if (declared := sum(row.bytes for row in rows.values() if row.sent)) != len(data):
        raise WireError(f"its tensors take {declared} bytes, {len(data)} came")
    return Message(head, rows, _tensors(rows, data))


def read_index(index: str) -> tuple[dict[str, Any], dict[str, Row]]:
    """What a message says, and its tensors.

    Raises:
        WireError: As `unpack`.
    """
    if not isinstance(index, str) or len(index) > INDEX_BYTES:
        raise WireError(f"its index is not a text of at most {INDEX_BYTES} bytes")
    sha256, _, body = index.partition("\n")
    try:
        if files.digest(body.encode()) != sha256:
            raise WireError("its index is not what was sent (SHA-256)")
        content = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise WireError("its index is not JSON") from error
    if not isinstance(content, dict) or content.get("schema") != SCHEMA:
        given = content.get("schema") if isinstance(content, dict) else content
        raise WireError(
            f"it is of version {short(given)}, this side speaks {SCHEMA!r}: install the same lamina on both"
        )
    if not isinstance(content.get("head"), dict) or not isinstance(content.get("tensors"), list):
        raise WireError("its index lacks head or tensors")
    rows: dict[str, Row] = {}
    for each in content["tensors"]:
        name, row = _row(each)
        if name in rows:
            raise WireError(f"it has tensor {short(name)} twice")
        rows[name] = row
    return content["head"], rows


def _row(given: Any) -> tuple[str, Row]:
    match given:
        case [str(name), str(dtype), [*shape], str(sha256), bool(sent)] if dtype in _DTYPES:
            if len(shape) <= _AXES and all(type(size) is int and 0 <= size < 2**40 for size in shape):
                return name, Row(_DTYPES[dtype], tuple(shape), sha256, sent)
    raise WireError(f"its index has a tensor {short(given)}; rows are [name, dtype, shape, SHA-256, sent]")


def _tensors(rows: Mapping[str, Row], data: bytes) -> Params:
    found, start = {}, 0
    for name, row in rows.items():
        if row.sent:
            content = memoryview(data)[start : start + row.bytes]
            found[name] = _from_bytes(content, row)
            if digest(found[name]) != row.sha256:
                raise WireError(f"tensor {short(name)} is not what was sent (SHA-256)")
            start += row.bytes
    return found


def _from_bytes(content: memoryview, row: Row) -> Tensor:
    """The tensor, in memory of its own."""
    if not content:
        return torch.empty(row.shape, dtype=row.dtype)
    return torch.frombuffer(bytearray(content), dtype=row.dtype).reshape(row.shape)


def to_bytes(tensor: Tensor) -> bytes:
    """The numbers of a tensor, row after row."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def digest(tensor: Tensor) -> str:
    """SHA-256 in hex of a tensor: its dtype, its shape and its numbers, since zeros of all shapes look alike."""
    return files.digest(f"{tensor.dtype} {tuple(tensor.shape)}\n".encode() + to_bytes(tensor))


def job_to_json(job: Job, spec: Spec) -> dict[str, Any]:
    """A job without its tensors, and the server's network; `job_from_json` gives them back."""
    return {
        "spec": asdict(spec),
        "method": to_table(job.method),
        "turn": asdict(job.turn),
        "plan": job.plan.to_json(),
        "local": asdict(job.local),
    }


def job_from_json(
    data: Mapping[str, Any], arrays: Mapping[str, Tensor], state: Mapping[str, Tensor]
) -> tuple[Job, Spec]:
    """The job and the network that `job_to_json` described.

    Raises:
        WireError: It does not describe them.
    """
    try:
        plan, method = Plan.from_json(data["plan"]), from_table(data["method"])
        job = Job(Turn(**data["turn"]), plan, Local(**data["local"]), arrays, method, state)
        return job, spec_from_json(data["spec"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise WireError(f"it is not a job: {type(error).__name__}") from error


def answer_to_json(answer: Update | Failure) -> dict[str, Any]:
    """An answer to a job, without its tensors."""
    if isinstance(answer, Failure):
        return {"answer": "failure", "reason": answer.reason}
    said = {"examples": answer.examples, "steps": answer.steps, "loss": float(answer.loss)}
    return {"answer": "update", "turn": asdict(answer.turn), **said}


def read_answer(message: Message, turn: Turn) -> Update | Failure:
    """The answer to the job of a turn.

    Raises:
        WireError: It is none, or one to another job.
    """
    match message.get("answer", str):
        case "failure":
            return Failure(turn, short(message.get("reason", str), 200, plain=True))
        case "update":
            if message.get("turn", dict) != asdict(turn):
                raise WireError("it answers another job")
            if any(not row.sent for row in message.rows.values()):
                raise WireError("it does not send all of its tensors")
            counts = (message.get("examples", int), message.get("steps", int), message.get("loss", float))
            return Update(turn, message.tensors, *counts)
    raise WireError(f"it is neither an update nor a failure but {short(message.head['answer'])}")


def short(value: object, most: int = 80, plain: bool = False) -> str:
    """A text that comes from elsewhere, in one line and not too long."""
    text = " ".join((str(value) if plain else repr(value)).split())
    text = "".join(letter if letter.isprintable() else "?" for letter in text)
    return text if len(text) <= most else f"{text[: most - 3]}..."
