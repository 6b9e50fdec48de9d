"""The command line: a few verbs, a TOML file each, `--set key=value` for single settings, `--json` for programs."""

from __future__ import annotations

import dataclasses
import json
import shlex
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lamina import __version__, files
from lamina.deploy.cli import deploy
from lamina.errors import UserError, about_place
from lamina.table import printable

if TYPE_CHECKING:
    from lamina.config import Experiment
    from lamina.experiment import Outlook

app = typer.Typer(
    help="Federated finetuning of small pretrained Transformers under device budgets.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

app.add_typer(deploy, name="deploy")


def _version(asked: bool) -> None:
    if asked:
        print(f"lamina {__version__}")
        raise typer.Exit


@app.callback()
def common(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """What goes without a verb."""


File = Annotated[Path, typer.Argument(help="TOML file.", show_default=False)]
Set = Annotated[list[str], typer.Option("--set", metavar="KEY=VALUE", help="Override a setting: local.lr=0.001.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for programs instead of tables.")]
NOTHING: list[str] = []


@app.command()
def run(
    file: Annotated[Path | None, typer.Argument(help="TOML file of the experiment.", show_default=False)] = None,
    overrides: Set = NOTHING,
    resume: Annotated[Path | None, typer.Option(help="Go on with the run in this folder.")] = None,
    out: Annotated[Path, typer.Option(help="Where run folders go.")] = Path("runs"),
    as_json: Json = False,
) -> None:
    """Run an experiment: plan, train round by round, report."""
    if (file is None) == (resume is None) or (resume and overrides):
        raise UserError("lamina run takes a TOML file, or --resume FOLDER alone")
    from lamina import config, machine
    from lamina import run as runs
    from lamina.view import View

    view = View(quiet=as_json)
    with ExitStack() as held:
        if resume:
            runs.demand_unfinished(resume)
            held.enter_context(files.lock(resume))
            current = runs.resume(resume)
            for change in machine.changes_since(resume):
                view.say(f"warning: {change}; the result may differ in its last bits from that of an unbroken run")
        else:
            assert file is not None
            current = runs.start(config.load_experiment(file, overrides), out)
            held.enter_context(files.lock(current.folder))
        try:
            summary = view.play(current)
        except KeyboardInterrupt:
            view.say(f"stopped; go on with: lamina run --resume {shlex.quote(str(current.folder))}")
            raise typer.Exit(130) from None
    if as_json:
        _print_json(summary)
        return
    view.outcome(current, summary)


@app.command()
def plan(
    file: File,
    overrides: Set = NOTHING,
    measured: Annotated[
        bool, typer.Option("--measure", help="Run two steps of each plan and measure its peak.")
    ] = False,
    data: Annotated[bool, typer.Option("--data", help="Show how the examples are spread over the devices.")] = False,
    why: Annotated[str | None, typer.Option(metavar="CLASS", help="Explain the plan of one device class.")] = None,
    as_json: Json = False,
) -> None:
    """Show which network is chosen and what every device class trains; trains nothing."""
    from lamina import config, tables
    from lamina.drawing import drawn, spread
    from lamina.experiment import load_task, look_ahead, measure_classes
    from lamina.view import View

    experiment = config.load_experiment(file, overrides)
    task = load_task(experiment) if data else None
    outlook = look_ahead(experiment, task)
    if why is not None:
        if measured or data:
            raise UserError("--why explains one class and goes without --measure and --data: take one of them")
        _explain(experiment, outlook, why, as_json)
        return
    network, classes = outlook.network_json(), outlook.classes_json()
    if measured:
        for row, found in zip(classes, measure_classes(experiment, outlook), strict=True):
            row["measured"] = found
    found = spread(task, outlook.class_of, [group.name for group in outlook.groups]) if task else None
    if as_json:
        made = {"schema": "lamina.plan/1", "network": network, "classes": classes}
        _print_json(made | {"data": found} if found else made)
        return
    view = View()
    shown = [tables.networks(network), *tables.of_classes(classes), tables.memory(classes)]
    for table in [*shown, *drawn(found, view.console.width)] if found else shown:
        view.table(table)
    for note in task.notes if task else ():
        view.say(f"note: {note}")


def _explain(experiment: Experiment, outlook: Outlook, name: str, as_json: bool) -> None:
    from lamina import tables
    from lamina.explain import explain
    from lamina.view import View

    found = explain(experiment, outlook, name)
    if as_json:
        _print_json(found)
        return
    view = View()
    for table in tables.why(found):
        view.table(table)
    for sentence in tables.reasons(found):
        view.say(sentence)


@app.command()
def compare(
    file: File,
    overrides: Set = NOTHING,
    out: Annotated[Path, typer.Option(help="Where the folder of the comparison goes.")] = Path("runs"),
    as_json: Json = False,
) -> None:
    """Run methods x seeds under the same fleet and show one table; the same command goes on after a stop."""
    from lamina import config, tables
    from lamina.compare import cells, check, collect, run_cell, save
    from lamina.errors import DoesNotFitError
    from lamina.report import answers
    from lamina.view import View

    view = View(quiet=as_json)
    comparison = config.load_comparison(file, overrides)
    found, folder = list(cells(comparison, out)), out / comparison.name
    check(comparison, found)
    misfits: dict[str, str] = {}
    with view.cells(len(found)) as live:
        try:
            for cell in found:
                what = f"{cell.label}, seed {cell.experiment.seed}"
                known = cell.result() or cell.label in misfits
                if not known:
                    live.begin(what)
                    run_cell(cell, misfits, live.play)
                live.done(what, cell.result(), misfits.get(cell.label), known=bool(known))
                if cell.result() and not known:
                    save(folder, collect(comparison, found, misfits))
        except KeyboardInterrupt:
            view.say("stopped; the same command goes on")
            raise typer.Exit(130) from None
    if not any(cell.result() for cell in found):
        reasons = "; ".join(f"{label}: {reason}" for label, reason in misfits.items())
        raise DoesNotFitError(f"no method fits the budgets: {reasons}")
    collected = collect(comparison, found, misfits)
    save(folder, collected)
    if as_json:
        _print_json(collected)
        return
    for table in tables.comparison(collected, wide=False):
        view.table(table)
    for label, reason in misfits.items():
        view.say(f"{label} does not fit: {reason}")
    view.say(answers.of_comparison(collected)[0])
    view.say(f"report {folder / 'report.html'}, table {folder / 'compare.md'}, runs {folder}")


@app.command()
def methods(
    names: Annotated[list[str] | None, typer.Argument(help="Only these methods.", show_default=False)] = None,
    as_json: Json = False,
) -> None:
    """List the methods: what they cut, what they can and cannot do, their sources and their settings."""
    from lamina import tables
    from lamina.errors import nearest
    from lamina.methods import METHODS
    from lamina.methods.about import describe
    from lamina.view import View

    if unknown := [name for name in names or () if name not in METHODS]:
        raise UserError(f"no method {unknown[0]!r}; {nearest(unknown[0], METHODS)}")
    rows: list[dict[str, Any]] = [describe(name) for name in names or METHODS]
    if as_json:
        _print_json({"schema": "lamina.methods/1", "methods": rows})
        return
    view = View()
    for table in tables.methods(rows):
        view.table(table)


@app.command()
def pretrain(file: File, overrides: Set = NOTHING, as_json: Json = False) -> None:
    """Pretrain one network per depth from plain text or images; the same command goes on after a stop."""
    from lamina import config
    from lamina.pretrain import pretrain as train
    from lamina.view import View

    view = View(quiet=as_json)
    job = config.load_pretrain(file, overrides)
    try:
        with view.pretraining(job) as live:
            for point in train(job):
                live(point)
                if as_json:
                    print(json.dumps({"schema": "lamina.pretrain/1"} | dataclasses.asdict(point)), flush=True)
    except KeyboardInterrupt:
        view.say("stopped; the same command goes on from the last checkpoint")
        raise typer.Exit(130) from None
    view.say(f"networks in {job.out}: {', '.join(f'{job.name}-{depth}' for depth in job.depths)}")


@app.command("import")
def bring(
    folder: Annotated[Path, typer.Argument(help="Folder as transformers writes it.", show_default=False)],
    out: Annotated[Path, typer.Option(help="Where the folder of the network goes.")] = Path("networks"),
    name: Annotated[str, typer.Option(help="Of the network; by default that of the folder.")] = "",
    force: Annotated[bool, typer.Option("--force", help="Replace a network of that name.")] = False,
    as_json: Json = False,
) -> None:
    """Check a pretrained network from a Hugging Face folder and copy what is needed of it."""
    from lamina import imports
    from lamina.table import Table
    from lamina.view import View

    name = name or folder.resolve().name
    if not name or Path(name).name != name or name in (".", ".."):
        raise UserError(f"--name must be the name of a folder, got {name!r}")
    found = imports.bring(folder, out / name, force)
    if as_json:
        _print_json(found.to_json())
        return
    view = View()
    view.table(Table(name, ("", ""), found.rows(), left=2))
    view.say(f"network {found.folder}")


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="Folder of a finished run.", show_default=False)],
    out: Annotated[Path | None, typer.Option(help="The folder to make; by default RUN/export.")] = None,
    dtype: Annotated[str, typer.Option(help="Of the weights: float32, float16 or bfloat16.")] = "float32",
    force: Annotated[bool, typer.Option("--force", help="Replace a network in that folder.")] = False,
    as_json: Json = False,
) -> None:
    """Write the network of a finished run as a folder for transformers, with an adapter for peft where there is one."""
    from lamina.export import export as write
    from lamina.view import View

    done = write(run, out or run / "export", dtype, force)
    if as_json:
        _print_json(done.to_json())
        return
    view = View()
    view.say(f"{done.architecture} in {done.dtype}: {done.folder}")
    if done.beside:
        view.say(f"beside it, in lamina.safetensors: {', '.join(done.beside)}; see README.md there")
    if done.adapter:
        view.say(f"adapter {done.folder / 'adapter'}" if done.adapter is True else f"no adapter: {done.adapter}")


@app.command()
def profile(
    name: Annotated[str, typer.Option(help="Of the class; by default that of this machine.")] = "",
    reserve: Annotated[str, typer.Option(help="Free memory that is not for training.")] = "384 MiB",
    server: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder of a device of a kit: measure the way to its server too.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Measure what this machine can spare, and print it as a class of the fleet."""
    import platform
    from dataclasses import replace

    from lamina import profile as profiles
    from lamina.fleet import quantity
    from lamina.view import View

    try:
        reserve_bytes = quantity("--reserve", reserve)
    except ValueError as error:
        raise UserError(str(error)) from None
    View(quiet=True).say("training a small network for some seconds")
    found = profiles.profile(name or platform.node() or "device", reserve_bytes)
    if server:
        from lamina.deploy import kit, way

        found = replace(found, rates=way.rates(kit.load_device(server)))
    if as_json:
        _print_json(found.to_json())
    else:
        print(found.toml(), end="")


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="Of a finished run, or of a comparison.", show_default=False)],
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="The page; by default FOLDER/report.html.")] = None,
    figures: Annotated[Path | None, typer.Option(metavar="DIR", help="Write each chart here too, as SVG.")] = None,
    show: Annotated[bool, typer.Option("--open", help="Show the page in the browser.")] = False,
    as_json: Json = False,
) -> None:
    """Make the page that shows a run or a comparison: one file of HTML, with charts, that loads nothing."""
    import webbrowser

    from lamina import report as reports
    from lamina.view import View

    found = reports.read(folder)
    page = out or folder / reports.PAGE
    for place in (page, *([figures / "figure.svg"] if figures else [])):
        files.demand_place(place)
    files.write(page, found.html)
    drawn = reports.figures(found, figures) if figures else []
    if show and not webbrowser.open(page.resolve().as_uri()):
        View(quiet=True).say(f"found no browser to show {page} in")
    if as_json:
        _print_json({"schema": "lamina.report/1", "page": str(page), "figures": [str(path) for path in drawn]})
        return
    View().say(f"report {page}" + (f", figures {figures}" if drawn else ""))


@app.command()
def bench(
    workload: Annotated[str, typer.Argument(help="A to F; see docs/bench.md.", show_default=False)],
    against: Annotated[str, typer.Option(metavar="SYSTEMS", help="loop, loop-lean, pfl, flower: by commas.")] = "",
    overrides: Set = NOTHING,
    rounds: Annotated[int, typer.Option(help="Timed rounds of a turn.")] = 3,
    warmup: Annotated[int, typer.Option(help="Rounds of a turn before those.")] = 1,
    settle: Annotated[int, typer.Option(help="More of them for ours, until most devices have been seen.")] = 0,
    repeats: Annotated[int, typer.Option(help="Turns of each system.")] = 3,
    workers: Annotated[int, typer.Option(help="Devices computed at a time, by systems that can.")] = 1,
    device: Annotated[str, typer.Option(help="Where ours and the loops compute: cpu, cuda, cuda:1.")] = "cpu",
    tolerance: Annotated[float, typer.Option(help="How far weights may be apart, beside how far they went.")] = 1e-3,
    record: Annotated[Path | None, typer.Option(metavar="FILE", help="Add the result to this JSON file.")] = None,
    as_json: Json = False,
) -> None:
    """Time rounds against other simulators, and check that the weights are the same; makes their environments once."""
    from lamina import tables
    from lamina.bench import contest as contests
    from lamina.view import View

    names = tuple(name.strip() for name in against.split(",")) if against else ()
    times = rounds, warmup, settle, repeats
    contest = contests.Contest(workload, names, tuple(overrides), *times, workers, device, tolerance)
    view = View(quiet=True)
    try:
        with view.turns(contest.all_rounds) as live:
            result = contests.hold(contest, live)
    except KeyboardInterrupt:
        view.say("stopped; nothing is kept of this contest but the environments")
        raise typer.Exit(130) from None
    if record:
        contests.record(record, result)
    if as_json:
        _print_json(result)
    else:
        View().table(tables.contest(result))
    for name in (apart := contests.disagreeing(result)):
        differ = result["systems"][name]["weights_differ"]
        view.say(f"error: the weights of {name} differ from ours by {differ:.1e}, more than --tolerance {tolerance:g}")
    if apart:
        raise typer.Exit(1)


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=2, allow_nan=False))


def main() -> None:
    """Entry point: bad input gives one line on standard error and exit code 2."""
    try:
        app()
    except UserError as error:
        print(printable(f"error: {error}"), file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        told = about_place(error)
        print(printable(f"error: {told or error}"), file=sys.stderr)
        sys.exit(2 if told else 1)  # 1: a full disk, a folder that went away
