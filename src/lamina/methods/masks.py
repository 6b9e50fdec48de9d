"""PerFedMask: which device trains which blocks is settled once, for all devices together."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch

from lamina import model
from lamina.job import MOST_EPOCHS, Local, Turn
from lamina.layout import Params
from lamina.methods.base import Method
from lamina.plan import Plan
from lamina.spec import Spec

if TYPE_CHECKING:
    from lamina.planner import Fleet


@dataclass(frozen=True)
class PerFedMask(Method):
    """Each device trains blocks of its own, the same in all rounds, chosen for all devices together before the first.

    With m_ck whether device c trains block k of l blocks, all of one size, and K_ck = m_ck / sum_c m_ck, the masks
    minimise
        sum_c [ l max_k K_ck - sum_k K_ck + e_c ],    e_c = M_c - sum_k m_ck,    M_c: the most blocks that c can train,
    so that no device has a large share in some blocks and a small one in others. A block then becomes the mean over the
    devices that train it, by examples.

    **Source:** Setayesh, Li and Wong, ICLR 2023 (PerFedMask); the objective as in the authors' code.
    **Departs:** the paper relaxes the masks and solves one convex programme after another with a commercial solver,
    from the best of 1000 random masks or the first blocks that fit. Here the best random masks and the last blocks that
    fit each device, which are the cheapest, are improved, of devices that are alike and of one after another, as long
    as that helps: some seconds for a hundred devices; the optimum is not certain. A device can train what fits its
    budgets, where the paper gives it a fraction of the parameters wherever they are. The objective favours that devices
    train the same blocks, and as many as fit: under memory budgets, and in fleets of devices that are all alike, masks
    come out much like the plans of `caff`, and a block that only few could train may be trained by none. The embeddings
    never train. Personalisation is off by default, so that one network is evaluated, as with the other methods; the
    paper's is `personal_epochs = 5`.

    Attributes:
        starts: Masks, all but the first at random, from which the search goes on.
        train_head: Whether all devices also train the final norm and the head; not so in the paper. A new head for the
            classes of a task otherwise stays as it was drawn, and the blocks learn to suit it.
        personal_epochs: Passes over its own examples that each device makes after the last round, training the whole
            network for itself by SGD with momentum 0.9 and weight decay 5e-4, as in the paper.
        personal_lr: Learning rate of that. The default is the last one of the authors' schedule.
    """

    starts: int = 1000
    train_head: bool = False
    personal_epochs: int = 0
    personal_lr: float = 1e-3

    group: ClassVar[str] = "blocks"
    source: ClassVar[str] = "Setayesh et al. 2023"
    for_fleet: ClassVar[bool] = True
    cuts: ClassVar[str] = "training of some blocks, others for each device"
    note: ClassVar[str] = (
        "Activations are kept from the lowest trained block upward, so a mask with a low block saves little. "
        "Personalisation, if asked for, trains everything and breaks the budget."
    )

    def __post_init__(self) -> None:
        """Refuse settings that mean nothing.

        Raises:
            ValueError: Naming the key, what was given and what is accepted.
        """
        super().__post_init__()
        if self.starts < 1:
            raise ValueError(f"starts must be at least 1, got {self.starts}")
        if not 0 <= self.personal_epochs <= MOST_EPOCHS:
            raise ValueError(f"personal_epochs must be from 0 to {MOST_EPOCHS}, got {self.personal_epochs}")
        if not self.personal_lr > 0:
            raise ValueError(f"personal_lr must be above 0, got {self.personal_lr}")

    def prepare(self, spec: Spec, params: Params, fleet: Fleet, turn: Turn) -> Params:
        """The masks, bool [devices, blocks]; nothing for devices that fit no block."""

        def of_class(index: int) -> list[int]:
            return most_blocks(spec.blocks, lambda blocks: fleet.fits(index, self._plan(spec, blocks)))

        limits = np.array([of_class(index) for index in range(len(fleet.plans))])[list(fleet.class_of)]
        able = limits.any(1)
        masks = np.zeros(limits.shape, dtype=bool)
        masks[able] = search(limits[able], turn.rng("masks"), self.starts)
        return {"masks": torch.from_numpy(masks)}

    def plans(self, spec: Spec, turn: Turn, memory: Params) -> Iterator[Plan]:
        """The blocks of the device's mask, and, should that not fit after all, fewer of them, the lowest let go first.

        Before there are masks, as many blocks as fit stand for them: the last ones, which are the cheapest.
        """
        blocks = list(range(spec.blocks))
        if memory and turn.device >= 0:
            blocks = memory["masks"][turn.device].nonzero().flatten().tolist()
        for first in range(len(blocks)):
            yield self._plan(spec, blocks[first:], known=bool(memory))

    def _plan(self, spec: Spec, blocks: Iterable[int], known: bool = True) -> Plan:
        layout, chosen = model.layout(spec), set(blocks)
        names = frozenset(name for name, row in layout.params.items() if row.block in chosen)
        trains = names | layout.tail(0) if self.train_head else names
        which = ", ".join(map(str, sorted(chosen))) if known else f"up to {len(chosen)}"
        return Plan(frozenset(layout.params), trains, label=f"{which} of {layout.blocks}")

    def personal(self, local: Local) -> Local | None:
        """By SGD with momentum, if at all."""
        if not self.personal_epochs:
            return None
        return Local(
            lr=self.personal_lr,
            optimizer="sgd",
            momentum=0.9,
            weight_decay=5e-4,
            batch_size=local.batch_size,
            epochs=self.personal_epochs,
        )


def most_blocks(blocks: int, fits: Callable[[Iterable[int]], bool]) -> list[int]:
    """For every block, how many a device can train if it is the lowest of them, wherever the others are.

    A price depends on the lowest trained block and on how many there are, and little on where the others are: the
    dearest have them right above the lowest, or at the very top. Both are asked for, and, as a block lower down never
    makes room, for one more than at the block above at most: about four questions a block.
    """
    found = [0] * (blocks + 1)
    for lowest in reversed(range(blocks)):
        count = found[lowest + 1] + 1
        while count and not (
            fits(range(lowest, lowest + count)) and fits({lowest, *range(blocks - count + 1, blocks)})
        ):
            count -= 1
        found[lowest] = count
    return found[:-1]


def objective(masks: np.ndarray, limits: np.ndarray) -> np.ndarray:
    """What masks, bool [..., devices, blocks], are to minimise, [...]; `limits` as in `search`. See `PerFedMask`."""
    shares = masks / np.maximum(masks.sum(-2, keepdims=True), 1)
    of_devices = masks.shape[-1] * shares.max(-1) - shares.sum(-1) + limits.max(-1) - masks.sum(-1)
    return np.asarray(of_devices.sum(-1))


def search(limits: np.ndarray, rng: np.random.Generator, starts: int) -> np.ndarray:
    """Masks with a low objective, bool [devices, blocks], each with at least one block.

    Args:
        limits: How many blocks each device can train if this one is the lowest, [devices, blocks].
        rng: Draws the starts, and changes to try.
        starts: Number of them: the last blocks of every device, then random ones that nothing can be added to. The
            first and the best of the others are improved.
    """
    devices, blocks = limits.shape
    last = np.tile(np.arange(blocks)[::-1], (devices, 1))
    orders = [last, *(rng.random(limits.shape).argsort(1) for _ in range(starts - 1))]
    first, *others = (_filled(limits, order) for order in orders)
    begun = [first, min(others, key=lambda masks: float(objective(masks, limits)), default=first)]
    improved = [_improved(masks, limits, rng) for masks in begun]
    return min(improved, key=lambda masks: float(objective(masks, limits)))


def _filled(limits: np.ndarray, orders: np.ndarray) -> np.ndarray:
    """Of every device the blocks in its order, those left out that do not fit beside the ones before."""
    devices, blocks = limits.shape
    masks, rows = np.zeros(limits.shape, dtype=bool), np.arange(devices)
    lowest, count = np.full(devices, blocks), np.zeros(devices, dtype=int)
    for block in orders.T:
        lower = np.minimum(lowest, block)
        taken = count < limits[rows, lower]
        masks[rows[taken], block[taken]] = True
        lowest, count = np.where(taken, lower, lowest), count + taken
    return masks


def _improved(masks: np.ndarray, limits: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The best change of all devices that are alike, and of one device after another, as long as any helps."""
    value, before = float(objective(masks, limits)), np.inf
    while value < before:
        before = value
        kinds = np.unique(np.hstack([masks, limits]), axis=0, return_inverse=True)[1].reshape(-1)
        alike = [np.flatnonzero(kinds == kind) for kind in range(kinds.max() + 1)]
        for devices in [*alike, *np.arange(len(masks))[:, None]]:
            changed = _changes(masks[devices[0]], limits[devices[0]], rng)
            tried = np.repeat(masks[None], len(changed), 0)
            tried[:, devices] = changed[:, None]
            reached = objective(tried, limits)
            if reached.min() < value - 1e-9:  # rounding is no progress
                masks, value = tried[reached.argmin()], float(reached.min())
    return masks


def _changes(mask: np.ndarray, limit: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Masks that fit: with a block more, or less, or another one instead; and for each block a random one with it."""
    blocks = len(mask)
    held, free = np.flatnonzero(mask).tolist(), np.flatnonzero(~mask).tolist()
    flips = [[i] for i in range(blocks)] + [[i, j] for i in held for j in free]
    near = np.tile(mask, (len(flips), 1))
    for row, flip in zip(near, flips, strict=True):
        row[flip] ^= True
    fits = near.any(1) & (near.sum(1) <= limit[near.argmax(1)])
    keys = rng.random((blocks, blocks)) - np.eye(blocks)
    return np.concatenate([near[fits], _filled(np.tile(limit, (blocks, 1)), keys.argsort(1))])
