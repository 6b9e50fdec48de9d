"""Messages between server and device: what is packed comes out again; of anything else a clear error, and only that."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
import tracemalloc
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support import LOCAL, TURN, VARIANTS, spec, suited

from lamina import files, model, wire
from lamina.job import Failure, Job, Update
from lamina.wire import INDEX_BYTES, SCHEMA, WireError

TENSORS = {
    "weight": torch.arange(6.0).reshape(2, 3),
    "empty": torch.empty(0, 4),
    "number": torch.tensor(7),
    "coded": torch.tensor([1, 2, 255], dtype=torch.uint8),
    "half": torch.tensor([0.5, -0.0], dtype=torch.bfloat16),
    "turned": torch.arange(4.0).reshape(2, 2).T,
}


def signed(body: str) -> str:
    return f"{files.digest(body.encode())}\n{body}"


def index(rows: list[Any], head: Any = None, schema: Any = SCHEMA) -> str:
    return signed(json.dumps({"schema": schema, "head": head or {}, "tensors": rows}))


def row(name: str = "a", dtype: Any = "float32", shape: Any = (2,), sent: Any = True, value: float = 0.0) -> list[Any]:
    return [name, dtype, shape, wire.digest(torch.full((2,), value)), sent]


def test_what_is_packed_comes_out_again_bit_for_bit() -> None:
    message = wire.unpack(*wire.pack({"text": 'a"\n', "number": 1.5}, TENSORS))
    assert message.head == {"text": 'a"\n', "number": 1.5}
    assert list(message.tensors) == list(TENSORS)
    for name, tensor in TENSORS.items():
        found = message.tensors[name]
        assert (found.dtype, found.shape) == (tensor.dtype, tensor.shape)
        assert wire.to_bytes(found) == wire.to_bytes(tensor)
    message.tensors["weight"].add_(1)  # memory of its own
    assert TENSORS["weight"][0, 0] == 0


def test_tensors_with_the_same_bytes_and_other_shapes_or_types_are_not_the_same() -> None:
    alike = [torch.zeros(4), torch.zeros(2, 2), torch.zeros(4, 1), torch.zeros(4, dtype=torch.int32)]
    assert len({wire.digest(each) for each in alike}) == 4
    text, data = wire.pack({}, {"a": alike[1]}, {wire.digest(alike[0])})
    assert wire.unpack(text, data).rows["a"].sent


def test_tensors_that_are_known_are_named_and_not_sent() -> None:
    known = wire.digest(TENSORS["weight"])
    whole = wire.pack({}, TENSORS)[1]
    text, data = wire.pack({}, TENSORS, {known})
    message = wire.unpack(text, data)
    assert len(whole) - len(data) == 24
    assert not message.rows["weight"].sent and message.rows["weight"].shape == (2, 3)
    assert message.rows["weight"].sha256 == known
    assert message.tensors.keys() == TENSORS.keys() - {"weight"}


@settings(max_examples=300)
@given(st.data())
def test_a_message_with_any_byte_changed_is_refused(data: st.DataObject) -> None:
    text, content = wire.pack({"loss": 1.25}, TENSORS)
    whole = bytearray(text.encode() + content)
    place, bit = data.draw(st.integers(0, len(whole) - 1)), data.draw(st.integers(0, 7))
    whole[place] ^= 1 << bit
    with pytest.raises(WireError):
        wire.unpack(whole[: len(text)].decode("latin-1"), bytes(whole[len(text) :]))


@given(st.integers(0, 40), st.binary(max_size=3))
def test_a_message_cut_short_or_with_more_at_its_end_is_refused(cut: int, more: bytes) -> None:
    text, content = wire.pack({}, TENSORS)
    changed = content[: len(content) - cut] + more
    if changed == content:
        assert wire.unpack(text, changed)
        return
    with pytest.raises(WireError, match=r"its tensors take 55 bytes|not what was sent"):
        wire.unpack(text, changed)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=300)
@given(JSON, JSON, st.lists(JSON | st.tuples(st.text(), st.just("float32"), JSON, st.text(), JSON), max_size=3))
@example(SCHEMA, {}, [["a", "float32", [2], None, True]])
def test_no_index_lets_another_error_escape(schema: Any, head: Any, rows: list[Any]) -> None:
    for text in (index(rows, head, schema), index(rows, {})):
        try:
            wire.unpack(text, bytes(8))
        except WireError:
            continue
        assert isinstance(head, dict) or text == index(rows, {})


@pytest.mark.parametrize("body", ["", "null", "3", "{}", "[" * 100_000, '{"schema": NaN}', "\ud800"])
def test_a_body_that_is_no_message_is_refused(body: str) -> None:
    text = f"{files.digest(body.encode(errors='replace'))}\n{body}"
    for each in (text, body):
        with pytest.raises(WireError):
            wire.unpack(each, b"")


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        ([row(), row()], "has tensor 'a' twice"),
        ([row(dtype="complex64")], "its index has a tensor"),
        ([row(dtype=">f4")], "its index has a tensor"),
        ([row(dtype="object")], "its index has a tensor"),
        ([row(shape=[-1])], "its index has a tensor"),
        ([row(shape=[True])], "its index has a tensor"),
        ([row(shape=[2.0])], "its index has a tensor"),
        ([row(shape=[1] * 9)], "its index has a tensor"),
        ([row(sent=1)], "its index has a tensor"),
        ([row(shape=[10**10])], "take 40000000000 bytes, 8 came"),
        ([row(shape=[2**39, 2**39])], "bytes, 8 came"),
        ([row(shape=[1])], "take 4 bytes, 8 came"),
        ([row(value=1.0)], "tensor 'a' is not what was sent"),
    ],
)
def test_an_index_that_says_what_cannot_be_is_refused_by_name(rows: list[Any], reason: str) -> None:
    with pytest.raises(WireError, match=reason):
        wire.unpack(index(rows), bytes(8))


def test_what_claims_to_be_large_is_refused_before_memory_is_taken_for_it() -> None:
    bombs = [index([row(shape=[10**10])]), index([row(name=str(i)) for i in range(30_000)]), "a" * 50_000_000]
    tracemalloc.start()
    for bomb in bombs:
        tracemalloc.reset_peak()
        with pytest.raises(WireError):
            wire.unpack(bomb, bytes(8))
        assert tracemalloc.get_traced_memory()[1] < 64 * 2**20
    tracemalloc.stop()


BOMBS = """
import resource, sys
from lamina import wire
found = eval(sys.stdin.read())
(size,) = [line.split()[1] for line in open("/proc/self/status") if line.startswith("VmSize")]
most = int(size) * 1024 + 64 * 2**20
resource.setrlimit(resource.RLIMIT_AS, (most, most))
for name, text in found:
    try:
        wire.unpack(text, bytes(8))
    except wire.WireError as error:
        print(name, error)
"""


def bombs() -> Iterator[tuple[str, str]]:
    """Indices that claim much in few bytes, or take much when they are read."""
    for name, shape in {"numbers": [10**10], "axes": [2**39] * 8, "empty": [0, 2**39]}.items():
        yield name, index([row(shape=shape)])
    yield "again", index([row()] * 5_000)
    for name, unit in (("lists", "[]"), ("tables", "{}"), ("texts", '""'), ("rows", '["a","int8",[0],"",true]')):
        start, most = f'{{"schema":"{SCHEMA}","head":{{}},"tensors":[', (INDEX_BYTES - 200) // (len(unit) + 1)
        yield name, signed(start + ",".join([unit] * most) + "]}")
    yield "names", signed(start + ",".join([unit] * 1_000_000) + "]}")


def test_what_claims_to_be_large_is_refused_with_64_mib_to_spare() -> None:
    """Of address space, so that what is only reserved counts as well."""
    given = [*bombs()]
    done = subprocess.run([sys.executable, "-c", BOMBS], input=repr(given), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    told = dict(line.split(" ", 1) for line in done.stdout.splitlines())
    assert list(told) == [name for name, _ in given]
    assert told["numbers"] == "its tensors take 40000000000 bytes, 8 came"
    assert told["names"].startswith("its index is not a text of at most")


def test_of_many_mutants_only_our_own_error_comes() -> None:
    """`python benchmarks/fuzz_wire.py benchmarks/fuzz_wire.json` reads 200,000 of them."""
    path = Path(__file__).parents[1] / "benchmarks" / "fuzz_wire.py"
    found = runpy.run_path(str(path))["fuzz"](2000, seed=1)
    assert sum(sum(counts.values()) for counts in found.values()) == 2000
    for name in ("flip_index", "flip_data", "cut", "lengthen"):
        assert found[name].keys() == {"refused"}
    assert all({"accepted", "refused"} <= found[name].keys() for name in ("edit", "remove", "repeat"))


def test_another_version_is_named() -> None:
    with pytest.raises(WireError, match=r"version 'lamina.wire/0', this side speaks 'lamina.wire/1'"):
        wire.unpack(index([], schema="lamina.wire/0"), b"")


@pytest.mark.parametrize("name", VARIANTS)
def test_every_job_goes_through_json(name: str) -> None:
    method = VARIANTS[name]
    network = method.adapt(suited(method, spec(2)))
    for plan in method.plans(network, TURN, {}):
        job = Job(TURN, plan, LOCAL, {}, method)
        sent = json.loads(json.dumps(wire.job_to_json(job, network)))
        assert wire.job_from_json(sent, {}, {}) == (job, network)
        assert plan.holds <= model.layout(plan.runs(network)).params.keys()


@pytest.mark.parametrize("key", ["spec", "method", "turn", "plan", "local"])
@pytest.mark.parametrize("value", [None, [1], {"name": "caff", "odd": 1}])
def test_what_is_no_job_is_refused(key: str, value: Any) -> None:
    method = VARIANTS["caff"]
    plan = next(iter(method.plans(spec(2), TURN, {})))
    sent = wire.job_to_json(Job(TURN, plan, LOCAL, {}, method), spec(2))
    with pytest.raises(WireError, match="not a job"):
        wire.job_from_json(sent | {key: value}, {}, {})


def test_an_answer_goes_through_a_message() -> None:
    update = Update(TURN, {"a": torch.ones(2)}, 7, 3, 0.5)
    found = wire.read_answer(wire.unpack(*wire.pack(wire.answer_to_json(update), update.arrays)), TURN)
    assert isinstance(found, Update) and torch.equal(found.arrays["a"], update.arrays["a"])
    assert replace(found, arrays={}) == replace(update, arrays={})
    failure = Failure(TURN, "over its budget")
    assert wire.read_answer(wire.unpack(*wire.pack(wire.answer_to_json(failure))), TURN) == failure


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"turn": {"seed": 0, "round": 1, "rounds": 1, "device": 0}}, "answers another job"),
        ({"turn": 3}, "turn must be dict"),
        ({"examples": True}, "examples must be int, got True"),
        ({"examples": [7]}, "examples must be int"),
        ({"steps": 1e30}, "steps must be int"),
        ({"loss": 3}, "loss must be float"),
        ({"loss": None}, "loss must be float, got None"),
        ({"answer": "bread\n" * 99}, "neither an update nor a failure but 'bread"),
        ({"answer": None}, "answer must be str"),
    ],
)
def test_what_is_no_answer_to_the_job_is_refused(change: dict[str, Any], reason: str) -> None:
    head = wire.answer_to_json(Update(TURN, {}, 7, 3, 0.5)) | change
    with pytest.raises(WireError, match=reason) as raised:
        wire.read_answer(wire.unpack(*wire.pack(head)), TURN)
    assert len(str(raised.value)) < 200 and "\n" not in str(raised.value)


def test_an_update_sends_all_of_its_tensors() -> None:
    tensors = {"a": torch.ones(2)}
    head = wire.answer_to_json(Update(TURN, tensors, 7, 3, 0.5))
    text, data = wire.pack(head, tensors, {wire.digest(tensors["a"])})
    with pytest.raises(WireError, match="does not send all"):
        wire.read_answer(wire.unpack(text, data), TURN)


def test_a_reason_is_one_line_that_is_not_too_long() -> None:
    text, data = wire.pack({"answer": "failure", "reason": "\x1b[31mred\n" * 200})
    found = wire.read_answer(wire.unpack(text, data), TURN)
    assert isinstance(found, Failure)
    assert len(found.reason) == 200 and found.reason.isprintable()
