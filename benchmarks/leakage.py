"""How much of the embedded Shakespeare task occurs in a pretraining text.

    python benchmarks/leakage.py novels98.txt.xz benchmarks/leakage.json

Counts the 50- and 30-character n-grams of the roles, one every 10 characters, that occur anywhere in the
text. Twice: "exact" compares the normalised texts as the network sees them; "letters" compares lower-case
letters with every run of other characters as one blank, so that a quotation is found whatever its
punctuation, line breaks and capitals. Neither finds quotations in another spelling. A thousand n-grams of the
text itself must all be found, or the run fails. Takes a minute and 1.6 GB.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lamina.data.shakespeare import Shakespeare
from lamina.data.text import decode, encode, normalise, read_text
from lamina.turn import generator

SIZES = (50, 30)  # characters of an n-gram
STRIDE = 10  # characters from one n-gram of a role to the next
BLOCK = 1 << 22  # n-grams of the text hashed at a time
BASE = np.uint64(0x9E3779B97F4A7C15)  # of the polynomial hash, modulo 2^64
LISTED = 25  # passages and plays listed


@dataclass(frozen=True, slots=True)
class Role:
    """The text of a role, and the part of it in test windows."""

    name: str
    text: str
    test: str

    @property
    def play(self) -> str:
        """The play it comes from."""
        return self.name.partition("|")[0]


def exact(text: str) -> str:
    """The text as the network sees it."""
    return text


def letters(text: str) -> str:
    """Lower-case letters, every run of anything else as one blank."""
    return re.sub("[^a-z]+", " ", text.lower()).strip()


def embedded_roles() -> list[Role]:
    """The roles of the default task, cut up as the task cuts them."""
    task = Shakespeare().load(seed=0)
    first = [int(shard.starts[0]) for shard in task.train]
    ends = [*first[1:], len(task.train[0].ids)]
    return [
        Role(name, decode(shard.ids[start:end]), decode(shard.ids[shard.starts[0] : end]))
        for name, shard, start, end in zip(task.names, task.test, first, ends, strict=True)
    ]


def hashes(ids: np.ndarray, size: int) -> Iterator[tuple[int, np.ndarray]]:
    """Hashes of all n-grams of `ids`, block by block: the first place of the block and uint64 [n-grams]."""
    for start in range(0, len(ids) - size + 1, BLOCK):
        count = min(BLOCK, len(ids) - size + 1 - start)
        block = np.zeros(count, np.uint64)
        for place in range(start, start + size):
            block *= BASE
            block += ids[place : place + count]
        yield start, block


def occurring(grams: set[str], ids: np.ndarray, size: int) -> set[str]:
    """Those of the `grams`, all of `size` characters, that occur in the text `ids`, uint8 [characters].

    Candidates come from the hashes and are compared character by character.
    """
    if not grams:
        return set()
    wanted = np.concatenate([block for gram in sorted(grams) for _, block in hashes(encode(gram), size)])
    wanted.sort()
    shift = np.uint64(40)
    likely = np.zeros(1 << 24, bool)  # by the upper 24 bits of the hash
    likely[wanted >> shift] = True
    found: set[str] = set()
    for start, block in hashes(ids, size):
        places = np.flatnonzero(likely[block >> shift])
        places = places[np.isin(block[places], wanted)] + start
        found.update(decode(ids[place : place + size]) for place in places)
    return found & grams


def cut(text: str, size: int) -> list[str]:
    """The n-grams of a text, one every STRIDE characters."""
    return [text[start : start + size] for start in range(0, len(text) - size + 1, STRIDE)]


def passages(text: str, size: int, found: set[str]) -> Iterator[str]:
    """Stretches of the text whose n-grams were all found."""
    grams = cut(text, size)
    start = None
    for row in range(len(grams) + 1):
        inside = row < len(grams) and grams[row] in found
        if inside and start is None:
            start = row
        elif not inside and start is not None:
            yield text[start * STRIDE : (row - 1) * STRIDE + size]
            start = None


def share(texts: list[str], size: int, found: set[str]) -> dict[str, float]:
    """Number of n-grams, of those found, and their ratio."""
    grams = [gram for text in texts for gram in cut(text, size)]
    hits = sum(gram in found for gram in grams)
    return {"ngrams": len(grams), "found": hits, "share": round(hits / len(grams), 6)}


def measure(roles: list[Role], novels: str, size: int, fold: Callable[[str], str]) -> dict[str, object]:
    """The shares found in `novels`, folded already: all text, test text and by play, with the passages."""
    ids = encode(novels)
    texts = {role.name: fold(role.text) for role in roles}
    tests = {role.name: fold(role.test) for role in roles}
    places = generator(0, "leakage", size).integers(0, len(novels) - size, 1000)
    control = {gram for gram in (novels[place : place + size] for place in places) if gram.isascii()}
    grams = {gram for text in [*texts.values(), *tests.values()] for gram in cut(text, size)}
    found = occurring(grams | control, ids, size)
    if not control <= found:
        raise AssertionError(f"{len(control - found)} n-grams of the text itself were not found in it")
    plays = {
        play: share([texts[role.name] for role in roles if role.play == play], size, found)
        for play in sorted({role.play for role in roles})
    }
    by_hits = sorted(plays.items(), key=lambda item: (-item[1]["found"], item[0]))
    stretches = [
        {"role": role.name, "text": passage} for role in roles for passage in passages(texts[role.name], size, found)
    ]
    return {
        "all": share(list(texts.values()), size, found),
        "test": share(list(tests.values()), size, found),
        "largest_share_of_a_role": max(share([text], size, found)["share"] for text in texts.values()),
        "plays_with_most": dict([item for item in by_hits if item[1]["found"]][:LISTED]),
        "num_passages": len(stretches),
        "longest_passages": sorted(stretches, key=lambda passage: (-len(passage["text"]), passage["role"]))[:LISTED],
    }


def main() -> None:
    """Measure, write the record and print its shares."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path, metavar="TEXT", help="pretraining text, .txt or .txt.xz")
    parser.add_argument("record", type=Path, metavar="RECORD", help="where the result goes, .json")
    arguments = parser.parse_args()
    novels = normalise(read_text(arguments.text))
    roles = embedded_roles()
    results: dict[str, object] = {}
    for fold in (exact, letters):
        folded = fold(novels)
        for size in SIZES:
            result = measure(roles, folded, size, fold)
            results[f"{fold.__name__}_{size}"] = result
            print(fold.__name__, size, "all", result["all"], "test", result["test"], flush=True)
    record = {
        "command": "python benchmarks/leakage.py novels98.txt.xz benchmarks/leakage.json",
        "text": {
            "name": arguments.text.name,
            "sha256": hashlib.sha256(arguments.text.read_bytes()).hexdigest(),
            "characters": len(novels),
        },
        "roles": {"number": len(roles), "characters": sum(len(role.text) for role in roles)},
        "stride": STRIDE,
        "results": results,
    }
    arguments.record.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
