"""Kernels on several devices at once: tensors of which each device has its own are stacked along a leading axis.

A `Stack` stands where a network has a tensor; its shape is that of one device's. What no device trains and all have
alike stays a plain tensor, through which the sequences of all devices run as one batch. Activations need no stack: the
sequences of the devices lie one after another in the batch, as many of each.

Shape legend: as in `lamina.model`, and G devices, N tokens or sequences of one device, I inputs, O outputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd import Function

from lamina import products
from lamina.kernels import Mix
from lamina.ops import HOST, Ops
from lamina.packed import unpacked
from lamina.spec import Act

_ALONE = 2_000_000
"""Multiplications of a device from which on its product is worth a call of its own where oneDNN is the faster."""
_LOGITS = 2**20
"""Logits that exist at a time."""
_TINY = 1e-30
"""Probabilities above it have exact enough logarithms in fp32."""
_GELU, _CUBE = 2 * math.sqrt(2 / math.pi), 0.044715
HIDDEN = -1
"""Target of what does not count: rows that make up the batch of a device which has fewer than others."""


@dataclass(frozen=True, eq=False, slots=True)
class Stack:
    """Tensors of several devices, [G, ...], with as much of one tensor's interface as the model uses."""

    value: Tensor

    @property
    def shape(self) -> Sequence[int]:
        """Sizes of one device's."""
        return self.value.shape[1:]

    def numel(self) -> int:
        """Number of elements of one device's."""
        return self.value[0].numel()

    def reshape(self, *shape: int) -> Stack:
        """Each reshaped."""
        return Stack(self.value.reshape(len(self.value), *shape))

    def flatten(self, start: int, end: int = -1) -> Stack:
        """Each flattened."""
        return Stack(self.value.flatten(start + 1, end + 1 if end >= 0 else end))

    def detach(self) -> Stack:
        """Without a graph."""
        return Stack(self.value.detach())


class Stacked(Ops):
    """The kernels, on plain tensors and stacks alike."""

    def __init__(self, dtype: torch.dtype = torch.float32, device: torch.device = HOST) -> None:
        """Multiply matrices in `dtype`; the residual stream, norms, losses and what trains are fp32."""
        super().__init__(device)
        self._dtype = dtype
        self.aim(1)

    def aim(self, devices: int) -> None:
        """From here on, the sequences of so many devices make up a batch; what was seen before, and its graph, goes."""
        self.devices, self._seen = devices, (torch.empty(0), torch.empty(0))

    def hold(self, arrays: Mapping[str, Tensor], name: str, bits: int) -> Tensor:
        """A frozen tensor with the values that fewer bits leave it, unpacked once: nobody is there to save memory."""
        return unpacked(super().hold(arrays, name, bits))

    def embed(
        self, ids: Tensor, tokens: Tensor, positions: Tensor | None, types: Tensor | None = None, first: int = 0
    ) -> Tensor:
        """From the tables of each device."""
        plain = super().embed

        def kernel(ids: Tensor, tokens: Tensor, positions: Tensor | None, types: Tensor | None) -> Tensor:
            return plain(ids, tokens, positions, types, first)

        return self._each(kernel, [ids], (tokens, positions, types))

    def patches(
        self,
        pixels_BCYX: Tensor,
        weight: Tensor,
        bias: Tensor,
        positions: Tensor,
        leads: Tensor | None,
        registers: Tensor | None,
    ) -> Tensor:
        """From the map and the vectors of each device."""
        return self._each(super().patches, [pixels_BCYX], (weight, bias, positions, leads, registers))

    def norm(self, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        """Layer norm over the last dimension."""
        if not isinstance(weight, Stack) and not isinstance(bias, Stack):
            return super().norm(x, weight, bias, eps)
        return cast(Tensor, _Norms.apply(x, self._all(weight), self._all(bias), eps))

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """RMS norm over the last dimension."""
        plain = super().rms_norm
        return self._each(lambda x, weight: plain(x, weight, eps), [x.float()], (weight,))

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """X W^T + b over the last dimension."""
        if not isinstance(weight, Stack) and isinstance(bias, Stack):
            out = self.linear(x, weight)
            return self._by_device(out).add(self._all(bias)[:, None]).view(out.shape)
        x = self._narrow(x)
        if not isinstance(weight, Stack):
            return cast(Tensor, _Linear.apply(x, weight, bias))  # type: ignore[no-untyped-call]
        biases = None if bias is None else self._all(bias)
        out_GNO = _Linears.apply(self._by_device(x), weight.value, biases)
        return cast(Tensor, out_GNO).view(*x.shape[:-1], -1)

    def lora_linear(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, a_RI: Tensor, b_OR: Tensor, scale: float
    ) -> Tensor:
        """As three linear layers."""
        return self.three_linears(x, weight, bias, a_RI, b_OR, scale)

    def group_linear(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, units: Sequence[int], by_rows: bool
    ) -> Tensor:
        """Each device by itself."""
        plain = super().group_linear
        return self._each(lambda x, weight, bias: plain(x, weight, bias, units, by_rows), [x.float()], (weight, bias))

    def spread(self, p_RkD: Tensor, places: Sequence[tuple[int, int]], rows: int, streams: int) -> Tensor:
        """Each device by itself."""
        plain = super().spread
        return self._stack(lambda p: plain(p, places, rows, streams), p_RkD)

    def sparse_linear(self, x: Tensor, weight: Tensor, values: Tensor, indices: Tensor, bias: Tensor | None) -> Tensor:
        """Each device by itself."""
        plain = super().sparse_linear

        def kernel(x: Tensor, weight: Tensor, values: Tensor, bias: Tensor | None) -> Tensor:
            return plain(x, weight, values, indices, bias)

        return self._each(kernel, [x.float()], (weight, values, bias))

    def act(self, x: Tensor, kind: Act) -> Tensor:
        """An activation; GELU by tanh in half the time of torch's kernel."""
        if kind == "gelu_tanh" and x.dtype == torch.float32:
            return cast(Tensor, _Gelu.apply(x))  # type: ignore[no-untyped-call]
        return super().act(x, kind)

    def multiply(self, x: Tensor, vector: Tensor) -> Tensor:
        """Each row of X times a vector of its device."""
        if not isinstance(vector, Stack):
            return super().multiply(x, vector)
        return (self._by_device(x) * vector.value[:, None]).view(x.shape)

    def leading(self, p: Tensor, sizes: Sequence[int]) -> Tensor:
        """Each device by itself."""
        plain = super().leading
        return self._stack(lambda p: plain(p, sizes), p)

    def attention(
        self, q_BSE: Tensor, k_BSE: Tensor, v_BSE: Tensor, heads: int, causal: bool = True, hides: Tensor | None = None
    ) -> Tensor:
        """In fp32: torch's fused kernel is slower in fewer bits, its backward pass ten times."""
        return super().attention(q_BSE.float(), k_BSE.float(), v_BSE.float(), heads, causal, hides)

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
        count, losses, plain = len(xs_BSD), [], super().head_loss
        inputs = zip(*(x.float().chunk(self.devices) for x in xs_BSD), strict=True)
        tables = self._apart((*weights_VD, *biases_V, labels_V))
        for xs, own, targets_NS in zip(inputs, tables, targets_BS.chunk(self.devices), strict=True):
            used = int((targets_NS[:, 0] != HIDDEN).sum())
            cut, targets = [x[:used] for x in xs], targets_NS[:used]
            if count == 1 and labels_V is None:
                given = (cut[0].flatten(0, 1), own[0], own[1], targets.flatten(), self._dtype)
                losses.append(cast(Tensor, _HeadLoss.apply(*given)))  # type: ignore[no-untyped-call]
            else:
                losses.append(plain(cut, own[:count], own[count:-1], targets, mix, own[-1], chunked))
        return torch.stack(losses)

    def _narrow(self, x: Tensor) -> Tensor:
        """X in the type in which it is multiplied; made once where several layers see the same x."""
        if x.dtype == self._dtype:
            return x
        seen = self._seen
        if seen[0] is not x:
            seen = self._seen = x, x.to(self._dtype)
        return seen[1]

    def _by_device(self, x: Tensor) -> Tensor:
        """[G, N, last]."""
        return x.reshape(self.devices, -1, x.shape[-1])

    def _all(self, p: Tensor) -> Tensor:
        """Of each device, the same where it has none of its own."""
        return p.value if isinstance(p, Stack) else p.expand(self.devices, *p.shape)

    def _apart(self, given: Sequence[Tensor | None]) -> list[list[Any]]:
        """Of each device, its part of activations and stacks, and what all share."""
        parts: list[Sequence[Any]] = []
        for each in given:
            if each is None:
                parts.append([None] * self.devices)
            elif isinstance(each, Stack):
                parts.append(each.value.unbind())
            else:
                parts.append([each] * self.devices)
        return [list(row) for row in zip(*parts, strict=True)]

    def _each(
        self, kernel: Callable[..., Tensor], batches: Sequence[Tensor], params: Sequence[Tensor | None]
    ) -> Tensor:
        """A kernel on the part of each device, if any has tensors of its own."""
        if not any(isinstance(each, Stack) for each in params):
            return kernel(*batches, *params)
        cut = zip(*(each.chunk(self.devices) for each in batches), strict=True)
        return torch.cat([kernel(*x, *own) for x, own in zip(cut, self._apart(params), strict=True)])

    def _stack(self, kernel: Callable[[Tensor], Tensor], p: Tensor) -> Tensor:
        """A kernel on the tensor of each device."""
        if not isinstance(p, Stack):
            return kernel(p)
        return cast(Tensor, Stack(torch.stack([kernel(own) for own in p.value.unbind()])))


class _Linear(Function):
    """A linear layer that all devices share, or a single one's."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
        """Keeps what backward needs of x and W."""
        of_x, of_weight = ctx.needs_input_grad[:2]
        ctx.save_for_backward(x if of_weight else None, weight_OI if of_x else None)
        weight_OI, bias_O = weight_OI.to(x.dtype), None if bias_O is None else bias_O.to(x.dtype)
        return products.linear(x, weight_OI, bias_O)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Gradients of x, W and b."""
        x, weight_OI = ctx.saved_tensors
        of_x, of_weight, of_bias = ctx.needs_input_grad
        flat_NO = gradient.reshape(-1, gradient.shape[-1])
        return (
            products.linear(gradient, weight_OI.to(gradient.dtype).T) if of_x else None,
            products.outer(flat_NO, x.reshape(-1, x.shape[-1])).float() if of_weight else None,
            flat_NO.sum(0, dtype=torch.float32) if of_bias else None,
        )


class _Linears(Function):
    """A linear layer of each device."""

    @staticmethod
    def forward(ctx: Any, x_GNI: Tensor, weight_GOI: Tensor, bias_GO: Tensor | None) -> Tensor:
        """Keeps what backward needs of x and W."""
        of_x, of_weight = ctx.needs_input_grad[:2]
        ctx.save_for_backward(x_GNI if of_weight else None, weight_GOI if of_x else None)
        return _products(x_GNI, weight_GOI.to(x_GNI.dtype), None if bias_GO is None else bias_GO.to(x_GNI.dtype))

    @staticmethod
    def backward(ctx: Any, gradient_GNO: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Gradients of x, W and b."""
        x_GNI, weight_GOI = ctx.saved_tensors
        of_x, of_weight, of_bias = ctx.needs_input_grad
        return (
            _products(gradient_GNO, weight_GOI.to(gradient_GNO.dtype).mT) if of_x else None,
            _outers(gradient_GNO, x_GNI).float() if of_weight else None,
            gradient_GNO.sum(1, dtype=torch.float32) if of_bias else None,
        )


def _alone(devices: int, multiplications: int) -> bool:
    return devices == 1 or (products.prefers_onednn() and multiplications >= _ALONE)


def _products(x_GNI: Tensor, weight_GOI: Tensor, bias_GO: Tensor | None = None) -> Tensor:
    """X W^T + b of each device."""
    devices = len(x_GNI)
    if not x_GNI.is_cuda and _alone(devices, x_GNI[0].numel() * weight_GOI.shape[1]):
        biases = [None] * devices if bias_GO is None else bias_GO.unbind()
        each = zip(x_GNI.unbind(), weight_GOI.unbind(), biases, strict=True)
        return torch.stack([products.linear(*one) for one in each])
    if bias_GO is None:
        return torch.bmm(x_GNI, weight_GOI.mT)
    return torch.baddbmm(bias_GO[:, None], x_GNI, weight_GOI.mT)


def _outers(left_GNO: Tensor, right_GNI: Tensor) -> Tensor:
    """Left^T right of each device."""
    if not left_GNO.is_cuda and _alone(len(left_GNO), left_GNO[0].numel() * right_GNI.shape[-1]):
        pairs = zip(left_GNO.unbind(), right_GNI.unbind(), strict=True)
        return torch.stack([products.outer(*pair) for pair in pairs])
    return torch.bmm(left_GNO.mT, right_GNI)


class _Norms(Function):
    """A layer norm of each device: the kernels of one, device after device, in the memory of all."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_GD: Tensor, bias_GD: Tensor, eps: float) -> Tensor:
        """Keeps x, the weights, and means and deviations."""
        x_GND = x.reshape(len(weight_GD), -1, x.shape[-1])
        size, out_GND, kept = [x.shape[-1]], torch.empty_like(x_GND), []
        for one_ND, weight_D, bias_D, into_ND in zip(x_GND, weight_GD, bias_GD, out_GND, strict=True):
            y_ND, mean, rstd = torch.native_layer_norm(one_ND, size, weight_D, bias_D, eps)
            into_ND.copy_(y_ND)
            kept += [mean, rstd]
        ctx.save_for_backward(x_GND, weight_GD, *kept)
        return out_GND.view(x.shape)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        """Gradients of x, w and b."""
        x_GND, weight_GD, *kept = ctx.saved_tensors
        size, needed = [x_GND.shape[-1]], list(ctx.needs_input_grad[:3])
        found = []
        for i, (g_ND, x_ND, weight_D) in enumerate(zip(gradient.reshape(x_GND.shape), x_GND, weight_GD, strict=True)):
            mean, rstd = kept[2 * i : 2 * i + 2]
            found.append(
                torch.ops.aten.native_layer_norm_backward(g_ND, x_ND, size, mean, rstd, weight_D, weight_D, needed)
            )
        of_x, of_weight, of_bias = (
            torch.stack(each) if need else None for each, need in zip(zip(*found, strict=True), needed, strict=True)
        )
        return None if of_x is None else of_x.view(gradient.shape), of_weight, of_bias, None


class _Gelu(Function):
    """GELU by tanh, as x sigmoid(2 u) with u = sqrt(2 / pi) (x + 0.044715 x^3): the same function, fewer operations."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        """Keeps x and the sigmoid."""
        gate = (x * x).mul_(_GELU * _CUBE).add_(_GELU).mul_(x).sigmoid_()
        ctx.save_for_backward(x, gate)
        return x * gate

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        """With s the sigmoid, the slope is s (1 + x (2 u)' (1 - s))."""
        x, gate = ctx.saved_tensors
        slope = (x * x).mul_(3 * _GELU * _CUBE).add_(_GELU).mul_(x)
        slope.addcmul_(slope, gate, value=-1)
        torch.addcmul(gate, slope, gate, out=slope)
        return cast(Tensor, slope.mul_(gradient))


class _HeadLoss(Function):
    """Mean loss per token of x W^T + b, a few tokens at a time; forward finds the gradients as well."""

    @staticmethod
    def forward(
        ctx: Any, x_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, targets_N: Tensor, dtype: torch.dtype
    ) -> Tensor:
        """With p the probabilities and y the one-hot target, the logits' gradient is (p - y) / N.

        The division is left to backward. A target's probability that is zero in fp32 would be an infinite loss; the
        logits then tell it.
        """
        weight, bias = weight_VD.to(dtype), None if bias_V is None else bias_V.to(dtype)
        of_x, of_weight, of_bias = (
            torch.zeros_like(each) if need and each is not None else None
            for each, need in zip((x_ND, weight_VD, bias_V), ctx.needs_input_grad, strict=False)
        )
        total, tokens = x_ND.new_zeros(()), len(targets_N)
        for start in range(0, tokens, size := max(32, _LOGITS // len(weight_VD))):
            rows = slice(start, start + size)
            x, targets = x_ND[rows].to(dtype), targets_N[rows, None]
            logits = products.linear(x, weight, bias).float()
            g = torch.softmax(logits, -1)
            chosen = g.gather(1, targets)
            if chosen.min() > _TINY:
                total -= chosen.log().sum()
            else:
                total -= torch.log_softmax(logits, -1).gather(1, targets).sum()
            if of_x is None and of_weight is None and of_bias is None:
                continue
            g = g.scatter_(1, targets, chosen.sub_(1))
            if of_bias is not None:
                of_bias += g.sum(0)
            g = g.to(dtype)
            if of_x is not None:
                of_x[rows] = products.linear(g, weight.T)
            if of_weight is not None:
                of_weight += products.outer(g, x)
        ctx.tokens = tokens
        ctx.save_for_backward(of_x, of_weight, of_bias)
        return total / tokens

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients that forward found; the loss is summed, so what comes is one."""
        return (*(None if each is None else each.mul_(gradient / ctx.tokens) for each in ctx.saved_tensors), None, None)
