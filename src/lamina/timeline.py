"""Which tensor bytes are alive when: a log of births and deaths, written by a prediction or by a measurement."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import accumulate


@dataclass(eq=False)
class Storage:
    """Memory of one or more tensors. Its category may become known after its birth.

    Attributes:
        size_bytes: Of the memory.
        category: What it is for; see `lamina.cost.Memory`.
    """

    size_bytes: int
    category: str


@dataclass
class Timeline:
    """Births and deaths of storages, in order.

    Attributes:
        events: Change in bytes, the storage, and the moment: a few words on what was going on.
        moment: Of the events to come.
    """

    events: list[tuple[int, Storage, str]] = field(default_factory=list)
    moment: str = "start"

    def born(self, storage: Storage) -> None:
        """A storage came to life."""
        self.events.append((storage.size_bytes, storage, self.moment))

    def died(self, storage: Storage) -> None:
        """A storage was freed."""
        self.events.append((-storage.size_bytes, storage, self.moment))

    def peak(self) -> tuple[dict[str, int], str]:
        """Bytes by category when most were alive, and the moment."""
        alive = list(accumulate(delta for delta, _, _ in self.events))
        at = max(range(len(alive)), key=alive.__getitem__)
        totals: dict[str, int] = {}
        for delta, storage, _ in self.events[: at + 1]:
            totals[storage.category] = totals.get(storage.category, 0) + delta
        return totals, self.events[at][2]
