"""Set-up of all tests: no network, one thread, and small networks in which no tensor is at its neutral value."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import torch
from hypothesis import settings

from lamina import model
from lamina.layout import Params
from lamina.machine import usable_cores
from lamina.spec import Spec

os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers is imported, which only test modules do
torch.set_num_threads(1)
settings.register_profile("lamina", deadline=None)
settings.load_profile("lamina")


def pytest_xdist_auto_num_workers() -> int:
    """Processes that `-n auto` makes: one for each core that this one may use."""
    return usable_cores()


@pytest.fixture(scope="session")
def tiny() -> Spec:
    """Three blocks, every size different, so that no mix-up of axes can hide."""
    return Spec(blocks=3, embed=16, heads=2, head_dim=8, ffn=24, vocab=11, positions=10)


@pytest.fixture(scope="session")
def random_params() -> Callable[[Spec, int], Params]:
    """Weights of a network by its sizes and a seed; biases, norms and LoRA's B are random too."""

    def make(spec: Spec, seed: int) -> Params:
        generator = torch.Generator().manual_seed(seed)
        params = model.init(spec, generator)
        return {name: p + 0.2 * torch.randn(p.shape, generator=generator) for name, p in params.items()}

    return make
