"""Who gets which sample: pure functions from labels to one index array per device.

Every function hands out each sample exactly once (`natural`: each sample of the users it is asked for) and
depends only on its arguments and the generator. A sample's label is whatever makes devices differ: a class, or
the role that speaks.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import numpy as np


def iid(count: int, devices: int, rng: np.random.Generator) -> list[np.ndarray]:
    """A permutation cut into parts that are equal within one.

    Args:
        count: Number of samples.
        devices: Number of devices, at least 1.
        rng: Source of the permutation.

    Returns:
        Sample indices per device, int64 [samples of the device].

    Raises:
        ValueError: There is no device.
    """
    return _cut(rng.permutation(count), devices)


def proportions(labels_count: int, devices: int, alpha: float, rng: np.random.Generator) -> np.ndarray:
    """Share of every label that each device gets: symmetric Dirichlet rows.

    A row is a vector of independent gamma(alpha) draws over its sum. They are drawn as logarithms, log
    gamma(alpha) = log gamma(alpha + 1) - exponential / alpha in distribution (Marsaglia and Tsang, 2000), and
    the largest is subtracted before they are exponentiated: a row of a tiny alpha is one 1 and zeros, never
    0 / 0.

    Args:
        labels_count: Number of labels.
        devices: Number of devices (or groups of devices), at least 1.
        alpha: Concentration, positive and finite: towards 0 one device has all of a label, large alpha is
            even.
        rng: Source of the draws.

    Returns:
        float64 [labels_count, devices], non-negative, rows sum to 1.

    Raises:
        ValueError: `alpha` is not positive and finite, or there is no device.
    """
    if not 0 < alpha < np.inf:
        raise ValueError(f"alpha must be positive and finite, got {alpha!r}")
    if devices < 1:
        raise ValueError(f"devices must be at least 1, got {devices!r}")
    shape = (labels_count, devices)
    logs = np.log(rng.standard_gamma(alpha + 1, shape)) - rng.standard_exponential(shape) / max(alpha, 1e-300)
    weights: np.ndarray = np.exp(logs - logs.max(axis=1, keepdims=True))
    shares: np.ndarray = weights / weights.sum(axis=1, keepdims=True)
    return shares


def dirichlet(labels: np.ndarray, shares: np.ndarray, rng: np.random.Generator) -> list[np.ndarray]:
    """Equal-size shards with skewed labels.

    Each label is dealt to the devices by one multinomial draw from its row of shares; the samples, device
    after device and label after label within a device, are cut again into parts that are equal within one.

    Source: the split of CoCoFL and SLT (Pfeiffer et al., 2023). Departs from the usual Dirichlet split
    (`unequal`), whose devices differ in size: here neighbouring devices may share a label instead.

    Args:
        labels: Label of every sample, integers [samples] in [0, labels).
        shares: Share of every label per device, [labels, devices], as from `proportions`.
        rng: Source of the draws.

    Returns:
        Sample indices per device, int64 [samples of the device].

    Raises:
        ValueError: A label has no row in `shares`.
    """
    owners = _owners(labels, _multinomial(labels, shares, rng), rng)
    return _cut(np.lexsort((labels, owners)), shares.shape[1])


def matching(labels: np.ndarray, counts: np.ndarray, rng: np.random.Generator) -> list[np.ndarray]:
    """Equal-size shards whose mixes of labels follow those of other shards of equal size.

    Each label is dealt in proportion to `counts`, rounded at random to within one sample, and the result is
    cut as in `dirichlet`. A second `dirichlet` with the same shares would not do: the noise of its
    multinomial draws adds up from device to device and moves the cuts by a good part of a shard, to a
    neighbour's labels.

    Args:
        labels: Label of every sample, integers [samples] in [0, labels).
        counts: Samples of every label in each of the other shards, [labels, devices]; a row of zeros is dealt
            evenly.
        rng: Source of the rounding, and of the order within a label.

    Returns:
        Sample indices per device, int64 [samples of the device].

    Raises:
        ValueError: A label has no row in `counts`.
    """
    weights = np.where(counts.sum(axis=1, keepdims=True) > 0, counts, 1)
    owners = _owners(labels, _rounded(weights, _sizes(labels, len(counts)), rng), rng)
    return _cut(np.lexsort((labels, owners)), counts.shape[1])


def following(labels: np.ndarray, counts: np.ndarray, rng: np.random.Generator) -> list[np.ndarray]:
    """Shards whose mixes of labels, and whose sizes, follow those of other shards.

    Sizes are equal within one where the others are, else in proportion to them, by largest remainder. `counts` are
    scaled to the labels there are here and to these sizes (`balanced`) and rounded, so that each device gets
    labels of its own even where it gets few samples, or where labels are not as frequent as in the other shards:
    `matching` then gives it many of its neighbour's.

    Args:
        labels: Label of every sample, integers [samples] in [0, labels).
        counts: Samples of every label in each of the other shards, [labels, devices].
        rng: Source of the order of equals in rounding, and of who gets which sample of a label.

    Returns:
        Sample indices per device, int64 [samples of the device].

    Raises:
        ValueError: A label has no row in `counts`.
    """
    rows, others = _sizes(labels, len(counts)), counts.sum(axis=0)
    sizes = in_proportion(len(labels), others if np.ptp(others) > 1 else np.ones_like(others))
    owners = _owners(labels, _whole(balanced(counts, rows, sizes), rows, sizes, rng), rng)
    return _by_owner(labels, owners, len(sizes))


def in_proportion(count: int, weights: np.ndarray) -> np.ndarray:
    """`count` in parts in proportion to `weights`, by largest remainder, of equals the first; int64 [parts]."""
    exact = count * weights / max(1, weights.sum())
    parts: np.ndarray = np.floor(exact).astype(np.int64)
    parts[np.argsort(parts - exact, kind="stable")[: count - parts.sum()]] += 1
    return parts


def balanced(counts: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """`counts` scaled by row and by column to given sums: nearly reached, and not exceeded.

    Iterative proportional fitting (Deming and Stephan, 1940), of `counts` plus a millionth, so that there is a
    solution whatever is zero. It stops when all columns are within half a sample, or after 100 rounds.

    Args:
        counts: Non-negative, [rows, columns].
        rows: Wanted sums of the rows, [rows]; nothing counts as a millionth.
        columns: Wanted sums of the columns, [columns], of the same total; nothing counts as a millionth.

    Returns:
        float64 [rows, columns].
    """
    table: np.ndarray = counts + 1e-6
    rows, columns = np.maximum(rows, 1e-6), np.maximum(columns, 1e-6)
    for _ in range(100):
        table *= (rows / table.sum(axis=1))[:, None]
        sums = table.sum(axis=0)
        if np.abs(sums - columns).max() < 0.5:
            break
        table *= columns / sums
    table *= (rows / table.sum(axis=1))[:, None]
    table *= np.minimum(1, columns / table.sum(axis=0))
    return table


def unequal(labels: np.ndarray, shares: np.ndarray, rng: np.random.Generator) -> list[np.ndarray]:
    """Each label dealt to the devices by its shares, so that the devices differ in labels and in size.

    With one label for all samples this is a skew of the sizes alone ("quantity").

    Source: Yurochkin et al. (2019); Li et al. (2022). Departs from them in rounding at random rather than down,
    and in drawing no second time where a device has too little: see `at_least`.

    Args:
        labels: Label of every sample, integers [samples] in [0, labels).
        shares: Share of every label per device, [labels, devices], as from `proportions`.
        rng: Source of the rounding, and of who gets which sample of a label.

    Returns:
        Sample indices per device, int64 [samples of the device]; some may be empty.

    Raises:
        ValueError: A label has no row in `shares`.
    """
    owners = _owners(labels, _rounded(shares, _sizes(labels, len(shares)), rng), rng)
    return _by_owner(labels, owners, shares.shape[1])


def shards(labels: np.ndarray, devices: int, per_device: int, rng: np.random.Generator) -> list[np.ndarray]:
    """Few labels per device: the samples by label, cut into shards of equal size, of which a device gets some.

    Source: McMahan et al. (2017), with 2 shards per device.

    Args:
        labels: Label of every sample, integers [samples].
        devices: Number of devices, at least 1.
        per_device: Shards of each device, at least 1; a device has no more labels than this, plus one for each
            of its shards that ends one label and begins another.
        rng: Source of the order within a label, and of who gets which shard.

    Returns:
        Sample indices per device, int64 [samples of the device]; sizes differ by at most `per_device`.

    Raises:
        ValueError: There is no device or no shard.
    """
    order = rng.permutation(len(labels))
    cut = _cut(order[np.argsort(labels[order], kind="stable")], devices * per_device)
    return [np.concatenate([cut[shard] for shard in own]) for own in _cut(rng.permutation(len(cut)), devices)]


def natural(users: Sequence[str], names: Sequence[str]) -> list[np.ndarray]:
    """The samples of each of the users `names`; those of others go to nobody.

    Args:
        users: Whose each sample is, [samples].
        names: Users that are devices, each once.

    Returns:
        Sample indices per name, int64 [samples of the user], in their order; empty for one who has none.
    """
    rows: dict[str, list[int]] = {name: [] for name in names}
    for row, user in enumerate(users):
        if user in rows:
            rows[user].append(row)
    return [np.array(own, np.int64) for own in rows.values()]


def at_least(parts: Sequence[np.ndarray], least: int, rng: np.random.Generator) -> list[np.ndarray]:
    """Parts of at least `least` samples.

    Part after part, one that has fewer takes samples, each drawn from the part that is then the largest, of equals the
    first. What is taken from falls no lower than `least`.

    Args:
        parts: Sample indices per device.
        least: Samples that every device shall have.
        rng: Source of which samples move.

    Returns:
        Sample indices per device, int64 [samples of the device].

    Raises:
        ValueError: There are too few samples.
    """
    if sum(map(len, parts)) < least * len(parts):
        raise ValueError(f"{sum(map(len, parts))} samples are too few for {len(parts)} parts of at least {least}")
    dealt = [part.tolist() for part in parts]
    largest = [(-len(part), place) for place, part in enumerate(dealt)]
    heapq.heapify(largest)
    for part in dealt:
        while len(part) < least:
            size, place = largest[0]
            part.append(dealt[place].pop(rng.integers(-size)))
            heapq.heapreplace(largest, (size + 1, place))
    return [np.array(part, np.int64) for part in dealt]


def mixes(labels: np.ndarray, parts: Sequence[np.ndarray], labels_count: int) -> np.ndarray:
    """Samples of each label in each part, int64 [parts, labels_count]."""
    return np.array([np.bincount(labels[part], minlength=labels_count) for part in parts], np.int64)


def resource_correlated(
    labels: np.ndarray, groups: Sequence[int], shares: np.ndarray, rng: np.random.Generator
) -> list[np.ndarray]:
    """Labels that depend on the resources of a device: weak devices hold what nobody else has.

    Each label is dealt to the resource groups by one multinomial draw from its row of shares; within a group
    the samples are permuted and cut into parts that are equal within one. A group without devices gets
    nothing: its share goes to the others in proportion to theirs, or, where they have none, to the number of
    their devices.

    Source: the rc-non-iid split of CoCoFL (Pfeiffer et al., 2023).

    Args:
        labels: Label of every sample, integers [samples] in [0, labels).
        groups: Resource group of every device, [devices] in [0, groups).
        shares: Share of every label per group, [labels, groups], as from `proportions`.
        rng: Source of the draws.

    Returns:
        Sample indices per device, int64 [samples of the device], in the order of `groups`.

    Raises:
        ValueError: A label has no row or a device's group no column in `shares`, or there is no device.
    """
    members = np.asarray(groups, np.int64)
    if len(members) == 0:
        raise ValueError("there is no device to take the samples")
    if members.min() < 0 or members.max() >= shares.shape[1]:
        raise ValueError(f"groups must be in [0, {shares.shape[1]}), got {members.min()} to {members.max()}")
    staffed = _staffed(shares, np.bincount(members, minlength=shares.shape[1]))
    owners = _owners(labels, _multinomial(labels, staffed, rng), rng)
    parts = [np.empty(0, np.int64)] * len(members)
    for group in np.unique(members):
        devices = np.flatnonzero(members == group)
        cut = _cut(rng.permutation(np.flatnonzero(owners == group)), len(devices))
        for device, part in zip(devices, cut, strict=True):
            parts[device] = part
    return parts


def _staffed(shares: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Shares [labels, groups] with nothing for a group without devices; `sizes` in devices, [groups]."""
    kept = shares * (sizes > 0)
    total = kept.sum(axis=1, keepdims=True)
    return np.where(total > 0, kept / np.where(total > 0, total, 1), sizes / sizes.sum())


def _sizes(labels: np.ndarray, rows: int) -> np.ndarray:
    """Samples of each label, int64 [rows]."""
    if len(labels) and not 0 <= labels.min() <= labels.max() < rows:
        raise ValueError(f"labels must be in [0, {rows}), got {labels.min()} to {labels.max()}")
    return np.bincount(labels, minlength=rows)


def _multinomial(labels: np.ndarray, shares: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Samples of each label that each column of `shares` gets, int64 [labels, columns]."""
    return rng.multinomial(_sizes(labels, len(shares)), shares)


def _rounded(weights: np.ndarray, sizes: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Samples of each label, [labels] `sizes`, in proportion to its row of `weights`, rounded at random to within one.

    int64 [labels, columns].
    """
    ends = np.cumsum(weights, axis=1) / weights.sum(axis=1, keepdims=True)
    cuts = np.minimum(np.floor(ends * sizes[:, None] + rng.random((len(sizes), 1))), sizes[:, None])
    cuts[:, -1] = sizes  # whatever the last bits of `ends` are
    counts: np.ndarray = np.diff(cuts.astype(np.int64), axis=1, prepend=0)
    return counts


def _whole(table: np.ndarray, rows: np.ndarray, columns: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Whole numbers near `table` whose rows and columns have the sums `rows` and `columns`, int64 [rows, columns].

    Rounded down, then up where the remainder is largest and both sums have room; what is left goes anywhere.
    """
    counts: np.ndarray = np.floor(table).astype(np.int64)
    short, room = (rows - counts.sum(axis=1)).tolist(), (columns - counts.sum(axis=0)).tolist()
    rest = table - counts
    places = rng.permutation(np.flatnonzero(rest > 1e-3))
    places = places[np.argsort(-rest.ravel()[places], kind="stable")]
    for row, column in zip(*(each.tolist() for each in np.unravel_index(places, table.shape)), strict=True):
        if short[row] and room[column]:
            counts[row, column] += 1
            short[row], room[column] = short[row] - 1, room[column] - 1
    np.add.at(counts, (np.repeat(np.arange(len(short)), short), np.repeat(np.arange(len(room)), room)), 1)
    return counts


def _owners(labels: np.ndarray, counts: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Column that owns each sample, int64 [samples]; at random, but `counts` [labels, columns] hold."""
    order = rng.permutation(len(labels))
    order = order[np.argsort(labels[order], kind="stable")]  # label by label, shuffled within a label
    owners = np.empty(len(labels), np.int64)
    owners[order] = np.repeat(np.tile(np.arange(counts.shape[1]), len(counts)), counts.ravel())
    return owners


def _by_owner(labels: np.ndarray, owners: np.ndarray, parts: int) -> list[np.ndarray]:
    """Sample indices of each owner, label by label."""
    order: np.ndarray = np.lexsort((labels, owners))
    dealt: list[np.ndarray] = np.split(order, np.cumsum(np.bincount(owners, minlength=parts))[:-1])
    return dealt


def _cut(order: np.ndarray, parts: int) -> list[np.ndarray]:
    """`order` in consecutive parts, sizes equal within one, longer ones first."""
    if parts < 1:
        raise ValueError(f"devices must be at least 1, got {parts!r}")
    return np.array_split(order, parts)
