"""Trending, the digest, and its way through a real SMTP server."""

from __future__ import annotations

import dataclasses
import datetime
import email
import email.policy
import json
import socket

import pytest
from aiosmtpd.controller import Controller
from aiosmtpd.smtp import AuthResult, LoginPassword

from etude.papers import mail, trending
from etude.papers.catalogue import Paper
from etude.papers.digest import build
from etude.papers.search import Index
from etude.papers.shelf import Listing, Shelf
from etude.study.store import Store
from etude.values.errors import InputError

TODAY = datetime.date(2026, 3, 10)
HOSTILE = '<script>alert("x")</script> & <b>bold</b>'


def paper(slug, date=None, comments=None, upvotes=None, added=None, title=None):
    return Paper(slug, slug, title or slug, None, date, None, "paper", "", "", "", "", "", abstract="About cats.", comments=comments, upvotes=upvotes, added=added)


def test_heat_falls_with_age_and_rises_with_what_is_said():
    papers = [paper("old", "2026-01-10", 10, 50), paper("new", "2026-03-09", 1, 2), paper("hot", "2026-03-08", 10, 50), paper("later", "2026-04-01", 99), paper("undated")]
    ranked = trending.trending(papers, TODAY)
    assert [one.paper.slug for one in ranked] == ["hot", "new", "old"]
    assert ranked[0].heat == pytest.approx((1 + 50 + 2 * 10) / (2 + 2) ** 1.8)
    assert [one.paper.slug for one in trending.trending(papers, TODAY, days=7, limit=1)] == ["hot"]


@pytest.mark.parametrize(
    ("date", "added", "day"), [("2024-02", None, "2024-02-29"), ("2024", None, "2024-12-31"), ("2024-02-14", None, "2024-02-14"), (None, "2026-01-02T03:04:05Z", "2026-01-02"), ("2024-13", None, None)]
)
def test_the_day_on_which_a_paper_appeared(date, added, day):
    found = trending.appeared(paper("x", date, added=added))
    assert (found and found.isoformat()) == day


@pytest.mark.parametrize(("text", "days"), [("7d", 7), ("2w", 14), ("1m", 30), ("1 year", 365), ("10 days", 10)])
def test_spans(text, days):
    assert trending.span(text) == days


@pytest.mark.parametrize("text", ["", "7", "d", "0d", "-1d", "7x", "7d7"])
def test_what_is_no_span_is_said(text):
    with pytest.raises(InputError, match="no span"):
        trending.span(text)


def test_a_digest_tells_what_came_in_its_days_and_nothing_else():
    papers = {
        one.slug: one
        for one in (paper("in", "2026-03-05"), paper("edge", "2026-03-03"), paper("out", "2026-03-02"), paper("month", "2026-03"), paper("added", "2020-01", added="2026-03-09T01:00:00Z"))
    }
    found = build(papers, datetime.date(2026, 3, 2), TODAY)
    assert {one.paper.slug for one in found.papers} == {"in", "edge", "added"}
    assert found.subject == "Étude: 3 new papers, 02 Mar to 10 Mar 2026"
    assert build(papers, datetime.date(2026, 3, 9), TODAY).empty
    assert "Nothing came" in build({}, datetime.date(2026, 3, 9), TODAY).as_text()


def test_a_digest_names_the_claims_that_were_tested():
    found = build({}, datetime.date(2020, 1, 1), datetime.date(2030, 1, 1))
    row = next(row for row in found.verdicts if row["slug"] == "sleb")
    assert row["verdict"] in ("holds", "contradicted", "undecided")
    assert f"SLEB: {row['verdict']} here" in found.as_text()
    assert "SLEB" in found.as_html()


def test_a_digest_can_be_about_something():
    papers = {one.slug: one for one in (paper("cats", "2026-03-05", title="On Cats"), paper("dogs", "2026-03-05", title="On Dogs"))}
    papers["dogs"] = dataclasses.replace(papers["dogs"], abstract="About dogs.")
    found = build(papers, datetime.date(2026, 3, 2), TODAY, "cats", Index(list(papers.values())))
    assert [one.paper.slug for one in found.papers] == ["cats"]


def test_titles_are_text_in_the_mail():
    found = build({"x": paper("x", "2026-03-05", title=HOSTILE)}, datetime.date(2026, 3, 2), TODAY)
    assert "<script>" not in found.as_html()
    assert "&lt;script&gt;" in found.as_html()
    assert HOSTILE in found.as_text()


@pytest.mark.parametrize("address", ["nobody", "a@b\nBcc: c@d.org", "a@b.org,c@d.org", "", "@b.org", "a@"])
def test_what_is_no_address_is_said(address):
    with pytest.raises(InputError, match="no mail address"):
        mail.checked(address)


# Through a server.


class Box:
    """Keeps what it is given."""

    def __init__(self):
        self.mails = []

    async def handle_RCPT(self, server, session, envelope, address, options):  # noqa: N802, aiosmtpd's name
        if address.startswith("full@"):
            return "552 the box is full"
        envelope.rcpt_tos.append(address)
        return "250 OK"

    async def handle_DATA(self, server, session, envelope):  # noqa: N802
        self.mails.append((envelope.mail_from, envelope.rcpt_tos, email.message_from_bytes(envelope.content, policy=email.policy.default)))
        return "250 OK"


@pytest.fixture
def server(monkeypatch):
    """A real SMTP server on this machine, which wants a name and a password."""
    box = Box()

    def known(server, session, envelope, mechanism, data):
        return AuthResult(success=isinstance(data, LoginPassword) and (data.login, data.password) == (b"etude", b"s3cret"))

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    controller = Controller(box, hostname="127.0.0.1", port=port, authenticator=known, auth_require_tls=False)
    controller.start()
    monkeypatch.setenv("ETUDE_SMTP", f"smtp://etude@127.0.0.1:{port}")
    monkeypatch.setenv("ETUDE_SMTP_PASSWORD", "s3cret")
    monkeypatch.delenv("ETUDE_SMTP_FROM", raising=False)
    yield box
    controller.stop()


@pytest.fixture
def place(tmp_path):
    shelf = Shelf(Store.open(tmp_path / "store"))
    shelf.put([Listing("Fóo: Doing it Better", abstract="About cats.", arxiv="2603.00001", date="2026-03-05", comments=3), Listing("On Dogs", abstract="About dogs.", date="2026-03-06")])
    rows = [json.loads(line) for line in shelf.path.read_text().splitlines()]
    shelf.path.write_text("".join(json.dumps({**row, "added": "2026-03-07T00:00:00Z"}) + "\n" for row in rows))
    return tmp_path / "store"


def test_a_digest_goes_through_a_server(server, place, etude):
    done = etude("papers", "digest", "--since", "7d", "--today", "2026-03-10", "--to", "me@example.org", "--to", "you@example.org", "--store", str(place))
    assert done.code == 0, done.err
    assert [to for _, to, _ in server.mails] == [["me@example.org"], ["you@example.org"]]
    sender, _, found = server.mails[0]
    assert sender == "me@example.org"
    assert found["Subject"].startswith("Étude: 2 new papers")
    text, html = found.get_body(("plain",)).get_content(), found.get_body(("html",)).get_content()
    assert "Fóo: Doing it Better" in text
    assert "https://arxiv.org/abs/2603.00001" in html


def test_subscriptions_are_sent_when_they_are_due_and_tell_only_what_is_new(server, place, etude):
    def papers(*words):
        return etude("papers", *words, "--store", str(place))

    assert papers("subscribe", "me@example.org", "--every", "7d", "--about", "dogs").code == 0
    assert papers("subscribe", "you@example.org", "--every", "5d").code == 0
    assert papers("digest", "--subscribed", "--today", "2026-03-10").code == 0
    bodies = {to[0]: found.get_body(("plain",)).get_content() for _, to, found in server.mails}
    assert "On Dogs" in bodies["me@example.org"]
    assert "Fóo" not in bodies["me@example.org"]
    assert "no subscription is due" in papers("digest", "--subscribed", "--today", "2026-03-10").out
    assert "nothing new for you@example.org" in papers("digest", "--subscribed", "--today", "2026-03-15").out
    assert len(server.mails) == 2
    assert [row["sent"] for row in json.loads(papers("subscriptions", "--json").out)] == ["2026-03-10", "2026-03-10"]
    assert papers("unsubscribe", "me@example.org").code == 0
    assert papers("unsubscribe", "me@example.org").code == 2


@pytest.mark.parametrize(
    ("variables", "to", "message"),
    [
        ({"ETUDE_SMTP": ""}, "me@example.org", "no mail server is named"),
        ({"ETUDE_SMTP": "ftp://host"}, "me@example.org", "no mail server's address"),
        ({"ETUDE_SMTP": "smtp://127.0.0.1:9"}, "me@example.org", "cannot be reached"),
        ({"ETUDE_SMTP_PASSWORD": "wrong"}, "me@example.org", "would not take the mail"),
        ({}, "full@example.org", "would not take the mail"),
        ({}, "nobody", "no mail address"),
    ],
)
def test_what_goes_wrong_with_mail_is_one_message(server, place, etude, monkeypatch, variables, to, message):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    failed = etude("papers", "digest", "--today", "2026-03-10", "--to", to, "--store", str(place))
    assert failed.code == 2
    assert message in failed.err
    assert "s3cret" not in failed.err
    assert "Traceback" not in failed.err


def test_a_digest_goes_to_the_screen_or_a_file(place, etude, tmp_path):
    assert "Fóo" in etude("papers", "digest", "--today", "2026-03-10", "--store", str(place)).out
    for name in ("digest.html", "digest.txt", "digest.eml"):
        assert etude("papers", "digest", "--today", "2026-03-10", "--out", str(tmp_path / name), "--store", str(place)).code == 0
    found = email.message_from_bytes((tmp_path / "digest.eml").read_bytes(), policy=email.policy.default)
    assert "Fóo" in found.get_body(("plain",)).get_content()
    assert etude("papers", "digest", "--out", str(tmp_path / "digest.pdf"), "--store", str(place)).code == 2


def test_trending_on_the_command_line(place, etude):
    rows = json.loads(etude("papers", "trending", "--today", "2026-03-10", "--since", "7d", "--json", "--store", str(place)).out)
    assert [row["slug"] for row in rows] == ["foo", "on-dogs"]
    assert "2 papers" in etude("papers", "trending", "--today", "2026-03-10", "--since", "7d", "--store", str(place)).out
    assert "no paper of that time" in etude("papers", "trending", "--today", "2019-03-10", "--since", "7d", "--store", str(place)).out
