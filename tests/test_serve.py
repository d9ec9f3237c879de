"""The page: what it answers, that text is only text, and what a reader does in a browser (headless Chromium)."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import NamedTuple

import pytest
import uvicorn
from playwright.sync_api import expect

from etude.papers.catalogue import catalogue
from etude.papers.shelf import Listing, Shelf
from etude.serve import app as serving
from etude.study import journal
from etude.study.store import Store

HOSTILE = '<img src=x onerror="window.hacked=1"><script>window.hacked=1</script>{{ 7 * 7 }}'
expect.set_options(timeout=30_000)
NAME = '<img src=x onerror="window.hacked=1">{{ 7 * 7 }}'
CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


class Answer(NamedTuple):
    code: int
    headers: dict
    text: str


class Page(NamedTuple):
    """A page that is served, and the store behind it."""

    address: str
    store: Store

    def get(self, path, **headers):
        request = urllib.request.Request(self.address + path, headers=headers)
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return Answer(answer.status, {key.lower(): value for key, value in answer.headers.items()}, answer.read().decode())
        except urllib.error.HTTPError as error:
            return Answer(error.code, {key.lower(): value for key, value in error.headers.items()}, error.read().decode())


@contextlib.contextmanager
def served(folder):
    """A page over a store, in a thread of its own."""
    store = Store.open(folder)
    listening = socket.socket()
    listening.bind(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(serving.create_app(store), log_level="warning", access_log=False))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.02)
    yield Page(f"http://127.0.0.1:{listening.getsockname()[1]}", store)
    server.should_exit = True
    thread.join(10)


@pytest.fixture(scope="module")
def page(tmp_path_factory, tiny):
    """The page over a store with a hostile paper, a hostile run, and a study that ran."""
    folder = tmp_path_factory.mktemp("serve")
    store = Store.open(folder / "store")
    Shelf(store).put([Listing(HOSTILE, abstract=f"An abstract with {HOSTILE}", arxiv="2511.00001", date="2025-11-01", comments=5)])
    shutil.copytree(tiny, folder / "work")
    command = [sys.executable, "-m", "etude", "run", "study.yaml", "--seeds", "1", "--store", str(store.root)]
    subprocess.run(command, cwd=folder / "work", check=True, capture_output=True, timeout=300)
    notes = {
        "study": NAME, "question": HOSTILE, "recipe": HOSTILE, "folder": "/nowhere", "host": "elsewhere", "pid": 1, "started": 1.0, "updated": 2.0, "ended": 2.0, "state": "finished", "doing": None,
        "verdict": HOSTILE, "steps": [{"label": HOSTILE, "kind": "step", "state": "failed", "seconds": 1.0, "error": HOSTILE}],
    }  # fmt: skip
    (store.root / "live" / "hostile.json").write_text(json.dumps(notes))
    (store.root / "live" / "broken.json").write_text("{")
    with served(store.root) as page:
        yield page


def test_every_page_answers_and_is_guarded(page):
    key = page.store.digests()[0]
    papers = "/papers /papers?q=prune&stage=compress /papers/sleb /papers/2402.09025 /papers/llm-compression-survey /papers/emo-loss /papers?page=0 /trending /trending?since=1y"
    others = f"/methods /methods/compress /methods/compress.sleb /methods/perplexity /methods/testbed-masked /studies /studies/tiny /studies/tiny/report /store /store/{key} /nothing"
    for path in f"{papers} {others}".split():
        answer = page.get(path)
        assert answer.code == {"/nothing": 404, "/papers?page=0": 400}.get(path, 200), path
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert ("sandbox" in policy and "script" not in policy) if path.endswith("report") else "script-src 'self'" in policy
        assert "unsafe" not in policy or path.endswith("report")
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["referrer-policy"] == "no-referrer"
        if not path.endswith("report"):
            assert not re.search(r"<script(?! src=\"/static/page.js\")|\son\w+=|style=|javascript:", re.sub(r"&lt;.*?&gt;", "", answer.text)), path
            assert not re.search(r'(?:src|href|action)="(?!/|#|https://arxiv\.org/abs/)', answer.text), path


def test_nothing_is_asked_of_any_other_machine(page):
    for path in ("/papers", "/papers/sleb", "/static/style.css", "/static/page.js"):
        text = page.get(path).text
        assert not re.search(r"""(?:src|url\(|@import|fetch\()\s*=?\s*["'(]?https?:""", text)


def test_another_host_name_is_refused(page):
    assert page.get("/papers", Host="evil.example.org").code == 400
    assert page.get("/papers", Host="localhost:1").code == 200


@pytest.mark.parametrize(
    "path",
    [
        "/papers/nothing",
        "/methods/nothing",
        "/methods/compress.nothing",
        "/studies/nothing",
        "/studies/../../etc",
        "/store/nothing",
        "/store/..%2f..%2fetc%2fpasswd",
        "/studies/..%2f..%2fetc%2fpasswd/report",
        "/static/app.py",
        "/static/..%2fapp.py",
        "/studies/x%00y",
        "/trending?since=x",
    ],
)
def test_what_is_not_there_is_said(page, path):
    answer = page.get(path)
    assert answer.code == 404
    assert "Traceback" not in answer.text
    assert "root:" not in answer.text
    assert "<h1>" in answer.text


def test_hostile_text_is_text(page):
    escaped = "&lt;img src=x onerror="
    found = page.get("/papers?status=new").text
    slug = re.search(r'href="/papers/([^"]+)"', found.partition('class="papers"')[2])[1]
    for path in ("/papers?status=new", f"/papers/{slug}", "/papers?q=onerror", "/trending", "/studies", "/studies/" + urllib.request.quote(NAME, safe="")):
        answer = page.get(path)
        assert answer.code == 200, path
        assert escaped in answer.text, path
        assert "<img" not in answer.text, path
        assert "<script>window" not in answer.text, path
        assert "{{ 7 * 7 }}" in answer.text, path  # never a template
    answer = page.get("/papers?q=" + urllib.request.quote(f'"><script>{HOSTILE}'))
    assert "<script>window" not in answer.text


def test_filters_and_search_narrow_the_list(page):
    rows = json.loads(page.get("/papers.json?stage=compress&status=checked").text)
    assert rows
    assert {(row["stage"], row["status"]) for row in rows} == {("compress", "checked")}
    assert len(json.loads(page.get("/papers.json").text)) == len(catalogue()) + 1
    assert json.loads(page.get("/papers.json?q=redundncy+verificaton").text)[0]["slug"] == "sleb"
    assert {row["date"][:4] for row in json.loads(page.get("/papers.json?year=2022").text)} == {"2022"}
    fragment = page.get("/papers?q=prune&fragment=1").text
    assert "<html" not in fragment
    assert fragment.count("<li>") == 60


def test_a_new_paper_appears_while_the_page_is_served(page):
    Shelf(page.store).put([Listing("Zebrafish Models", abstract="About zebrafish.")])
    assert json.loads(page.get("/papers.json?q=zebrafish").text)[0]["slug"] == "zebrafish-models"


def test_a_run_that_was_killed_is_no_longer_running(page):
    path = page.store.root / "live" / "gone.json"
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    notes = json.loads((page.store.root / "live" / "tiny.json").read_text())
    path.write_text(json.dumps({**notes, "study": "gone", "state": "running", "ended": None, "pid": gone.pid}))
    assert journal.read(path).state == "stopped"
    assert "stopped" in page.get("/studies/gone").text
    path.unlink()


def test_a_journal_that_cannot_be_written_stops_no_run(workplace, etude, monkeypatch):
    monkeypatch.setattr("etude.study.journal.write_atomically", lambda path, text: (_ for _ in ()).throw(OSError(28, "no room")))
    assert etude("run", "study.yaml", "--only", "size", "--seeds", "1").code == 0


def contrast(one, other):
    """The ratio of WCAG 2: of relative luminances."""

    def luminance(colour):
        channels = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
        red, green, blue = (value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in channels)
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def test_contrast_is_that_of_wcag_aa():
    css = (serving.STATIC / "style.css").read_text()
    themes = [dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6});", part)) for part in css.split("@media (prefers-color-scheme: dark)")[:2]]
    assert len(themes) == 2
    for colours in themes:
        for ink, paper in [("ink", "paper"), ("soft", "paper"), ("link", "paper"), ("soft", "panel"), ("ink", "panel"), *((name, f"{name}-paper") for name in ("good", "bad", "open"))]:
            assert contrast(colours[ink], colours[paper]) >= 4.5, (ink, paper)
        for edge in ("edge", "focus", *(f"s{place}" for place in range(6))):
            assert contrast(colours[edge], colours["paper"]) >= 3, edge


# In a browser.


@pytest.fixture(scope="module")
def browser():
    if not CHROMIUM:
        pytest.skip("there is no Chromium on this machine")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playing:
        browser = playing.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def tab(browser, page):
    """A tab that fails a test for what goes wrong in it: an error, a refusal of the policy, a request to another machine."""
    context = browser.new_context(viewport={"width": 1100, "height": 800}, base_url=page.address)
    context.grant_permissions(["clipboard-read", "clipboard-write"])
    tab, wrong = context.new_page(), []
    tab.on("pageerror", lambda error: wrong.append(str(error)))
    tab.on("console", lambda message: wrong.append(message.text) if message.type in ("error", "warning") else None)
    tab.on("request", lambda request: None if request.url.startswith(page.address) else wrong.append(request.url))
    yield tab
    assert tab.evaluate("window.hacked") is None
    context.close()
    assert not wrong


def test_a_reader_searches_filters_and_opens(tab, page):
    tab.goto("/papers")
    tab.keyboard.press("/")
    tab.keyboard.type("redundancy verification of blocks", delay=5)
    expect(tab).to_have_url(re.compile("q=redundancy.*blocks"))  # what was typed last is answered
    expect(tab.locator(".papers .name").first).to_have_text("SLEB")
    tab.keyboard.press("ArrowDown")
    assert tab.evaluate("document.activeElement.getAttribute('href')") == "/papers/sleb"
    tab.keyboard.press("ArrowUp")
    assert tab.evaluate("document.activeElement.id") == "q"
    tab.fill("#q", "")
    tab.select_option("select[name=stage]", "compress")
    tab.select_option("select[name=status]", "checked")
    expect(tab.locator(".papers li")).to_have_count(len(json.loads(page.get("/papers.json?stage=compress&status=checked").text)))
    assert "stage=compress" in tab.url
    tab.click("text=SLEB")
    tab.wait_for_url("**/papers/sleb")
    assert "Redundancy Verification" in tab.inner_text("h1")
    assert tab.locator("svg.plot").count() >= 1
    assert tab.locator("text=What we found").count() == 1


def test_a_study_can_be_copied(tab):
    tab.goto("/papers/sleb")
    tab.click("button.copy >> nth=0")
    tab.wait_for_selector("text=Copied")
    assert tab.evaluate("navigator.clipboard.readText()") == tab.evaluate("document.getElementById('study').textContent")
    assert "study: claim-sleb" in tab.evaluate("navigator.clipboard.readText()")


def test_hostile_text_does_nothing_in_a_browser(tab, page):
    for path in ("/papers?status=new", "/papers?q=onerror", "/trending", "/studies", "/studies/" + urllib.request.quote(NAME, safe="")):
        tab.goto(path)
        assert tab.evaluate("window.hacked") is None
    tab.goto("/papers")
    tab.fill("#q", "onerror")
    expect(tab.locator(".papers")).to_contain_text("onerror")


def test_the_report_of_a_finished_study_is_shown(tab):
    tab.goto("/studies")
    tab.click(".runs >> text=tiny")
    tab.click("text=the report")
    tab.wait_for_url("**/report")
    assert "Which block is missed least?" in tab.inner_text("body")


def test_a_run_is_live(browser, page, tiny, tmp_path):
    """A real study, begun after the page was opened, ends before the reader's eyes without a reload."""
    shutil.copytree(tiny, tmp_path / "work")
    text = (tmp_path / "work" / "study.yaml").read_text().replace("study: tiny", "study: alive").replace("3 steps", "150 steps")
    (tmp_path / "work" / "study.yaml").write_text(text)
    command = [sys.executable, "-m", "etude", "run", "study.yaml", "--seeds", "1", "--store", str(page.store.root)]
    running = subprocess.Popen(command, cwd=tmp_path / "work", stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        path = page.store.root / "live" / "alive.json"
        while not path.exists():
            assert running.poll() is None
            time.sleep(0.05)
        context = browser.new_context(base_url=page.address)
        tab = context.new_page()
        tab.goto("/studies/alive")
        tab.evaluate("window.same = 1")
        assert tab.inner_text("[role=status] .badge") == "running"
        expect(tab.locator(".doing")).to_contain_text("training", timeout=120_000)
        expect(tab.locator("[role=status] .badge")).to_have_text("finished", timeout=240_000)
        assert tab.evaluate("window.same") == 1
        assert tab.locator("text=the report").count() == 1
        context.close()
    finally:
        running.terminate()
        running.wait()


def test_it_can_be_read_without_script_on_a_phone_and_in_the_dark(browser, page):
    context = browser.new_context(java_script_enabled=False, viewport={"width": 360, "height": 740}, color_scheme="dark", base_url=page.address)
    tab = context.new_page()
    tab.goto("/papers?stage=compress")
    assert tab.locator(".papers li").count() > 20
    tab.fill("#q", "redundancy verification")
    tab.click("button[type=submit]")
    assert tab.inner_text(".papers li >> nth=0").startswith("SLEB")
    assert not tab.locator("button.copy:visible").count()
    context.close()
    context = browser.new_context(viewport={"width": 360, "height": 740}, color_scheme="dark", base_url=page.address)
    tab = context.new_page()
    for path in ("/papers", "/papers/sleb", "/methods", "/methods/compress", "/methods/compress.sleb", "/studies/tiny", "/store", "/trending"):
        tab.goto(path)
        assert tab.evaluate("document.documentElement.scrollWidth") <= 360, path
        assert tab.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(20, 24, 29)"
    context.close()


def test_every_control_has_a_name_and_headings_are_in_order(tab):
    for path in ("/papers", "/papers/sleb", "/methods/compress.sleb", "/studies/tiny", "/store"):
        tab.goto(path)
        nameless = "one => !(one.labels?.length || one.getAttribute('aria-label') || one.textContent.trim())"
        assert tab.evaluate(f"[...document.querySelectorAll('input, select, button, progress')].filter({nameless}).length") == 0, path
        levels = tab.evaluate("[...document.querySelectorAll('h1, h2, h3')].map(one => +one.tagName[1])")
        assert levels[0] == 1
        assert levels.count(1) == 1
        assert all(after - before <= 1 for before, after in itertools.pairwise(levels))
        assert tab.get_attribute("html", "lang") == "en"


# The command.


def test_the_command_serves_on_this_machine_alone_until_it_is_stopped(tmp_path):
    running = subprocess.Popen([sys.executable, "-u", "-m", "etude", "serve", "--port", "0", "--store", str(tmp_path / "store")], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        line = running.stdout.readline()
        address = re.match(r"(http://127\.0\.0\.1:\d+) shows", line)[1]
        with urllib.request.urlopen(address + "/trending", timeout=60) as answer:
            assert answer.status == 200
        taken = subprocess.run(
            [sys.executable, "-m", "etude", "serve", "--port", address.rpartition(":")[2], "--store", str(tmp_path / "store")], capture_output=True, text=True, timeout=60, check=False
        )
        assert taken.returncode == 2
        assert "cannot be had" in taken.stderr
    finally:
        running.terminate()
        assert running.wait(20) is not None


def test_a_missing_package_is_named(etude, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    failed = etude("serve", "--store", str(tmp_path / "store"))
    assert failed.code == 2
    assert "etude[serve]" in failed.err


def test_the_page_is_in_the_package():
    folder = Path(serving.__file__).parent
    assert {path.name for path in (folder / "static").iterdir()} == set(serving.TYPES)
