"""Matrix products of a linear layer, by the library that is fastest on this machine.

Torch multiplies fp32 matrices by MKL, which on processors that are not Intel's goes without their widest instructions.
oneDNN, which torch has too, uses them: about twice as fast where there is AVX-512, in the same precision. Which library
computes depends on the machine alone, never on a measurement, so that results can be repeated.

Shape legend: N rows, I inputs, O outputs.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

_ROWS = 8
"""Fewer rows than this are not worth oneDNN's longer way."""


@cache
def prefers_onednn() -> bool:
    """Whether oneDNN multiplies fp32 matrices faster than what torch takes: AVX-512 on a processor of AMD."""
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    try:
        maker = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    return "AuthenticAMD" in maker


def linear(x: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """X W^T + b over the last dimension, without a graph."""
    if not x.is_cuda and prefers_onednn() and x.numel() >= _ROWS * x.shape[-1]:
        return cast(Tensor, torch.ops.mkldnn._linear_pointwise(x, weight_OI, bias_O, "none", [], ""))
    return F.linear(x, weight_OI, bias_O)


def outer(left_NO: Tensor, right_NI: Tensor) -> Tensor:
    """Left^T right, [O, I], without a graph: the smaller of the two is copied where oneDNN wants it turned."""
    if left_NO.is_cuda or not prefers_onednn():
        return left_NO.T @ right_NI
    if left_NO.shape[1] <= right_NI.shape[1]:
        return linear(left_NO.T, right_NI.T)
    return linear(right_NI.T, left_NO.T).T.contiguous()
