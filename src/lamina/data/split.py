"""Who gets which sample: pure functions from labels to one index array per device.

Every function hands out each sample exactly once and depends only on its arguments and the generator. A
sample's label is whatever makes devices differ: a class, or the role that speaks.
"""

from __future__ import annotations

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

    Source: the split of CoCoFL and SLT (Pfeiffer et al., 2023). Departs from the usual Dirichlet split (Hsu,
    Qi and Brown, 2019), whose devices differ in size: here neighbouring devices may share a label instead.

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
    ends = np.cumsum(weights, axis=1) / weights.sum(axis=1, keepdims=True)
    sizes = _sizes(labels, len(counts))[:, None]
    cuts = np.minimum(np.floor(ends * sizes + rng.random((len(counts), 1))), sizes).astype(np.int64)
    owners = _owners(labels, np.diff(cuts, axis=1, prepend=0), rng)
    return _cut(np.lexsort((labels, owners)), counts.shape[1])


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


def _owners(labels: np.ndarray, counts: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Column that owns each sample, int64 [samples]; at random, but `counts` [labels, columns] hold."""
    order = rng.permutation(len(labels))
    order = order[np.argsort(labels[order], kind="stable")]  # label by label, shuffled within a label
    owners = np.empty(len(labels), np.int64)
    owners[order] = np.repeat(np.tile(np.arange(counts.shape[1]), len(counts)), counts.ravel())
    return owners


def _cut(order: np.ndarray, parts: int) -> list[np.ndarray]:
    """`order` in consecutive parts, sizes equal within one, longer ones first."""
    if parts < 1:
        raise ValueError(f"devices must be at least 1, got {parts!r}")
    return np.array_split(order, parts)
