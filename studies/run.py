"""Run settings of the study: docs/study.md says what came out.

python studies/run.py shakespeare tuning half one     # settings of a task, one after the other; go on after a stop
python studies/run.py cifar10 half --data data        # where the folder cifar10 is
python studies/run.py shakespeare half --dry          # write the file of the comparison, run nothing

Of each setting, <out>/<task>-<setting>.toml is what `lamina compare` is given; it needs nothing of this script.
Learning rates have the best accuracy in the tuning of the task, which is measured on training examples held back.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

from lamina import files, toml

HERE = Path(__file__).parent
RECORDS = HERE.parent / "records" / "study"
GRID = {"lr": [3e-4, 1e-3, 3e-3, 1e-2]}
QUICK = {"seeds": [100], "rounds": 6, "validation": 0.2}
HEAD_GRID = GRID | {"head_lr": [3e-3, 1e-2, 3e-2]}
# Peak memory in MiB of full training of the networks with three, six and nine blocks (`lamina plan`, batch 32), rounded
FULL = {"shakespeare": (54.31, 103.3, 152.4), "cifar10": (45.04, 85.6, 126.2), "cifar100": (45.18, 85.7, 126.3)}
# Of the network with six blocks: KiB that a device sends with LoRA, GFLOP that it computes with full training
UPLINK = {"shakespeare": 360.0, "cifar10": 327.8, "cifar100": 361.9}
COMPUTE = {"shakespeare": 94.0, "cifar10": 46.3, "cifar100": 46.3}

# Of runs that go on for longer, and the accuracy they are to reach
ROUNDS = {"shakespeare": 32, "cifar10": 48, "cifar100": 48}
TARGET = {"shakespeare": 0.56, "cifar10": 0.45, "cifar100": 0.15}

METHODS: dict[str, dict[str, Any]] = {
    "fedavg, no budgets": {"name": "fedavg", "on_infeasible": "ignore"},
    "fedavg, restricted": {"name": "fedavg", "on_infeasible": "reject"},
    "fedavg, drop": {"name": "fedavg"},
    **{
        name: {"name": name}
        for name in (
            *("caff", "lora", "lora-last-t", "hetlora", "adapters", "heterofl", "fedrolex", "federated-dropout"),
            *("depthfl", "progfed", "slt", "cocofl", "fedra", "fedhm", "fjord"),
        )
    },
}
SHALLOW = [(name, 3) for name in ("heterofl", "fedrolex", "federated-dropout", "depthfl", "progfed", "slt")]
ALONE = {
    f"{name}, {blocks} blocks": (name, blocks)
    for name, blocks in (("caff", 6), ("caff", 12), ("lora-last-t", 12), *SHALLOW)
}
"""On one network alone, with the learning rate of the method."""
DEEP = ["caff, 6 blocks", "caff, 12 blocks", "lora-last-t, 12 blocks"]
DEPTHS = (3, 6, 9, 12)
LAST = ["caff", "lora-last-t"]
TIGHT = [*LAST, *(name for name, _ in SHALLOW), "cocofl", "fedra", "fjord"]
"""Those that fit the tightest budget."""
NEAR = [*LAST, "cocofl", "slt", "hetlora", "adapters"]
"""Those whose distance from CAFF on images a learning rate of its own for the head may change."""
WITHIN = [label for label in METHODS if label not in ("fedavg, no budgets", "fedavg, drop", "fjord")]
TUNED = [label for label in METHODS if label not in ("fedavg, restricted", "fedavg, drop", "fjord")]


def one_class(memory: str | None = None, **budget: str) -> list[dict[str, Any]]:
    """A fleet of equal devices."""
    return [{"name": "device", "share": 1} | ({"memory": memory} if memory else {}) | budget]


def three_classes(full: float, *shares: float) -> list[dict[str, Any]]:
    """Strong, medium and weak devices, a third each."""
    names = ("strong", "medium", "weak")
    return [
        {"name": name, "share": 34 if name == "weak" else 33, "memory": f"{round(full * share, 1)} MiB"}
        for name, share in zip(names, shares, strict=True)
    ]


def settings(task: str) -> dict[str, dict[str, Any]]:
    """What each setting changes; `grid` are learning rates to try, else those count that the tuning `rates` found."""
    return of_tuning(task) | of_equal_devices(task) | of_classes(task)


def of_tuning(task: str) -> dict[str, dict[str, Any]]:
    """Learning rates: another seed, few rounds, examples held back, three classes that any method can take part in."""
    fleet = three_classes(1.02 * FULL[task][1], 1, 0.5, 0.25)
    tuning = QUICK | {"fleet": fleet}
    return {
        "tuning": tuning | {"labels": TUNED, "grid": GRID},
        "head-tuning": tuning | {"labels": [*NEAR, "fedavg, no budgets"], "grid": HEAD_GRID},
        "fjord-tuning": tuning | {"labels": ["fjord"], "grid": GRID},
    }


def of_equal_devices(task: str) -> dict[str, dict[str, Any]]:
    """Fleets of equal devices that lack memory, or upload or operations."""
    three, six, nine = FULL[task]
    one, half = ({"fleet": one_class(f"{memory} MiB")} for memory in (three, round(three / 2, 1)))
    # Of methods that draw the same plan where only uploads count, or nothing binds, one stands for all
    by_upload = [label for label in [*WITHIN, *DEEP] if label not in ("lora-last-t", "fedra", "caff, 6 blocks")]
    unbound = ["fedavg, restricted", *LAST, "lora", "adapters", "depthfl", "progfed", "slt"]
    larger = {"depths": DEPTHS, "labels": [*WITHIN, "caff, 12 blocks", "lora-last-t, 12 blocks"]}
    deep = {"prefer": "deep", "depths": DEPTHS, "labels": WITHIN}
    race = {"rounds": ROUNDS[task], "eval_every": 4, "target": TARGET[task]}
    return {
        "half": half | {"labels": [*WITHIN, *DEEP[1:]]},
        "one": one | {"labels": ["fedavg, no budgets", *WITHIN, *DEEP]},
        "six": {"fleet": one_class(f"{1.02 * six:.1f} MiB")} | larger,
        "nine": {"fleet": one_class(f"{1.02 * nine:.1f} MiB")} | larger,
        # Of three blocks, methods that cut a network cut less
        "half-three": half | {"labels": ["caff", *(label for label, (_, blocks) in ALONE.items() if blocks == 3)]},
        "fjord": half | {"labels": ["caff", "fjord"], "rates": "fjord-tuning"},
        # With rates found at this budget, where others were found on a fleet some of whose devices train everything
        "half-tuning": half | QUICK | {"labels": TIGHT, "grid": GRID},
        "half-tuned": half | {"labels": TIGHT, "rates": "half-tuning"},
        "half-deep": half | deep,
        "one-deep": one | deep,
        "race": half | race | {"labels": [*LAST, "cocofl", "slt", "fedavg, no budgets"]},
        "exact": half | {"levers": "exact", "labels": [*unbound, "caff, 12 blocks", "lora-last-t, 12 blocks"]},
        "uplink": {"fleet": one_class(uplink=f"{round(2 * UPLINK[task], 1)} KiB"), "labels": by_upload},
        "compute": {"fleet": one_class(flops=f"{round(COMPUTE[task] / 2, 1)} G"), "labels": [*WITHIN, *DEEP]},
        # Whether a head that is new decides between methods: from a network whose head was trained before, and with a
        # learning rate of its own for the head
        "warm": half | {"labels": LAST, "grid": GRID},
        "head": half | {"labels": NEAR, "rates": "head-tuning"},
        "one-head": one | deep | {"labels": [*NEAR, "fedavg, restricted"], "rates": "head-tuning"},
        # With rates found at this budget and on these networks, where tuning is on six blocks at most
        "one-tuning": one | deep | QUICK | {"labels": LAST, "grid": HEAD_GRID},
        "one-tuned": one | deep | {"labels": LAST, "rates": "one-tuning"},
        "exact-head": half
        | {"levers": "exact", "labels": [*LAST, "caff, 12 blocks", "lora-last-t, 12 blocks"], "rates": "head-tuning"},
    }


def of_classes(task: str) -> dict[str, dict[str, Any]]:
    """Fleets of three classes, by default with data that depends on the class."""
    thirds, eighths = (three_classes(1.02 * FULL[task][1], *shares) for shares in ((1, 0.66, 0.33), (1, 0.5, 0.125)))
    tied = {"task": {"split": "resource"}}
    uneven = {"fleet": thirds, "labels": ["fedavg, drop", *WITHIN, *DEEP]}
    # An eighth is too little for most: they leave that class out
    steep = {"fleet": eighths, "each": {"on_infeasible": "drop"}}
    steep |= {"labels": ["fedavg, drop", *(each for each in WITHIN if each != "fedavg, restricted"), "caff, 12 blocks"]}
    # In a round a device has up to 30 % less, and three in ten break down
    unsure = {"fleet": [each | {"drift": 0.3} for each in thirds], "clock": {"failures": 0.3}}
    some = ["fedavg, drop", *LAST, "lora", "heterofl", "fedrolex", "depthfl", "cocofl", "slt"]
    return {
        "three-classes": tied | uneven,
        "three-classes-iid": {"task": {"split": "iid"}} | uneven,
        "three-classes-head": tied | uneven | {"labels": LAST, "rates": "head-tuning"},
        "eighths": tied | steep,
        "eighths-exact": tied | steep | {"levers": "exact"},
        "robust": tied | unsure | {"labels": some},
    }


def comparison(task: str, setting: str, tunings: list[Path], data: str) -> dict[str, Any]:
    """The tables of the comparison; `tunings` are folders of which the first that has the tuning counts."""
    base = tomllib.loads((HERE / f"{task}.toml").read_text(encoding="utf-8"))
    change = settings(task)[setting]
    labels, words, grid, each = (change.pop("labels"), *(change.pop(key, {}) for key in ("task", "grid", "each")))
    names = dict.fromkeys(("tuning", change.pop("rates", "tuning")))
    rates = {} if grid else {label: best for name in names for label, best in chosen(tunings, name).items()}
    table = {"name": f"{task}-{setting}"} | base | change
    table["task"] = base["task"] | words
    if depths := table.pop("depths", ()):
        table["networks"] = [f"{base['networks'][0].rpartition('-')[0]}-{depth}" for depth in depths]
    if "path" in table["task"]:
        table["task"]["path"] = str(Path(data) / task)
    table["methods"] = [entry(label, rates, table["networks"]) | each for label in labels]
    table["local"] = base["local"] | grid
    return table


def warmed(table: dict[str, Any], out: Path) -> str:
    """The network after a short run of CAFF with another seed, which makes its head one that was trained."""
    first = {key: table[key] for key in ("cohort", "eval_devices", "task", "fleet") if key in table}
    first |= {"name": f"{table['name']}-up", "seed": 100, "rounds": 6, "networks": table["networks"][1:]}
    first |= {"method": {"name": "caff"}, "local": table["local"] | {"lr": 1e-3}}
    file = out / f"{first['name']}.toml"
    files.write(file, toml.dump(first))
    begun = next((each for each in out.glob(f"{first['name']}-*") if each.is_dir()), None)
    if begun is None or not (begun / "summary.json").exists():
        told = ["--resume", begun] if begun else [file, "--out", out]
        subprocess.run(["lamina", "run", *told], check=True)
        begun = next(each for each in out.glob(f"{first['name']}-*") if each.is_dir())
    return str(begun / "model")


def entry(label: str, rates: dict[str, dict[str, float]], networks: list[str]) -> dict[str, Any]:
    """A row of the comparison, with its own learning rate once that is known."""
    like, blocks = ALONE.get(label, (label, 0))
    made: dict[str, Any] = {"label": label} | METHODS[like]
    if blocks:
        made["networks"] = [f"{networks[0].rpartition('-')[0]}-{blocks}"]
    if rates:
        made["local"] = rates["fedavg, no budgets" if like.startswith("fedavg") else like]
    return made


def chosen(tunings: list[Path], name: str) -> dict[str, dict[str, float]]:
    """Per label, the learning rates with the best accuracy on what was held back."""
    told = [at.with_name(f"{at.name}-{name}") / "compare.json" for at in tunings]
    file = next((each for each in told if each.exists()), None)
    if not file:
        sys.exit(f"there is none of {', '.join(map(str, told))}: run `{name}` first")
    best: dict[str, tuple[float, dict[str, float]]] = {}
    for row in json.loads(file.read_text(encoding="utf-8"))["methods"]:
        label = re.split(", (?:head_)?lr ", row["label"])[0]
        if row["seeds"]:
            rates = {key: float(value) for key, value in re.findall(r", ((?:head_)?lr) ([^,]+)", row["label"])}
            found = (row["accuracy"]["after"]["mean_over_devices"]["mean"], rates)
            best[label] = max(found, best.get(label, found), key=lambda each: (each[0], each[1]["lr"]))
    return {label: rates for label, (_, rates) in best.items()}


def main() -> None:
    """Write the file of each setting, and run it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=sorted(FULL))
    parser.add_argument("settings", nargs="+", choices=list(settings("shakespeare")))
    parser.add_argument("--data", default="data", help="folder of the folders cifar10 and cifar100")
    parser.add_argument("--out", type=Path, default=Path("runs/study"))
    parser.add_argument("--rates-from", metavar="TASK", help="whose tunings count where the task has none of its own")
    parser.add_argument("--seeds", type=int, nargs="+", help="instead of those of the task")
    parser.add_argument("--dry", action="store_true", help="write the files only")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    for setting in given.settings:
        tasks = [given.task, *([given.rates_from] if given.rates_from else [])]
        tunings = [folder / task for task in tasks for folder in (given.out, RECORDS)]
        file = given.out / f"{given.task}-{setting}.toml"
        table = comparison(given.task, setting, tunings, given.data)
        if given.seeds:
            table["seeds"] = given.seeds
        if setting == "warm":
            table["networks"] = [warmed(table, given.out)]
        files.write(file, toml.dump(table))
        print(file, flush=True)
        if not given.dry:
            subprocess.run(["lamina", "compare", file, "--out", given.out], check=True)


if __name__ == "__main__":
    main()
