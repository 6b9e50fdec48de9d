"""What a person sees while a command works: tables, and a live line that becomes plain lines when piped."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table as RichTable
from rich.text import Text

from lamina.table import printable
from lamina.units import duration

if TYPE_CHECKING:
    from lamina.engines import Engine
    from lamina.pretrain import Pretrain
    from lamina.pretrain import Progress as Point
    from lamina.run import RoundRow, Run
    from lamina.server import DeviceRow
    from lamina.table import Table


class View:
    """A terminal, or a pipe."""

    def __init__(self, quiet: bool = False) -> None:
        """Speak on standard output, or, when that carries JSON, on standard error."""
        self.console = Console(stderr=quiet, highlight=False, soft_wrap=False)
        if not self.console.is_terminal:
            self.console.width = 120

    def say(self, text: str) -> None:
        """One line, which a terminal wraps and a pipe does not."""
        self.console.print(printable(text), markup=False, soft_wrap=not self.console.is_terminal)

    def table(self, table: Table) -> None:
        """A table under its title."""
        drawn = RichTable(
            header_style="dim",
            box=box.SIMPLE_HEAD if any(table.head) else None,
            show_header=any(table.head),
            pad_edge=False,
        )
        for index, head in enumerate(table.head):
            drawn.add_column(Text(printable(head)), justify="left" if index < table.left else "right", overflow="fold")
        for row in table.rows:
            drawn.add_row(*(Text(printable(cell)) for cell in row))
        self.console.print(printable(table.title), style="bold", markup=False)
        self.console.print(drawn)

    def play(
        self,
        run: Run,
        engine: Engine | None = None,
        play: Callable[[Callable[[RoundRow, Sequence[DeviceRow]], None]], dict[str, Any]] | None = None,
    ) -> dict[str, Any]:
        """Show the plan of a run, then its rounds as they go.

        Args:
            run: The run.
            engine: Carries its jobs; by default the devices are simulated in this process.
            play: Plays it in the place of `run.play`, given what is to be told of each round.

        Returns:
            Its summary.
        """
        from lamina import tables

        self.table(tables.networks(run.outlook.network_json()))
        for table in tables.of_classes(run.outlook.classes_json()):
            self.table(table)
        for note in run.task.notes:
            self.say(f"note: {note}")
        self.say(f"run folder {run.folder}")
        classes = [group.name for group in run.outlook.groups]
        with self.rounds(run.state.round, run.experiment.rounds) as live:

            def show(row: RoundRow, devices: Sequence[DeviceRow]) -> None:
                live.round(row, devices, classes)

            return play(show) if play else run.play(show, live.progress, engine)

    def outcome(self, run: Run, summary: Mapping[str, Any]) -> None:
        """What came out of a run, and where it is."""
        from lamina import tables

        for table in (tables.outcome(summary), tables.totals(summary)):
            self.table(table)
        self.say(f"report {run.folder / 'report.html'}, network {run.folder / 'model'}")

    @contextmanager
    def rounds(self, done: int, rounds: int) -> Iterator[LiveRounds]:
        """A live bar over the rounds."""
        columns = (
            TextColumn("round {task.completed:.0f}/{task.total:.0f}"),
            BarColumn(),
            TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=self.console, disable=not self.console.is_terminal) as bar:
            task = bar.add_task("", total=rounds, completed=done, note="accuracy before training")
            yield LiveRounds(self, bar, task, done)

    @contextmanager
    def pretraining(self, job: Pretrain) -> Iterator[Callable[[Point], None]]:
        """A live bar over the steps of all depths."""
        columns = (
            TextColumn("{task.fields[note]}"),
            BarColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=self.console, disable=not self.console.is_terminal) as bar:
            task = bar.add_task("", total=sum(job.steps), note=f"reading the {job.source}")

            def show(point: Point) -> None:
                before = sum(s for d, s in zip(job.depths, job.steps, strict=True) if d < point.depth)
                bar.update(task, completed=before + point.step, note=f"depth {point.depth}")
                self.say(
                    f"depth {point.depth} step {point.step}/{point.steps}: loss {point.train_loss:.4f},"
                    f" validation {point.val_loss:.4f} nats, {point.told()}"
                )

            yield show

    @contextmanager
    def cells(self, cells: int) -> Iterator[LiveCells]:
        """A live bar over the cells of a comparison."""
        columns = (
            TextColumn("run {task.fields[number]}/{task.total:.0f}"),
            BarColumn(),
            TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=self.console, disable=not self.console.is_terminal) as bar:
            yield LiveCells(self, bar, bar.add_task("", total=cells, note="", number=0))

    @contextmanager
    def turns(self, rounds: int) -> Iterator[LiveTurns]:
        """A live bar over the rounds of systems that take turns."""
        columns = (
            TextColumn("{task.fields[note]}"),
            BarColumn(),
            TextColumn("{task.completed:.0f}/{task.total:.0f} rounds"),
            TimeElapsedColumn(),
        )
        with Progress(*columns, console=self.console, disable=not self.console.is_terminal) as bar:
            yield LiveTurns(self, bar, bar.add_task("", total=rounds, note="preparing"))


class LiveTurns:
    """Shows a contest of systems as it goes."""

    def __init__(self, view: View, bar: Progress, task: TaskID) -> None:
        """Begin."""
        self.say, self._bar, self._task = view.say, bar, task

    def advance(self, note: str, rounds: int) -> None:
        """So many more rounds are over, or need not be played."""
        self._bar.update(self._task, advance=rounds, note=note)


class LiveCells:
    """Shows a comparison as it goes."""

    def __init__(self, view: View, bar: Progress, task: TaskID) -> None:
        """Begin."""
        self._view, self._bar, self._task, self._done, self._what = view, bar, task, 0, ""

    def begin(self, what: str) -> None:
        """A cell is taken up."""
        self._what = what
        self._bar.update(self._task, note=f"{what}: planning", number=self._done + 1)

    def play(self, run: Run) -> None:
        """Play a run to its end, within its cell."""
        rounds = run.experiment.rounds

        def show(done: int, jobs: int) -> None:
            at = run.state.round + done / jobs
            note = f"{self._what}: round {run.state.round + 1}/{rounds}"
            self._bar.update(self._task, completed=self._done + at / rounds, note=note)

        run.play(on_progress=show)

    def done(self, what: str, result: Mapping[str, Any] | None, misfit: str | None, known: bool) -> None:
        """A cell is finished: one line."""
        self._done += 1
        self._bar.update(self._task, completed=self._done, note=what, number=self._done)
        if result:
            before, after = (result["accuracy"][when]["mean_over_devices"] for when in ("before", "after"))
            text = f"{before:.2%} -> {after:.2%}, {result['totals']['seconds']:.0f} s"
        else:
            text = "does not fit" if misfit else "not run"
        self._view.say(f"{what}: {text}{', done before' if known and result else ''}")


class LiveRounds:
    """Shows a run as it goes."""

    def __init__(self, view: View, bar: Progress, task: TaskID, done: int) -> None:
        """Begin after `done` rounds."""
        self.view, self.bar, self.task, self.done = view, bar, task, done

    def progress(self, done: int, jobs: int) -> None:
        """Updates that came, of the jobs of the round under way."""
        self.bar.update(self.task, completed=self.done + done / jobs, note=f"{done}/{jobs} devices")

    def round(self, row: RoundRow, devices: Sequence[DeviceRow], classes: Sequence[str]) -> None:
        """A finished round: one line, one more for each update that was rejected for what it was."""
        from lamina.clock import ABANDONED, AWAY, FAILED, LATE

        self.done = row.round
        self.bar.update(self.task, completed=row.round)
        parts = []
        for index, name in enumerate(classes):
            losses = [each.loss for each in devices if each.group == index and each.loss is not None]
            parts.append(f"{name} {sum(losses) / len(losses):.3f}" if losses else f"{name} -")
        accuracy = f", accuracy {row.accuracy['mean_over_devices']:.2%}" if row.accuracy else ""
        loss = "no usable update: the round is abandoned" if row.loss is None else f"loss {row.loss:.3f}"
        counts = {why: sum(each.rejected == why for each in devices) for why in (LATE, AWAY, FAILED)}
        lost = [f", {count} {why}" for why, count in counts.items() if count]
        clock = f", clock {duration(row.clock_seconds)}" if row.clock_seconds else ""
        told = f"{accuracy}{''.join(lost)}, {row.seconds:.1f} s{clock}"
        self.view.say(f"round {row.round:3}: {loss} ({', '.join(parts)}){told}")
        for each in devices:
            if each.rejected not in (None, *counts, ABANDONED):
                self.view.say(f"           rejected: device {each.device}: {each.rejected}")
