"""Make the phones and links that come with lamina from the files of FLASH.

    python scripts/make_phones.py raw_ai_benchmark_list.json speed_distri.json src/lamina/assets/phones.json

The sources are models/utils/device_util/raw_ai_benchmark_list.json and models/speed_distri.json of
https://github.com/PKU-Chengxu/FLASH at commit 55cbede0. DEST has of every phone its name, year, RAM in GB and score of
floating-point networks on the CPU, and of every user's link the means and standard deviations of its rates in KiB/s,
rounded. The same sources give the same bytes.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

LINK = ("down_u", "down_sigma", "up_u", "up_sigma")


def pack(phones: list[dict[str, str]], links: dict[str, dict[str, float]]) -> dict[str, Any]:
    """What DEST holds: a row per phone and per link."""
    if (len(phones), len(links)) != (333, 19):
        raise SystemExit("these are other files than FLASH's of commit 55cbede0")
    rows = [
        [each["Model"].strip(), int(each["Year"]), float(each["RAM"].removesuffix("GB")), int(each["CPU_F_AI_Score"])]
        for each in phones
    ]
    return {"phones": sorted(rows), "links": sorted([round(each[key], 1) for key in LINK] for each in links.values())}


def main() -> None:
    """Read the sources, write DEST and print what is in it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("phones", type=Path, metavar="PHONES")
    parser.add_argument("links", type=Path, metavar="LINKS")
    parser.add_argument("dest", type=Path, metavar="DEST")
    arguments = parser.parse_args()
    packed = pack(*(json.loads(path.read_text(encoding="utf-8")) for path in (arguments.phones, arguments.links)))
    parts = (f'"{key}": [\n' + ",\n".join(map(json.dumps, rows)) + "\n]" for key, rows in packed.items())
    arguments.dest.write_text("{" + ",\n".join(parts) + "}\n", encoding="utf-8")
    print(f"{arguments.dest}: {len(packed['phones'])} phones, {len(packed['links'])} links")


if __name__ == "__main__":
    main()
