"""The command line.  Nothing heavy is imported before a command needs it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from etude import console

if TYPE_CHECKING:
    from etude.study.plan import Plan
    from etude.study.store import Store

UNMET, MISTAKE, FAILED = 1, 2, 3

app = typer.Typer(
    name="etude",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    rich_markup_mode=None,
    help="""Run published techniques for language models side by side, on your own checkpoint and text, and see which one helps.

Begin with `etude run examples/depth-pruning.yaml`, or `etude methods` to see what there is.""",
    epilog="Exit codes: 0 all is well, 1 an expectation was not met, 2 a mistake in what was given, 3 a step failed.",
)
store_app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Look after the store, where every computed value lies under the digest of what made it.")
app.add_typer(store_app, name="store")

StudyFile = Annotated[Path, typer.Argument(metavar="STUDY", help="The study, a YAML file.")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change something in the study: `base=./my-model`, `pruned.sleb.blocks=0.5`, `healed.budget='1M tokens'`. Repeatable.")
]
Seeds = Annotated[int | None, typer.Option(min=1, help="Number of seeds, in place of the study's.")]
StoreAt = Annotated[Path | None, typer.Option("--store", metavar="FOLDER", help="Where computed values are kept.  [default: $ETUDE_STORE, else .etude]")]
AsJson = Annotated[bool, typer.Option("--json", help="Print data, for programs.")]


def main() -> None:
    """Run the command line: a user's mistake is one message and exit code 2, never a traceback."""
    from etude.values.errors import InputError

    try:
        app()
    except InputError as error:
        typer.secho(f"error: {error}", fg="red", err=True)
        sys.exit(MISTAKE)
    except KeyboardInterrupt:
        typer.echo("stopped; what was finished is kept, and the same command goes on from there", err=True)
        sys.exit(130)
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(0)


@app.command()
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
    plan = _plan(study, set_, seeds)
    place = _store(store)
    with console.live(len([node for node in plan.nodes if node.kind != "given"]), quiet=as_json) as listen:
        from etude.study.run import run as walk

        done = walk(plan, place, only or (), listen)
    from etude.study.results import write

    folder = out or Path("out") / plan.study.name
    found = write(done, folder)
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


@app.command()
def plan(study: StudyFile, set_: Overrides = None, seeds: Seeds = None, store: StoreAt = None, as_json: AsJson = False) -> None:
    """Show what a study would compute, what the store already has, and what the rest may cost; computes nothing.

    Seconds are those of the same method's earlier runs in this store, where there are any.
    """
    unrolled = _plan(study, set_, seeds)
    place = _store(store)
    from etude.study.estimate import estimate

    rows = estimate(unrolled, place)
    if as_json:
        typer.echo(json.dumps(rows))
        return
    console.table(
        ["", "method", "seed", "state", "seconds", "tokens"],
        [
            [
                row["name"],
                row["method"] or "",
                console.dash(row["seed"]),
                row["state"],
                console.dash(row["seconds"] and f"{row['seconds']:.1f}"),
                console.dash(row["tokens"] and f"{row['tokens']:,.0f}"),
            ]
            for row in rows
        ],
    )
    left = [row for row in rows if row["state"] == "to compute"]
    known = [row["seconds"] for row in left if row["seconds"] is not None]
    typer.echo(
        f"\n{len(left)} to compute"
        + (f", about {console.duration(sum(known))} for the {len(known)} whose like ran before" if known else "")
        + f"; models up to {max((row['bytes'] for row in rows), default=0) / 1e6:.0f} MB of weights"
    )


@app.command()
def methods(stage: Annotated[str | None, typer.Argument(help="Show one stage only, such as `compress`.")] = None, as_json: AsJson = False) -> None:
    """List the methods: their names, what they take and give, and what they do in a line."""
    from etude.method import discover, interface
    from etude.values.errors import InputError, nearest

    found = [interface(cls).as_data() for room in ("methods", "measures") for cls in discover(room).values()]
    if stage:
        stages = {row["stage"] for row in found}
        if stage not in stages:
            raise InputError(f"there is no stage {stage!r}", remedy=nearest(stage, stages))
        found = [row for row in found if row["stage"] == stage]
    if as_json:
        typer.echo(json.dumps(found, indent=1))
        return
    console.table(["method", "takes", "gives", "what it does"], [[row["name"], ", ".join(row["inputs"].values()), row["output"], row["summary"]] for row in found])


@app.command()
def show(name: Annotated[str, typer.Argument(metavar="METHOD", help="A method or measure, such as `compress.sleb` or `perplexity`.")], as_json: AsJson = False) -> None:
    """Show one method: what it does, where it comes from, its inputs and every parameter."""
    from etude.method import find, interface, names

    cls = find("measures" if name in names("measures") else "worlds" if name in names("worlds") else "methods", name)
    face = interface(cls)
    data = face.as_data()
    if as_json:
        typer.echo(json.dumps({**data, "documentation": face.documentation}, indent=1))
        return
    typer.secho(data["name"], bold=True)
    typer.echo(f"\n{face.documentation}\n")
    takes = ", ".join(f"{slot}: {kind}" for slot, kind in data["inputs"].items()) or "nothing"
    extras = [word for word, used in (("a seed", data["takes_seed"]), ("a budget", data["takes_budget"])) if used]
    typer.echo(f"takes {takes}{'; ' + ' and '.join(extras) if extras else ''}\ngives {data['output']}\n")
    for parameter in data["parameters"]:
        typer.echo(f"  {parameter['name']}: {parameter['type']} = {parameter['default']!r}")
        typer.echo(f"      {parameter['documentation']}".replace("\n", "\n      "))


@app.command()
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


@app.command()
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

        unrolled, place = _plan(Path(source), set_, None), _store(store)
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


# The store.


@store_app.command("ls")
def store_ls(store: StoreAt = None, as_json: AsJson = False) -> None:
    """List what the store holds: when it was made, by what, how large it is."""
    place = _store(store)
    rows = []
    for key in place.digests():
        record = place.record(key)
        rows.append(
            {
                "digest": key,
                "kind": record["kind"],
                "method": record["method"],
                "name": record["name"],
                "finished": record["finished"],
                "seconds": record["cost"]["seconds"],
                "bytes": sum(file["bytes"] for file in record["files"].values()),
            }
        )
    rows.sort(key=lambda row: row["finished"])
    if as_json:
        typer.echo(json.dumps(rows, indent=1))
        return
    console.table(
        ["digest", "finished", "kind", "method", "name", "seconds", "MB"],
        [[r["digest"][:12], r["finished"], r["kind"], r["method"], r["name"], f"{r['seconds']:.1f}", f"{r['bytes'] / 1e6:.1f}"] for r in rows],
    )
    typer.echo(f"\n{len(rows)} objects, {sum(row['bytes'] for row in rows) / 1e6:,.1f} MB in {place.root}")


@store_app.command("verify")
def store_verify(store: StoreAt = None) -> None:
    """Read every object again and compare it with its record; exits 3 if anything is not what was written."""
    place = _store(store)
    wrong = {key: problems for key in place.digests() if (problems := place.verify(key))}
    for key, problems in wrong.items():
        for problem in problems:
            typer.secho(f"{key}: {problem}", fg="red", err=True)
    typer.echo(f"{len(place.digests())} objects, {len(wrong)} of them broken" + ("; remove their folders and run the study again" if wrong else ""))
    if wrong:
        raise typer.Exit(FAILED)


@store_app.command("gc")
def store_gc(
    store: StoreAt = None,
    forget: Annotated[list[str] | None, typer.Option(metavar="STUDY", help="Let go of what only this study needs. Repeatable.")] = None,
    dry_run: Annotated[bool, typer.Option(help="Only say what would go.")] = False,
) -> None:
    """Delete what no study needs any more: objects of edited methods, leftovers of interrupted writes."""
    place = _store(store)
    import shutil

    from etude.values.errors import InputError, nearest

    for name in forget or ():
        path = place.runs / f"{name}.json"
        if not path.exists():
            raise InputError(f"the store remembers no study {name!r}", remedy=nearest(name, [run.stem for run in place.runs.glob("*.json")]))
        if not dry_run:
            path.unlink()
    garbage = place.garbage()
    size = sum(file.stat().st_size for folder in garbage for file in folder.rglob("*") if file.is_file())
    for folder in garbage:
        if not dry_run:
            shutil.rmtree(folder)
    typer.echo(f"{len(garbage)} objects, {size / 1e6:,.1f} MB {'would go' if dry_run else 'deleted'}")


# Shared by the commands.


def _plan(path: Path, overrides: list[str] | None, seeds: int | None) -> Plan:
    from etude.study.plan import build
    from etude.study.recipe import Study

    return build(Study.read(path, [*(overrides or ()), *([f"seeds={seeds}"] if seeds else ())]))


def _store(path: Path | None) -> Store:
    from etude.study.store import Store

    return Store.open(path)
