"""Any text for causal networks: `python -m pytest tests/data/test_streams.py`."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from vocabularies import write_bert, write_bytes, write_json, write_llama

from lamina import checkpoint, networks
from lamina.data.shakespeare import Shakespeare
from lamina.data.streams import Text
from lamina.data.task import Shard
from lamina.data.text import ALPHABET
from lamina.data.windows import Windows
from lamina.errors import UserError
from lamina.job import Turn
from lamina.spec import Spec
from lamina.tokens import read_tokenizer

GPT2 = Spec(blocks=1, embed=8, heads=2, head_dim=4, ffn=8, vocab=320, positions=64)
SMALL: dict[str, Any] = {"window": 8, "scored": 2, "devices": 3}


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bytes(tmp_path_factory.mktemp("streams") / "gpt2")


@pytest.fixture(scope="module")
def letters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of a network of characters."""
    folder = tmp_path_factory.mktemp("letters")
    write_json(folder / "config.json", {"alphabet": ALPHABET})
    return folder


def speech(characters: int, seed: int = 0) -> str:
    """Letters at random, so that no two places look alike."""
    return "".join(np.random.default_rng(seed).choice(list("abcdefghijklmnopqrstuvwxyz"), characters))


def put(folder: Path, value: object, name: str = "a.json") -> str:
    (folder / name).write_text(json.dumps(value), encoding="utf-8")
    return str(folder / name)


def windows(shard: Shard) -> Windows:
    assert isinstance(shard, Windows)
    return shard


def targets(shards: Any, last: int) -> list[int]:
    """Places in the stream of the last targets of every window."""
    found: list[int] = []
    for shard in shards:
        view = windows(shard)
        found += (view.starts[:, None] + np.arange(view.window - last + 1, view.window + 1)).ravel().tolist()
    return found


def test_one_text_is_one_stream_with_an_end(tmp_path: Path, gpt2: Path) -> None:
    path = tmp_path / "mine.txt"
    path.write_text("the quick brown fox " * 40, encoding="utf-8")
    task = Text(path=str(path), **SMALL).load(0, None, gpt2)
    stream = windows(task.train[0]).ids
    assert stream.tolist() == [*read_tokenizer(gpt2).encode([path.read_text(encoding="utf-8")])[0].tolist(), 0]
    assert stream.dtype == np.uint16
    assert all(windows(shard).ids is stream for shard in (*task.train, *task.test))
    assert (task.kinds, task.labels, task.scored) == (("mine.txt",), (), 2)
    assert task.mix.tolist() == [[len(shard)] for shard in task.train]
    inputs, following = task.train[0].batch(np.array([0, 1]))
    assert inputs.shape == following.shape == (2, 8)
    assert (inputs[:, 1:] == following[:, :-1]).all()
    assert task.train[0].at(Turn(0, 1, 2, 0)) is task.train[0]


@st.composite
def worlds(draw: st.DrawFn) -> tuple[dict[str, str], dict[str, Any]]:
    window = draw(st.integers(2, 10))
    lengths = draw(st.lists(st.integers(1, 200), min_size=1, max_size=6))
    texts = {f"user {i}": speech(length, i) for i, length in enumerate(lengths)}
    scored, stride = draw(st.integers(1, window)), draw(st.integers(1, 12))
    fraction = draw(st.sampled_from([0.2, 0.5, 0.9]))
    fields = {"window": window, "stride": stride, "scored": scored, "train_fraction": fraction}
    return texts, fields | {"split": draw(st.sampled_from(["natural", "iid", "dirichlet"])), "devices": 1}


quick = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)


@quick
@given(worlds())
def test_no_test_target_is_a_training_target(
    tmp_path: Path, letters: Path, gpt2: Path, world: tuple[dict[str, str], dict[str, Any]]
) -> None:
    texts, fields = world
    for folder in (letters, gpt2):
        try:
            task = Text(path=put(tmp_path, texts), **fields).load(0, None, folder)
        except UserError as error:
            assert "long enough" in str(error)
            continue
        trained, tested = targets(task.train, fields["window"]), targets(task.test, fields["window"])
        assert not set(trained) & set(tested)
        assert max(tested) < len(windows(task.train[0]).ids)
        counted = targets(task.test, fields["scored"])
        assert len(counted) == len(set(counted))
        if fields["stride"] >= fields["window"]:
            assert len(trained) == len(set(trained))
        assert task.mix.sum() == sum(map(len, task.train))
        assert all(len(shard) for shard in (*task.train, *task.test))


def test_the_characters_of_shakespeare_are_cut_as_its_own_task_cuts_them(tmp_path: Path, letters: Path) -> None:
    roles = {f"play|{name}": speech(400, seed) for seed, name in enumerate("CAB")}
    fields: dict[str, Any] = {"window": 16, "stride": 16, "scored": 4, "path": put(tmp_path, roles)}
    theirs = Shakespeare(**fields, min_windows=1).load(0)
    mine = Text(**fields, split="natural").load(0, None, letters)
    assert mine.names == theirs.names
    for one, other in zip((*mine.train, *mine.test), (*theirs.train, *theirs.test), strict=True):
        (a, b), (c, d) = (each.batch(np.arange(len(each))) for each in (one, other))
        assert (a.tolist(), b.tolist()) == (c.tolist(), d.tolist())


@pytest.mark.parametrize("split", ["iid", "dirichlet", "dirichlet-unequal", "shards", "quantity", "resource"])
def test_every_window_is_dealt_once(tmp_path: Path, gpt2: Path, split: Any) -> None:
    texts = {f"user {i}": speech(300 + 20 * i, i) for i in range(5)}
    config = Text(path=put(tmp_path, texts), split=split, **SMALL)
    task, whole = config.load(1, [0, 1, 1], gpt2), replace(config, split="natural", devices=None).load(1, None, gpt2)
    for part in ("train", "test"):
        dealt, own = (
            np.concatenate([windows(shard).starts for shard in getattr(each, part)]) for each in (task, whole)
        )
        assert sorted(dealt.tolist()) == own.tolist()
    assert task.kinds == whole.names
    assert task.mix.sum(axis=0).tolist() == [len(shard) for shard in whole.train]
    again, other = config.load(1, [0, 1, 1], gpt2), config.load(2, [0, 1, 1], gpt2)
    assert task.digest == again.digest != other.digest


def test_users_are_devices(tmp_path: Path, gpt2: Path) -> None:
    rows = [{"text": speech(150, i), "author": "ben" if i % 2 else "anna"} for i in range(6)]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    config = Text(path=str(path), split="natural", window=8, stride=8, scored=2)
    task = config.load(0, None, gpt2)
    assert task.names == task.kinds == ("anna", "ben")
    assert config.device_count() == 2
    tokenizer, stream = read_tokenizer(gpt2), windows(task.train[0]).ids
    found = [[*ids.tolist(), 0] for ids in tokenizer.encode([row["text"] for row in rows])]
    assert stream.tolist() == [token for row in (0, 2, 4, 1, 3, 5) for token in found[row]]
    boundary = sum(len(found[row]) for row in (0, 2, 4))
    assert max(targets([task.train[0], task.test[0]], 8)) < boundary <= min(windows(task.train[1]).starts)
    assert task.mix.tolist() == [[len(task.train[0]), 0], [0, len(task.train[1])]]


def test_short_neighbours_are_joined_where_windows_are_dealt(tmp_path: Path, gpt2: Path) -> None:
    rows = [{"text": speech(20, i)} for i in range(21)] + [{"text": " "}]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    task = Text(path=str(path), window=8, stride=1, scored=1, devices=1, train_fraction=0.5).load(0, None, gpt2)
    stream = windows(task.train[0]).ids
    assert len(stream) == sum(len(ids) + 1 for ids in read_tokenizer(gpt2).encode([row["text"] for row in rows[:21]]))
    assert task.kinds[0] == "text 1 to text 2"
    assert task.kinds[-1] == "text 19 to text 21"  # the last is too short and has no neighbour of its own
    found = set(targets(task.train, 8)) | set(targets(task.test, 8))
    assert found == set(range(len(stream))) - {0} - {int(start) for start in firsts(task.kinds, path, gpt2)}


def firsts(kinds: tuple[str, ...], path: Path, folder: Path) -> list[int]:
    """Place of the first token of each kind of joined texts."""
    texts = [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines()[:21]]
    starts = np.cumsum([0, *(len(ids) + 1 for ids in read_tokenizer(folder).encode(texts))])
    return [int(starts[int(kind.split()[1]) - 1]) for kind in kinds]


def test_texts_for_testing(tmp_path: Path, gpt2: Path) -> None:
    path, test_path = (
        put(tmp_path, {"a": speech(200), "b": speech(90, 1)}),
        put(tmp_path, {"b": speech(99, 2)}, "b.json"),
    )
    config = Text(path=path, test_path=test_path, **SMALL)
    task = config.load(0, None, gpt2)
    encode = read_tokenizer(gpt2).encode
    first, second, third = ([*ids.tolist(), 0] for ids in encode([speech(200), speech(90, 1), speech(99, 2)]))
    stream = windows(task.train[0]).ids.tolist()
    assert stream == first + second + third
    own = len(first) + len(second)
    starts = sorted(int(start) for shard in task.train for start in windows(shard).starts)
    assert starts == [*range(0, len(first) - 8, 8), *range(len(first), own - 8, 8)]
    tested = sorted(int(start) for shard in task.test for start in windows(shard).starts)
    assert tested == list(range(own, len(stream) - 8, 2))
    users = replace(config, split="natural", devices=None).load(0, None, gpt2)
    assert [len(shard) for shard in users.test] == [0, len(tested)]
    other = replace(config, test_path=put(tmp_path, {"c": speech(99, 2)}, "c.json")).load(0, None, gpt2)
    assert (other.kinds, sum(map(len, other.test))) == (("a", "b"), len(tested))
    few = replace(config, test_windows=3).load(0, None, gpt2)
    assert sum(map(len, few.test)) == 3


def test_fit(tmp_path: Path, gpt2: Path) -> None:
    config = Text(path="none.txt", window=64, stride=64, scored=1)
    assert config.fit(GPT2, gpt2) == GPT2
    labelled = replace(GPT2, labels=3, pool="last")
    assert config.fit(labelled, gpt2) == GPT2
    llama = replace(GPT2, positions=0, rotary=1e4)
    assert config.fit(llama, write_llama(tmp_path / "llama")) == llama
    for each, spec, folder, message in (
        (replace(config, window=65), GPT2, gpt2, "network gpt2 has 64 positions; task.window must be at most that"),
        (
            config,
            replace(GPT2, causal=False),
            write_bert(tmp_path / "bert"),
            "network bert sees what comes after a token, so it cannot learn to predict it; name a causal network",
        ),
        (config, replace(GPT2, vocab=300), gpt2, f"the tokenizer in {gpt2} is of another network"),
    ):
        with pytest.raises(UserError) as caught:
            each.fit(spec, folder)
        assert str(caught.value).startswith(message)
    assert config.reads(gpt2) == read_tokenizer(gpt2).digest


def test_networks_of_the_package_take_a_text_of_ones_own(tmp_path: Path) -> None:
    folder = networks.find("novels-3")
    path = tmp_path / "mine.txt"
    path.write_text("It was the best of times,\nit was the worst of times. " * 60, encoding="utf-8")
    config = Text(path=str(path), devices=4)
    spec = checkpoint.read_spec(folder)
    assert config.fit(spec, folder) == spec == Shakespeare().fit(spec, folder)
    assert config.reads(folder) == Shakespeare().reads(folder)
    task = config.load(0, None, folder)
    assert len(task.train) == config.device_count() == 4
    assert (windows(task.train[0]).ids > 0).all()  # the line break is a blank


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab": 95}, "network novels-3 has 95 symbols and 128 positions; the task needs 96 symbols and at least 80"),
        ({"positions": 79}, "network novels-3 has 96 symbols and 79 positions; the task needs 96 symbols and at least"),
        ({"causal": False}, "network novels-3 does not predict characters"),
        ({"labels": 2}, "network novels-3 does not predict characters"),
        ({"patch": 4}, "network novels-3 does not predict characters"),
    ],
)
def test_networks_that_shakespeare_refuses(changes: dict[str, Any], message: str) -> None:
    folder = networks.find("novels-3")
    with pytest.raises(UserError) as caught:
        Shakespeare().fit(replace(checkpoint.read_spec(folder), **changes), folder)
    assert str(caught.value).startswith(message)


def test_shakespeare_refuses_another_alphabet(tmp_path: Path) -> None:
    spec = checkpoint.read_spec(networks.find("novels-3"))
    write_json(tmp_path / "config.json", {"alphabet": ALPHABET[::-1]})
    with pytest.raises(UserError, match="was trained on another alphabet than the task's"):
        Shakespeare().fit(spec, tmp_path)
    write_json(tmp_path / "config.json", {})
    assert Shakespeare().fit(spec, tmp_path) == spec


def test_device_count_does_not_read_where_it_need_not() -> None:
    assert Text(path="none.txt").device_count() == 100
    assert Text(path="none.txt", split="natural", devices=7).device_count() == 7
    with pytest.raises(UserError):
        Text(path="none.txt", split="natural").device_count()


def test_texts_that_cannot_be_used(tmp_path: Path, letters: Path, gpt2: Path) -> None:
    path = put(tmp_path, {"long": speech(300), "short": speech(9), "none": " "})
    small = {key: value for key, value in SMALL.items() if key != "devices"}
    natural = Text(path=path, split="natural", **small)
    assert natural.device_count() == 2
    with pytest.raises(UserError) as caught:
        natural.load(0, None, letters)
    assert str(caught.value) == (
        f"1 of the 2 texts of {path} are too short to be a device; set task.devices to 1 or less, or lower"
        " task.window or task.min_examples"
    )
    assert replace(natural, devices=1).load(0, None, letters).names == ("long",)
    short = put(tmp_path, {"a": speech(60), "b": speech(20)}, "short.json")
    for config, message in (
        (
            Text(path=short, devices=1, window=16, scored=1),
            f"no text of {short} is long enough: the longest has 80 tokens, 167 are needed (task.window = 16,"
            " task.train_fraction = 0.9)",
        ),
        (
            Text(path=path, test_path=short, split="natural", window=64, devices=1),
            f"no text of {short} for testing is long enough: the longest has 60 tokens, 65 are needed",
        ),
        (Text(path=put(tmp_path, {"a": " "}, "blank.json"), devices=1), f"{tmp_path / 'blank.json'} holds no text"),
        (Text(path=path, user="usr"), f"task.user: {path} has no column 'usr'; did you mean 'user'?"),
        (Text(path=path, devices=50, window=8, stride=8, scored=2), "50 devices with task.min_examples = 1 take 50"),
    ):
        with pytest.raises(UserError) as caught:
            config.load(0, None, letters)
        assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"window": 1, "scored": 1}, "task.window must be at least 2, got 1"),
        ({"stride": 0}, "task.stride must be at least 1, got 0"),
        ({"scored": 0}, "task.scored must be from 1 to window = 128, got 0"),
        ({"train_fraction": 1.0}, "task.train_fraction must be above 0 and below 1, got 1.0"),
        ({"test_windows": 0}, "task.test_windows must be at least 1, got 0"),
        ({"devices": 0}, "task.devices must be at least 1, got 0"),
    ],
)
def test_fields_out_of_range_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        Text(path="a.txt", **fields)
    assert str(caught.value) == message
