"""The claims: their table, running them, and the page that is made of their evidence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from etude import console
from etude.cli.options import FAILED, UNMET, AsJson, Defaulted, Overrides, Seeds, StoreAt, opened

app = typer.Typer(cls=Defaulted, rich_markup_mode=None, help="What papers claim, put to the test: studies whose expectations are the claim, and the evidence that running them gave.")


@app.command("list")
def list_(as_json: AsJson = False) -> None:
    """The table of all claims that have a study: verdict, evidence, and whether it is stale."""
    from etude.papers.claims import claims
    from etude.papers.status import VERDICTS

    found = [(claim, claim.evidence) for claim in claims().values()]
    if as_json:
        typer.echo(
            json.dumps(
                [{"slug": claim.paper.slug, "claim": claim.paper.claim, "study": claim.text, "state": claim.state, "evidence": known.data if known else None} for claim, known in found], indent=1
            )
        )
        return
    rows = []
    for claim, known in found:
        hold = sum(row["verdict"] == "holds" for row in known.expectations) if known else 0
        evidence = (
            [VERDICTS[known.verdict], f"{hold} of {len(known.expectations)}", len(known.data["seeds"]), console.duration(known.data["cost"]["seconds"]), str(known.data["finished"])[:10], claim.state]
            if known
            else ["not run yet", "", "", "", "", ""]
        )
        rows.append([claim.paper.slug, claim.path.parent.name, *evidence])
    console.table(["claim of", "stage", "verdict", "hold", "seeds", "cost", "run", "evidence"], rows)
    typer.echo(f"\n{len(rows)} claims; `etude show SLUG` is one of them, `etude claims run SLUG` runs it again")


@app.command()
def run(
    slugs: Annotated[list[str] | None, typer.Argument(metavar="[SLUG]…", help="Papers whose claims to run.")] = None,
    stale: Annotated[bool, typer.Option("--stale", help="Run all claims without evidence, and those whose study or methods have changed since.")] = False,
    set_: Overrides = None,
    seeds: Seeds = None,
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="Where results, report and evidence go, a folder a claim.")] = Path("out/claims"),
    record: Annotated[bool, typer.Option("--record", help="Keep the evidence in the package's own source, in place of what was there.")] = False,
    store: StoreAt = None,
    as_json: AsJson = False,
) -> None:
    """Run claims: their studies, judged. A verdict is a result, so that contradicted exits 0 as holds does; a failed step exits 3.

    `--set base=Qwen/Qwen2.5-0.5B` puts a claim to the test on another model.
    """
    from etude.papers import claims
    from etude.values.errors import InputError

    if record and (set_ or seeds):
        raise InputError("--record keeps the evidence of the claim as it is written, and --set or --seeds change it", remedy="Leave one of them out.")
    chosen = [claims.claim(slug) for slug in slugs or ()] + [claim for claim in claims.claims().values() if stale and claim.state in (None, "stale")]
    if not chosen and not stale:
        raise InputError("which claim?", remedy="Name the papers, as in `etude claims run sleb`, or add --stale; `etude claims` lists them.")
    place, found, failed = opened(store), [], False
    for claim in chosen:
        data, broken = _run(claim, place, out, [*(set_ or ()), *([f"seeds={seeds}"] if seeds else ())], record, quiet=as_json)
        found.append(data)
        failed |= broken
    if as_json:
        typer.echo(json.dumps(found, indent=1))
    elif not chosen:
        typer.echo("no claim is stale")
    if failed:
        raise typer.Exit(FAILED)


def _run(claim: Any, place: Any, out: Path, overrides: list[str], record: bool, quiet: bool) -> tuple[dict[str, Any], bool]:
    """Run one claim, say what came out; returns its evidence and whether a step failed."""
    from etude.cli.show import expectations
    from etude.papers import claims
    from etude.papers.status import VERDICTS
    from etude.study.journal import Journal

    if not quiet:
        typer.secho(f"\n{claim.paper.name}: {claim.paper.claim}\n", bold=True)
    plan, folder = claims.planned(claim, overrides), out / claim.paper.slug
    with Journal(plan, place, folder) as journal, console.live(journal, quiet=quiet) as listen:
        tested = claims.put_to_test(claim, plan, place, folder, listen)
        journal.ended(VERDICTS[tested.evidence.verdict])
    if record and not tested.run.failed:
        claims.record(tested)
    if not quiet:
        expectations(tested.evidence.expectations)
        console.failures(tested.run)
        typer.secho(f"\n{claim.paper.name}: {VERDICTS[tested.evidence.verdict]}", bold=True)
        typer.echo(f"report: {out / claim.paper.slug / 'report.html'}; evidence: {claims.evidence.FOLDER / tested.evidence.path.name if record else tested.evidence.path}")
    return dict(tested.evidence.data), bool(tested.run.failed)


@app.command()
def page(out: Annotated[Path, typer.Argument(metavar="FILE", help="Where to write it.")] = Path("docs/what-holds.md")) -> None:
    """Write the page "What holds" from the evidence."""
    from etude.papers.page import page as text
    from etude.study.store import write_atomically, writing

    with writing(out):
        write_atomically(out, text())
    typer.echo(out)


@app.command()
def judge() -> None:
    """Judge all evidence again from its items, without running anything, and write down what has changed: after a change of the statistics."""
    from etude.papers import evidence
    from etude.papers.claims import claims
    from etude.study.store import writing

    for claim in claims().values():
        known = claim.evidence
        if known is None:
            continue
        anew = known.rejudged()
        changed = [(old, new) for old, new in zip(known.expectations, anew["expectations"], strict=True) if old["verdict"] != new["verdict"]]
        if changed or anew["verdict"] != known.verdict:
            with writing(known.path.parent):
                evidence.write_data(anew, known.path)
            typer.echo(f"{claim.paper.slug}: {known.verdict}" + ("" if anew["verdict"] == known.verdict else f", now {anew['verdict']}"))
            for old, new in changed:
                typer.echo(f"  {new['text']}: {old['verdict']}, now {new['sentence']}")


@app.command()
def check() -> None:
    """Judge all evidence again from its items, and say what is stale; exits 1 if a verdict is not what the items say."""
    from etude.papers.claims import claims

    wrong = 0
    for claim in claims().values():
        known = claim.evidence
        if known is None:
            typer.secho(f"{claim.paper.slug}: no evidence yet; run `etude claims run {claim.paper.slug} --record`", fg="yellow")
            continue
        verdict, outcomes = known.judged()
        if verdict != known.verdict or [outcome.verdict for outcome in outcomes] != [row["verdict"] for row in known.expectations]:
            wrong += 1
            typer.secho(f"{claim.paper.slug}: the items say {verdict}, the evidence {known.verdict}", fg="red")
        if changed := known.changed(claim.text):
            typer.secho(f"{claim.paper.slug}: STALE, {', '.join(changed)} changed since; run `etude claims run {claim.paper.slug} --record`", fg="yellow")
    typer.echo(f"{len(claims())} claims, {wrong} of them with a verdict that their items do not give")
    if wrong:
        raise typer.Exit(UNMET)
