"""The Shakespeare task against LEAF's arithmetic: `python -m pytest tests/data/test_shakespeare.py`."""

import importlib.util
import json
import lzma
from importlib import resources
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from lamina.data.shakespeare import Shakespeare, read_roles
from lamina.data.task import Shard, Task
from lamina.data.text import decode, encode
from lamina.data.windows import Windows
from lamina.errors import UserError
from lamina.turn import generator

Samples = list[tuple[str, str]]


def leaf(text: str, window: int, fraction: float) -> tuple[Samples, Samples]:
    """Training and test samples of one role as LEAF's `split_data.py` has them."""
    samples = [(text[i : i + window], text[i + window]) for i in range(len(text) - window)]
    train = max(1, int(fraction * len(samples)))
    return samples[:train], samples[train + window - 1 :]


def speech(characters: int, seed: int = 0) -> str:
    """Letters at random, so that no two places look alike."""
    return "".join(np.random.default_rng(seed).choice(list("abcdefghijklmnopqrstuvwxyz"), characters))


def write(folder: Path, roles: object) -> str:
    path = folder / "roles.json"
    path.write_text(json.dumps(roles), encoding="utf-8")
    return str(path)


def samples(shard: Shard) -> Samples:
    """What LEAF would see: the inputs, and the last target."""
    inputs, targets = shard.batch(np.arange(len(shard)))
    return [(decode(row), decode(last)) for row, last in zip(inputs, targets[:, -1:], strict=True)]


def windows(shard: Shard) -> Windows:
    assert isinstance(shard, Windows)
    return shard


def places(shard: Shard, scored: int) -> list[int]:
    """Places in the stream of the last `scored` targets of every window."""
    view = windows(shard)
    last = np.arange(view.window - scored + 1, view.window + 1)
    every: list[int] = (view.starts[:, None] + last).ravel().tolist()
    return every


@st.composite
def small_tasks(draw: st.DrawFn) -> tuple[str, dict[str, Any]]:
    window = draw(st.integers(2, 12))
    fields = {
        "window": window,
        "train_fraction": draw(st.sampled_from([0.1, 0.5, 0.8, 0.9])),
        "min_windows": 1,
        "stride": draw(st.integers(1, 2 * window)),
        "scored": draw(st.integers(1, window)),
    }
    text = speech(draw(st.integers(3, 250)))
    count = len(text) - window
    assume(count > max(1, int(fields["train_fraction"] * count)) + window - 1)
    return text, fields


with_a_folder = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60, deadline=None)


@with_a_folder
@given(small_tasks())
def test_stride_1_and_scored_1_are_the_windows_of_leaf(tmp_path: Path, small: tuple[str, dict[str, Any]]) -> None:
    text, fields = small
    task = Shakespeare(path=write(tmp_path, {"p|R": text}), **{**fields, "stride": 1, "scored": 1}).load(0)
    train, test = leaf(text, fields["window"], fields["train_fraction"])
    assert (samples(task.train[0]), samples(task.test[0])) == (train, test)


@with_a_folder
@given(small_tasks())
def test_strides_thin_the_windows_out(tmp_path: Path, small: tuple[str, dict[str, Any]]) -> None:
    text, fields = small
    task = Shakespeare(path=write(tmp_path, {"p|R": text}), **fields).load(0)
    train, test = leaf(text, fields["window"], fields["train_fraction"])
    assert samples(task.train[0]) == train[:: fields["stride"]]
    assert samples(task.test[0]) == test[:: fields["scored"]]


@with_a_folder
@given(small_tasks())
def test_no_test_target_is_a_training_target(tmp_path: Path, small: tuple[str, dict[str, Any]]) -> None:
    text, fields = small
    window, scored = fields["window"], fields["scored"]
    path = write(tmp_path, {"p|A": text, "p|B": text[::-1], "p|C": text})
    task = Shakespeare(path=path, **fields).load(0)
    trained = [place for shard in task.train for place in places(shard, window)]
    tested = [place for shard in task.test for place in places(shard, window)]
    assert not set(trained) & set(tested)
    assert max(tested) < len(windows(task.train[0]).ids)
    counted = [place for shard in task.test for place in places(shard, scored)]
    assert len(counted) == len(set(counted))  # every character counts once
    if fields["stride"] >= window:
        assert len(trained) == len(set(trained))


@with_a_folder
@given(small_tasks())
def test_scored_positions_are_those_of_leaf_up_to_the_ends(tmp_path: Path, small: tuple[str, dict[str, Any]]) -> None:
    text, fields = small
    path, scored = write(tmp_path, {"p|R": text}), fields["scored"]
    counted = places(Shakespeare(path=path, **fields).load(0).test[0], scored)
    of_leaf = places(Shakespeare(path=path, **{**fields, "scored": 1}).load(0).test[0], 1)
    assert counted == list(range(of_leaf[0] - scored + 1, counted[-1] + 1))
    assert 0 <= of_leaf[-1] - counted[-1] < scored


def test_batch_is_shifted_by_one_and_reads_one_stream() -> None:
    shard = Windows(encode("To be, or not"), np.array([0, 3, 6]), window=4)
    inputs, targets = shard.batch(np.array([2, 0]))
    assert inputs.shape == targets.shape == (2, 4)
    assert inputs.dtype == targets.dtype == np.dtype(np.int64)
    assert [decode(row) for row in inputs] == [" or ", "To b"]
    assert [decode(row) for row in targets] == ["or n", "o be"]
    with pytest.raises(IndexError):
        shard.batch(np.array([3]))


def test_embedded_task() -> None:
    task = Shakespeare().load(seed=0)
    plays = [name.partition("|")[0] for name in task.names]
    assert len(task.names) == len(task.train) == len(task.test) == Shakespeare().device_count() == 100
    assert list(task.names) == sorted(set(task.names))
    assert len(set(plays)) == 37
    assert max(map(plays.count, plays)) == 4
    assert "edward-iii" not in plays
    assert task.scored == 20
    stream = windows(task.train[0]).ids
    assert all(windows(shard).ids is stream for shard in (*task.train, *task.test))
    assert min(len(shard) for shard in task.train) == 107
    assert min(len(shard) for shard in task.test) == 44
    assert (stream > 0).all()  # nothing outside the alphabet
    asset = resources.files("lamina") / "assets" / "shakespeare.json.xz"
    assert len(asset.read_bytes()) <= 450_000


def test_vocabulary_is_the_alphabet() -> None:
    assert Shakespeare().vocabulary == 96


def test_test_windows_are_evenly_spaced(tmp_path: Path) -> None:
    path = write(tmp_path, {"p|R": speech(5000)})
    every = windows(Shakespeare(path=path).load(0).test[0]).starts
    few = windows(Shakespeare(path=path, test_windows=5).load(0).test[0]).starts
    assert len(every) == 21
    assert few.tolist() == every[[0, 4, 8, 12, 16]].tolist()
    all_of_them = windows(Shakespeare(path=path, test_windows=99).load(0).test[0])
    assert all_of_them.starts.tolist() == every.tolist()


def test_roles_are_drawn_by_the_seed() -> None:
    every = Shakespeare().load(0)
    drawn = Shakespeare(devices=7).load(3)
    assert len(drawn.names) == Shakespeare(devices=7).device_count() == 7
    assert drawn.names == Shakespeare(devices=7).load(3).names != Shakespeare(devices=7).load(4).names
    for name, shard in zip(drawn.names, drawn.train, strict=True):
        assert samples(shard) == samples(every.train[every.names.index(name)])


@pytest.mark.parametrize("split", ["iid", "dirichlet", "resource"])
def test_pooled_splits_deal_every_window_once(split: Any) -> None:
    groups = [device % 3 for device in range(30)]
    config = Shakespeare(split=split, devices=30)
    task, roles = config.load(5, groups), Shakespeare().load(5)
    assert task.names[7] == "device 7"
    assert len(task.names) == config.device_count() == 30
    for dealt, whole in ((task.train, roles.train), (task.test, roles.test)):
        starts = np.concatenate([windows(shard).starts for shard in dealt])
        assert sorted(starts) == np.concatenate([windows(shard).starts for shard in whole]).tolist()
        sizes = np.array([len(shard) for shard in dealt])
        assert np.ptp(sizes) <= 1 or split == "resource"
    again, other = config.load(5, groups), config.load(6, groups)
    for kind in ("train", "test"):
        once, same, others = ([shard.starts.tolist() for shard in getattr(one, kind)] for one in (task, again, other))
        assert once == same != others


def mixes(task: Task, shards: Any) -> np.ndarray:
    """Share of every embedded role among the windows of every device, [devices, roles]."""
    first = np.array([windows(shard).starts[0] for shard in Shakespeare().load(0).train])
    counts = [np.bincount(np.searchsorted(first, s.starts, "right") - 1, minlength=100) for s in shards]
    sizes = np.array([[len(shard)] for shard in shards])
    shares: np.ndarray = np.stack(counts) / sizes
    return shares


def test_dirichlet_tests_a_device_on_the_mix_it_trains_on() -> None:
    task = Shakespeare(split="dirichlet").load(0)
    train, test = mixes(task, task.train), mixes(task, task.test)
    overlap = np.minimum(train, test).sum(axis=1)
    stranger = np.minimum(train, np.roll(test, 50, axis=0)).sum(axis=1)
    assert len(task.names) == 100
    assert overlap.mean() > 0.8 > 0.3 > stranger.mean()
    assert (train > 0.02).sum(axis=1).mean() < 20  # few of the 100 roles on a device


def test_resource_split_ties_roles_to_classes() -> None:
    groups = [0] * 10 + [1] * 10 + [2] * 10
    task = Shakespeare(split="resource", devices=30, alpha=1e-3).load(0, groups)
    train, test = mixes(task, task.train) > 0, mixes(task, task.test) > 0
    classes = np.stack([train[np.equal(groups, group)].any(axis=0) for group in range(3)])
    tested = np.stack([test[np.equal(groups, group)].any(axis=0) for group in range(3)])
    assert (classes.sum(axis=0) == 1).mean() > 0.9  # most roles live in one class
    assert (classes == tested).all(axis=0).mean() > 0.9  # and are tested there
    assert classes.any(axis=1).all()


def test_device_count_does_not_read_where_it_need_not() -> None:
    assert Shakespeare(path="none.json", devices=9).device_count() == 9
    assert Shakespeare(path="none.json", split="iid").device_count() == 100
    with pytest.raises(UserError):
        Shakespeare(path="none.json").device_count()


def test_short_roles_are_left_out(tmp_path: Path) -> None:
    """871 characters are 791 windows of 80: 711 for training, and a test window from 711 + 79 = 790."""
    path = write(tmp_path, {"p|LONG": speech(2000), "p|JUST": speech(871), "p|SHORT": speech(870)})
    task = Shakespeare(path=path).load(0)
    assert task.names == ("p|JUST", "p|LONG")
    assert len(task.test[0]) == 1
    assert Shakespeare(path=path).device_count() == 2
    path = write(tmp_path, {"p|LONG": speech(80), "p|SHORT": speech(79)})
    short = Shakespeare(path=path, window=10, scored=1, train_fraction=0.5, min_windows=70)
    assert short.load(0).names == ("p|LONG",)


def test_the_characters_needed_are_enough(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        Shakespeare(path=write(tmp_path, {"p|A": speech(870), "p|B": ""})).load(0)
    assert str(caught.value) == (
        f"no role of {tmp_path / 'roles.json'} is long enough: the longest has 870 characters, 871 are needed"
        " (task.window = 80, task.train_fraction = 0.9, task.min_windows = 64)"
    )
    with pytest.raises(UserError, match="no role of the embedded plays is long enough"):
        Shakespeare(window=5000).load(0)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"split": "user"}, "task.split must be one of role, iid, dirichlet, resource, got 'user'"),
        ({"devices": 0}, "task.devices must be at least 1, got 0"),
        ({"alpha": 0.0}, "task.alpha must be finite and above 0, got 0.0"),
        ({"alpha": float("nan")}, "task.alpha must be finite and above 0, got nan"),
        ({"alpha": float("inf")}, "task.alpha must be finite and above 0, got inf"),
        ({"window": 1, "scored": 1}, "task.window must be at least 2, got 1"),
        ({"stride": 0}, "task.stride must be at least 1, got 0"),
        ({"scored": 0}, "task.scored must be from 1 to window = 80, got 0"),
        ({"scored": 81}, "task.scored must be from 1 to window = 80, got 81"),
        ({"train_fraction": 1.0}, "task.train_fraction must be above 0 and below 1, got 1.0"),
        ({"train_fraction": float("nan")}, "task.train_fraction must be above 0 and below 1, got nan"),
        ({"min_windows": 0}, "task.min_windows must be at least 1, got 0"),
        ({"test_windows": 0}, "task.test_windows must be at least 1, got 0"),
    ],
)
def test_fields_out_of_range_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        Shakespeare(**fields)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("fields", "groups", "message"),
    [
        ({"devices": 101}, None, "task.devices must be at most 100, the roles there are; got 101"),
        (
            {"split": "iid", "devices": 6000},
            None,
            "417 of 6000 devices have none of the 5583 test windows; lower task.devices or raise task.alpha",
        ),
        (
            {"split": "resource", "devices": 3},
            None,
            'task.split = "resource" needs the resource class, from 0, of each of the 3 devices; got none',
        ),
        (
            {"split": "resource", "devices": 3},
            [0, 1],
            'task.split = "resource" needs the resource class, from 0, of each of the 3 devices; got 2, the smallest 0',
        ),
        (
            {"split": "resource", "devices": 2},
            [0, -1],
            'task.split = "resource" needs the resource class, from 0, of each of the 2 devices;'
            " got 2, the smallest -1",
        ),
    ],
)
def test_devices_that_do_not_fit_are_refused(fields: dict[str, Any], groups: list[int] | None, message: str) -> None:
    with pytest.raises(UserError) as caught:
        Shakespeare(**fields).load(0, groups)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.json",
            b'{"p|R": "text"',
            "{path} is not JSON: Expecting ',' delimiter: line 1 column 15 (char 14)",
        ),
        ("a.json", b'["text"]', '{path} must hold one JSON object of texts by role, {{"play|ROLE": "text"}}'),
        (
            "a.json",
            b'{"p|R": 3}',
            '{path} must hold one JSON object of texts by role, {{"play|ROLE": "text"}}',
        ),
        ("a.json", b"{}", '{path} must hold one JSON object of texts by role, {{"play|ROLE": "text"}}'),
        ("a.json", b'{"p|R": "\xe9"}', "{path} is not UTF-8 text: byte 9 cannot be decoded"),
        (
            "a.json",
            b'{"p|R": "text",\n "p|\\ud83d": "text"}',
            "{path}, line 2: \\ud83d is half a character (a surrogate without its other half), which no text can have;"
            " remove it, or write both halves",
        ),
        ("a.txt", b"text", "{path} is of an unknown kind: the name must end in .json or .json.xz"),
        (
            "a.json.xz",
            lzma.compress(b'{"p|R": "text"}')[:-9],
            "{path} is not a whole xz file (Compressed data ended before the end-of-stream marker was reached)",
        ),
    ],
)
def test_files_that_cannot_be_used(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        Shakespeare(path=str(path)).load(0)
    assert str(caught.value) == message.format(path=path)


def test_a_missing_file_names_the_nearest(tmp_path: Path) -> None:
    near = write(tmp_path, {"p|R": speech(1000)})
    with pytest.raises(UserError) as caught:
        Shakespeare(path=str(tmp_path / "role.json")).load(0)
    assert str(caught.value) == f"{tmp_path / 'role.json'} does not exist; did you mean {near}?"


def test_packed_and_plain_files_are_the_same(tmp_path: Path) -> None:
    plain = Path(write(tmp_path, {"p|R": "caf\u00e9 \n " + speech(1000)}))
    packed = tmp_path / "roles.json.xz"
    packed.write_bytes(lzma.compress(plain.read_bytes()))
    texts = [decode(windows(Shakespeare(path=str(path)).load(0).train[0]).ids) for path in (plain, packed)]
    assert texts == ["cafe " + speech(1000)] * 2


def test_fields_are_a_config_schema() -> None:
    schema = TypeAdapter(Shakespeare)
    table = '{"split": "iid", "devices": 10, "alpha": 1, "path": null}'
    assert schema.validate_json(table, strict=True) == Shakespeare(split="iid", devices=10, alpha=1.0)
    for wrong in ('{"devices": "10"}', '{"window": 80.5}', '{"split": "user"}'):
        with pytest.raises(ValidationError):
            schema.validate_json(wrong, strict=True)
    with pytest.raises(UserError, match=r"task\.window"):
        schema.validate_json('{"window": 1, "scored": 1}', strict=True)


def test_generator_is_a_function_of_its_fields() -> None:
    assert generator(0, "task", "train").integers(2**63) == generator("0", "task/train").integers(2**63)
    draws = [generator(*fields).integers(2**63) for fields in ((0,), (1,), (0, "a"), (0, "b"))]
    assert len(set(draws)) == 4
    # Fixed for good: a change would silently change every recorded run.
    assert generator(0, "task", "train").integers(0, 1000, 4).tolist() == [970, 775, 842, 764]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    path = Path(__file__).parents[2] / "scripts" / "make_shakespeare.py"
    spec = importlib.util.spec_from_file_location("make_shakespeare", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_script_chooses_the_embedded_roles_again(script: ModuleType) -> None:
    with resources.as_file(resources.files("lamina") / "assets" / "shakespeare.json.xz") as path:
        roles = read_roles(path)
    assert script.choose(roles) == roles
    assert list(roles) == sorted(roles)
    assert script.pack(roles) == script.pack(dict(reversed(roles.items())))


def test_the_script_takes_every_play_and_cuts_at_a_word(script: ModuleType) -> None:
    texts = {f"big{play}|{role}": "word " * 3000 for play in range(30) for role in range(5)}
    texts |= {"small|A": "one", "small|B": "two words", "edward-iii|A": "word " * 9000}
    roles = script.choose(texts)
    plays = [name.partition("|")[0] for name in roles]
    assert len(roles) == 100
    assert plays.count("small") == 1 and roles["small|B"] == "two words"
    assert set(plays) == {"small", *(f"big{play}" for play in range(30))}
    assert max(map(plays.count, plays)) == 4
    assert roles["big0|0"] == ("word " * 2400).strip()
    assert len(script.cut("a" * 5999 + " " + "b" * 9000)) == 5999
    assert len(script.cut("a" * 12000 + " b")) == 12000
