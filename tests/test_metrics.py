"""Accuracy against a count, one window and one character at a time."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from specs import SPECS
from support import spec, weights

from lamina import metrics, model
from lamina.data.task import Shard
from lamina.job import Turn
from lamina.layout import Params
from lamina.metrics import Score, evaluate
from lamina.turn import generator


@dataclass(frozen=True)
class Noise:
    """Characters at random."""

    seed: int
    windows: int

    def __len__(self) -> int:
        return self.windows

    def batch(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        text = generator("noise", self.seed).integers(0, 3, (self.windows, 13))[rows]  # few symbols: some hits
        return text[:, :-1], text[:, 1:]

    def at(self, turn: Turn) -> Shard:
        return self


SHARDS: Sequence[Shard] = [Noise(seed, windows) for seed, windows in enumerate((5, 1, 40, 17))]


@pytest.fixture(scope="module")
def params() -> Params:
    """Random weights that favour the three symbols in use."""
    params = weights(spec(2), seed=5)
    head = params["head.weight"].clone()
    head[3:] = 0
    return params | {"head.weight": head * 20}


def counted(params: Params, scored: int) -> list[int]:
    """Right answers per device."""
    right = []
    for shard in SHARDS:
        hits = 0
        for row in range(len(shard)):
            ids, targets = shard.batch(np.array([row]))
            logits = model.forward(spec(2), params, torch.from_numpy(ids))[0]
            for place in range(12 - scored, 12):
                hits += int(logits[place].argmax()) == targets[0, place]
        right.append(hits)
    return right


@pytest.mark.parametrize("batch", [1, 7, 128])
@pytest.mark.parametrize("scored", [1, 4, 12])
def test_accuracy_is_the_share_of_right_characters(
    scored: int, batch: int, params: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics, "_BATCH", batch)
    for workers in (1, 3):
        score = evaluate(spec(2), params, SHARDS, scored, workers)
        assert score.correct.tolist() == counted(params, scored)
        assert score.total.tolist() == [len(shard) * scored for shard in SHARDS]
    assert 0 < score.correct.sum() < score.total.sum()
    assert score.correct.dtype == score.total.dtype == np.int64


def test_mean_weighted_mean_and_tenth_percentile() -> None:
    """Eleven devices with 0, 1 ... 10 right of 10, and the last with 100 of 100: a tenth of the way is the second."""
    score = Score(np.array([*range(10), 100]), np.array([10] * 10 + [100]))
    assert score.accuracy() == {
        "mean_over_devices": pytest.approx((4.5 + 1) / 11),
        "weighted": pytest.approx(145 / 200),
        "p10": pytest.approx(0.1),
    }
    between = Score(np.array([0, 10]), np.array([10, 10])).accuracy()
    assert between["p10"] == pytest.approx(0.1)  # a tenth of the way from 0 to 1


def test_the_score_of_some_devices() -> None:
    score = Score(np.array([1, 2, 3]), np.array([4, 5, 6])).of([2, 0])
    assert (score.correct.tolist(), score.total.tolist()) == ([3, 1], [6, 4])


def test_evaluation_keeps_no_gradients(params: Params) -> None:
    leaves = {name: p.clone().requires_grad_() for name, p in params.items()}
    evaluate(spec(2), leaves, SHARDS, 4, workers=2)
    assert all(leaf.grad is None for leaf in leaves.values())


class Texts(Noise):
    """Texts of one to nine characters with a class each; a batch is as wide as its longest."""

    def batch(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        drawn = generator("texts", self.seed).integers(0, 9, (self.windows, 11))[rows]
        lengths = 1 + drawn[:, :1]
        ids = np.where(np.arange(lengths.max(initial=1)) < lengths, drawn[:, : lengths.max(initial=1)], -1)
        return ids, drawn[:, 9:10] % 3


@pytest.mark.parametrize("family", ["bert", "gpt2, classes"])
def test_texts_of_other_devices_change_no_answer(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where devices share a batch, shorter texts are made longer: what is added counts for nothing."""
    network = replace(SPECS[family], labels=3)
    params = weights(network, seed=3)
    params["head.weight"] = params["head.weight"] * 50
    shards = [Texts(seed, count) for seed, count in enumerate((3, 0, 25, 9))]
    alone = []
    for shard in shards:
        rows = (shard.batch(np.array([row])) for row in range(len(shard)))
        pairs = [(model.forward(network, params, model.batch(network, ids)), labels) for ids, labels in rows]
        alone.append(sum(int(logits.argmax()) == labels.item() for logits, labels in pairs))
    for batch in (4, 128):
        monkeypatch.setattr(metrics, "_BATCH", batch)
        score = evaluate(network, params, shards, 1)
        assert score.correct.tolist() == alone and score.total.tolist() == [3, 0, 25, 9]
    assert 0 < sum(alone) < 37


def test_devices_without_test_examples_have_no_say() -> None:
    nothing = evaluate(spec(2), weights(spec(2)), [Noise(0, 0)], 4)
    assert nothing.correct.tolist() == nothing.total.tolist() == [0]
    score = Score(np.array([1, 0, 3]), np.array([2, 0, 4]))
    assert score.accuracy() == {
        "mean_over_devices": 0.625,
        "weighted": pytest.approx(4 / 6),
        "p10": pytest.approx(0.525),
    }
