"""Accuracy against a count, one window and one character at a time."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest
import torch
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
