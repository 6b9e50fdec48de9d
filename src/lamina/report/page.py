"""The page: what is in a folder, read without trusting it, as one file of HTML that needs nothing else.

There is no script in it: values that are shown on hovering are titles of marks.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from html import escape
from pathlib import Path
from typing import Any

from lamina import files, tables
from lamina.errors import UserError
from lamina.report import answers, charts, contrast
from lamina.report.marks import Chart
from lamina.table import Table, printable

Row = Mapping[str, Any]
_ODD = (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, StopIteration)
"""What comes of files that are JSON, but not what a run writes."""
PAGE, MEASURED = "report.html", "plan-measured.json"
_NOBODY = "Nobody: every class has a plan, and every update counted."
_STYLE = "".join((Path(__file__).parent / name).read_text("utf-8") for name in ("chart.css", "dark.css", "page.css"))


@dataclass(frozen=True)
class Section:
    """Charts side by side, or one across, or tables, under a heading."""

    title: str
    note: str = ""
    charts: Sequence[Chart] = ()
    tables: Sequence[Table] = ()


@dataclass(frozen=True)
class Report:
    """What there is to say of a run or of a comparison.

    Attributes:
        title: What it is of.
        answer: The result in a sentence or two.
        sections: In reading order.
        folded: Name -> text that is there for those who look for it.
        details: What else there is to say in words, a sentence or two each.
    """

    title: str
    answer: str
    sections: Sequence[Section]
    folded: Mapping[str, str]
    details: Sequence[str] = ()

    def charts(self) -> list[Chart]:
        """All of them."""
        return [chart for section in self.sections for chart in section.charts]

    @cached_property
    def html(self) -> str:
        """The page."""
        body = "".join(map(_section, self.sections))
        details = "".join(f"<li>{escape(each)}</li>" for each in self.details)
        details = f'<ul class="details">{details}</ul>' if details else ""
        folded = "".join(
            f"<details><summary>{escape(k)}</summary><pre>{escape(v)}</pre></details>" for k, v in self.folded.items()
        )
        return printable(
            '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width,initial-scale=1">'
            f"<title>{escape(self.title)}</title><style>{_STYLE}</style></head>\n"
            f'<body><main><h1>{escape(self.title)}</h1><p class="answer">{escape(self.answer)}</p>{details}\n'
            f"{body}{folded}<footer>Made by lamina report. Point at a mark to see its value.</footer>"
            "</main></body></html>\n"
        )


def read(folder: Path) -> Report:
    """What the folder of a run or of a comparison has to say.

    Raises:
        UserError: It is not there, holds neither a finished run nor a comparison, or a file of it cannot be read.
    """
    for name, make in (("summary.json", _of_run), ("compare.json", _of_comparison)):
        if (folder / name).is_file():
            try:
                made = make(folder, _json(folder / name))
                made.html.encode()  # finds what is not text
                return made
            except _ODD as error:
                reason = f"{type(error).__name__} {error}"
                raise UserError(f"{folder / name} is not as this version of lamina writes it: {reason}") from error
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}")
    if (folder / "config.toml").is_file():
        raise UserError(f"the run in {folder} is not finished: `lamina run --resume {folder}` goes on with it")
    raise UserError(f"{folder} has no summary.json, as a finished run has, and no compare.json, as a comparison has")


def figures(report: Report, folder: Path) -> list[Path]:
    """Write every chart as a file of its own, for papers: SVG, in the colours for light paper."""
    paths = [folder / f"{chart.name}.svg" for chart in report.charts()]
    for path, chart in zip(paths, report.charts(), strict=True):
        files.write(path, chart.file())
    return paths


def _of_run(folder: Path, summary: Row) -> Report:
    summary = {"tested_devices": sum(row["devices"] for row in summary["classes"])} | dict(summary)  # a later key
    rounds, tally = list(_lines(folder / "rounds.jsonl")), _tally(folder / "devices.jsonl")
    if (folder / MEASURED).is_file():
        found = {row["name"]: row.get("measured") for row in _json(folder / MEASURED)["classes"]}
        summary = {**summary, "classes": [row | {"measured": found.get(row["name"])} for row in summary["classes"]]}
    made, out = charts.of_run(summary, rounds, tally), answers.left_out(summary, tally)
    curves = [chart for chart in made if chart.name.startswith("accuracy")]
    sections = [
        Section("Accuracy over what it cost", "Over all devices that were tested.", curves),
        *(Section(chart.title, chart.note, [chart]) for chart in made if chart not in curves),
        Section("Who was left out, and why", "" if out else _NOBODY, tables=[out] if out else []),
        Section("Numbers", tables=tables.of_summary(summary)),
    ]
    title = f"{summary['name']}: {summary['method']} on {summary['network']['chosen']}"
    return Report(title, answers.of_run(summary), sections, _settings(folder))


def _of_comparison(folder: Path, collected: Row) -> Report:
    methods = collected["methods"]
    runs = {row["label"]: [each for name in row.get("runs", ()) if (each := _run(folder / name))] for row in methods}
    made = contrast.of_comparison(collected, runs)
    groups = {"Accuracy against cost": "against", "Learning curves": "learning"}
    notes = {
        "against": "The dashed line is the front: nothing else within the budgets is both cheaper and better; "
        "what is on it has its name in bold (*: leaves devices out). Colours are those above. Memory is the predicted "
        "peak, the mean over the devices with a plan; the rest is summed over all devices and rounds."
        + (f" {contrast.BEYOND}" if any(contrast.over_budget(row) for _, row in contrast.ranked(methods)) else ""),
        "learning": "Means over seeds, with bands of one standard deviation."
        + (f" The dashed line is the target, {collected['target']:.1%}." if collected.get("target") else ""),
    }
    sections: list[Section] = []
    for chart in made:
        group = next((title for title, start in groups.items() if chart.name.startswith(start)), None)
        if group is None:
            sections.append(Section(chart.title, chart.note, [chart]))
        elif sections[-1].title == group:
            sections[-1] = Section(group, sections[-1].note, [*sections[-1].charts, chart])
        else:
            sections.append(Section(group, notes[groups[group]], [chart]))
    unfit = answers.misfits(collected)
    sections += [Section("Numbers", tables=tables.comparison(collected))]
    sections += [Section("What does not fit, and why", tables=[unfit])] if unfit else []
    own = answers.differences(collected)
    sections += [Section(own.title, tables=[own])] if own else []
    first = next((row["runs"][0] for row in methods if row.get("runs")), "")
    alike = "\n".join(f"{key} = {value}" for key, value in collected.get("settings", {}).items())
    folded = {"Settings that all share, every default filled in": alike} if alike else {}
    folded |= _versions(folder / first)
    title = f"{collected['name']}: {len(methods)} methods compared"
    answer, *details = answers.of_comparison(collected)
    return Report(title, answer, sections, folded, [*details, *answers.setting(collected)])


def _run(folder: Path) -> tuple[Row, list[Row]] | None:
    """Summary and rounds of a run of a comparison, if they are still there."""
    path = folder / "summary.json"
    return (_json(path), list(_lines(folder / "rounds.jsonl"))) if path.is_file() else None


def _settings(folder: Path) -> dict[str, str]:
    path = folder / "config.toml"
    found = {"Settings, every default filled in": _text(path)} if path.is_file() else {}
    return found | _versions(folder)


def _versions(folder: Path) -> dict[str, str]:
    path = folder / "env.json"
    return {"Versions and machine": _text(path)} if path.is_file() else {}


def _text(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not text in UTF-8: {error}") from error


def _json(path: Path) -> Any:
    try:
        return _parsed(_text(path))
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}") from error


def _parsed(text: str) -> Any:
    """JSON, which has no numbers that are not finite."""

    def refuse(constant: str) -> None:
        raise ValueError(f"it holds {constant}")

    return json.loads(text, parse_constant=refuse)


def _lines(path: Path) -> Iterator[Row]:
    if not path.is_file():
        return
    with open(path, encoding="utf-8") as file:
        try:
            yield from map(_parsed, file)
        except ValueError as error:
            raise UserError(f"{path} is not JSON lines: {error}") from error


def _tally(path: Path) -> charts.Tally:
    """What devices did, counted, for there may be very many lines."""
    return charts.Tally(
        (row["round"], row["class"], tuple(row["blocks"]) if row["loss"] is not None else None, row["rejected"])
        for row in _lines(path)
    )


def _section(section: Section) -> str:
    note = f"<p>{escape(section.note)}</p>" if section.note else ""
    shown = "".join(_table(table, section.title) for table in section.tables)
    figures = "".join(_figure(chart, len(section.charts) > 1) for chart in section.charts)
    figures = f'<div class="row">{figures}</div>' if len(section.charts) > 1 else figures
    return f"<section><h2>{escape(section.title)}</h2>{note}{figures}{shown}</section>\n"


def _figure(chart: Chart, captioned: bool) -> str:
    caption = f"<figcaption>{escape(chart.title)}</figcaption>" if captioned else ""
    return f'<figure id="{escape(chart.name)}">{caption}{chart.svg}</figure>'


def _table(table: Table, heading: str) -> str:
    """A table under its title, if that is not the heading above it already."""

    def row(cells: Iterable[str], kind: str) -> str:
        sides = ("l" if i < table.left else "r" for i in range(len(table.head)))
        marked = (f'<{kind} class="{side}">{escape(cell)}</{kind}>' for side, cell in zip(sides, cells, strict=True))
        return f"<tr>{''.join(marked)}</tr>"

    caption = f"<caption>{escape(table.title)}</caption>" if table.title != heading else ""
    head = f"<thead>{row(table.head, 'th')}</thead>" if any(table.head) else ""
    body = "".join(row(cells, "td") for cells in table.rows)
    return f'<div class="scroll"><table>{caption}{head}<tbody>{body}</tbody></table></div>'
