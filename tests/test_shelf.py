"""New papers: from the Hub (a local server that answers as it does), from files, merged where they are known."""

from __future__ import annotations

import http.server
import json
import os
import subprocess
import sys
import threading
import urllib.parse

import pytest

from etude.papers import imports
from etude.papers.catalogue import arxiv_number, catalogue
from etude.papers.shelf import Listing, Shelf, normalised
from etude.papers.status import NEW, status
from etude.study.store import Store
from etude.values.errors import InputError

ABSTRACT = (
    "We present a method that does something to language models, and we show on several benchmarks that it does it better "
    "than methods before it, at a small part of their cost and with no loss at all."
)


@pytest.fixture
def shelf(tmp_path):
    return Shelf(Store.open(tmp_path / "store"))


def test_a_new_paper_is_added_once_and_grows_by_what_others_say(shelf):
    done = shelf.put([Listing("Foo: Doing it Better", arxiv="2511.00001", date="2025-11")])
    assert done.added == ("foo",)
    assert shelf.put([Listing("Foo: Doing it Better", arxiv="2511.00001", date="2025-11")]).known == 1
    done = shelf.put([Listing("FOO — doing it better!", abstract=ABSTRACT, date="2025-11-03", comments=4)])
    assert (done.added, done.updated) == ((), ("foo",))
    paper = shelf.papers()["foo"]
    assert (paper.title, paper.arxiv, paper.date, paper.comments, paper.abstract) == ("Foo: Doing it Better", "2511.00001", "2025-11-03", 4, ABSTRACT)
    assert status(paper).status == NEW
    assert shelf.put([Listing("Foo: Doing it Better", arxiv="2511.00001", comments=9)]).updated == ("foo",)
    assert shelf.papers()["foo"].comments == 9


def test_a_paper_of_the_catalogue_keeps_its_place(shelf):
    known = catalogue()["sleb"]
    assert shelf.put([Listing(known.title, arxiv=known.arxiv)]).known == 1
    done = shelf.put([Listing("Another title of it", abstract=ABSTRACT, arxiv=known.arxiv, comments=3)])
    assert done.updated == ("sleb",)
    paper = shelf.papers()["sleb"]
    assert (paper.title, paper.claim, paper.comments, paper.stage) == (known.title, known.claim, 3, "compress")
    assert len(shelf.papers()) == len(catalogue())


def test_one_title_and_two_numbers_are_two_papers(shelf):
    done = shelf.put([Listing("A Survey", arxiv="2501.00001"), Listing("A Survey", arxiv="2502.00002"), Listing("a survey")])
    assert done.added == ("a-survey", "a-survey-2")


def test_titles_are_the_same_whatever_their_case_accents_and_signs():
    assert normalised("Étude: A–B  C!") == normalised("etude a b c") == normalised("ETUDE-ABC")
    with pytest.raises(ValueError, match="title"):
        Listing("…")


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("2402.09025v3", "2402.09025"),
        ("http://arxiv.org/pdf/2402.09025", "2402.09025"),
        ("arXiv:cs/0703053", "cs/0703053"),
        ("math.GT/0309136", "math.GT/0309136"),
        ("12402.09025", None),
        ("2413.09025", None),
        ("10.1145/3580305.3599790", None),
    ],
)
def test_arxiv_numbers(text, number):
    assert arxiv_number(text) == number


def test_a_broken_shelf_is_named(shelf):
    shelf.put([Listing("One")])
    shelf.path.write_text("{no json\n")
    with pytest.raises(InputError, match=r"papers\.jsonl cannot be read"):
        shelf.papers()


# Files.

BIBTEX = r"""
@article{one, title = {{SLEB}: Streamlining {LLMs} through Redundancy Verification and Elimination of Transformer Blocks},
  author = {Song, J. and Oh, K. and others}, year = 2024, eprint = {2402.09025}, archivePrefix={arXiv}}
@inproceedings{two, title = "Caf{\'e} models", author="Garc{\'\i}a, A.", year = "2025", month = mar, abstract = {Short.}}
@misc{three, author = {Nobody}, year = 2020}
@article{two, title = {The same key}, url = {https://arxiv.org/abs/2501.01234v1}}
@article{broken, title = {Never closed
"""


def test_bibtex(tmp_path, shelf):
    path = tmp_path / "refs.bib"
    path.write_text(BIBTEX)
    found = imports.read(path)
    by_title = {listing.title: listing for listing in found.listings}
    sleb = next(listing for title, listing in by_title.items() if title.startswith("SLEB"))
    assert (sleb.arxiv, sleb.date, sleb.authors) == ("2402.09025", "2024", 3)
    assert (by_title["Café models"].date, by_title["Café models"].authors, by_title["Café models"].abstract) == ("2025-03", 1, "Short.")
    assert by_title["The same key"].arxiv == "2501.01234"
    assert len(found.left_out) == 2  # one without a title, one that never ends
    done = shelf.put(found.listings)
    assert len(done.added) == 2
    assert done.known == 1  # SLEB is in the catalogue, and nothing new was said of it


def test_json_lines_of_several_makers(tmp_path):
    rows = [
        {"title": "One", "abstract": "text", "arxiv": "2501.00001", "date": "2025-01", "authors": 3, "comments": 2},
        {"title": "Two", "paper": {"id": "2501.00002", "summary": "words", "publishedAt": "2025-01-05T00:00:00.000Z", "authors": [{"name": "a"}, {"name": "b"}], "upvotes": 7}, "numComments": 1},
        {"id": "2501.00003", "title": "Three\n  lines", "abstract": " a\nb ", "authors": "A B, C D", "update_date": "2025-02-01"},
        {"abstract": "no title"},
        7,
    ]
    path = tmp_path / "papers.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + "{broken\n")
    found = imports.read(path)
    one, two, three = found.listings
    assert (one.arxiv, one.date, one.authors, one.comments) == ("2501.00001", "2025-01", 3, 2)
    assert (two.arxiv, two.abstract, two.date, two.authors, two.comments, two.upvotes) == ("2501.00002", "words", "2025-01-05", 2, 1, 7)
    assert (three.title, three.abstract, three.authors) == ("Three lines", "a b", 2)
    assert [line.partition(":")[0] for line in found.left_out] == ["line 4", "line 5", "line 6"]
    (tmp_path / "list.json").write_text(json.dumps(rows[:2]))
    assert len(imports.read(tmp_path / "list.json").listings) == 2


TEXT_PAGE = f"""Search papers
Sign up

Foo: Doing It Better Than Before

{ABSTRACT}

3 authors

· Published on Feb 14, 2024

12 comments

An Analysis of Something Else

{ABSTRACT[:94]}
{ABSTRACT[94:]}

1 author

2023-05-02

Something At the Bottom

Privacy
"""

HTML_PAGE = f"""<!doctype html><html><head><title>Papers</title><script>document.title = "A long script that is no abstract " + "word ".repeat(50)</script></head><body>
<nav><a href="/">Home</a> <a href="/models">Models</a></nav>
<article><div><h3><a href="/papers/2402.00001">Foo: Doing It <em>Better</em>
   Than Before</a></h3><p>{ABSTRACT}</p>
<ul><li>Submitted by somebody</li><li>3 authors</li><li><time datetime="2024-02-14T00:00:00">Feb 14</time></li><li>Upvote 33</li><li>12 comments</li></ul></div></article>
<article><h3><a href="/papers/2402.00002v2">&lt;script&gt;alert(1)&lt;/script&gt; in Titles</a></h3><p>{ABSTRACT}<br>{ABSTRACT}</p><span>1 author</span></article>
<footer>Company</footer></body></html>"""


def test_a_saved_page_of_text(tmp_path):
    (tmp_path / "page.txt").write_text(TEXT_PAGE)
    one, two = imports.read(tmp_path / "page.txt").listings
    assert (one.title, one.abstract, one.authors, one.date, one.comments) == ("Foo: Doing It Better Than Before", ABSTRACT, 3, "2024-02-14", 12)
    assert (two.title, " ".join(two.abstract.split()), two.authors, two.date, two.comments) == ("An Analysis of Something Else", ABSTRACT, 1, "2023-05-02", None)


def test_a_saved_page_of_html(tmp_path):
    (tmp_path / "page.html").write_text(HTML_PAGE)
    one, two = imports.read(tmp_path / "page.html").listings
    assert (one.title, one.arxiv, one.abstract, one.authors, one.date, one.upvotes, one.comments) == ("Foo: Doing It Better Than Before", "2402.00001", ABSTRACT, 3, "2024-02-14", 33, 12)
    assert (two.title, two.arxiv, two.abstract, two.authors) == ("<script>alert(1)</script> in Titles", "2402.00002", f"{ABSTRACT} {ABSTRACT}", 1)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.bib", "no bibtex at all", "no paper in"),
        ("a.jsonl", "{", "no paper in"),
        ("a.html", "<p>hello", "no paper in"),
        ("a.pdf", "%PDF", "of no kind"),
        ("a.json", "[1, 2", "no paper in"),
        ("a.txt", "", "no paper in"),
    ],
)
def test_files_without_papers_are_one_message(tmp_path, etude, name, text, message):
    (tmp_path / name).write_text(text)
    failed = etude("papers", "import", str(tmp_path / name), "--store", str(tmp_path / "store"))
    assert failed.code == 2
    assert message in failed.err
    assert "Traceback" not in failed.err


def test_bytes_that_are_no_text_are_one_message(tmp_path, etude):
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe\x00\x81")
    assert "cannot be read" in etude("papers", "import", str(tmp_path / "a.txt")).err
    assert etude("papers", "import", str(tmp_path / "nothing.bib")).code == 2


def test_the_command_line_imports_lists_and_shows(tmp_path, etude):
    (tmp_path / "page.txt").write_text(TEXT_PAGE)
    place = ("--store", str(tmp_path / "store"))
    assert "2 new, 0 updated, 0 known already" in etude("papers", "import", str(tmp_path / "page.txt"), *place).out
    assert "0 new, 0 updated, 2 known already" in etude("papers", "import", str(tmp_path / "page.txt"), *place).out
    assert "2 of 491 papers: 2 new" in etude("papers", "--status", "new", *place).out
    assert "on your shelf since" in etude("show", "foo", *place).out
    assert json.loads(etude("papers", "doing it better", "--json", *place).out)[0]["slug"] == "foo"


# The Hub.


class Hub(http.server.BaseHTTPRequestHandler):
    """Answers as the Hub does to what `huggingface_hub` asks of papers."""

    def do_GET(self):
        address = urllib.parse.urlsplit(self.path)
        day = urllib.parse.parse_qs(address.query).get("date", ["newest"])[0]
        paper = {
            "id": "2402.00001",
            "title": "Foo: Doing It Better",
            "summary": ABSTRACT,
            "publishedAt": "2024-02-14T00:00:00.000Z",
            "authors": [{"name": "A", "_id": "1"}, {"name": "B", "_id": "2"}],
            "upvotes": 5,
        }
        answers = {
            "/api/daily_papers": [
                {"paper": dict(paper), "title": f"{paper['title']}", "publishedAt": paper["publishedAt"], "numComments": 3},
                {"paper": {"id": "2402.09025", "upvotes": 1}, "title": catalogue()["sleb"].title, "numComments": 8},
            ],
            "/api/papers/2402.00001": paper,
        }
        if day == "2024-02-30":
            answers = {"/api/daily_papers": {"error": "no list"}}
        known = answers.get(address.path)
        self.send_response(200 if known is not None else 404)
        self.send_header("content-type", "application/json")
        self.end_headers()
        self.wfile.write(json.dumps(known if known is not None else {"error": "not found"}).encode())

    def log_message(self, *words):
        pass


@pytest.fixture(scope="module")
def hub():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def asked(hub, folder, *words, **more):
    environment = {**os.environ, "HF_ENDPOINT": hub, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_TELEMETRY": "1", **more}
    return subprocess.run([sys.executable, "-m", "etude", "papers", *words, "--store", str(folder)], capture_output=True, text=True, env=environment, timeout=120, check=False)


def test_papers_of_a_day_are_synced_and_merged(hub, tmp_path):
    done = asked(hub, tmp_path, "sync", "--daily", "2024-02-14")
    assert done.returncode == 0, done.stderr
    assert "1 new, 1 updated, 0 known already" in done.stdout
    papers = Shelf(Store(tmp_path)).papers()
    assert (papers["foo"].date, papers["foo"].authors, papers["foo"].comments, papers["foo"].upvotes) == ("2024-02-14", 2, 3, 5)
    assert (papers["sleb"].comments, papers["sleb"].claim) == (8, catalogue()["sleb"].claim)
    assert "0 new, 0 updated, 2 known already" in asked(hub, tmp_path, "sync", "--daily").stdout


def test_one_paper_is_added_by_its_number(hub, tmp_path):
    done = asked(hub, tmp_path, "add", "https://arxiv.org/abs/2402.00001v2", "--json")
    assert json.loads(done.stdout) == {"added": ["foo"], "updated": [], "known": 0}


@pytest.mark.parametrize(
    ("words", "more", "message"),
    [
        (("add", "2402.99999"), {}, "the Hub has not paper 2402.99999"),
        (("add", "no-number"), {}, "no arXiv number"),
        (("sync",), {}, "which list?"),
        (("sync", "--daily", "14.2.2024"), {}, "is no date"),
        (("sync", "--daily"), {"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE is set"),
        (("sync", "--daily"), {"HF_ENDPOINT": "http://127.0.0.1:9"}, "cannot be reached"),
    ],
)
def test_what_goes_wrong_with_the_hub_is_one_message(hub, tmp_path, words, more, message):
    failed = asked(hub, tmp_path, *words, **more)
    assert failed.returncode == 2
    assert message in failed.stderr
    assert "Traceback" not in failed.stderr
