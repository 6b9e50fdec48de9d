"""Training examples in the place of test examples."""

from pathlib import Path

import numpy as np
from support import begin, write_world

from lamina import config
from lamina.data.task import Pairs, Task
from lamina.experiment import load_task
from lamina.job import Turn


def pairs(count: int) -> Pairs:
    return Pairs(np.arange(count)[:, None], 100 + np.arange(count)[:, None])


def test_the_last_examples_of_every_device_are_for_validation() -> None:
    whole = Task([pairs(8), pairs(5), pairs(1)], [pairs(3)] * 3, list("abc"), 1, "d", (), np.zeros((3, 0)))
    made = whole.validating(0.25)
    assert [len(each) for each in made.train] == [6, 3, 1] and [len(each) for each in made.test] == [2, 2, 0]
    inputs, targets = made.test[1].batch(np.array([1, 0]))
    assert inputs.tolist() == [[4], [3]] and targets.tolist() == [[104], [103]]
    inputs, _ = made.train[0].at(Turn(0, 1, 0)).batch(np.array([5, 0]))
    assert inputs.tolist() == [[5], [0]]
    assert len({whole.digest, made.digest, whole.validating(0.5).digest}) == 3


def test_everyone_keeps_a_training_example() -> None:
    whole = Task([pairs(8), pairs(1), pairs(0)], [pairs(3)] * 3, list("abc"), 1, "d", (), np.zeros((3, 0)))
    made = whole.validating(0.999)
    assert [len(each) for each in made.train] == [1, 1, 0] and [len(each) for each in made.test] == [7, 0, 0]
    assert made.test[0].batch(np.array([0]))[0].tolist() == [[1]]


def test_a_run_goes_on_where_a_device_has_a_single_example(tmp_path: Path) -> None:
    run = begin(write_world(tmp_path, rounds=1, cohort=6, validation=0.999), tmp_path / "runs")
    assert {len(each) for each in run.task.train} == {1}
    assert run.play()["totals"]["updates"] == 6


def test_an_experiment_asks_for_it(tmp_path: Path) -> None:
    table = write_world(tmp_path)
    plain, held = (load_task(config.experiment(table | {"validation": share}, "here")) for share in (0.0, 0.4))
    for all_of_it, train, test in zip(plain.train, held.train, held.test, strict=True):
        assert len(train) + len(test) == len(all_of_it) and len(test) >= 0.4 * len(all_of_it)
        rows = np.arange(len(test))
        assert np.array_equal(test.batch(rows)[0], all_of_it.batch(rows + len(train))[0])
