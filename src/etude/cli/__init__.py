"""The command line.  Nothing heavy is imported before a command needs it."""

from __future__ import annotations

import sys

import typer

from etude.cli import claims, compare, methods, papers, serve, show, store, studies
from etude.cli.options import MISTAKE

app = typer.Typer(
    name="etude",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    rich_markup_mode=None,
    help="""Run published techniques for language models side by side, on your own checkpoint and text, and see which one helps.

Begin with `etude run examples/depth-pruning.yaml`, `etude methods` to see what there is, or `etude papers` for the papers behind it.""",
    epilog="Exit codes: 0 all is well, 1 an expectation was not met, 2 a mistake in what was given, 3 a step failed.",
)

app.command()(studies.run)
app.command()(studies.plan)
app.command()(methods.methods)
app.command()(show.show)
app.add_typer(papers.app, name="papers")
app.add_typer(claims.app, name="claims")
app.command()(studies.report)
app.command()(compare.compare)
app.command()(studies.export)
app.add_typer(store.app, name="store")
app.command()(serve.serve)


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
