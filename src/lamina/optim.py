"""Optimizers of a local round: torch's where it has them, and two that keep less.

All are built anew in every round, since devices are stateless, and one per group of tensors, so that a group can be
updated as soon as its gradient is complete.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.optim.optimizer import ParamsT

    from lamina.job import Local

Kind = Literal["sgd", "momentum", "adamw", "adamw8", "adafactor"]

_CODED = 4096
"""Tensors with fewer elements keep fp32 states under "adamw8", as in Dettmers et al. 2022, section 3."""
_GROUP = 256
"""Elements that share a scale."""
_STRETCH = 2**14
"""Elements that are decoded at a time."""


def build(rated: Mapping[float, Sequence[Tensor]], local: Local, kind: Kind) -> torch.optim.Optimizer:
    """An optimizer of `kind` over tensors by their learning rates, with the other settings of `local`."""
    params = [{"params": list(those), "lr": rate} for rate, those in rated.items()]
    match kind:
        case "sgd" | "momentum":
            return torch.optim.SGD(params, momentum=local.momentum, weight_decay=local.weight_decay, fused=True)
        case "adamw":
            return torch.optim.AdamW(params, weight_decay=local.weight_decay, fused=True)
        case "adamw8":
            return AdamW8(params, local.lr, local.weight_decay)
        case "adafactor":
            return Adafactor(params, local.lr, local.weight_decay)


def state_bytes(kind: Kind, shape: Sequence[int]) -> int:
    """What an optimizer keeps for a tensor of this shape."""
    numel = math.prod(shape)
    match kind:
        case "sgd":
            return 0
        case "momentum":
            return 4 * numel
        case "adamw":
            return 8 * numel + 4  # and the number of steps, as a tensor
        case "adamw8" if numel >= _CODED:
            groups = -(-numel // _GROUP)
            return 2 * _GROUP * groups + 8 * groups
        case "adamw8":
            return 8 * numel
        case "adafactor" if len(shape) > 1:
            return 4 * (numel // shape[-1] + shape[-1])
        case "adafactor":
            return 4 * numel


def scratch_bytes(kind: Kind, shape: Sequence[int]) -> int:
    """What an optimizer needs besides while it updates a tensor of this shape."""
    numel = math.prod(shape)
    match kind:
        case "adamw8" if numel >= _CODED:
            return 3 * 4 * min(_STRETCH, _GROUP * -(-numel // _GROUP))
        case "adafactor" if len(shape) > 1:
            return 4 * max(numel // shape[-1] + 1, shape[-1])  # of rows and their mean, or of columns
        case "adamw8" | "adafactor":
            return 4 * numel
        case _:
            return 0


class _TensorByTensor(torch.optim.Optimizer):
    """Decoupled weight decay, then `_update` for each tensor that has a gradient."""

    def __init__(self, params: ParamsT, lr: float, weight_decay: float) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})
        self._steps = 0

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update all tensors; may spoil the gradients."""
        self._steps += 1
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    self._update(p, p.grad, group["lr"])

    def _update(self, p: Tensor, gradient: Tensor, lr: float) -> None:
        raise NotImplementedError


class AdamW8(_TensorByTensor):
    """AdamW (Loshchilov and Hutter 2019) with both moments in 8 bits and a scale per 256 elements.

    **Source:** block-wise quantised states, Dettmers et al., ICLR 2022, section 2.
    **Departs:** instead of a dynamic tree, codes are powers: m ~ sign(c) (c / 127)^2 and v ~ (c / 255)^4 times the
    largest of the block; the code of v is at least 1, so that no step is divided by a v that was rounded to nothing.
    Betas are 0.9 and 0.999, epsilon 1e-8.
    """

    def _update(self, p: Tensor, gradient: Tensor, lr: float) -> None:
        state, coded = self.state[p], p.numel() >= _CODED
        if not state:
            groups = -(-p.numel() // _GROUP)
            if coded:
                state["m"] = torch.zeros(groups, _GROUP, dtype=torch.int8, device=p.device)
                state["v"] = torch.zeros(groups, _GROUP, dtype=torch.uint8, device=p.device)
                state["m_scale"], state["v_scale"] = gradient.new_zeros(groups, 1), gradient.new_zeros(groups, 1)
            else:
                state["m"], state["v"] = gradient.new_zeros(p.numel()), gradient.new_zeros(p.numel())
        flat, gradient = p.view(-1), gradient.reshape(-1)
        if not coded:
            self._move(flat, gradient, state["m"], state["v"], lr)
            return
        for start in range(0, p.numel(), _STRETCH):
            part = slice(start, min(start + _STRETCH, p.numel()))
            rows = slice(start // _GROUP, -(-part.stop // _GROUP))
            m = _decode(state["m"][rows], state["m_scale"][rows], 127, 2)
            v = _decode(state["v"][rows], state["v_scale"][rows], 255, 4)
            count = part.stop - part.start
            self._move(flat[part], gradient[part], m.view(-1)[:count], v.view(-1)[:count], lr)
            _encode(m, state["m"][rows], state["m_scale"][rows], 127, 2)
            _encode(v, state["v"][rows], state["v_scale"][rows], 255, 4)
            del m, v

    def _move(self, p: Tensor, gradient: Tensor, m: Tensor, v: Tensor, lr: float) -> None:
        m.lerp_(gradient, 0.1)
        v.mul_(0.999).addcmul_(gradient, gradient, value=0.001)
        scale = v.div(1 - 0.999**self._steps).sqrt_().add_(1e-8)
        p.addcdiv_(m, scale, value=-lr / (1 - 0.9**self._steps))


def _decode(code: Tensor, scale: Tensor, top: int, power: int) -> Tensor:
    """|x| = (|code| / top)^power scale, with the sign of the code; power is 2 or 4."""
    x = code.float().div_(top)
    x = x.mul_(x.abs()) if power == 2 else x.square_().square_()
    return x.mul_(scale)


def _encode(x: Tensor, code: Tensor, scale: Tensor, top: int, power: int) -> None:
    """The inverse, into `code` and `scale`; x is spoiled."""
    torch.amax(x.abs(), -1, keepdim=True, out=scale)
    x.div_(scale.clamp(min=1e-38))
    if power == 2:
        code.copy_(torch.sgn(x).mul_(x.abs_().sqrt_()).mul_(top).round_())
    else:
        code.copy_(x.sqrt_().sqrt_().mul_(top).clamp_(min=1).round_())


class Adafactor(_TensorByTensor):
    """Second moments as an outer product of row and column means; no first moment.

    **Source:** Shazeer and Stern, ICML 2018: Algorithms 4 and 5 with update clipping at 1 (section 6) and
    beta2 = 1 - step^-0.8 (section 7.2).
    **Departs:** the step is `lr` itself, not relative to the size of the weights (section 8), so that a learning rate
    means what it means for AdamW. Unlike torch's, it needs no memory of the size of a matrix besides the gradient.
    """

    def _update(self, p: Tensor, gradient: Tensor, lr: float) -> None:
        state, fresh = self.state[p], self._steps**-0.8
        if gradient.dim() > 1:
            matrix = gradient.reshape(-1, gradient.shape[-1])
            if not state:
                state["row"], state["column"] = matrix.new_zeros(len(matrix)), matrix.new_zeros(matrix.shape[1])
            for key, dim in (("row", 1), ("column", 0)):
                # without a name for the means, which would live until the next
                state[key].lerp_(
                    torch.linalg.vector_norm(matrix, dim=dim).square_().div_(matrix.shape[dim]).add_(1e-30), fresh
                )
            matrix.mul_((state["row"] / state["row"].mean()).rsqrt_()[:, None]).mul_(state["column"].rsqrt())
        else:
            if not state:
                state["square"] = torch.zeros_like(gradient)
            state["square"].lerp_(gradient.square().add_(1e-30), fresh)
            gradient.mul_(state["square"].rsqrt())
        rms = float(torch.linalg.vector_norm(gradient)) / math.sqrt(gradient.numel())
        p.add_(gradient, alpha=-lr / max(1.0, rms))
