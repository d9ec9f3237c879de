"""Studies: run, plan, report, export."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from etude import console
from etude.cli.options import FAILED, UNMET, AsJson, Overrides, Seeds, StoreAt, StudyFile, opened, planned


def run(
    study: StudyFile,
    set_: Overrides = None,
    seeds: Seeds = None,
    only: Annotated[list[str] | None, typer.Option(metavar="NAME", help="Compute only this step or measure, and what it needs. Repeatable.")] = None,
    out: Annotated[Path | None, typer.Option(metavar="FOLDER", help="Where results and report go.  [default: out/<name of the study>]")] = None,
    store: StoreAt = None,
    as_json: AsJson = False,
) -> None:
    """Run a study: compute what is not in the store yet, then write results.json and report.html.

    What was computed once is never computed again; an interrupted run goes on where it stood.
    """
    from etude.study.journal import Journal

    plan = planned(study, set_, seeds)
    place, folder = opened(store), out or Path("out") / plan.study.name
    with Journal(plan, place, folder) as journal:
        with console.live(journal, quiet=as_json) as listen:
            from etude.study.run import run as walk

            done = walk(plan, place, only or (), listen)
        from etude.study.results import write

        found = write(done, folder)
        journal.ended(found["verdict"])
    if as_json:
        typer.echo(json.dumps(found))
    else:
        console.outcome_table(found)
        console.expectations(found)
        console.failures(done)
        computed = sum(state == "computed" for state in done.states.values())
        typer.echo(f"\n{computed} computed, {sum(state == 'cached' for state in done.states.values())} from the store, in {console.duration(done.seconds)}")
        typer.echo(f"report: {folder / 'report.html'}")
    if done.failed:
        raise typer.Exit(FAILED)
    if not only and any(outcome["verdict"] != "holds" for outcome in found["expectations"]):
        raise typer.Exit(UNMET)


def plan(study: StudyFile, set_: Overrides = None, seeds: Seeds = None, store: StoreAt = None, as_json: AsJson = False) -> None:
    """Show what a study would compute, what the store already has, and what the rest may cost; computes nothing.

    Seconds and peak memory are those of the same method's earlier runs in this store; where there are none, and the method trains or measures speed or
    perplexity, they are estimated from the model's size and from what this machine can do, which is measured once a store: these have a ~ before them.
    """
    unrolled = planned(study, set_, seeds)
    place = opened(store)
    from etude.study.estimate import estimate

    rows = estimate(unrolled, place)
    if as_json:
        typer.echo(json.dumps(rows))
        return
    console.table(["", "method", "seed", "state", "seconds", "peak MB", "tokens"], [_planned_row(row) for row in rows])
    left = [row for row in rows if row["state"] == "to compute"]
    known = [row["seconds"] for row in left if row["source"] == "record"]
    foretold = [row["seconds"] for row in left if row["source"] == "estimate"]
    typer.echo(
        f"\n{len(left)} to compute"
        + (f", about {console.duration(sum(known))} for the {len(known)} whose like ran before" if known else "")
        + (f", ~{console.duration(sum(foretold))} by estimate for {len(foretold)}" if foretold else "")
        + f"; models up to {max((row['bytes'] for row in rows), default=0) / 1e6:.0f} MB of weights"
    )


def _planned_row(row: dict[str, Any]) -> list[str]:
    about = "~" if row["source"] == "estimate" else ""
    return [
        row["name"],
        (row["method"] or "") + (f", {row['trials']} trials" if row["trials"] > 1 else ""),
        console.dash(row["seed"]),
        row["state"],
        console.dash(row["seconds"] and f"{about}{row['seconds']:.1f}"),
        console.dash(row["peak_bytes"] and f"{about}{row['peak_bytes'] / 1e6:.0f}"),
        console.dash(row["tokens"] and f"{row['tokens']:,.0f}"),
    ]


def report(
    results: Annotated[Path, typer.Argument(help="A results.json, or the folder that holds one.")],
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Where to write it.  [default: report.html beside the results]")] = None,
) -> None:
    """Write the report of earlier results anew."""
    from etude.study.report import render
    from etude.study.results import SCHEMA
    from etude.study.store import write_atomically, writing
    from etude.values.errors import InputError

    path = results / "results.json" if results.is_dir() else results
    try:
        data = json.loads(path.read_text(encoding="utf8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read: {error}", remedy="Give the results.json that `etude run` wrote.") from error
    if not isinstance(data, dict) or data.get("schema") != SCHEMA:
        raise InputError(f"{path} holds no results of the schema {SCHEMA}", remedy="Give the results.json that `etude run` wrote.")
    target = out or path.with_name("report.html")
    with writing(target):
        write_atomically(target, render(data))
    typer.echo(f"report: {target}")


def export(
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="A study's YAML file, or a checkpoint folder.")],
    target: Annotated[Path, typer.Argument(help="The folder to write.")],
    value: Annotated[str | None, typer.Option(metavar="NAME", help="Which model of the study, as in `pruned[sleb]`.")] = None,
    seed: Annotated[int, typer.Option(help="Of which seed.")] = 0,
    set_: Overrides = None,
    store: StoreAt = None,
) -> None:
    """Write a model as a folder that plain transformers loads with the same logits.

    What the architecture's config cannot say (blocks of unequal width, heads that the config ties to the width) comes back as zeros.
    """
    from etude.values.errors import InputError
    from etude.values.model import Model

    if not source.endswith((".yaml", ".yml")):
        model = Model.load(source)
    else:
        from etude.study.recipe import Reference

        unrolled, place = planned(Path(source), set_, None), opened(store)
        if value is None:
            raise InputError("which model of the study?", remedy=f"Add --value, one of {', '.join(unrolled.values)}.")
        if seed not in unrolled.study.seeds:
            raise InputError(f"the study has the seeds {', '.join(map(str, unrolled.study.seeds))}, not {seed}")
        nodes = unrolled.variants(Reference.parse(value, "--value"), seed)
        if len(nodes) > 1:
            raise InputError(f"{value} names {len(nodes)} models: {', '.join(node.name for node in nodes)}", where="--value")
        if nodes[0].kind != "given" and not place.has(nodes[0].key):
            raise InputError(f"{value} is not computed yet", remedy=f"Run it first: etude run {source} --only {nodes[0].owner}")
        model = nodes[0].value if nodes[0].kind == "given" else place.load(nodes[0].key)
        if not isinstance(model, Model):
            raise InputError(f"{value} is no model", where="--value")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise InputError(f"{target} exists and is not empty", remedy="Choose a new folder.")
    model.export(target)
    typer.echo(f"{target}: {model.base.model_type}, {model.parameters:,} parameters" + ("" if model.plain else ", padded with zeros to the shape that its config can say"))
