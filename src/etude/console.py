"""What the command line draws: tables, the moving line of a run, what came out."""

from __future__ import annotations

import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from etude.study.journal import Journal
    from etude.study.run import Event, Run

QUIET_FOR = 30.0
"""Seconds after which a long step says how far it is, where no moving line can be drawn."""
BAR_AFTER = 0.5
"""Seconds after which work is worth a bar."""


@contextmanager
def live(journal: Journal, quiet: bool) -> Iterator[Callable[[Event], None]]:
    """One line a finished step, and while one runs, how far it is; on a terminal as a moving line.  The journal hears of everything too."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    from etude.engine import progress

    console = Console(stderr=True, quiet=quiet, highlight=False)
    done, spoken = 0, time.monotonic()
    total = len(journal.steps)
    with Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}", markup=False),
        console=console,
        transient=True,
    ) as bar:
        task = bar.add_task("", total=1.0, note="", visible=False)

        def hear(report: progress.Progress) -> None:
            nonlocal spoken
            journal.progress(report)
            if not console.is_terminal and time.monotonic() - spoken > QUIET_FOR:
                spoken = time.monotonic()
                console.print(f"{report.done / report.total:>8.0%}  {report.doing} {report.note}".rstrip(), markup=False, soft_wrap=True)
            bar.update(task, completed=report.done / report.total, note=f"{report.doing} {report.note}".strip(), visible=True)

        def listen(event: Event) -> None:
            nonlocal done, spoken
            journal.event(event)
            spoken = time.monotonic()
            if event.state == "started":
                bar.reset(task, description=event.node.label, total=1.0, note="", visible=True)
                return
            if event.state in ("computed", "cached", "failed", "skipped"):
                done += 1
            bar.update(task, visible=False)
            seconds = f"{event.seconds:7.1f} s" if event.seconds else " " * 9
            place = f"[{done:>{len(str(total))}}/{total}] "
            console.print(f"{place}{seconds}  {event.state:<9} {event.node.label}" + (f": {event.error}" if event.error else ""), markup=False, soft_wrap=True)

        with progress.listening(hear):
            yield listen


@contextmanager
def bar(doing: str) -> Iterator[Callable[[int, int], None]]:
    """A bar for work that is told how far it is, done of total; nothing is drawn for what is done at once, or where nobody looks."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    begun = time.monotonic()
    with Progress(TextColumn("{task.description}"), BarColumn(bar_width=24), TextColumn("{task.percentage:>3.0f}%"), TimeRemainingColumn(), console=Console(stderr=True), transient=True) as drawn:
        task = drawn.add_task(doing, visible=False)

        def told(done: int, total: int) -> None:
            drawn.update(task, completed=done, total=total, visible=done < total and time.monotonic() - begun > BAR_AFTER)

        yield told


def outcome_table(found: dict[str, Any]) -> None:
    """A row a value, a column a measure's first part, means with intervals."""
    rows = found["measurements"]
    measures = list(dict.fromkeys((row["measure"], row["part"], row["unit"]) for row in rows))
    main = [(measure, part, unit) for measure, part, unit in measures if (measure, part) == next((m, p) for m, p, _ in measures if m == measure)]
    if found["question"]:
        typer.secho(f"\n{found['question']}\n", bold=True)
    cells = {(row["of"], row["measure"], row["part"]): row["estimate"] for row in rows}
    values = list(dict.fromkeys(row["of"] for row in rows))
    header = ["", *(part.replace("_", " ") + (f" ({unit})" if unit and unit != "parameters" else "") for _, part, unit in main)]
    marks = found.get("marks") or {}
    table(header, [[value + " †" * (value in marks), *(interval(cells.get((value, measure, part))) for measure, part, _ in main)] for value in values])
    for value, notes in marks.items():
        if value in values:
            typer.echo(f"† {value} was not treated like the other variants: {'; '.join(notes)}")


def expectations(found: dict[str, Any]) -> None:
    """Every expectation with what became of it."""
    for outcome in found["expectations"]:
        colour = {"holds": "green", "contradicted": "red"}.get(outcome["verdict"], "yellow")
        typer.secho(f"\n{outcome['text']}: {outcome['sentence']}", fg=colour, nl=False)
    if found["expectations"]:
        typer.echo()


def failures(done: Run) -> None:
    """Every failed step with its error."""
    for node in done.failed:
        typer.secho(f"\n{node.label} failed:\n{done.errors[node.key]}", fg="red", err=True)


def interval(estimate: dict[str, Any] | None) -> str:
    """A mean with its interval."""
    if estimate is None:
        return ""
    value = f"{estimate['value']:,.4g}" if abs(estimate["value"]) < 1e4 else f"{estimate['value']:,.0f}"
    return value if estimate["low"] is None or estimate["low"] == estimate["high"] else f"{value} [{estimate['low']:.4g}, {estimate['high']:.4g}]"


def table(header: list[str], rows: list[list[str]]) -> None:
    """Print rows under a header; wide where nobody looks, so that nothing is folded."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="dim")
    for name in header:
        table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(*(Text(str(cell)) for cell in row))
    console = Console(highlight=False)
    console.print(table) if console.is_terminal else Console(highlight=False, width=200).print(table)


def duration(seconds: float) -> str:
    """Seconds in words."""
    return f"{seconds:.1f} s" if seconds < 100 else f"{seconds // 60:.0f} min {seconds % 60:.0f} s"


def dash(value: Any) -> str:
    """A value, or a dash for none."""
    return "–" if value is None or value == "" else str(value)


def width() -> int:
    """Columns of the terminal, or of a page where there is none."""
    import shutil

    return shutil.get_terminal_size((100, 24)).columns
