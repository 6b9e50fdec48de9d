"""The page of a run and of a comparison: its marks lie where the data say, and nothing in it runs or is loaded."""

from __future__ import annotations

import json
import os
import re
import runpy
import shutil
import webbrowser
from collections.abc import Callable, Sequence
from html.parser import HTMLParser
from pathlib import Path
from statistics import fmean, stdev
from typing import Any
from xml.etree import ElementTree

import pytest
from support import begin, write_world

from lamina import model
from lamina.cli import main
from lamina.errors import UserError
from lamina.experiment import parts
from lamina.job import Turn
from lamina.methods.lora import FedLora
from lamina.methods.width import HeteroFL
from lamina.report import answers, charts, contrast, figures, marks, read
from lamina.report.marks import Chart
from lamina.spec import Spec

Table = dict[str, Any]
Call = Callable[..., tuple[int | str | None, str, str]]
MIB = 2**20
ROOT = Path(__file__).parents[1]
NASTY = '<script>alert("1")</script>&'


def scores(mean: float, p10: float) -> dict[str, float]:
    return {"mean_over_devices": mean, "weighted": mean, "p10": p10}


def device_class(name: str, used: int, limit: int | None, plan: str | None = "last 1 of 2") -> Table:
    memory = {"weights_bytes": used // 4, "activations_bytes": used - used // 4}
    price = {"memory_bytes": used, "up_bytes": 5, "down_bytes": 5, "flops": 10, "memory": memory}
    trained = [("embeddings", 1, 0), ("block 0", 0.5, 0.0), ("block 1", 1, 0.25), ("head", 1, 1)]
    return {
        "name": name,
        "devices": 4,
        "budget": {"memory_bytes": limit, "up_bytes": None, "down_bytes": None, "flops": None},
        "predicted": price | {"peak_bytes": used, "peak_moment": "backward"},
        "plan": plan,
        "levers": [],
        "trained_blocks": 1,
        "binding": [],
        "sat_out": 0 if plan else 4,
        "parts": [{"part": p, "held": h, "trained": t} for p, h, t in trained] if plan else [],
        "accuracy": {"before": scores(0.2, 0.1), "after": scores(0.6, 0.3)},
    }


@pytest.fixture
def summary() -> Table:
    return {
        "schema": "lamina.summary/1",
        "name": "made",
        "method": "caff",
        "accuracy": {"before": scores(0.2, 0.1), "after": scores(0.6, 0.3)},
        "tested_devices": 12,
        "personalised": None,
        "network": {
            "chosen": "n-2",
            "candidates": [{"name": "n-2", "blocks": 2, "mean_trained_blocks": 1.0, "feasible": True}],
        },
        "classes": [
            device_class("big", 40 * MIB, 50 * MIB),
            device_class(NASTY, 20 * MIB, None),
            device_class("small", 30 * MIB, 10 * MIB, None),
        ],
        "totals": {
            **{"rounds": 3, "up_bytes": 6 * MIB, "down_bytes": 9, "flops": 4e9, "updates": 5, "rejected_updates": 1},
            **{"clock_seconds": 0, "seconds": 1.0},
        },
        "folder": "somewhere",
    }


ROUNDS: list[Table] = [
    {"round": 1, "accuracy": scores(0.3, 0.2), "up_bytes": 1 * MIB, "flops": 1e9},
    {"round": 2, "accuracy": None, "up_bytes": 2 * MIB, "flops": 1e9},
    {"round": 3, "accuracy": scores(0.6, 0.3), "up_bytes": 3 * MIB, "flops": 2e9},
]
DEVICES: list[Table] = [
    {"round": 1, "class": "big", "blocks": [0, 1], "loss": 1.0, "rejected": None},
    {"round": 1, "class": "big", "blocks": [1], "loss": 1.0, "rejected": None},
    {"round": 2, "class": "big", "blocks": [0], "loss": None, "rejected": "late"},
    {"round": 3, "class": NASTY, "blocks": [1], "loss": 1.0, "rejected": None},
]


@pytest.fixture
def folder(summary: Table, tmp_path: Path) -> Path:
    """A run folder made by hand."""
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    for name, rows in (("rounds", ROUNDS), ("devices", DEVICES)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "config.toml").write_text(f'name = "{NASTY}"\n')
    return tmp_path


def method(label: str, accuracy: list[float], used: int, up: float = 1.0, worst: float = 0.1, **more: Any) -> Table:
    mean, std = fmean(accuracy), stdev(accuracy) if len(accuracy) > 1 else None
    after = {"mean": mean, "std": std, "values": accuracy}
    first = device_class("big", used, 50 * MIB) | {"accuracy": after}
    second = device_class("small", used, None) | {"accuracy": after}
    return {
        **{"label": label, "settings": {"method.name": "caff", "local.lr": used / MIB}, "method": "caff"},
        **{"seeds": list(range(len(accuracy))), "misfit": None, "network": "n-2"},
        "accuracy": {
            "before": {kind: {"mean": 0.2, "std": 0.0} for kind in charts.KINDS},
            "after": dict.fromkeys(charts.KINDS, after),
        },
        "worst_class": {"mean": worst, "std": 0.01, "values": [worst + 0.01 * i for i in range(len(accuracy))]},
        "took_part": 1.0,
        "totals": {"rounds": 3, "up_bytes": up * MIB, "down_bytes": 1.0, "flops": 1e9, "clock_seconds": 0},
        "classes": [first, second],
        **more,
    }


@pytest.fixture
def collected() -> Table:
    methods = [
        method("good", [0.5, 0.54], 40 * MIB, up=4.0),
        method("level", [0.5, 0.5], 20 * MIB, up=5.0, worst=0.2, took_part=0.5),
        method("free", [0.6, 0.6], 60 * MIB),
        method("poor", [0.3, 0.3], 30 * MIB),
        {"label": NASTY, "settings": {"method.name": NASTY}, "seeds": [], "misfit": f"class {NASTY} fits no plan"},
    ]
    settings = {"task.name": "noise", "cohort": 5, "rounds": 3, "local.batch_size": 8}
    return {"schema": "lamina.compare/1", "name": "made", "seeds": [0, 1], "settings": settings, "methods": methods}


@pytest.fixture
def lamina(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """The command line: code, standard output, standard error."""

    def call(*arguments: object) -> tuple[int | str | None, str, str]:
        monkeypatch.setattr("sys.argv", ["lamina", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            main()
        return stop.value.code or 0, *capsys.readouterr()

    return call


class Page(HTMLParser):
    """Fails on tags that are not closed in order; keeps the elements and the text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def alone(text: str) -> Page:
    """The page, which runs nothing and loads nothing."""
    page = Page(text)
    assert {tag for tag, _ in page.seen}.isdisjoint({"script", "link", "img", "iframe", "object", "use", "image", "a"})
    names = {name for _, attributes in page.seen for name in attributes}
    assert names.isdisjoint({"src", "href", "xlink:href", "style"}) and not any(name.startswith("on") for name in names)
    assert not re.search(r"https?:|url\(|@import", text)
    return page


def tree(chart: Chart) -> ElementTree.Element:
    return ElementTree.fromstring(chart.svg)


def points(chart: Chart, words: str = "") -> list[tuple[float, float, str]]:
    """Circles whose value holds some words: x, y and the value that is shown on hovering."""
    found = [
        (float(each.get("cx", "")), float(each.get("cy", "")), each[0].text or "")
        for each in tree(chart).iter("circle")
    ]
    return [each for each in found if words in each[2]]


def along(chart: Chart, wanted: Sequence[float], places: Sequence[float], axis: str) -> bool:
    """Whether places agree with the numbers that are written along an axis ("x" or "y")."""
    kept = "middle" if axis == "x" else "end"
    shown = [
        (float(each.text or ""), float(each.get(axis, "")) - (4 if axis == "y" else 0))
        for each in tree(chart).iter("text")
        if each.get("class") == "soft"
        and each.get("text-anchor") == kept
        and re.fullmatch(r"-?[\d.]+", each.text or "")
    ]
    (low, start), (high, end) = shown[0], shown[-1]
    return places == pytest.approx([start + (v - low) / (high - low) * (end - start) for v in wanted], abs=0.02)


def named(found: list[Chart], name: str) -> Chart:
    (chart,) = (each for each in found if each.name == name)
    return chart


def test_the_page_of_a_run(folder: Path) -> None:
    html = read(folder).html
    page = alone(html)
    assert sum(tag == "svg" for tag, _ in page.seen) == len(read(folder).charts()) == 7
    assert NASTY in page.text and "late" in page.text
    assert (
        "caff on n-2 fits 2 of 3 device classes. Accuracy went from 20.0% to 60.0% (+40.0 points, mean over devices) "
        "in 3 rounds, for 6.0 MiB sent and 4.0 GFLOP computed by the devices; 4 of 12 devices sat out; 5 of 6 "
        "updates counted." in page.text
    )
    assert "small4 devicesthe cheapest plan needs 30.0 MiB of memory (there are 10.0 MiB)" in page.text
    assert "big1 updatenot counted: late" in page.text
    for name in ("prefers-color-scheme: dark", "@media print"):
        assert name in html


def test_updates_that_did_not_count_are_told_without_their_reasons(folder: Path, summary: Table) -> None:
    """As of the recorded runs, which have no devices.jsonl."""
    (folder / "devices.jsonl").unlink()
    summary["classes"] = summary["classes"][:2]
    summary["totals"] |= {"updates": 75, "rejected_updates": 45, "abandoned_rounds": 2}
    (folder / "summary.json").write_text(json.dumps(summary))
    page = alone(read(folder).html)
    assert "; no device sat out; 75 of 120 updates counted, 2 of 3 rounds abandoned." in page.text
    assert "of any class45 updatesnot counted: the reasons are not recorded here" in page.text
    assert "Nobody" not in page.text
    summary["totals"] |= {"rejected_updates": 0, "abandoned_rounds": 0}
    (folder / "summary.json").write_text(json.dumps(summary))
    page = alone(read(folder).html)
    assert "; no device was left out." in page.text and "Nobody: every class has a plan" in page.text


def test_curves_lie_where_the_numbers_are(summary: Table) -> None:
    made = charts.curves(summary, ROUNDS)
    assert [chart.name for chart in made] == ["accuracy-round", "accuracy-up", "accuracy-flops"]
    for chart, across in zip(made, ([0, 1, 3], [0, 1, 6], [0, 1, 4]), strict=True):
        for words, up in (("mean of devices", [20, 30, 60]), ("10th", [10, 20, 30])):
            found = points(chart, words)
            assert along(chart, across, [x for x, _, _ in found], "x")
            assert along(chart, up, [y for _, y, _ in found], "y")
    assert points(made[1])[1][2] == "mean of devices: 30.0%, data sent by devices 1.0 MiB"
    assert not points(made[0], "weighted")
    rounds = [row | {"clock_seconds": 60.0 * row["round"]} for row in ROUNDS]
    timed = charts.curves(summary | {"totals": summary["totals"] | {"clock_seconds": 180}}, rounds)[-1]
    assert timed.name == "accuracy-clock" and points(timed)[-1][2].endswith("virtual time 3 min 00 s")
    assert along(timed, [0, 1, 3], [x for x, _, _ in points(timed, "10th")], "x")


def test_what_is_weighted_is_drawn_where_it_is_something_else(summary: Table) -> None:
    summary["accuracy"]["before"]["weighted"] = 0.25
    assert points(charts.curves(summary, ROUNDS)[0], "weighted")[0][2].startswith("weighted: 25.0%")


def test_gains_of_the_classes(summary: Table) -> None:
    chart = charts.gains(summary)
    assert chart
    assert along(chart, [20, 60] * 3, [x for x, _, _ in points(chart)], "x")
    assert "takes no part" in chart.svg and charts.gains(summary | {"classes": []}) is None


def test_the_picture_of_the_plan(summary: Table) -> None:
    chart = charts.picture(summary["classes"])
    assert chart
    cells = [each for each in tree(chart).iter("g")]
    assert len(cells) == 12
    said = [cell[0].text for cell in cells]
    assert said[:4] == [
        *("big, embeddings: 0% trained, 100% frozen", "big, block 0: 0% trained, 50% frozen"),
        *("big, block 1: 25% trained, 75% frozen", "big, head: 100% trained, 0% frozen"),
    ]
    heights = [{e.get("class", "").split()[-1]: float(e.get("height", "")) for e in cell[1:]} for cell in cells]
    assert heights[:4] == [
        *({"none": 26.0, "frozen": 26.0}, {"none": 26.0, "frozen": 13.0}),
        *({"none": 26.0, "frozen": 19.5, "trained": 6.5}, {"none": 26.0, "trained": 26.0}),
    ]
    assert heights[8:] == [{"none": 26.0}] * 4
    assert charts.picture([row | {"parts": []} for row in summary["classes"]]) is None


def test_memory_adds_up_to_the_peak_beside_the_budget(summary: Table, folder: Path) -> None:
    found = summary["classes"][0]["predicted"] | {"peak_bytes": 44 * MIB}
    found["memory"] = {"weights_bytes": 10 * MIB, "activations_bytes": 34 * MIB}
    (folder / "plan-measured.json").write_text(json.dumps({"classes": [{"name": "big", "measured": found}]}))
    chart = named(read(folder).charts(), "memory")
    bars = [each for each in tree(chart).iter("rect") if "hit" in each.get("class", "")]
    ends = [float(each.get("x", "")) + float(each.get("width", "")) for each in bars]
    assert along(chart, [10, 40, 10, 44, 5, 20, 7.5, 30], ends, "x")
    assert chart.svg.count("sits out") == 1
    limits = [float(e.get("x1", "")) for e in tree(chart).iter("line") if e.get("class") == "limit"]
    assert along(chart, [50, 50, 10], limits, "x")
    assert [each[0].text for each in bars][:3] == [
        *("big, predicted: weights 10.0 MiB", "big, predicted: activations 30.0 MiB"),
        "big, measured: weights 10.0 MiB",
    ]


def test_coverage_counts_usable_updates(folder: Path) -> None:
    with open(folder / "devices.jsonl", "a") as file:
        file.write(json.dumps(DEVICES[2] | {"round": 4}) + "\n")
    chart = named(read(folder).charts(), "coverage")
    assert chart.note.endswith("Where a column is empty, no update was used.")
    found = {each[0].text: each.get("opacity") for each in tree(chart).iter("rect") if "share" in each.get("class", "")}
    assert found == {
        "round 1, block 0: 50% of 2 updates": "0.5",
        "round 3, block 0: 0% of 1 updates": "0",
        **dict.fromkeys(["round 2, no update was used", "round 4, no update was used"], "0"),
        "round 1, block 1: 100% of 2 updates": "1",
        "round 3, block 1: 100% of 1 updates": "1",
    }
    whole = [each.text for each in tree(chart).iter("text") if each.get("class") == ""]
    assert whole == ["33%", "100%"]
    many = charts.Tally((number, "big", (0,), None) for number in range(1, 121))
    long = charts.coverage(1, many)
    assert long and "rounds 1 to 2, block 0: 100% of 2 updates" in long.svg
    assert charts.coverage(2, charts.Tally()) is None


def test_the_page_of_a_comparison(collected: Table, summary: Table, tmp_path: Path) -> None:
    for seed, shift in enumerate((0.0, 0.1)):
        run = tmp_path / f"good-{seed}"
        run.mkdir()
        (run / "summary.json").write_text(json.dumps(summary))
        rows = [row | {"accuracy": scores(0.3 + shift, 0.1)} for row in ROUNDS]
        (run / "rounds.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    collected["methods"][0]["runs"] = ["good-0", "good-1", "gone"]
    (tmp_path / "compare.json").write_text(json.dumps(collected))
    page, found = alone(read(tmp_path).html), read(tmp_path).charts()
    assert sum(tag == "svg" for tag, _ in page.seen) == len(found) == 9
    assert NASTY in page.text and f"class {NASTY} fits no plan" in page.text
    curve = points(named(found, "learning-round"))
    assert along(named(found, "learning-round"), [20, 35, 35, 35], [y for _, y, _ in curve], "y")
    assert curve[-1][2] == "good: 35.0% ± 7.1%, rounds 3"
    (band,) = tree(named(found, "learning-round")).iter("polygon")
    low = [float(pair.split(",")[1]) for pair in band.get("points", "").split()][1]
    assert along(named(found, "learning-round"), [100 * (0.35 - stdev([0.3, 0.4]))], [low], "y")


def test_the_ranking(collected: Table) -> None:
    chart = contrast.ranking(collected["methods"])
    assert along(chart, [60, 52, 50, 30], [x for x, _, _ in points(chart)], "x")
    assert [text for *_, text in points(chart)] == [
        *("free: 60.0±0.0%, beyond the budgets", "good: 52.0±2.8%", "level: 50.0±0.0%, 50% left out"),
        "poor: 30.0±0.0%",
    ]
    names = [each.text for each in tree(chart).iter("text") if "own" in each.get("class", "")]
    assert names == ["free", "good", "level", "poor", NASTY] and "does not fit" in chart.svg


def test_the_front_keeps_the_budgets(collected: Table) -> None:
    memory, sent, received, _ = contrast.tradeoffs(collected["methods"])
    assert [text for *_, text in points(memory, "on the front")] == [
        "good: 52.0%, 40.0 MiB (on the front)",
        "level: 50.0%, 20.0 MiB (on the front)",
    ]
    assert along(memory, [40, 20, 60, 30], [x for x, _, _ in points(memory)], "x")
    assert along(memory, [52, 50, 60, 30], [y for _, y, _ in points(memory)], "y")
    assert [text.split(":")[0] for *_, text in points(sent, "on the front")] == ["good", "poor"]
    hollow = [each[0].text for each in tree(sent).iter("circle") if "hollow" in each.get("class", "")]
    assert hollow == ["free: 60.0%, 1.0 MiB"]
    assert "level*" in {each.text for each in tree(received).iter("text")}
    assert contrast.front([(1, 0.5), (1, 0.6), (2, 0.6), (3, 0.7), (0.5, 0.1)]) == [4, 1, 3]


def test_the_answer_of_a_comparison(collected: Table) -> None:
    assert answers.of_comparison(collected) == [
        "good on n-2 is the most accurate within the budgets: 52.0±2.8%, from 20.0% before (mean ± standard deviation "
        "over 2 seeds). Level with that, within a standard deviation of the differences over seeds: level (-2.0±2.8). "
        "Behind: poor (-22.0±2.8 points).",
        "A device needs up to 40.0 MiB for it; in all, devices send 4.0 MiB, receive 0.0 KiB and compute 1.0 GFLOP.",
        "The class that is worst off has most with level: 20.0±1.0%. Next: good (-10.0±0.0 points).",
        "Beyond the budgets: free 60.0±0.0%.",
        "Leave devices out: level (50%).",
        f"Have no plan within the budgets: {NASTY}.",
    ]
    rows = {row["label"]: row for row in collected["methods"]}
    many = [rows["level"] | {"label": f"half {i}"} for i in range(7)]
    first, *rest = answers.of_comparison(collected | {"methods": [*many, rows["poor"]]})
    assert first.startswith(
        "half 0 on n-2, though it leaves out 50% of the devices, is the most accurate within the budgets: 50.0"
    )
    assert first.endswith(
        "Behind: poor (-20.0±0.0 points). Of those that leave no device out, poor has most: 30.0±0.0%."
    )
    assert "Leave devices out: half 1 (50%), half 2 (50%), half 3 (50%), half 4 (50%), and 2 more." in rest
    nothing = collected | {"methods": collected["methods"][-1:]}
    assert answers.of_comparison(nothing) == ["No method has run within the budgets."]
    assert contrast.of_comparison(nothing, {}) == []


def test_methods_are_compared_on_the_seeds_that_both_have(collected: Table) -> None:
    """Seeds differ more than methods do here: seed by seed the second is behind, though the means are close."""
    rows = {row["label"]: row for row in collected["methods"]}
    ours, theirs = method("ours", [0.3, 0.5, 0.7], MIB), method("theirs", [0.28, 0.48, 0.68], MIB)
    (first, *_) = answers.of_comparison(collected | {"methods": [ours, theirs]})
    assert "Level" not in first and first.endswith("Next: theirs (-2.0±0.0 points).")
    (first, *_) = answers.of_comparison(collected | {"methods": [ours, method("theirs", [0.28], MIB)]})
    assert first.endswith("Next: theirs (-2.0 points).")
    (first, *_) = answers.of_comparison(collected | {"methods": [ours, method("theirs", [0.3 - 1e-12], MIB)]})
    assert first.endswith("Level with that: theirs (+0.0).")
    a, b = method("a", [0.3, 0.5], MIB), method("b", [0.2796, 0.4804], MIB)  # -2.000 ± 0.057, then -0.0004 ± 0.0001
    assert answers.of_comparison(collected | {"methods": [a, b]})[0].endswith("Next: b (-2.0±0.1 points).")
    b = method("b", [0.29995, 0.49997], MIB)
    (first, *_) = answers.of_comparison(collected | {"methods": [a, b]})
    assert first.endswith("of the differences over seeds: b (+0.0±0.0).")
    apart = method("apart", [0.1], MIB) | {"seeds": [7]}
    (first, *_) = answers.of_comparison(collected | {"methods": [ours, apart]})
    assert "apart" not in first
    assert (
        "one seed: differences may be chance"
        in answers.of_comparison(collected | {"methods": [method("alone", [0.3], MIB), rows[NASTY]]})[0]
    )


def test_a_comparison_tells_of_updates_that_did_not_count(collected: Table) -> None:
    collected["methods"][0]["totals"] |= {"updates": 84.5, "rejected_updates": 35.5}
    collected["methods"][3]["totals"] |= {"updates": 0, "rejected_updates": 12.0, "abandoned_rounds": 3.0}
    said = answers.of_comparison(collected)
    told = "good (84.5 of 120 updates counted), poor (0 of 12 updates counted, 3 of 3 rounds abandoned)"
    assert f"Not every update was used: {told}." in said


def test_what_each_method_is(collected: Table) -> None:
    found = answers.differences(collected)
    assert found and found.rows[0] == ("good", "training of the first blocks", "arXiv 2411.07826", "local.lr = 40.0")
    assert found.rows[-1] == (NASTY, "", "", "")


def test_an_older_comparison_has_a_page(collected: Table, tmp_path: Path) -> None:
    """Before there were settings and values of each seed in it."""
    del collected["settings"]
    for row in collected["methods"]:
        del row["settings"]
        if row["seeds"]:
            del row["accuracy"]["after"]["mean_over_devices"]["values"], row["worst_class"]["values"]
    (tmp_path / "compare.json").write_text(json.dumps(collected))
    page = alone(read(tmp_path).html)
    assert "good on n-2 is the most accurate within the budgets: 52.0±2.8%" in page.text
    assert "Level" not in page.text and "Settings" not in page.text


def test_fairness_has_a_panel_per_class(collected: Table) -> None:
    chart = contrast.fairness(collected["methods"])
    assert chart and len(points(chart)) == 12
    for panel in ("big", "small"):
        at = [x for x, _, text in points(chart) if f", {panel}:" in text]
        assert [(x - at[-1]) / (at[0] - at[-1]) for x in at] == pytest.approx([1, 22 / 30, 20 / 30, 0], abs=1e-3)
    assert [text for *_, text in points(chart) if ", worst off:" in text] == [
        f"{label}, worst off: {share}.0% ± 1.0%"
        for label, share in (("free", 10), ("good", 10), ("level", 20), ("poor", 10))
    ]
    hollow = [each[0].text or "" for each in tree(chart).iter("circle") if "hollow" in each.get("class", "")]
    assert {text.split(",")[0] for text in hollow} == {"free"} and chart.note.endswith(contrast.BEYOND)
    collected["methods"][0]["classes"][1]["plan"] = None
    partial = contrast.fairness(collected["methods"])
    assert partial and len(points(partial)) == 11 and "A cross: the class takes no part" in partial.note
    (cross,) = tree(partial).iter("path")
    assert cross[0].text == "good, small: 52.0% ± 2.8%, takes no part"
    collected["methods"][0]["classes"][1]["plan"] = "all 2"
    for row in collected["methods"][:-1]:
        del row["worst_class"]  # as in a comparison from before there was such a thing
    older = contrast.fairness(collected["methods"])
    assert older and len(points(older)) == 8 and "worst off" not in older.svg
    for row in collected["methods"][:-1]:
        row["classes"] = row["classes"][:1]
    assert contrast.fairness(collected["methods"]) is None


def test_the_setting_of_a_comparison(collected: Table) -> None:
    assert answers.setting(collected) == [
        "4 devices of class big (memory 50.0 MiB each), 4 devices of class small (no budget).",
        "3 rounds, task noise, devices in a round 5, batches of 8.",
    ]
    for number, told in ((0, "all devices that have test examples"), (5, "5 devices"), (1, "1 device")):
        collected["settings"]["eval_devices"] = number
        assert (
            answers.setting(collected)[-1]
            == f"3 rounds, task noise, devices in a round 5, batches of 8, tested on {told}."
        )
    assert answers.setting(collected | {"methods": collected["methods"][-1:]}) == []


def outside(chart: Chart) -> list[str]:
    """What of a chart lies outside it, and numbers of an axis that do not rise to the right."""
    root = tree(chart)
    _, _, wide, high = map(float, root.get("viewBox", "").split())
    found, axes = [], dict[str, list[tuple[float, float]]]()
    for each in root.iter("text"):
        said = "".join(each.itertext()) if not len(each) else each[0].tail or ""
        x, y, size = (
            float(each.get("x", "")),
            float(each.get("y", "")),
            sum(5.0 if c < "\u2e80" else 12.0 for c in said),
        )
        start = x - {"start": 0.0, "middle": size / 2, "end": size}[each.get("text-anchor", "")]
        if start < 0 or start + size > wide or not 0 < y < high:
            found.append(said)
        if each.get("text-anchor") == "middle" and re.fullmatch(r"[\d.]+", said):
            axes.setdefault(each.get("y", ""), []).append((x, float(said)))
    found += [f"width {each.get('width')}" for each in root.iter("rect") if float(each.get("width", "")) < 0]
    return found + [str(each) for each in axes.values() if len(each) > 1 and each[0] >= each[-1]]


@pytest.mark.parametrize(
    ("words", "length"), [("name ", 1), ("name ", 28), ("name ", 90), ("name ", 400), ("名前", 30)]
)
def test_charts_hold_names_of_any_length_and_number(words: str, length: int, collected: Table, summary: Table) -> None:
    names = [f"{words * 80}"[:length] + f" {i}" for i in range(26)]
    good = collected["methods"][0]
    rows = [good | {"classes": [good["classes"][0] | {"name": name} for name in names[:8]]} for _ in names]
    methods = [row | {"label": name, "network": name} for row, name in zip(rows, names, strict=True)]
    runs = {name: [(summary, ROUNDS)] for name in names}
    made = contrast.of_comparison(collected | {"methods": methods}, runs)
    assert len(made) == 9
    for row, name in zip(summary["classes"], names, strict=False):
        row["name"] = name
    made += charts.of_run(summary, ROUNDS, charts.Tally({(1, "big", (0,), None): 2}))
    assert {chart.title: found for chart in made if (found := outside(chart))} == {}
    full = [each.text for chart in made for each in tree(chart).iter("title")]
    assert set(names) <= set(full) or length < 40
    long = "caff, batch_size 4, lr 0.001"
    assert marks.short(long) == long and marks.short(long, 82) == "caff,…0.001" and marks.short(long, 1) == "…"


def test_panels_of_many_classes_are_in_several_rows(collected: Table) -> None:
    row = collected["methods"][0]
    row |= {"classes": [row["classes"][0] | {"name": f"class {i}"} for i in range(8)]}
    chart = contrast.fairness([row])
    assert chart
    first, *_, last = (points(chart, f"class {i}:")[0] for i in range(8))
    assert first[1] < last[1]
    labels = [each for each in tree(chart).iter("text") if each.text == "good"]
    assert len(labels) == 2


@pytest.mark.skipif(not (os.environ.get("CHROMIUM") or shutil.which("chromium")), reason="needs chromium")
@pytest.mark.parametrize("name", ["study/shakespeare-half", "demo"])
def test_a_browser_draws_the_page(name: str, tmp_path: Path) -> None:
    """Every chart has marks, no text is cut off or tiny, and the browser does not complain, wide and narrow."""
    look = runpy.run_path(str(ROOT / "scripts" / "look_at_report.py"))
    page = read(ROOT / "records" / name).html
    assert page.count("<svg") >= 4
    assert [line for width in (1200, 420) for line in look["verdict"](page, width)] == []
    emptied = re.sub(r"<(circle|polyline|rect|polygon)[^>]*>", "", page)
    assert any("empty chart" in line for line in look["verdict"](emptied, 1200))


def test_figures_are_files_of_their_own(folder: Path, tmp_path: Path) -> None:
    paths = figures(read(folder), tmp_path / "figures")
    assert [path.name for path in paths][:2] == ["accuracy-round.svg", "accuracy-up.svg"] and len(paths) == 7
    for path in paths:
        root = ElementTree.parse(path).getroot()
        assert root.tag == "{http://www.w3.org/2000/svg}svg" and "--ink" in (root[0].text or "")
        assert "dark" not in (root[0].text or "")


def test_on_the_command_line(folder: Path, tmp_path: Path, lamina: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []

    def show(address: str) -> bool:
        opened.append(address)
        return True

    monkeypatch.setattr(webbrowser, "open", show)
    out = tmp_path / "deep" / "page.html"
    code, text, _ = lamina("report", folder, "--out", out, "--figures", tmp_path / "f", "--open", "--json")
    said = json.loads(text)
    assert code == 0 and opened == [out.as_uri()] and (said["schema"], said["page"]) == ("lamina.report/1", str(out))
    assert all(Path(path).is_file() for path in said["figures"]) and not (folder / "report.html").exists()
    code, text, _ = lamina("report", folder)
    assert (code, text) == (0, f"report {folder / 'report.html'}\n") and len(opened) == 1
    monkeypatch.setattr(webbrowser, "open", lambda _: False)
    code, text, err = lamina("report", folder, "--open", "--json")
    assert code == 0 and json.loads(text) and err == f"found no browser to show {folder / 'report.html'} in\n"
    (folder / "summary.json").write_text("{")
    code, _, err = lamina("report", folder)
    assert code == 2 and err.startswith(f"error: {folder / 'summary.json'} is not JSON: ") and err.count("\n") == 1


def test_names_that_would_command_a_terminal_are_shown_without(folder: Path, summary: Table, tmp_path: Path) -> None:
    summary["name"] = summary["classes"][0]["name"] = "a\x1b[31m\x00\x9b\ud800\uffff"
    (folder / "summary.json").write_text(json.dumps(summary))
    for path in figures(read(folder), tmp_path / "figures"):
        ElementTree.parse(path)
    assert "a\ufffd[31m\ufffd" in read(folder).html


def test_folders_of_something_else_are_refused(tmp_path: Path, folder: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty has no summary\.json, as a finished run has, and no compare\.json"):
        read(tmp_path / "empty")
    with pytest.raises(UserError, match=r"^there is no folder .*nowhere$"):
        read(tmp_path / "nowhere")
    (tmp_path / "empty" / "config.toml").touch()
    with pytest.raises(UserError, match=r"empty is not finished: `lamina run --resume .*empty` goes on with it$"):
        read(tmp_path / "empty")
    (folder / "rounds.jsonl").write_text("{}\n{\n")
    with pytest.raises(UserError, match=r"rounds\.jsonl is not JSON lines"):
        read(folder)
    (folder / "rounds.jsonl").unlink()
    (folder / "summary.json").write_text('{"classes": []}')
    with pytest.raises(UserError, match=r"summary\.json is not as this version of lamina writes it: KeyError"):
        read(folder)


@pytest.mark.parametrize(
    "change",
    [
        {"classes": []},
        {"totals": [1]},
        {"accuracy": {"before": scores(0.2, 0.1), "after": scores(float("nan"), 0.3)}},
        {"accuracy": {"before": scores(0.2, 0.1), "after": scores(float("inf"), 0.3)}},
        {"network": None},
        {"classes": [device_class("a", MIB, 0) | {"name": 7}]},
        {"classes": [device_class("a", MIB, 0) | {"plan": 7}]},
    ],
    ids=["classes", "totals", "nan", "infinity", "network", "name", "plan"],
)
def test_a_damaged_run_is_refused_in_a_line(change: Table, folder: Path, summary: Table, lamina: Call) -> None:
    (folder / "summary.json").write_text(json.dumps(summary | change))
    code, _, err = lamina("report", folder)
    assert code == 2 and err.startswith(f"error: {folder / 'summary.json'} is not ") and err.count("\n") == 1


@pytest.mark.parametrize("name", ["config.toml", "env.json", "summary.json", "rounds.jsonl"])
def test_text_that_is_not_utf_8_is_refused_in_a_line(name: str, folder: Path, lamina: Call) -> None:
    (folder / name).write_bytes(b"\xff\xfe")
    code, _, err = lamina("report", folder)
    assert code == 2 and err.startswith(f"error: {folder / name} is not ") and err.count("\n") == 1


@pytest.mark.parametrize("change", [{"settings": [1]}, {"methods": 3}, {"methods": [3]}, {"target": "x"}])
def test_a_damaged_comparison_is_refused_in_a_line(
    change: Table, collected: Table, tmp_path: Path, lamina: Call
) -> None:
    (tmp_path / "compare.json").write_text(json.dumps(collected | change))
    code, _, err = lamina("report", tmp_path)
    assert code == 2 and err.startswith(f"error: {tmp_path / 'compare.json'} is not ") and err.count("\n") == 1
    collected["methods"][0]["seeds"].append(7)
    (tmp_path / "compare.json").write_text(json.dumps(collected))
    assert lamina("report", tmp_path)[0] == 2


def test_a_run_leaves_a_page(tmp_path: Path) -> None:
    run = begin(write_world(tmp_path, rounds=2, eval_every=1), tmp_path / "runs")
    summary = run.play()
    page = alone((run.folder / "report.html").read_text(encoding="utf-8"))
    assert answers.of_run(summary) in page.text
    names = [attributes["id"] for tag, attributes in page.seen if tag == "figure"]
    assert names == ["accuracy-round", "accuracy-up", "accuracy-flops", "classes", "plan", "memory", "coverage"]
    assert [(each["held"], each["trained"]) for each in summary["classes"][1]["parts"]] == [(1, 0)] * 3 + [(1, 1)] * 2


def test_parts_are_shares_of_the_network_of_the_server(tiny: Spec) -> None:
    turn = Turn(0, 0, 1)
    first = next(iter(HeteroFL(ratios=(0.5,)).plans(tiny, turn, {})))
    for row in parts(tiny, first):
        assert row["held"] == row["trained"] and 0 < row["held"] < 0.6
    method = FedLora()
    spec = method.adapt(tiny)
    rows = parts(spec, next(iter(method.plans(spec, turn, {}))))
    assert [row["part"] for row in rows] == ["embeddings", "block 0", "block 1", "block 2", "head"]
    layout = model.layout(spec)
    added = sum(layout.numel(name) for name, row in layout.params.items() if row.block == 0 and row.part == "lora")
    whole = sum(layout.numel(name) for name, row in layout.params.items() if row.block == 0)
    assert rows[1] == {"part": "block 0", "held": 1.0, "trained": round(added / whole, 4)}


def test_labels_keep_clear_of_each_other() -> None:
    assert marks.spread([10, 100], 14, 0, 200) == [10, 100]
    assert marks.spread([50, 50, 50], 10, 0, 200) == [40, 50, 60]
    assert marks.spread([60, 50], 20, 0, 200) == [65, 45]
    assert marks.spread([0, 1], 10, 0, 200) == [0, 10]
    assert marks.spread([200, 199], 10, 0, 200) == [200, 190]
    assert marks.spread([5, 5, 5], 10, 0, 10) == [0, 10, 20]
    assert marks.spread([], 10, 0, 10) == []


def test_axes_and_bars_of_shares_stay_between_none_and_all(collected: Table, summary: Table) -> None:
    assert [marks.padded(each) for each in ([0.0], [1.0, 0.5], [0.5])] == [(0, 1), (0.46, 1), (0.46, 0.54)]
    low, high = method("low", [0.0, 0.3], MIB, worst=0.005), method("high", [0.8, 1.0], MIB)
    ends = [(row | {"accuracy": scores(value, value)}, value) for row in ROUNDS for value in (0.0, 0.3)]
    runs = {"low": [(summary, [row for row, each in ends if each == value]) for value in (0.0, 0.3)]}
    made = contrast.of_comparison(collected | {"methods": [low, high]}, runs)
    for chart, shape in (("ranking", "polyline"), ("fairness", "polyline"), ("learning-round", "polygon")):
        axis, anchor = ("y", "end") if shape == "polygon" else ("x", "middle")
        numbers = [each for each in tree(named(made, chart)).iter("text") if each.get("text-anchor") == anchor]
        assert {each.text for each in numbers if (each.text or "").startswith("-")} == set()
        places = [
            float(pair.split(",")[axis == "y"])
            for each in tree(named(made, chart)).iter(shape)
            if (each.get("class") or "").startswith(("line", "band"))
            for pair in each.get("points", "").split()
        ]
        if chart == "ranking":
            assert along(named(made, chart), [90 - 14.142, 100, 0, 15 + 21.213], places, "x")
        if chart == "learning-round":
            assert along(named(made, chart), [0], [max(places)], "y")


def test_a_scale_keeps_its_ends() -> None:
    scale = marks.Scale(10, 20, 300, 100)
    assert [scale(10), scale(15), scale(20)] == [300, 200, 100]
    assert marks.Scale(5, 5, 0, 100)(5) == 0


def test_ticks_are_round_numbers() -> None:
    assert marks.ticks(0, 10) == [0, 2, 4, 6, 8, 10]
    assert marks.ticks(50.3, 57.4) == pytest.approx([52, 54, 56])
    assert marks.ticks(0, 0.03) == pytest.approx([0, 0.01, 0.02, 0.03])
    assert marks.ticks(3, 3) == [3]
