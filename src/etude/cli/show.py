"""One method, or one paper, as a card."""

from __future__ import annotations

import json
import textwrap
from typing import TYPE_CHECKING, Annotated, Any

import typer

from etude import console
from etude.cli.options import AsJson, StoreAt

if TYPE_CHECKING:
    from etude.papers.catalogue import Paper


def show(
    name: Annotated[
        str,
        typer.Argument(
            metavar="NAME",
            help="A paper's slug or arXiv number, such as `sleb`; a method, measure or world, such as `compress.sleb` or `perplexity`; or a stage, such as `compress`.",
        ),
    ],
    store: StoreAt = None,
    as_json: AsJson = False,
) -> None:
    """Show a paper's card: what it does, its claim, our evidence, a study to copy; a method's: its source, inputs and parameters; or a stage's methods, side by side."""
    from etude.cli.papers import shelf
    from etude.method import names
    from etude.papers.catalogue import arxiv_number, find
    from etude.papers.rooms import method_card
    from etude.values.errors import InputError, nearest

    papers = shelf(store).papers()
    if name in papers or arxiv_number(name):
        _show_paper(find(name, papers), as_json)
        return
    if name in {method.partition(".")[0] for method in names("methods")}:
        _show_stage(name, as_json)
        return
    room = next((room for room in ("measures", "worlds") if name in names(room)), "methods")
    if "." not in name and room == "methods":
        raise InputError(f"there is no paper, measure or world {name!r}", remedy=nearest(name, [*papers, *names("measures"), *names("worlds"), *names("methods")]))
    data = method_card(room, name)
    if as_json:
        typer.echo(json.dumps(data, indent=1))
        return
    typer.secho(data["name"], bold=True)
    typer.echo(f"\n{data['documentation']}\n")
    _parameters(data)


def _show_stage(stage: str, as_json: bool) -> None:
    """The methods of a stage in a table: what each takes away, what it needs, what it costs, and what became of its paper here."""
    from etude.papers.rooms import stage_rows

    rows = stage_rows(stage)
    if as_json:
        typer.echo(json.dumps(rows, indent=1))
        return
    removes = any(row["removes"] for row in rows)
    header = ["method", *(["removes"] if removes else []), "needs", "cost", "its claim, here"]
    console.table(header, [[row["method"], *([row["removes"] or "–"] if removes else []), ", ".join(row["needs"]) or "nothing", row["cost"] or "–", row["verdict"]] for row in rows])
    typer.echo("\none of them: etude show NAME; the evidence of a claim: etude show PAPER")


def _parameters(data: dict[str, Any]) -> None:
    """What a method takes, gives and can be told."""
    takes = ", ".join(f"{slot}: {kind}" for slot, kind in data["inputs"].items()) or "nothing"
    extras = [word for word, used in (("a seed", data["takes_seed"]), ("a budget", data["takes_budget"])) if used]
    typer.echo(f"takes {takes}{'; ' + ' and '.join(extras) if extras else ''}\ngives {data['output']}\n")
    for parameter in data["parameters"]:
        typer.echo(f"  {parameter['name']}: {parameter['type']} = {parameter['default']!r}")
        typer.echo(f"      {parameter['documentation']}".replace("\n", "\n      "))


def _show_paper(paper: Paper, as_json: bool) -> None:
    from etude.papers.claims import claims
    from etude.papers.rooms import method_card, room_of
    from etude.papers.status import NEW, as_data, status

    found, claim = status(paper), claims().get(paper.slug)
    known = claim.evidence if claim else None
    methods = [method_card(room_of(name), name) for name in found.methods]
    if as_json:
        evidence = {**known.data, "state": claim.state} if claim and known else None
        typer.echo(json.dumps({**as_data(paper), "methods": methods, "evidence": evidence, "study": claim.text if claim else None}, indent=1))
        return
    typer.secho(f"{paper.name}: {found.words}", bold=True)
    facts = [paper.title, ", ".join(filter(None, (paper.kind, paper.stage, paper.date, f"{paper.authors} authors" if paper.authors else None))), paper.address]
    typer.echo("\n".join(fact for fact in facts if fact))
    if paper.abstract:
        _paragraph("Its abstract", paper.abstract)
    if found.status == NEW:
        typer.echo(f"\nnot in the catalogue; on your shelf since {(paper.added or '')[:10]}")
        return
    _paragraph("What it does", paper.does)
    _paragraph("Its claim", paper.claim)
    if paper.covers is not None:
        _paragraph("Of the papers here it covers", ", ".join(paper.covers) or "none")
        return
    _paragraph("What would test it", paper.check)
    if claim and known:
        typer.secho(f"\nOur evidence ({claim.state}; {len(known.data['seeds'])} seeds, {known.data['cost']['seconds']:,.0f} s, {str(known.data['finished'])[:10]})", bold=True)
        expectations(known.expectations)
    for data in methods:
        typer.secho(f"\nThe method: {data['name']}", bold=True)
        typer.echo(data["summary"])
        _parameters(data)
    if claim:
        typer.secho(f"\nA study to copy: {claim.path}", bold=True)
        typer.echo(textwrap.indent(claim.text.rstrip(), "  "))
        typer.echo(f"\nrun it: etude claims run {paper.slug}")
    if paper.related:
        _paragraph("Beside it", ", ".join(paper.related))


def expectations(rows: list[dict[str, Any]]) -> None:
    """What became of each expectation of a claim."""

    def number(value: float | None) -> str:
        return "–" if value is None else f"{value:,.4g}"

    console.table(
        ["measured here", "left", "right", "holds by [95 % interval]", ""],
        [[row["text"], number(row["left"]), number(row["right"]), console.interval(row["margin"] if row["margin"]["value"] is not None else None), row["verdict"]] for row in rows],
    )


def _paragraph(title: str, text: str) -> None:
    typer.secho(f"\n{title}", bold=True)
    typer.echo(textwrap.fill(text, min(100, console.width())))
