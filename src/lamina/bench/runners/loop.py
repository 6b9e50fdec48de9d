"""A plain loop around GPT-2 of transformers."""

from __future__ import annotations

from . import training
from .gpt2 import Gpt2
from .request import Request
from .rounds import Rounds


def play(request: Request, rounds: Rounds) -> None:
    """All rounds."""
    training.play(request, rounds, Gpt2(request.network, request.device))
