"""Laws of the splits: `python -m pytest tests/data/test_split.py`."""

from collections.abc import Callable, Sequence

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lamina.data import split

seeds = st.integers(0, 2**32)
alphas = st.floats(-3, 3).map(lambda exponent: 10.0**exponent)
label_lists = st.lists(st.integers(0, 6), max_size=60).map(lambda labels: np.array(labels, np.int64))


def make(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


def assert_dealt(parts: Sequence[np.ndarray], count: int) -> None:
    """Nothing lost, nothing twice."""
    assert np.sort(np.concatenate(parts)).tolist() == list(range(count))


def assert_equal_within_one(parts: Sequence[np.ndarray]) -> None:
    sizes = [len(part) for part in parts]
    assert max(sizes) - min(sizes) <= 1


def lists(parts: Sequence[np.ndarray]) -> list[list[int]]:
    return [part.tolist() for part in parts]


@settings(deadline=None)
@given(st.integers(0, 200), st.integers(1, 30), seeds)
def test_iid(count: int, devices: int, seed: int) -> None:
    parts = split.iid(count, devices, make(seed))
    assert len(parts) == devices
    assert_dealt(parts, count)
    assert_equal_within_one(parts)
    assert lists(parts) == lists(split.iid(count, devices, make(seed)))


def test_iid_shuffles_by_the_generator() -> None:
    once, again = split.iid(50, 2, make(0)), split.iid(50, 2, make(1))
    assert lists(once) != lists(again)
    assert set(once[0]) != set(range(25))


@settings(deadline=None)
@example(3, 4, 5e-324, 0)
@given(st.integers(0, 8), st.integers(1, 40), st.one_of(alphas, st.floats(5e-324, 1e300)), seeds)
def test_proportions_are_shares(labels: int, devices: int, alpha: float, seed: int) -> None:
    shares = split.proportions(labels, devices, alpha, make(seed))
    assert shares.shape == (labels, devices)
    assert np.isfinite(shares).all()
    assert (shares >= 0).all()
    np.testing.assert_allclose(shares.sum(axis=1), 1, rtol=1e-12)
    assert shares.tolist() == split.proportions(labels, devices, alpha, make(seed)).tolist()


@pytest.mark.parametrize("alpha", [0.05, 0.5, 1.0, 8.0])
def test_proportions_are_dirichlet(alpha: float) -> None:
    """A share of a symmetric Dirichlet over d has mean 1/d and variance (1/d) (1 - 1/d) / (d alpha + 1)."""
    devices = 5
    shares = split.proportions(40_000, devices, alpha, make(3))
    np.testing.assert_allclose(shares.mean(axis=0), 1 / devices, atol=0.01)
    variance = (1 / devices) * (1 - 1 / devices) / (devices * alpha + 1)
    np.testing.assert_allclose(shares.var(axis=0), variance, rtol=0.05)


def test_proportions_of_a_tiny_alpha_give_a_label_to_one_device() -> None:
    shares = split.proportions(200, 4, 1e-9, make(0))
    assert (shares.max(axis=1) == 1).all()
    assert set(shares.argmax(axis=1)) == {0, 1, 2, 3}


@pytest.mark.parametrize("alpha", [0.0, -1.0, float("nan"), float("inf")])
def test_proportions_refuse_alpha(alpha: float) -> None:
    with pytest.raises(ValueError, match="alpha must be positive and finite"):
        split.proportions(2, 2, alpha, make(0))


@settings(deadline=None)
@given(label_lists, st.integers(1, 20), alphas, seeds)
def test_dirichlet(labels: np.ndarray, devices: int, alpha: float, seed: int) -> None:
    shares = split.proportions(7, devices, alpha, make(seed))
    parts = split.dirichlet(labels, shares, make(seed))
    assert len(parts) == devices
    assert_dealt(parts, len(labels))
    assert_equal_within_one(parts)
    assert lists(parts) == lists(split.dirichlet(labels, shares, make(seed)))


def test_dirichlet_cuts_device_after_device() -> None:
    """Label 0 is dealt to device 1, label 1 to device 0; the cut after 3 of 6 moves one of label 0."""
    labels = np.array([0, 0, 0, 0, 1, 1])
    parts = split.dirichlet(labels, np.array([[0.0, 1.0], [1.0, 0.0]]), make(0))
    assert [labels[part].tolist() for part in parts] == [[1, 1, 0], [0, 0, 0]]


def test_dirichlet_shuffles_within_a_label() -> None:
    parts = split.dirichlet(np.zeros(40, np.int64), np.array([[0.5, 0.5]]), make(0))
    assert set(parts[0]) != set(range(20))


def test_dirichlet_is_as_uneven_as_alpha_says() -> None:
    labels = np.repeat(np.arange(10), 200)
    kinds = {
        alpha: np.mean(
            [
                len(set(labels[part]))
                for part in split.dirichlet(labels, split.proportions(10, 20, alpha, make(0)), make(1))
            ]
        )
        for alpha in (0.01, 0.1, 100.0)
    }
    assert kinds[0.01] < 2.5 < kinds[0.1] < 6 < 9.5 < kinds[100.0]


@settings(deadline=None)
@given(label_lists, st.integers(1, 20), alphas, seeds)
def test_matching(labels: np.ndarray, devices: int, alpha: float, seed: int) -> None:
    counts = np.floor(3 * split.proportions(7, devices, alpha, make(seed)))  # rows of zeros among them
    parts = split.matching(labels, counts, make(seed))
    assert len(parts) == devices
    assert_dealt(parts, len(labels))
    assert_equal_within_one(parts)
    assert lists(parts) == lists(split.matching(labels, counts, make(seed)))


@settings(deadline=None)
@given(seeds)
def test_matching_keeps_the_mix_where_it_divides(seed: int) -> None:
    counts = np.array([[6, 0, 0], [0, 4, 2], [0, 2, 4]])
    labels = np.array([0, 1, 2] * 3)
    parts = split.matching(labels, counts, make(seed))
    assert [sorted(labels[part].tolist()) for part in parts] == [[0, 0, 0], [1, 1, 2], [1, 2, 2]]


def test_matching_follows_a_dirichlet_split_better_than_a_second_one() -> None:
    labels, fewer = np.repeat(np.arange(50), 130), np.repeat(np.arange(50), 50)
    shares = split.proportions(50, 60, 0.1, make(0))

    def mixes(of: np.ndarray, parts: Sequence[np.ndarray]) -> np.ndarray:
        return np.stack([np.bincount(of[part], minlength=50) / len(part) for part in parts])

    parts = split.dirichlet(labels, shares, make(1))
    counts = np.stack([np.bincount(labels[part], minlength=50) for part in parts], axis=1)
    wanted = mixes(labels, parts)
    followed = np.minimum(wanted, mixes(fewer, split.matching(fewer, counts, make(2)))).sum(axis=1).mean()
    redrawn = np.minimum(wanted, mixes(fewer, split.dirichlet(fewer, shares, make(2)))).sum(axis=1).mean()
    assert followed > 0.8 > redrawn


@settings(deadline=None)
@given(
    label_lists,
    st.lists(st.sampled_from([0, 2, 3]), min_size=1, max_size=12),
    alphas,
    seeds,
)
def test_resource_correlated(labels: np.ndarray, groups: list[int], alpha: float, seed: int) -> None:
    """Groups 1 and 4 never have a device; whatever is due to them must go to the others."""
    shares = split.proportions(7, 5, alpha, make(seed))
    parts = split.resource_correlated(labels, groups, shares, make(seed))
    assert len(parts) == len(groups)
    assert_dealt(parts, len(labels))
    for group in set(groups):
        assert_equal_within_one([part for part, of in zip(parts, groups, strict=True) if of == group])
    assert lists(parts) == lists(split.resource_correlated(labels, groups, shares, make(seed)))


def test_resource_correlated_ties_labels_to_groups() -> None:
    labels = np.array([0] * 40 + [1] * 40 + [2] * 40)
    groups = [0, 1, 0, 2, 1]
    shares = np.array([[0.0, 0.0, 1.0], [1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])  # label 0 to group 2, 1 to 0, 2 to 1
    parts = split.resource_correlated(labels, groups, shares, make(0))
    assert [set(labels[part].tolist()) for part in parts] == [{1}, {2}, {1}, {0}, {2}]
    assert [len(part) for part in parts] == [20, 20, 20, 40, 20]
    assert set(parts[0]) != set(range(40, 60))  # permuted within the group


def test_resource_correlated_moves_the_share_of_an_empty_group() -> None:
    labels = np.repeat([0, 1], 9000)
    shares = np.array([[0.2, 0.6, 0.2], [0.0, 1.0, 0.0]])  # group 1 has no device
    parts = split.resource_correlated(labels, [0, 2, 2], shares, make(0))
    of_label = [[int((labels[part] == label).sum()) for part in parts] for label in (0, 1)]
    assert of_label[0][0] == pytest.approx(4500, abs=300)  # 0.2 to 0.2
    assert of_label[1][0] == pytest.approx(3000, abs=300)  # nothing left: by devices, 1 to 2


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: split.iid(3, -1, make(0)), "devices must be at least 1, got -1"),
        (lambda: split.proportions(3, 0, 1.0, make(0)), "devices must be at least 1, got 0"),
        (
            lambda: split.dirichlet(np.array([0, 3]), np.ones((3, 1)), make(0)),
            r"labels must be in \[0, 3\), got 0 to 3",
        ),
        (
            lambda: split.matching(np.array([-1, 2]), np.ones((3, 1)), make(0)),
            r"labels must be in \[0, 3\), got -1 to 2",
        ),
        (
            lambda: split.resource_correlated(np.array([0]), [0, 2], np.full((1, 2), 0.5), make(0)),
            r"groups must be in \[0, 2\), got 0 to 2",
        ),
        (
            lambda: split.resource_correlated(np.array([0]), [], np.ones((1, 1)), make(0)),
            "there is no device",
        ),
    ],
)
def test_wrong_arguments_are_refused(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
