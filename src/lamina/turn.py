"""Randomness as a function of names: nothing depends on the order in which numbers are drawn."""

from __future__ import annotations

import hashlib

import numpy as np


def generator(*fields: object) -> np.random.Generator:
    """The only source of randomness: a fresh generator that is a function of the fields alone.

    The fields, written as text and joined by "/", are hashed with SHA-256; the first 128 bits are the key of
    a counter-based Philox stream (Salmon, Moraes, Dror and Shaw, 2011). Different fields give independent
    streams.

    Args:
        *fields: What the numbers are for, for example a seed, a round, a device and a purpose.

    Returns:
        A generator at the start of its stream.
    """
    digest = hashlib.sha256("/".join(map(str, fields)).encode()).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little")))
