"""The kernels of a stack on a card, where launches cost more than memory: one for all devices instead of one for each.

Shape legend: as in `lamina.stack`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from lamina.kernels import Mix
from lamina.ops import HOST, Ops
from lamina.spec import Act
from lamina.stack import HIDDEN, Stack, Stacked


def stacked(dtype: torch.dtype, device: torch.device) -> Stacked:
    """The kernels for stacks of devices that are computed there."""
    return Stacked(dtype, device) if device == HOST else Batched(dtype, device)


class Batched(Stacked):
    """What `Stacked` does device by device, to stay near a processor, for all devices at once."""

    def embed(
        self, ids: Tensor, tokens: Tensor, positions: Tensor | None, types: Tensor | None = None, first: int = 0
    ) -> Tensor:
        """From the tables of all devices, one after another."""
        given = [each for each in (tokens, positions, types) if each is not None]
        if not any(isinstance(each, Stack) for each in given):
            return super().embed(ids, tokens, positions, types, first)
        tables, length = self._all(tokens), ids.shape[1]
        starts = torch.arange(self.devices, device=ids.device)[:, None, None] * tables.shape[1]
        found = F.embedding(ids.view(self.devices, -1, length) + starts, tables.flatten(0, 1))
        if positions is not None:
            found = found + self._all(positions)[:, None, first : first + length]
        if types is not None:
            found = found + self._all(types)[:, None, :1]
        return found.flatten(0, 1)

    def norm(self, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        """Layer norm over the last dimension."""
        if not isinstance(weight, Stack) and not isinstance(bias, Stack):
            return super().norm(x, weight, bias, eps)
        normed = self._by_device(F.layer_norm(x, x.shape[-1:], eps=eps))
        return torch.addcmul(self._all(bias)[:, None], normed, self._all(weight)[:, None]).view(x.shape)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """RMS norm over the last dimension."""
        if not isinstance(weight, Stack):
            return super().rms_norm(x, weight, eps)
        return self.multiply(F.rms_norm(x.float(), x.shape[-1:], eps=eps), cast(Tensor, weight))

    def act(self, x: Tensor, kind: Act) -> Tensor:
        """An activation, in one kernel of torch."""
        return Ops.act(self, x, kind)

    def head_loss(
        self,
        xs_BSD: Sequence[Tensor],
        weights_VD: Sequence[Tensor],
        biases_V: Sequence[Tensor | None],
        targets_BS: Tensor,
        mix: Mix,
        labels_V: Tensor | None,
        chunked: bool,
    ) -> Tensor:
        """Mean loss per token of each device, [G]."""
        if len(xs_BSD) > 1 or labels_V is not None:
            return super().head_loss(xs_BSD, weights_VD, biases_V, targets_BS, mix, labels_V, chunked)
        logits = self.linear(xs_BSD[0], weights_VD[0], biases_V[0]).float().flatten(0, 1)
        losses = F.cross_entropy(logits, targets_BS.flatten(), ignore_index=HIDDEN, reduction="none")
        counted = (targets_BS != HIDDEN).view(self.devices, -1)
        return losses.view(self.devices, -1).sum(1) / counted.sum(1)
