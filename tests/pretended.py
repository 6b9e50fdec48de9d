"""A CUDA card that is not there: tensors that say they are on it, compute on the processor, and refuse to be mixed.

Torch lets a tensor of the host meet one of a card in few places: copies, single numbers, and indices in brackets. What
is here is as strict, so that a tensor that was forgotten on the host is found without a card. Numbers are real, so
results can be compared with those of the host.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

CARD, HOST = torch.device("cuda", 0), torch.device("cpu")
_ATEN = torch.ops.aten
LAUNCHED = Counter[str]()
"""Kernels of the card, views among them, since the beginning of `pretended`."""
_COPIES = (_ATEN.copy_.default, _ATEN._to_copy.default)
_INDEXING = (_ATEN.index.Tensor, _ATEN.index_put_.default, _ATEN._index_put_impl_.default)


class OnCard(Tensor):
    """A tensor on the card, whose numbers are in `numbers`."""

    numbers: Tensor

    @staticmethod
    def __new__(cls, numbers: Tensor) -> OnCard:
        """A wrapper without memory of its own. Below Python, torch takes it for a tensor of the host."""
        make = Tensor._make_wrapper_subclass
        made: OnCard = make(cls, numbers.shape, numbers.stride(), numbers.storage_offset(), dtype=numbers.dtype)
        made.numbers = numbers
        return made

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        """For error messages."""
        return f"OnCard({self.numbers})"

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]
    device, is_cuda = CARD, True

    def numpy(self, **_: Any) -> Any:
        """As torch says it."""
        raise TypeError("can't convert cuda:0 device type tensor to numpy")

    def tolist(self) -> Any:
        """Its numbers."""
        return self.numbers.tolist()

    def cpu(self, **_: Any) -> Tensor:  # type: ignore[override]
        """A copy on the host."""
        return self.numbers.clone()

    def to(self, *args: Any, **kwargs: Any) -> Tensor:
        """The same tensor, another type of it, or a copy on the host."""
        if HOST in args:
            return self.cpu()
        return self if args == (CARD,) else super().to(*args, **kwargs)

    @property
    def data(self) -> Tensor:
        """Without a graph."""
        return self.detach()

    @data.setter
    def data(self, value: Tensor) -> None:
        Tensor.data.__set__(self, value)  # type: ignore[attr-defined]
        self.numbers = _plain(value)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        """A kernel."""
        return _computed(func, args, kwargs or {})


def _computed(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """A kernel of the card: all tensors that it is given must be there, and what it makes is there."""
    given = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
    meets = given[:1] if func in _INDEXING else [] if func in _COPIES else given
    takes_numbers = torch.Tag.pointwise in func.tags
    strays = [p for p in meets if not isinstance(p, OnCard) and not (takes_numbers and p.dim() == 0)]
    if strays:
        raise RuntimeError(f"{func}: expected all tensors to be on the same device, but not {strays}")
    if kwargs.get("device"):
        kwargs = kwargs | {"device": HOST}
    LAUNCHED[str(func)] += 1
    known = {id(_plain(each)): each for each in given}
    found = func(*tree_map(_plain, args), **tree_map(_plain, kwargs))

    def wrapped(each: Any) -> Any:
        return known[id(each)] if id(each) in known else OnCard(each) if isinstance(each, Tensor) else each

    return tree_map(wrapped, found)


def _plain(each: Any) -> Any:
    return each.numbers if isinstance(each, OnCard) else each


class Card(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While it is there, tensors can be made on it and sent to it, in this thread."""

    _mode_key = torch._C._TorchDispatchModeKey.FAKE  # torch then does not look for a driver

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        """A kernel, of the card or of the host."""
        kwargs = kwargs or {}
        if kwargs.get("device") == CARD or any(isinstance(each, OnCard) for each in tree_leaves((args, kwargs))):
            return _computed(func, args, kwargs)
        return func(*args, **kwargs)


@contextmanager
def pretended() -> Iterator[None]:
    """A machine with one card, in all threads that are begun meanwhile."""
    submit = ThreadPoolExecutor.submit

    def submitted(pool: ThreadPoolExecutor, call: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        def called() -> Any:
            with Card():  # type: ignore[no-untyped-call]
                return call(*args, **kwargs)

        return submit(pool, called)

    with pytest.MonkeyPatch.context() as patch, Card():  # type: ignore[no-untyped-call]
        LAUNCHED.clear()
        patch.setattr(ThreadPoolExecutor, "submit", submitted)
        patch.setattr(torch.cuda, "is_available", lambda: True)
        patch.setattr(torch.cuda, "device_count", lambda: 1)
        patch.setattr(torch.cuda, "get_device_name", lambda device: "pretended")
        yield
