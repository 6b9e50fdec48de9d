"""Make the digits that come with lamina from those that come with scikit-learn, losslessly.

    python scripts/make_digits.py site-packages/sklearn/datasets/data/digits.csv.gz src/lamina/assets/digits.xz

SOURCE has a line per image: 64 values from 0 to 16, and the digit. DEST has the same numbers, a byte each (16 takes a
fifth bit, and xz packs better what is not packed). The same source and liblzma give the same bytes on every run.
"""

from __future__ import annotations

import argparse
import gzip
import lzma
from pathlib import Path

import numpy as np


def pack(table: np.ndarray) -> bytes:
    """Images and digits, numbers [images, 65], in an xz file of bytes."""
    if table.shape != (1797, 65) or table[:, :-1].max() != 16 or set(table[:, -1]) != set(range(10)):
        raise SystemExit("this is another file than scikit-learn's digits")
    return lzma.compress(table.astype(np.uint8).tobytes(), preset=9 | lzma.PRESET_EXTREME)


def main() -> None:
    """Read SOURCE, write DEST and print what is in it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, metavar="SOURCE")
    parser.add_argument("dest", type=Path, metavar="DEST")
    arguments = parser.parse_args()
    with gzip.open(arguments.source, "rt", encoding="ascii") as lines:
        table = np.loadtxt(lines, delimiter=",")
    packed = pack(table)
    arguments.dest.write_bytes(packed)
    print(f"{arguments.dest}: {len(packed):,} bytes, {len(table):,} images")


if __name__ == "__main__":
    main()
