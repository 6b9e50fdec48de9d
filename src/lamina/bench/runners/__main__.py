"""Plays the rounds that a request asks for: `python -m runners SYSTEM FOLDER OUT`."""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path

import torch

from .processes import adopt
from .request import read
from .rounds import Rounds


def main(system: str, folder: str, out: str) -> None:
    """Let a system play; what it prints itself goes to standard error, so that only the protocol is on the other."""
    protocol = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    adopt()
    torch.set_num_threads(1)
    request = read(Path(folder))
    importlib.import_module(f".{system}", __package__).play(request, Rounds(protocol, Path(out)))


if __name__ == "__main__":
    main(*sys.argv[1:])
