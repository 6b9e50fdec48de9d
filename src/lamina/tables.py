"""The tables people see, made from what programs see, once for the terminal and for report.md."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

from lamina.fleet import RESOURCES
from lamina.methods.about import meanings, own_fields, written
from lamina.methods.base import Method
from lamina.table import Table, printable
from lamina.units import duration, human

_BAR = 28
WORST = "worst off"
_KINDS = {
    "mean_over_devices": "mean over devices",
    "weighted": "weighted by predictions",
    "p10": "10th percentile",
}


def networks(network: Mapping[str, Any]) -> Table:
    """The score table: which network, and why."""
    rows = [
        (
            each["name"] + (" *" if each["name"] == network["chosen"] else ""),
            str(each["blocks"]),
            f"{each['mean_trained_blocks']:.2f}",
            "yes" if each["feasible"] else "no",
        )
        for each in network["candidates"]
    ]
    rule = {
        "trained": "most trained blocks on average, of equals the deepest",
        "deep": "the deepest of those that leave fewest devices out",
    }
    title = f"Networks (* chosen: {rule[network.get('prefer', 'trained')]})"
    return Table(title, ("network", "blocks", "mean trained blocks", "feasible"), rows)


def classes(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Per class: plan, prices against budgets, and what keeps it from training more."""
    shown = [r for r in ("down_bytes",) if any(row["budget"][r] is not None for row in rows)]
    columns = ["memory_bytes", "up_bytes", *shown, "flops"]
    timed = any(row.get("seconds") for row in rows)
    lines = [
        (
            row["name"],
            row["plan"] or "sits out",
            str(row["devices"]),
            *(_of_budget(row, resource) for resource in columns),
            *([_time(row["seconds"])] if timed else []),
            _limit(row),
        )
        for row in rows
    ]
    heads = (*(RESOURCES[resource] for resource in columns), *(["time"] if timed else []))
    head = ("class", "trains blocks", "devices", *heads, "limited by")
    return Table("Device classes (per device and round: predicted / budget)", head, lines, left=2)


def _of_budget(row: Mapping[str, Any], resource: str) -> str:
    """What a class needs of a resource, of how much; of memory also how much there is in the best of rounds."""
    text, best = human(resource, row["predicted"][resource], row["budget"][resource]), row.get("best_memory_bytes")
    return f"{text} (up to {human(resource, best)})" if resource == "memory_bytes" and best else text


def _time(seconds: float | None) -> str:
    return "" if seconds is None else duration(seconds)


def levers(rows: Sequence[Mapping[str, Any]]) -> Table:
    """How each class saves memory."""
    lines = [(row["name"], ", ".join(row["levers"]) or "none needed") for row in rows if row["plan"]]
    return Table("Levers: how memory is saved", ("class", "levers"), lines, left=2)


def _limit(row: Mapping[str, Any]) -> str:
    """What keeps a class from more, or by what it is over its budget where budgets are ignored."""
    used, limits = row["predicted"], row["budget"]
    over = [key for name, key in RESOURCES.items() if row["plan"] and used[name] > (limits[name] or math.inf)]
    if over:
        return f"over its {' and '.join(over)}"
    return " and ".join(RESOURCES[name] for name in row["binding"]) or "nothing"


def memory(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Per class: memory by category at the peak, and, where it was measured, beside it what it was."""
    categories = list(rows[0]["predicted"]["memory"])

    outside = {"allocator_bytes": "allocator", "rss_bytes": "resident"}
    more = outside if any(row.get("measured") for row in rows) else {}

    def line(name: str, found: Mapping[str, Any]) -> tuple[str, ...]:
        sizes = (human("bytes", found["memory"][category]) for category in categories)
        beyond = (human("bytes", found[key]) if key in found else "" for key in more)
        return name, *sizes, human("bytes", found["peak_bytes"]), found["peak_moment"], *beyond

    lines = []
    for row in rows:
        lines.append(line(row["name"], row["predicted"]))
        if row.get("measured"):
            lines.append(line("  measured", row["measured"]))
    heads = (category.removesuffix("_bytes") for category in categories)
    title = "Memory at the peak, predicted" + (" and measured" if more else "")
    return Table(title, ("class", *heads, "all", "when", *more.values()), lines)


def why(found: Mapping[str, Any]) -> list[Table]:
    """The memory of a class at the peak, without levers and with one more of them at a time: drawn, and in numbers."""
    steps, budget = found["waterfall"], found["budget"]["memory_bytes"]
    categories = list(steps[0]["memory"])
    scale = max([step["peak_bytes"] for step in steps] + [budget or 0]) / _BAR
    end = round(budget / scale) if budget else -1

    def drawn(step: Mapping[str, Any]) -> tuple[str, ...]:
        bar = "".join(mark * round(step["memory"][c] / scale) for c, mark in zip(categories, "WGOAT", strict=True))
        marked = "".join("|" if i == end else letter for i, letter in enumerate(bar.ljust(_BAR + 1)))
        operations = f"{step['flops'] / steps[0]['flops']:.2f} x"
        return step["step"], marked.rstrip(), human("bytes", step["peak_bytes"]), step["peak_moment"], operations

    def numbers(step: Mapping[str, Any]) -> tuple[str, ...]:
        return step["step"], *(f"{step['memory'][category] / 2**20:.2f}" for category in categories)

    heads = [category.removesuffix("_bytes") for category in categories]
    limit = f"; | budget {human('bytes', budget)}" if budget else ""
    title = f"Memory of {found['class']} at the peak ({', '.join(f'{h[0].upper()} {h}' for h in heads)}{limit})"
    return [
        Table(title, ("levers", "", "memory", "when", "FLOPs"), [drawn(step) for step in steps], left=2),
        Table("The same in MiB", ("levers", *heads), [numbers(step) for step in steps]),
    ]


def reasons(found: Mapping[str, Any]) -> list[str]:
    """The rest of the answer to "why?", a sentence each."""
    count = f"{found['devices']} device{'s' * (found['devices'] != 1)},"
    said = [f"class {found['class']}, {count} on {found['network']}: "]
    if found["plan"]:
        said[0] += f"trains blocks: {_with(found)}"
    else:
        said[0] += f"sits out; its cheapest plan, shown above, lacks {_lacking(found)}"
    if richer := found["richer"]:
        said.append(f"with {_lacking(richer)} more it would train blocks: {_with(richer)}")
    if cheaper := found["cheaper"]:
        used = cheaper["predicted"]
        said.append(
            f"the next cheaper plan, {_with(cheaper)}, takes {human('bytes', used['memory_bytes'])} of memory, "
            f"{human('bytes', used['up_bytes'])} up and {human('flops', used['flops'])}"
        )
    now = {"plan": found["plan"], "levers": found["levers"]}
    for allowed, other in found["with_levers"].items():
        if other != now:
            said.append(f'with levers = "{allowed}" it would train blocks: {_with(other)}')
            now = other
    return said


def _lacking(found: Mapping[str, Any]) -> str:
    return " and ".join(f"{human(name, size, up=True)} of {RESOURCES[name]}" for name, size in found["missing"].items())


def _with(found: Mapping[str, Any]) -> str:
    return str(found["plan"]) + (f" ({', '.join(found['levers'])})" if found["levers"] else "")


def outcome(summary: Mapping[str, Any]) -> Table:
    """Accuracy before and after, over all devices and per class, beside what each class trained in which memory."""

    def scores(found: Mapping[str, Any], kind: str) -> tuple[str, ...]:
        before, after = found["before"][kind], found["after"][kind]
        return f"{before:.1%}", f"{after:.1%}", f"{100 * (after - before):+z.1f} points"

    nothing = [""] * 4
    rows = [(f"all, {text}", *nothing, *scores(summary["accuracy"], kind)) for kind, text in _KINDS.items()]
    if own := summary["personalised"]:
        both = {"before": summary["accuracy"]["before"], "after": own}
        rows += [(f"each*, {text}", *nothing, *scores(both, kind)) for kind, text in _KINDS.items()]
    for row in summary["classes"]:
        used = human("memory_bytes", row["predicted"]["memory_bytes"], row["budget"]["memory_bytes"])
        held = (row["plan"] or "sits out", str(row["devices"]), str(row["sat_out"]), used)
        gained = scores(row["accuracy"], "mean_over_devices") if row["accuracy"] else ("", "", "")
        rows.append((row["name"], *held, *gained))
    head = ("devices", "trains blocks", "number", "sat out", "memory", "before", "after", "gain")
    every, tested = sum(row["devices"] for row in summary["classes"]), summary["tested_devices"]
    whose = f" of {tested} of the {every} devices" if tested < every else ""
    title = f"Accuracy on held-out examples{whose} (of a class: mean over its devices)"
    if own:
        title += "; * finetuned by each device for itself in the end, beyond its budget"
    return Table(title, head, rows, left=2)


def totals(summary: Mapping[str, Any]) -> Table:
    """What the run cost."""
    spent = summary["totals"]
    rows = [
        ("rounds", str(spent["rounds"])),
        ("updates used / rejected", f"{spent['updates']} / {spent['rejected_updates']}"),
        ("sent by devices", human("bytes", spent["up_bytes"])),
        ("received by devices", human("bytes", spent["down_bytes"])),
        ("computed by devices", human("flops", spent["flops"])),
        ("devices that sat out", str(sum(row["sat_out"] for row in summary["classes"]))),
        ("wall time", f"{spent['seconds']:.0f} s"),
    ]
    if virtual := spent.get("clock_seconds"):
        rows.append(("virtual time", duration(virtual)))
    return Table("Totals", ("", ""), rows)


def methods(rows: Sequence[Mapping[str, Any]]) -> list[Table]:
    """What there is to know of each method; settings that are the same for all come last."""
    made = []
    for row in rows:
        about = [
            ("source", row["source"]),
            ("cuts", row["cuts"]),
            ("memory", row["note"]),
            ("tasks", ", ".join(row["tasks"])),
            ("a device keeps", row["stateful"] or "nothing"),
            *_settings(own_fields(row)),
        ]
        made.append(Table(f"{row['name']} ({row['group']}): {row['summary']}", ("", ""), about, left=2))
    common = {
        f.name: {
            "default": f.default,
            "accepts": rows[0]["fields"][f.name]["accepts"],
            "meaning": meanings(Method)[f.name],
        }
        for f in fields(Method)
    }
    title = "Settings of every method, and their defaults where nothing else is said"
    return [*made, Table(title, ("", ""), _settings(common), left=2)]


def _settings(found: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [(key, f"{written(each['default'])}  ({each['accepts']}) {each['meaning']}") for key, each in found.items()]


def of_classes(rows: Sequence[Mapping[str, Any]]) -> list[Table]:
    """What each class trains, and its levers where any class has some."""
    return [classes(rows), *([levers(rows)] if any(row["levers"] for row in rows) else [])]


def of_summary(summary: Mapping[str, Any]) -> list[Table]:
    """All tables of a finished run, in reading order."""
    return [
        networks(summary["network"]),
        *of_classes(summary["classes"]),
        memory(summary["classes"]),
        outcome(summary),
        totals(summary),
    ]


def comparison(collected: Mapping[str, Any], wide: bool = True) -> list[Table]:
    """The result and the cost of each method, and what each class held and trained for it.

    Args:
        collected: What compare.json holds.
        wide: With the class that is worst off, for which a terminal has no room.
    """
    done = [row for row in collected["methods"] if row["seeds"]]
    done.sort(key=lambda row: -row["accuracy"]["after"]["mean_over_devices"]["mean"])
    seeds = len(collected["seeds"])
    results = _results(done, [row for row in collected["methods"] if not row["seeds"]], wide)
    return [
        replace(results, title=f"Accuracy in % and cost, {seeds} seed{'s' * (seeds != 1)} ({results.title})"),
        *([_race(done, collected["target"])] if done and collected.get("target") else []),
        _held(done),
    ]


def by_class(row: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any] | None, bool]]:
    """Of each class, then of that which is worst off, if there are several: name, accuracy, and whether it trains."""
    found = [(each["name"], each["accuracy"], each["plan"] is not None) for each in row["classes"]]
    worst = [(WORST, row["worst_class"], True)] if "worst_class" in row else []
    return [*found, *worst] if len(found) > 1 else []


def _results(done: Sequence[Mapping[str, Any]], rest: Sequence[Mapping[str, Any]], wide: bool) -> Table:
    """Accuracies and totals, the best first, then what did not run; the title says what the columns are."""
    names = [name for name, *_ in by_class(done[0]) if wide or name != WORST] if done else []
    timed = any(row["totals"].get("clock_seconds") for row in done)
    lines, most = [], max((row["totals"]["flops"] for row in done), default=0.0)
    for row in done:
        accuracies = [percent(found) if found else "" for name, found, _ in by_class(row) if name in names]
        after, totals = row["accuracy"]["after"], row["totals"]
        lines.append(
            (
                row["label"],
                percent(after["mean_over_devices"]),
                percent(after["p10"]),
                *accuracies,
                f"{row['took_part']:.0%}",
                human("bytes", *(round(totals[key]) for key in ("up_bytes", "down_bytes"))),
                human("flops", totals["flops"], among=most),
                *([duration(totals["clock_seconds"])] if timed else []),
            )
        )
    head = ("method", "mean", "p10", *names, "part", "up / down", "FLOPs", *(["time"] if timed else []))
    for row in rest:
        lines.append((row["label"], "does not fit" if row["misfit"] else "not run", *[""] * (len(head) - 2)))
    return Table("mean±std; p10: nine in ten devices have more; part: devices with a plan", head, lines)


def _held(done: Sequence[Mapping[str, Any]]) -> Table:
    """What each class held and trained, method by method."""
    lines, most = [], max((each["predicted"]["down_bytes"] for row in done for each in row["classes"]), default=0)
    for row in done:
        for i, each in enumerate(row["classes"]):
            used, there = each["predicted"], each["plan"] is not None
            named = (row["label"], row["network"]) if not i else ("", "")
            held = human("bytes", used["down_bytes"], among=most) if there else ""
            memory = human("memory_bytes", used["memory_bytes"], each["budget"]["memory_bytes"])
            plan = each["plan"] or "does not fit"
            lines.append((*named, each["name"], plan, ", ".join(each["levers"]), held, memory))
    head = ("method", "network", "class", "trains blocks", "levers", "holds", "peak memory / budget")
    return Table("What each class held and trained", head, lines, left=5)


def _race(done: Sequence[Mapping[str, Any]], target: float) -> Table:
    """What it took each method to reach an accuracy: means over the seeds that did; most seeds first, then soonest."""
    timed = any(row["to_target"] and row["to_target"]["clock_seconds"] for row in done)
    lines = []
    reached = [row for row in done if row["to_target"]]
    reached.sort(key=lambda row: (-len(row["to_target"]["seeds"]), row["to_target"]["round"]))
    for row in [*reached, *(row for row in done if not row["to_target"])]:
        spent, count = row["to_target"], len(row["seeds"])
        if not spent:
            lines.append((row["label"], f"0 of {count}", *[""] * (3 + timed)))
            continue
        costs = (human("bytes", round(spent["up_bytes"])), human("flops", round(spent["flops"])))
        time = [duration(spent["clock_seconds"])] if timed else []
        lines.append((row["label"], f"{len(spent['seeds'])} of {count}", f"{spent['round']:.1f}", *costs, *time))
    head = ("method", "seeds there", "rounds", "up", "FLOPs", *(["time"] if timed else []))
    return Table(f"Until {target:.1%} are reached (mean over the seeds that do)", head, lines)


def percent(found: Mapping[str, Any], sign: str = "") -> str:
    """A share, or with sign "+" a difference, as mean and, over several seeds, standard deviation: "56.2±0.2"."""
    return f"{100 * found['mean']:{sign}z.1f}" + (f"±{100 * found['std']:.1f}" if found["std"] is not None else "")


def contest(result: Mapping[str, Any]) -> Table:
    """What a round takes each system, and how far its weights are from ours."""
    rows = []
    for name, row in result["systems"].items():
        if row["fault"] is not None:
            rows.append((name, str(row["workers"]), "no result", *[""] * 6))
            continue
        to_ours = (f"{row['to_ours'][key]:.2f}" for key in ("cpu_seconds", "wall_seconds"))
        rows.append(
            (
                name,
                str(row["workers"]),
                f"{row['cpu_seconds']:.3f} s",
                f"{row['wall_seconds']:.3f} s",
                human("bytes", row["peak_rss_bytes"]),
                f"{row['start_seconds']:.1f} s",
                *to_ours,
                f"{row['weights_differ']:.1e}",
            )
        )
    head = ("system", "workers", "CPU / round", "wall / round", "peak RSS", "start")
    ratios = ("CPU / ours", "wall / ours", "weights differ by")
    return Table(f"{result['label']}: {result['workload']['about']}", (*head, *ratios), rows)


def page(title: str, shown: Sequence[Table]) -> str:
    """Tables as a page of Markdown."""
    parts = [f"# {_markdown(title)}"]
    for table in shown:
        rules = [":--" if i < table.left else "--:" for i in range(len(table.head))]
        lines = [list(map(_markdown, table.head)), rules, *(list(map(_markdown, row)) for row in table.rows)]
        parts += [f"## {_markdown(table.title)}", "\n".join("| " + " | ".join(line) + " |" for line in lines)]
    return "\n\n".join(parts) + "\n"


def _markdown(text: str) -> str:
    """Text that Markdown shows as it is: it ends no cell, and is neither HTML nor a link nor code."""
    return re.sub(r"([\\|<`\[])", r"\\\1", " ".join(printable(text).splitlines()))


def markdown(summary: Mapping[str, Any], coverage: Sequence[float]) -> str:
    """report.md: the tables, and how often each block was trained."""
    blocks = [(f"block {i}", f"{share:.0%}", "#" * round(30 * share)) for i, share in enumerate(coverage)]
    cover = Table("Blocks: share of updates that trained each", ("", "share", ""), blocks)
    title = f"{summary['name']}: {summary['method']} on {summary['network']['chosen']}"
    return page(title, [*of_summary(summary), cover])
