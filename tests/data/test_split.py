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


tables = st.tuples(st.integers(1, 7), st.integers(1, 12)).flatmap(
    lambda shape: st.lists(st.integers(0, 30), min_size=shape[0] * shape[1], max_size=shape[0] * shape[1]).map(
        lambda counts: np.array(counts, np.int64).reshape(shape)
    )
)


@settings(deadline=None)
@example(np.array([[0, 0, 3, 5]] * 7), np.array([4, 4, 4]), 0)  # a device without, labels that are not here
@example(np.array([[2, 1]]), np.zeros(30, np.int64), 0)  # within one: equal, not two to one
@given(tables, label_lists, seeds)
def test_following(counts: np.ndarray, labels: np.ndarray, seed: int) -> None:
    labels = labels % len(counts)
    parts = split.following(labels, counts, make(seed))
    assert len(parts) == counts.shape[1]
    assert_dealt(parts, len(labels))
    sizes, others = np.array(list(map(len, parts))), counts.sum(axis=0)
    if np.ptp(others) <= 1:
        assert_equal_within_one(parts)
    else:
        assert (np.abs(sizes - len(labels) * others / others.sum()) < 1).all()
    assert lists(parts) == lists(split.following(labels, counts, make(seed)))


@settings(deadline=None)
@given(tables, st.integers(1, 4), seeds)
def test_following_keeps_the_mix_where_it_divides(counts: np.ndarray, factor: int, seed: int) -> None:
    """Unequal sizes: `factor` times as many samples of every label, dealt in the same proportions."""
    if np.ptp(counts.sum(axis=0)) <= 1:
        return
    labels = np.repeat(np.arange(len(counts)), factor * counts.sum(axis=1))
    parts = split.following(labels, counts, make(seed))
    assert (factor * counts == split.mixes(labels, parts, len(counts)).T).all()


@pytest.mark.parametrize("per_device", [3, 8, 60])
def test_following_gives_devices_labels_of_their_own(per_device: int) -> None:
    """Where few samples fall on a device, and labels are not as frequent as in the shards that are followed."""
    rng = make(0)
    labels = rng.choice(40, 60 * 80, p=split.proportions(1, 40, 2.0, rng)[0])
    shares = split.proportions(40, 60, 0.1, rng)
    counts = split.mixes(labels, split.dirichlet(labels, shares, rng), 40).T
    tested = np.repeat(np.arange(40), 60 * per_device // 40)
    own = {
        deal.__name__: np.mean([(counts[tested[part], device] > 0).mean() for device, part in enumerate(parts)])
        for deal in (split.following, split.matching)
        for parts in [deal(tested, counts, make(1))]
    }
    assert own["following"] > 0.8 > own["matching"]


@settings(deadline=None)
@given(tables, seeds)
def test_balanced_never_exceeds_what_is_wanted(counts: np.ndarray, seed: int) -> None:
    rows: np.ndarray = make(seed).integers(0, 50, len(counts))
    columns = split.in_proportion(int(rows.sum()), np.array(make(seed).integers(1, 6, counts.shape[1])))
    table = split.balanced(counts, rows, columns)
    assert np.isfinite(table).all() and (table >= 0).all()
    assert (table.sum(axis=1) <= np.maximum(rows, 1e-6) * (1 + 1e-9)).all()
    assert (table.sum(axis=0) <= np.maximum(columns, 1e-6) * (1 + 1e-9)).all()


def test_balanced_finds_the_fit_of_deming_and_stephan() -> None:
    """The odds ratio stays, the sums become those that are wanted."""
    table = split.balanced(
        np.array([[40.0, 30.0], [35.0, 50.0]]), np.array([15_000, 35_000]), np.array([24_000, 26_000])
    )
    np.testing.assert_allclose(table.sum(axis=0), [24_000, 26_000], rtol=1e-4)
    assert table[0, 0] * table[1, 1] / (table[0, 1] * table[1, 0]) == pytest.approx(40 * 50 / (30 * 35), rel=1e-4)


@settings(deadline=None)
@given(st.integers(0, 100), st.lists(st.integers(0, 30), min_size=1, max_size=20))
def test_in_proportion(count: int, weights: list[int]) -> None:
    if sum(weights) == 0:
        weights[0] = 1
    parts = split.in_proportion(count, np.array(weights))
    assert parts.sum() == count
    assert (np.abs(parts - count * np.array(weights) / sum(weights)) < 1).all()


@settings(deadline=None)
@example(np.zeros(60, np.int64), 20, 1e-300, 0)
@given(label_lists, st.integers(1, 20), st.one_of(alphas, st.floats(5e-324, 1e300)), seeds)
def test_unequal(labels: np.ndarray, devices: int, alpha: float, seed: int) -> None:
    shares = split.proportions(7, devices, alpha, make(seed))
    parts = split.unequal(labels, shares, make(seed))
    assert len(parts) == devices
    assert_dealt(parts, len(labels))
    exact = np.bincount(labels, minlength=7)[:, None] * shares
    assert (np.abs(split.mixes(labels, parts, 7).T - exact) < 1).all()
    assert lists(parts) == lists(split.unequal(labels, shares, make(seed)))


def test_unequal_rounds_without_favour() -> None:
    """Three devices with a third of one sample each: all get it as often."""
    got = [
        len(part) for seed in range(300) for part in split.unequal(np.zeros(1, int), np.full((1, 3), 1 / 3), make(seed))
    ]
    assert np.reshape(got, (-1, 3)).sum(axis=0) == pytest.approx([100] * 3, abs=30)


def test_unequal_shuffles_within_a_label() -> None:
    parts = split.unequal(np.zeros(40, np.int64), np.array([[0.5, 0.5]]), make(0))
    assert set(parts[0].tolist()) != set(range(20)) and set(parts[0].tolist()) != set(range(20, 40))


@settings(deadline=None)
@given(label_lists, st.integers(1, 20), st.integers(1, 4), seeds)
def test_shards(labels: np.ndarray, devices: int, per_device: int, seed: int) -> None:
    parts = split.shards(labels, devices, per_device, make(seed))
    assert len(parts) == devices
    assert_dealt(parts, len(labels))
    sizes = list(map(len, parts))
    assert max(sizes) - min(sizes) <= per_device
    assert lists(parts) == lists(split.shards(labels, devices, per_device, make(seed)))


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 8), st.integers(1, 3), st.integers(1, 5), seeds)
def test_shards_are_of_one_label_where_it_divides(devices: int, per_device: int, size: int, seed: int) -> None:
    labels = make(seed).permutation(np.repeat(np.arange(devices * per_device), size))
    parts = split.shards(labels, devices, per_device, make(seed))
    assert all(len(set(labels[part])) == per_device and len(part) == size * per_device for part in parts)


def test_shards_are_handed_out_at_random_and_shuffled_within_a_label() -> None:
    labels = np.repeat([0, 1, 2], 40)
    parts = split.shards(labels, 6, 1, make(0))
    assert [set(labels[part]) for part in parts] != [{0}, {0}, {1}, {1}, {2}, {2}]
    assert all(np.ptp(part) > 19 for part in parts)


def test_natural_keeps_the_order_of_names_and_rows() -> None:
    parts = split.natural(["b", "a", "c", "b", "", "a"], ["a", "d", "b"])
    assert lists(parts) == [[1, 5], [], [0, 3]]
    assert all(part.dtype == np.int64 for part in parts)


@settings(deadline=None)
@given(st.lists(st.integers(0, 12), min_size=1, max_size=15), st.integers(0, 4), seeds)
def test_at_least(sizes: list[int], least: int, seed: int) -> None:
    parts = np.split(np.arange(sum(sizes)), np.cumsum(sizes)[:-1])
    if sum(sizes) < least * len(sizes):
        with pytest.raises(ValueError, match=f"{sum(sizes)} samples are too few for {len(sizes)} parts"):
            split.at_least(parts, least, make(seed))
        return
    moved = split.at_least(parts, least, make(seed))
    assert_dealt(moved, sum(sizes))
    for before, after in zip(parts, moved, strict=True):
        assert len(after) >= least
        if len(before) <= least:
            assert len(after) == least or least < 1
            assert set(before.tolist()) <= set(after.tolist())
        else:
            assert set(after.tolist()) <= set(before.tolist())
    assert lists(moved) == lists(split.at_least(parts, least, make(seed)))


def test_at_least_takes_from_the_largest_any_sample() -> None:
    parts = [np.arange(10), np.arange(10, 12), np.arange(12, 20), np.empty(0, np.int64)]
    moved = split.at_least(parts, 4, make(0))
    assert [len(part) for part in moved] == [6, 4, 6, 4]
    taken = {row for seed in range(20) for row in split.at_least(parts, 4, make(seed))[3].tolist()}
    assert len(taken) > 12


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
        (lambda: split.following(np.array([5]), np.ones((3, 1)), make(0)), r"labels must be in \[0, 3\), got 5 to 5"),
        (lambda: split.unequal(np.array([4]), np.ones((3, 1)), make(0)), r"labels must be in \[0, 3\), got 4 to 4"),
        (lambda: split.shards(np.array([5]), 3, -1, make(0)), "devices must be at least 1, got -3"),
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
