"""Texts and their classes: `python -m pytest tests/data/test_texts.py`."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError
from transformers import AutoTokenizer
from vocabularies import write_bert, write_bytes, write_json

from lamina.data.dealing import held_out
from lamina.data.task import Shard, Task
from lamina.data.text import ALPHABET
from lamina.data.texts import TextClassification, Texts
from lamina.errors import UserError
from lamina.job import Turn
from lamina.spec import Spec
from lamina.tokens import read_tokenizer
from lamina.turn import generator

BERT = Spec(
    blocks=1, embed=8, heads=2, head_dim=4, ffn=8, vocab=150, positions=64, causal=False, types=2, pooler="tanh"
)
GPT2 = Spec(blocks=1, embed=8, heads=2, head_dim=4, ffn=8, vocab=320, positions=64)
NAMES = ("bank", "card", "cash")


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bert(tmp_path_factory.mktemp("texts") / "bert")


def table(folder: Path, rows: list[dict[str, Any]], name: str = "a.jsonl") -> str:
    path = folder / name
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return str(path)


def examples(count: int, users: int = 4) -> list[dict[str, Any]]:
    """Texts of 1 to 9 words, all different; classes and users in turn."""
    words = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog"]
    return [
        {
            "text": f"{i} {' '.join(words[: i % 9 + 1])}",
            "label": NAMES[i % 3],
            "user": f"user {i % users}",
        }
        for i in range(count)
    ]


def everything(shards: Any) -> list[tuple[tuple[int, ...], int]]:
    """Ids and class of every example."""
    found = []
    for shard in shards:
        inputs, targets = shard.batch(np.arange(len(shard)))
        found += [(tuple(row[row >= 0].tolist()), int(target)) for row, (target,) in zip(inputs, targets, strict=True)]
    return found


def expected(rows: list[dict[str, Any]], folder: Path, names: tuple[str, ...]) -> Counter[tuple[tuple[int, ...], int]]:
    tokenizer = read_tokenizer(folder)
    ids = tokenizer.encode([row["text"] for row in rows])
    framed = [(*tokenizer.before, *each.tolist(), *tokenizer.after) for each in ids]
    return Counter((each, names.index(row["label"])) for each, row in zip(framed, rows, strict=True))


@pytest.mark.parametrize(
    "split", ["natural", "iid", "dirichlet", "dirichlet-unequal", "shards", "quantity", "resource"]
)
def test_every_example_is_dealt_once(tmp_path: Path, bert: Path, split: Any) -> None:
    rows = examples(120)
    config = TextClassification(path=table(tmp_path, rows), split=split, devices=4)
    task = config.load(3, [0, 0, 1, 1], bert)
    assert Counter(everything(task.train) + everything(task.test)) == expected(rows, bert, NAMES)
    assert sum(map(len, task.test)) == 24
    assert (task.labels, task.kinds, task.scored, task.notes) == (NAMES, NAMES, 1, ())
    counts = [np.bincount(shard.batch(np.arange(len(shard)))[1][:, 0], minlength=3) for shard in task.train]
    assert task.mix.tolist() == np.stack(counts).tolist()
    again, other = config.load(3, [0, 0, 1, 1], bert), config.load(4, [0, 0, 1, 1], bert)
    assert task.digest == again.digest != other.digest
    assert everything(task.train) == everything(again.train) != everything(other.train)
    assert len(task.train) == config.device_count() == 4


def test_users_are_devices(tmp_path: Path, bert: Path) -> None:
    rows = examples(70, users=5)
    config = TextClassification(path=table(tmp_path, rows), split="natural")
    task = config.load(0, None, bert)
    assert task.names == tuple(f"user {i}" for i in range(5))
    assert config.device_count() == 5
    for user, train, test in zip(task.names, task.train, task.test, strict=True):
        mine = [row for row in rows if row["user"] == user]
        assert Counter(everything([train, test])) == expected(mine, bert, NAMES)
        assert len(test) == 3  # a fifth of 14
    drawn = replace(config, devices=2).load(0, None, bert)
    assert set(drawn.names) < set(task.names)


def test_held_out_examples_come_from_every_class(tmp_path: Path, bert: Path) -> None:
    rows = examples(90)
    seen = set()
    for seed in range(3):
        task = TextClassification(path=table(tmp_path, rows), devices=5, test_fraction=0.3).load(seed, None, bert)
        tested = everything(task.test)
        assert Counter(label for _, label in tested) == {0: 9, 1: 9, 2: 9}
        seen.add(tuple(sorted(tested)))
    assert len(seen) == 3


@given(st.lists(st.integers(0, 5), min_size=1), st.floats(0.01, 0.99), st.integers(0, 9))
def test_held_out(strata: list[int], fraction: float, seed: int) -> None:
    labels = np.array(strata)
    held = held_out(labels, fraction, generator(seed))
    assert len(set(held.tolist())) == len(held)
    for stratum, size in Counter(strata).items():
        count = int((labels[held] == stratum).sum())
        assert count < size
        assert abs(count - fraction * size) <= 0.5 or count == size - 1


def test_test_examples_of_their_own(tmp_path: Path, bert: Path) -> None:
    rows, more = examples(30), [{"text": "brown dog", "label": "card"}, {"text": "fox", "label": "bank"}]
    path, test_path = table(tmp_path, rows), table(tmp_path, more, "b.jsonl")
    (tmp_path / "c.json").write_text(json.dumps({"train": rows, "test": more}), encoding="utf-8")
    for config in (
        TextClassification(path=path, test_path=test_path, devices=2),
        TextClassification(path=str(tmp_path / "c.json"), devices=2),
        TextClassification(path=path, test_path=test_path, devices=2, split="natural"),  # no user there: dealt
    ):
        task = config.load(0, None, bert)
        assert Counter(everything(task.test)) == expected(more, bert, NAMES)
        if config.split != "natural":
            assert Counter(everything(task.train)) == expected(rows, bert, NAMES)


def test_batches_are_trimmed_and_filled(bert: Path) -> None:
    ids = np.array([5, 6, 7, 8, 9, 10], np.uint16)
    shard = Texts(ids, np.array([0, 3, 4, 6]), np.array([2, 0, 1]), np.array([2, 0, 1]))
    inputs, targets = shard.batch(np.array([0, 2]))
    assert inputs.tolist() == [[9, 10], [8, -1]]
    assert targets.tolist() == [[1], [0]]
    assert inputs.dtype == targets.dtype == np.int64
    assert shard.batch(np.array([1]))[0].tolist() == [[5, 6, 7]]
    assert shard.batch(np.array([], int))[0].shape == (0, 0)
    assert shard.at(Turn(0, 1, 2, 0)) is shard
    with pytest.raises(IndexError):
        shard.batch(np.array([3]))


def test_long_texts_are_cut_between_the_special_tokens(tmp_path: Path, bert: Path) -> None:
    rows = [{"text": f"{'fox ' * words}".strip(), "label": NAMES[words % 2]} for words in (1, 6, 7, 400, 2, 3)]
    task = TextClassification(path=table(tmp_path, rows), window=8, devices=1).load(0, None, bert)
    found = everything([*task.train, *task.test])
    assert sorted(len(ids) for ids, _ in found) == [3, 4, 5, 8, 8, 8]
    assert all(ids[0] == 2 and ids[-1] == 3 for ids, _ in found)
    assert task.notes == ("2 of 6 texts are longer than task.window = 8 tokens and were cut",)
    reference = AutoTokenizer.from_pretrained(bert)
    rows = examples(30)
    task = TextClassification(path=table(tmp_path, rows), window=6, devices=1).load(0, None, bert)
    wanted = [tuple(reference(row["text"], truncation=True, max_length=6)["input_ids"]) for row in rows]
    assert Counter(ids for ids, _ in everything([*task.train, *task.test])) == Counter(wanted)
    with pytest.raises(UserError, match=r"task\.window must be at least 3, for the tokens round a text and one of it"):
        TextClassification(path=table(tmp_path, rows), window=2, devices=1).load(0, None, bert)


def test_order_of_the_classes(tmp_path: Path, bert: Path) -> None:
    numbers = [{"text": f"fox {i}", "label": 11 - i % 12} for i in range(36)]
    task = TextClassification(path=table(tmp_path, numbers), devices=1).load(0, None, bert)
    assert task.labels == tuple(map(str, range(12)))
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["z", "a"])})
    columns = {"text": ["fox", "dog", "the fox", "the dog"], "label": [0, 1, 0, 1]}
    made = datasets.DatasetDict(
        {part: datasets.Dataset.from_dict(columns, features=features) for part in ("train", "test")}
    )
    made.save_to_disk(str(tmp_path / "made"))
    task = TextClassification(path=str(tmp_path / "made"), devices=1).load(0, None, bert)
    assert task.labels == ("z", "a")
    assert Counter(target for _, target in everything(task.train)) == {0: 2, 1: 2}


def pooling(folder: Path, **modes: bool) -> Path:
    (folder / "1_Pooling").mkdir(exist_ok=True)
    write_json(folder / "1_Pooling" / "config.json", {"word_embedding_dimension": 8} | modes)
    return folder


def test_fit(tmp_path: Path, bert: Path) -> None:
    config = TextClassification(path=table(tmp_path, examples(30)))
    wanted = replace(BERT, labels=3, head_bias=True, pool="first")
    assert config.fit(BERT, bert) == wanted
    assert replace(config, pool="first").fit(BERT, bert) == wanted
    assert replace(config, pool="mean").fit(BERT, bert) == replace(wanted, pool="mean", pooler="")
    sentence = write_bert(tmp_path / "sentence")
    pooling(sentence, pooling_mode_cls_token=False, pooling_mode_mean_tokens=True)
    assert config.fit(BERT, sentence) == replace(wanted, pool="mean", pooler="")
    assert replace(config, pool="first").fit(BERT, sentence) == wanted
    pooling(sentence, pooling_mode_cls_token=True, pooling_mode_mean_tokens=False)
    assert config.fit(BERT, sentence) == replace(wanted, pooler="")
    causal = write_bytes(tmp_path / "causal")
    assert config.fit(GPT2, causal) == replace(GPT2, labels=3, pool="last")
    assert replace(config, pool="mean").fit(GPT2, causal) == replace(GPT2, labels=3, pool="mean")


def test_networks_that_do_not_fit(tmp_path: Path, bert: Path) -> None:
    config = TextClassification(path=table(tmp_path, examples(30)))
    causal = write_bytes(tmp_path / "causal")
    sentence = pooling(write_bert(tmp_path / "sentence"), pooling_mode_max_tokens=True)
    for each, spec, folder, message in (
        (replace(config, window=65), BERT, bert, "network bert has 64 positions; task.window must be at most that"),
        (replace(config, pool="last"), BERT, bert, 'task.pool: "last" is for causal networks, bert is none; take'),
        (replace(config, pool="first"), GPT2, causal, "task.pool: the first token of network causal sees no other"),
        (config, BERT, sentence, f"{sentence}/1_Pooling/config.json: pools by pooling_mode_max_tokens; set task.pool"),
        (config, replace(BERT, patch=4, image=8), bert, "network bert takes images"),
    ):
        with pytest.raises(UserError) as caught:
            each.fit(spec, folder)
        assert str(caught.value).startswith(message)


def test_reads_is_the_tokenizer(tmp_path: Path, bert: Path) -> None:
    config = TextClassification(path="none.csv")
    assert config.reads(bert) == read_tokenizer(bert).digest != config.reads(write_bytes(tmp_path / "causal"))


def test_characters(tmp_path: Path) -> None:
    write_json(tmp_path / "config.json", {"alphabet": ALPHABET})
    rows = [{"text": "To be", "label": "a"}, {"text": "or not", "label": "b"}] * 3
    config = TextClassification(path=table(tmp_path, rows), devices=1)
    task = config.load(0, None, tmp_path)
    assert {len(ids) for ids, _ in everything(task.train)} == {5, 6}
    rows[0]["text"] = "\u200b"
    with pytest.raises(UserError, match=r"the network's tokenizer makes no token of the text '\\u200b'"):
        TextClassification(path=table(tmp_path, rows), devices=1).load(0, None, tmp_path)


def test_device_count_does_not_read_where_it_need_not(tmp_path: Path) -> None:
    assert TextClassification(path="none.csv").device_count() == 100
    assert TextClassification(path="none.csv", devices=7, split="natural").device_count() == 7
    with pytest.raises(UserError):
        TextClassification(path="none.csv", split="natural").device_count()


def loaded(folder: Path, bert: Path, rows: list[dict[str, Any]], more: Any = None, **fields: Any) -> Task:
    test_path = table(folder, more, "more.jsonl") if more else None
    return TextClassification(path=table(folder, rows), test_path=test_path, devices=1, **fields).load(0, None, bert)


def test_tables_that_cannot_be_used(tmp_path: Path, bert: Path) -> None:
    rows, path = examples(30), tmp_path / "a.jsonl"
    one = [row | {"label": "bank"} for row in rows]
    blank = [row | {"text": " "} if i == 4 else row for i, row in enumerate(rows)]
    rare = [*rows, {"text": "a", "label": "rare", "user": "user 0"}]
    nobody = [{"text": row["text"], "label": row["label"]} for row in rows]
    for mine, more, fields, message in (
        (one, None, {}, f"{path} has one class, 'bank'; at least two are needed"),
        (blank, None, {}, f"{path}, row 5: 'text' is empty"),
        (rows, [{"text": "a", "label": "bnk"}], {}, f"{tmp_path / 'more.jsonl'} has class 'bnk', of which there is no"),
        (rows, None, {"label": "lable"}, f"task.label: {path} has no column 'lable'; did you mean 'label'?"),
        (nobody, None, {"split": "natural"}, f"task.user must name a column of {path}: text, label; none has a usual"),
        (rows[:4], None, {"test_fraction": 0.1}, f"task.test_fraction = 0.1 of {path} is no test example; raise it"),
    ):
        with pytest.raises(UserError) as caught:
            loaded(tmp_path, bert, mine, more, **fields)
        assert str(caught.value).startswith(message)
    task = loaded(tmp_path, bert, rare)  # of a class with one example, that one is for training
    assert task.mix[0, task.kinds.index("rare")] == 1


def test_a_class_without_an_example_is_refused(tmp_path: Path, bert: Path) -> None:
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["a", "b"])})
    datasets.Dataset.from_dict({"text": ["x", "y"], "label": [0, 0]}, features=features).save_to_disk(str(tmp_path))
    with pytest.raises(UserError, match=r"class 'b' of .* has no training example"):
        TextClassification(path=str(tmp_path), devices=1).load(0, None, bert)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"test_fraction": 1.0}, "task.test_fraction must be above 0 and below 1, got 1.0"),
        ({"window": 0}, "task.window must be at least 1, got 0"),
        ({"pool": "max"}, "task.pool must be one of auto, first, mean, last, got 'max'"),
        ({"alpha": 0.0}, "task.alpha must be finite and above 0, got 0.0"),
    ],
)
def test_fields_out_of_range_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        TextClassification(path="a.csv", **fields)
    assert str(caught.value) == message


def test_the_path_must_be_given() -> None:
    with pytest.raises(ValidationError, match="path"):
        TypeAdapter(TextClassification).validate_python({})


def test_a_view_is_a_shard(tmp_path: Path, bert: Path) -> None:
    task = loaded(tmp_path, bert, examples(30))
    shards: list[Shard] = [*task.train, *task.test]
    first = shards[0]
    assert isinstance(first, Texts)
    assert all(isinstance(shard, Texts) and shard.ids is first.ids for shard in shards)
    assert first.ids.dtype == np.uint16
