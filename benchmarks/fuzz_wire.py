"""Mutated messages through `lamina.wire`: how many are refused, and that nothing but a `WireError` comes of them.

    python benchmarks/fuzz_wire.py benchmarks/fuzz_wire.json

A job and an update of a small network are packed, and one thing is done to one of them, by a seed: bits flipped, an end
cut off or added, a value of the index changed, removed or repeated with its digest made right. Then the message is read
as the other side reads it. What is not refused must be what it says it is: sizes and digests of its tensors fit.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lamina import files, model, wire
from lamina.job import Job, Local, Turn, Update
from lamina.limits import resident_peak, start_count
from lamina.machine import environment
from lamina.methods import METHODS
from lamina.spec import Spec
from lamina.wire import WireError

TURN = Turn(seed=0, round=0, rounds=2, device=1)
SPEC = Spec(blocks=2, embed=4, heads=2, head_dim=2, ffn=8, vocab=5, positions=4)
VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 7, 2**31, 2**40, 2**63, 10**30, 0.5, 1e308, float("nan"), float("inf")),
    *(
        "",
        "a",
        "\x00",
        "\ud800",
        "float32",
        "complex64",
        "../../x",
        "a" * 70,
        [],
        [[]],
        [1, -1],
        [2**39] * 9,
        {},
        {"a": 1},
    ),
)
Sent = tuple[str, bytes]
Change = Callable[[Sent, np.random.Generator], Sent]


def main() -> None:
    """Read mutants, and write what came of them."""
    parser = argparse.ArgumentParser(description="Mutated messages, and what became of them.")
    parser.add_argument("path", type=Path)
    parser.add_argument("--count", type=int, default=200_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    tick = time.monotonic()
    before = start_count()
    outcomes = fuzz(options.count, options.seed)
    result: dict[str, Any] = {"messages": options.count, "seed": options.seed, "outcomes": outcomes}
    result |= {"resident_rise_bytes": resident_peak() - before, "seconds": round(time.monotonic() - tick, 1)}
    files.write_json(options.path, result | {"environment": environment()})
    print(json.dumps(result, indent=2))


def fuzz(count: int, seed: int) -> dict[str, dict[str, int]]:
    """Read so many mutants; by kind of change, how many were refused and how many accepted.

    Raises:
        Exception: Whatever else than a `WireError` comes of a message.
    """
    rng, names = np.random.default_rng(seed), list(CHANGES)
    known = [(each, read) for each, read in ((update(), read_update), (job(), read_job))]
    found = {name: Counter[str]() for name in names}
    for _ in range(count):
        name = names[int(rng.integers(len(names)))]
        sent, read = known[int(rng.integers(len(known)))]
        mutant = CHANGES[name](sent, rng)
        try:
            read(mutant)
            found[name]["as it was" if mutant == sent else "accepted"] += 1
        except WireError:
            found[name]["refused"] += 1
    return {name: dict(sorted(counts.items())) for name, counts in found.items()}


def update() -> Sent:
    """An update as a device sends it."""
    params = model.init(SPEC, torch.Generator().manual_seed(0))
    made = Update(TURN, {name: params[name] for name in list(params)[-6:]}, 9, 3, 0.5)
    return wire.pack(wire.answer_to_json(made) | {"state": False}, made.arrays)


def job() -> Sent:
    """A job as the server sends it."""
    method, params = METHODS["caff"](), model.init(SPEC, torch.Generator().manual_seed(0))
    plan = next(iter(method.plans(SPEC, TURN, {})))
    given = Job(TURN, plan, Local(), {name: params[name] for name in sorted(plan.holds)}, method)
    return wire.pack(wire.job_to_json(given, SPEC) | {"base": "b", "run": "r", "state": -1}, given.arrays)


def read_update(sent: Sent) -> None:
    """As the server does."""
    message = checked(sent)
    wire.read_answer(message, TURN)
    message.get("state", bool)


def read_job(sent: Sent) -> None:
    """As a device does, up to where it looks whether it can afford the plan."""
    message = checked(sent)
    message.get("base", str)
    wire.job_from_json(message.head, message.tensors, {})


def checked(sent: Sent) -> wire.Message:
    """What it says; what is accepted is what it says it is."""
    message = wire.unpack(*sent)
    for name, tensor in message.tensors.items():
        row = message.rows[name]
        assert (tensor.dtype, tuple(tensor.shape), wire.digest(tensor)) == (row.dtype, row.shape, row.sha256)
    return message


def flip_index(sent: Sent, rng: np.random.Generator) -> Sent:
    """Bits of the index."""
    return flipped(sent[0].encode(), rng).decode("utf-8", "replace"), sent[1]


def flip_data(sent: Sent, rng: np.random.Generator) -> Sent:
    """Bits of the tensors."""
    return sent[0], flipped(sent[1], rng)


def flipped(content: bytes, rng: np.random.Generator) -> bytes:
    """With one to four bits changed."""
    changed = bytearray(content)
    for place in rng.integers(len(content), size=rng.integers(1, 5)):
        changed[place] ^= 1 << int(rng.integers(8))
    return bytes(changed)


def cut(sent: Sent, rng: np.random.Generator) -> Sent:
    """The end of one half is missing."""
    index, data = sent
    if rng.random() < 0.5:
        return index[: int(rng.integers(len(index)))], data
    return index, data[: int(rng.integers(len(data)))]


def lengthen(sent: Sent, rng: np.random.Generator) -> Sent:
    """One half has more bytes at its end."""
    more = rng.bytes(int(rng.integers(1, 9)))
    return (sent[0] + more.decode("latin-1"), sent[1]) if rng.random() < 0.5 else (sent[0], sent[1] + more)


def edit(sent: Sent, rng: np.random.Generator) -> Sent:
    """A value of the index is another, with the digest made right."""
    return edited(sent, rng, lambda parent, key: parent.__setitem__(key, VALUES[int(rng.integers(len(VALUES)))]))


def remove(sent: Sent, rng: np.random.Generator) -> Sent:
    """A value of the index is gone, with the digest made right."""
    return edited(sent, rng, lambda parent, key: parent.__delitem__(key))


def repeat(sent: Sent, rng: np.random.Generator) -> Sent:
    """A value of the index is what another is, with the digest made right."""
    body = json.loads(sent[0].partition("\n")[2])
    parent, key = place(body, rng)
    other, where = place(body, rng)
    parent[key] = json.loads(json.dumps(other[where]))
    return signed(body), sent[1]


def edited(sent: Sent, rng: np.random.Generator, change: Callable[[Any, Any], None]) -> Sent:
    """With a change at one place of the index."""
    body = json.loads(sent[0].partition("\n")[2])
    change(*place(body, rng))
    return signed(body), sent[1]


def place(body: Any, rng: np.random.Generator) -> tuple[Any, Any]:
    """A list or table of the index and a key of it, one in three a list or table of its own."""
    while True:
        keys = list(body) if isinstance(body, dict) else list(range(len(body)))
        key = keys[int(rng.integers(len(keys)))]
        if not isinstance(body[key], dict | list) or not body[key] or rng.random() < 0.2:
            return body, key
        body = body[key]


def signed(body: Any) -> str:
    """An index with the digest that it should have."""
    text = json.dumps(body)
    return f"{files.digest(text.encode(errors='replace'))}\n{text}"


CHANGES: dict[str, Change] = {
    each.__name__: each for each in (flip_index, flip_data, cut, lengthen, edit, remove, repeat)
}


if __name__ == "__main__":
    main()
