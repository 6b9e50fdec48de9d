"""Training examples in the place of test examples."""

from pathlib import Path

import numpy as np
from support import write_world

from lamina import config
from lamina.data.task import Pairs, Task
from lamina.experiment import load_task
from lamina.job import Turn


def pairs(count: int) -> Pairs:
    return Pairs(np.arange(count)[:, None], 100 + np.arange(count)[:, None])


def test_the_last_examples_of_every_device_are_for_validation() -> None:
    whole = Task([pairs(8), pairs(5), pairs(1)], [pairs(3)] * 3, list("abc"), 1, "d", (), np.zeros((3, 0)))
    made = whole.validating(0.25)
    assert [len(each) for each in made.train] == [6, 3, 0] and [len(each) for each in made.test] == [2, 2, 1]
    inputs, targets = made.test[1].batch(np.array([1, 0]))
    assert inputs.tolist() == [[4], [3]] and targets.tolist() == [[104], [103]]
    inputs, _ = made.train[0].at(Turn(0, 1, 0)).batch(np.array([5, 0]))
    assert inputs.tolist() == [[5], [0]]
    assert len({whole.digest, made.digest, whole.validating(0.5).digest}) == 3


def test_an_experiment_asks_for_it(tmp_path: Path) -> None:
    table = write_world(tmp_path)
    plain, held = (load_task(config.experiment(table | {"validation": share}, "here")) for share in (0.0, 0.4))
    for all_of_it, train, test in zip(plain.train, held.train, held.test, strict=True):
        assert len(train) + len(test) == len(all_of_it) and len(test) >= 0.4 * len(all_of_it)
        rows = np.arange(len(test))
        assert np.array_equal(test.batch(rows)[0], all_of_it.batch(rows + len(train))[0])
