"""The catalogue, what is computed from the code, and claims with their evidence."""

from __future__ import annotations

import json
import re
import shutil

import numpy as np
import pytest
from test_compare import measurement, simulate

from etude.method import by_paper, discover
from etude.papers import evidence
from etude.papers.catalogue import catalogue, find
from etude.papers.claims import Claim, claims
from etude.papers.page import page
from etude.papers.status import CHECKED, PLANNED, RUNS, SURVEY, status
from etude.study import compare
from etude.study.expect import Expectation

CHECKED_CLAIMS = [slug for slug, claim in claims().items() if claim.evidence]


def test_the_catalogue_has_every_paper_once_and_in_full():
    papers = catalogue()
    assert len(papers) == 489
    numbers = [paper.arxiv for paper in papers.values() if paper.arxiv]
    assert len(set(numbers)) >= len(numbers) - 2  # a survey and its second edition share one
    for slug, paper in papers.items():
        assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", slug)
        assert all((paper.name, paper.title, paper.does, paper.claim, paper.check, paper.takes))
        assert paper.date is None or re.fullmatch(r"20\d\d-[01]\d(-[0-3]\d)?", paper.date)
        assert all(other in papers and papers[other].covers is None for other in paper.covers or ())


def test_status_is_what_the_code_and_the_evidence_say():
    assert {slug for slug, names in by_paper().items() if names} <= set(catalogue())
    carried = {cls.paper for room in ("methods", "measures", "worlds") for cls in discover(room).values() if cls.paper}
    assert carried == set(by_paper())  # what is read from the sources is what the classes say
    for slug, paper in catalogue().items():
        found = status(paper)
        expected = SURVEY if paper.covers is not None else CHECKED if slug in CHECKED_CLAIMS and slug in by_paper() else RUNS if slug in by_paper() else PLANNED
        assert found.status == expected
        assert (found.verdict is not None) == (found.status == CHECKED)


@pytest.mark.parametrize("slug", list(claims()))
def test_a_claim_stands_in_its_methods_stage_and_tries_it_over_several_seeds(slug):
    from etude.study.recipe import Study

    claim = claims()[slug]
    study = Study.read(claim.path)
    tried = {type(method).paper for step in study.steps.values() for method in step.variants.values()} | {type(measure.method).paper for measure in study.measures.values()}
    assert slug in tried
    assert len(study.seeds) >= 3
    assert study.expectations
    assert any(name.partition(".")[0] == claim.path.parent.name for name in by_paper()[slug]) or claim.path.parent.name in ("measure", catalogue()[slug].stage)


@pytest.mark.parametrize("slug", CHECKED_CLAIMS)
def test_the_verdict_follows_again_from_the_items(slug):
    known = claims()[slug].evidence
    verdict, outcomes = known.judged()
    assert verdict == known.verdict
    for outcome, row in zip(outcomes, known.expectations, strict=True):
        assert outcome.verdict == row["verdict"]
        assert [outcome.margin.value, outcome.margin.low, outcome.margin.high] == pytest.approx([row["margin"][key] for key in ("value", "low", "high")], rel=1e-3, abs=1e-5)
    assert {"cores", "torch", "transformers"} <= set(known.data["environment"])
    assert known.data["cost"]["seconds"] > 0


def test_what_was_judged_wrongly_is_judged_again_from_the_items():
    known = claims()["sleb"].evidence
    rows = [{**row, "verdict": "holds", "sentence": "by hand"} for row in known.expectations]
    anew = evidence.Evidence({**known.data, "verdict": "holds", "expectations": rows}, known.path).rejudged()
    assert anew["verdict"] == known.verdict
    for row, old in zip(anew["expectations"], known.expectations, strict=True):
        assert row["verdict"] == old["verdict"]
        assert row["sentence"] != "by hand"
        assert row["p_corrected"] == pytest.approx(old["p_corrected"], abs=1e-3)


def test_the_page_is_what_the_evidence_gives(request):
    written = (request.config.rootpath / "docs" / "what-holds.md").read_text(encoding="utf8")
    assert written == page(), "write it anew: etude claims page"


def test_of_five_hundred_claims_of_nothing_at_most_six_percent_are_judged():
    """Claims of one to four comparisons, three seeds, crossed effects of seeds and items, a baseline shared by all."""
    random = np.random.default_rng(5)
    judged = 0
    for turn in range(500):
        common, count = random.normal(0, 2, 40), 1 + turn % 4
        ours = [measurement(common + row) for row in simulate(random, 3, 40, 10.0, 0.3, 0.5, 1.0)]
        outcomes = []
        for _ in range(count):
            theirs = [measurement(common + row) for row in simulate(random, 3, 40, 10.0, 0.3, 0.5, 1.0)]
            expectation = Expectation.parse("a.m < b.m")
            outcomes.append(compare.judge(expectation, dict(zip(expectation.terms, (ours, theirs), strict=True))))
        judged += compare.together(outcomes) != "undecided"
    assert judged / 500 <= 0.06


def outcome(verdict: str, p: float) -> compare.Outcome:
    return compare.Outcome("a < b", verdict, compare.Estimate(1.0, 0.5, 1.5, p, 0.1), "")


def test_several_expectations_make_one_verdict():
    holds, missed, open_ = outcome("holds", 0.01), outcome("contradicted", 0.001), outcome("undecided", 0.4)
    assert compare.together([holds, holds]) == "holds"
    assert compare.together([holds, open_]) == "undecided"
    assert compare.together([holds, missed]) == "contradicted"
    assert compare.together([open_, open_, outcome("contradicted", 0.04)]) == "undecided"  # three chances to miss one
    assert compare.together([]) == "undecided"


CLAIM = """
study: claim-sleb
given:
  base: {model: MODEL}
  text: {corpus: TEXT}
steps:
  calibration: {inputs: {corpus: text}, use: {curate.sample: {records: 6}}}
  pruned:
    inputs: {model: base, calibration: calibration}
    try:
      sleb: {compress.sleb: {blocks: 0.5, tokens: 200, length: 24}}
      random: {compress.drop_blocks: {blocks: 0.5, choose: random}}
measure:
  perplexity: {of: [base, pruned], on: text}
seeds: 3
expect:
  - pruned[sleb].perplexity < 1.5 * pruned[random].perplexity
"""


@pytest.fixture
def house(tmp_path, monkeypatch, workplace):
    """A package with one claim, on a tiny model, and no evidence."""
    folder = tmp_path / "claims" / "compress"
    folder.mkdir(parents=True)
    (folder / "sleb.yaml").write_text(CLAIM.replace("MODEL", str(workplace / "base")).replace("TEXT", str(workplace / "text.jsonl")))
    monkeypatch.setattr("etude.papers.claims.FOLDER", tmp_path / "claims")
    monkeypatch.setattr("etude.papers.evidence.FOLDER", tmp_path / "evidence")
    monkeypatch.setattr(evidence.read, "__defaults__", (tmp_path / "evidence",))
    claims.cache_clear()
    yield tmp_path
    claims.cache_clear()


def test_a_claim_runs_is_recorded_and_grows_stale(house, etude, monkeypatch):
    assert "not run yet" in etude("claims").out
    assert status(find("sleb")).status == RUNS
    ran = etude("claims", "run", "sleb", "--record")
    assert ran.code == 0, ran.err
    known = evidence.read("sleb")
    assert known.verdict in ran.out
    assert json.loads((house / "evidence" / "sleb.json").read_text())["seeds"] == [0, 1, 2]
    assert status(find("sleb")).status == CHECKED
    claim = claims()["sleb"]
    assert claim.state == "current"
    (row,) = json.loads(etude("claims", "--json").out)
    assert (row["slug"], row["state"]) == ("sleb", "current")
    card = etude("show", "sleb").out
    assert "Our evidence (current" in card
    assert "compress.sleb" in card
    assert etude("claims", "check").code == 0
    assert "stale" not in page()
    # The study says something else: stale; another comment: not.
    claim.path.write_text("# a comment\n" + claim.text)
    assert Claim(claim.paper, claim.path).state == "current"
    claim.path.write_text(claim.text.replace("tokens: 200", "tokens: 100"))
    assert Claim(claim.paper, claim.path).state == "stale"
    assert "STALE" in etude("claims", "check").out
    assert "stale: its study changed since" in page()
    claim.path.write_text(claim.text.replace("tokens: 100", "tokens: 200"))
    # A method's own source changes, then only what lies beneath it.
    monkeypatch.setattr("etude.papers.evidence.own_digest", lambda module: "other" if module.endswith("sleb") else known.data["sources"]["compress.drop_blocks"]["own"])
    assert "compress.sleb" in known.changed(claim.text)
    monkeypatch.undo()
    monkeypatch.setattr("etude.papers.evidence.code_digest", lambda module: "other")
    assert known.state(claim.text) == "older engine"


def test_a_verdict_that_the_items_do_not_give_is_found(house, etude):
    assert etude("claims", "run", "sleb", "--record").code == 0
    path = house / "evidence" / "sleb.json"
    data = json.loads(path.read_text())
    data["verdict"] = "contradicted" if data["verdict"] != "contradicted" else "holds"
    path.write_text(json.dumps(data))
    assert etude("claims", "check").code == 1


def test_mistakes_about_claims_are_one_message(house, etude, tmp_path):
    for words, message in (
        (("claims", "run", "slebb"), "sleb"),
        (("claims", "run"), "which claim"),
        (("claims", "run", "emo-loss"), "no study yet"),
        (("claims", "run", "sleb", "--record", "--seeds", "4"), "--record"),
        (("papers", "--stage", "compres"), "compress"),
        (("papers", "--verdict", "hold"), "holds"),
        (("show", "sleeb"), "sleb"),
    ):
        failed = etude(*words)
        assert failed.code == 2, words
        assert message in failed.err
        assert "Traceback" not in failed.err
    shutil.rmtree(tmp_path / "evidence", ignore_errors=True)


def test_papers_are_listed_and_filtered(etude):
    rows = json.loads(etude("papers", "--json").out)
    assert len(rows) == 489
    rows = json.loads(etude("papers", "prune", "--stage", "compress", "--year", "2024", "--json").out)
    assert rows
    assert {(row["stage"], row["date"][:4]) for row in rows} == {("compress", "2024")}
    assert "of 489 papers" in etude("papers", "--status", "survey").out
    assert "covers" in etude("show", "llm-compression-survey").out
