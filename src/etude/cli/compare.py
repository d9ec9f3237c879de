"""Two results, side by side."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from etude import console
from etude.cli.options import AsJson


def compare(
    first: Annotated[Path, typer.Argument(metavar="A", help="A results.json or its folder, or lm-eval's samples_*.jsonl or a folder of them.")],
    second: Annotated[Path, typer.Argument(metavar="B", help="Another.")],
    as_json: AsJson = False,
) -> None:
    """Compare two results, ours or lm-eval's logged samples, item by item.

    Differences are A - B, paired by item and seed, with intervals of 95 %; p is corrected for the number of comparisons (Holm), and "could see" is the
    smallest difference that these items and seeds would have shown four times in five.
    """
    from etude.study.against import against, read

    rows = against(read(first), read(second))
    if as_json:
        typer.echo(json.dumps([row.as_data() for row in rows]))
        return
    console.table(
        ["", "A", "B", "A - B", "could see", "p (Holm)", "better"],
        [
            [
                row.name,
                console.interval(row.one.as_data()),
                console.interval(row.other.as_data()),
                console.interval(row.difference.as_data() if row.difference else None),
                console.dash(row.difference and row.difference.visible and f"{row.difference.visible:.3g}"),
                console.dash(row.p if row.p is None else f"{row.p:.3g}"),
                {"first": "A", "second": "B"}.get(row.verdict, row.verdict),
            ]
            for row in rows
        ],
    )
