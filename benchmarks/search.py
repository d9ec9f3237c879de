"""Search over papers: its quality on written queries with known answers, and its speed on 100,000 papers.

    python benchmarks/search.py [--papers 100000] [--rounds 5]

Prints and writes benchmarks/results/search.json.  Quality: nDCG@10 and recall@10 over `search_queries.jsonl`, whose answers were written from the catalogue's titles before the search was run on
them (but for the first, with which it was tried out); they are not all that a reader might accept.
Compared with what a user would put together without us: SQLite's full-text search (BM25 with Porter's stemmer, any of the words), and the sentence
encoder alone.  Speed: the time of one answer, the query's own vector included, over papers whose texts are made of the catalogue's sentences and whose vectors are noise about real ones.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import sqlite3
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from etude.papers import encoder, vectors
from etude.papers.catalogue import Paper, catalogue
from etude.papers.search import Index, text_of
from etude.study.environment import environment

HERE = Path(__file__).parent
AT = 10


def sqlite(papers: list[Paper]) -> Callable[[str], list[str]]:
    base = sqlite3.connect(":memory:")
    base.execute("create virtual table papers using fts5(slug unindexed, title, body, tokenize='porter')")
    base.executemany("insert into papers values (?, ?, ?)", [(paper.slug, paper.title, text_of(paper)) for paper in papers])

    def search(query: str) -> list[str]:
        words = " OR ".join(f'"{word}"' for word in re.findall(r"\w+", query))
        return [slug for (slug,) in base.execute("select slug from papers where papers match ? order by bm25(papers) limit 10", (words,))]

    return search


def contestants(papers: list[Paper]) -> dict[str, Callable[[str], list[str]]]:
    words, whole = Index(papers), Index(papers, vectors.of(papers))
    assert whole.vectors is not None

    def meaning(query: str) -> list[str]:
        near = whole.vectors @ encoder.encoder().vectors([query])[0]
        return [papers[place].slug for place in np.argsort(-near, kind="stable")[:AT]]

    return {
        "etude": lambda query: [hit.paper.slug for hit in whole.search(query, AT)],
        "etude, words alone": lambda query: [hit.paper.slug for hit in words.search(query, AT)],
        "sentence encoder alone": meaning,
        "SQLite FTS5": sqlite(papers),
    }


def quality(found: list[str], answers: list[str]) -> tuple[float, float]:
    """nDCG@10 and recall@10, each answer worth the same."""
    gains = [1 / np.log2(place + 2) for place, slug in enumerate(found[:AT]) if slug in answers]
    best = sum(1 / np.log2(place + 2) for place in range(min(AT, len(answers))))
    return float(sum(gains) / best), len(gains) / min(AT, len(answers))


def many(papers: list[Paper], count: int) -> tuple[list[Paper], np.ndarray]:
    """Papers made of the catalogue's sentences."""
    draw, noise = random.Random(0), np.random.default_rng(0)
    sentences = [part for paper in papers for part in re.split(r"(?<=[.;])\s+", text_of(paper)) if len(part) > 20]
    words = [word for paper in papers for word in paper.title.split()]
    made = [
        Paper(f"paper-{place}", f"Paper {place}", " ".join(draw.sample(words, 9)), None, None, None, "paper", "", "", "", "", "", abstract=" ".join(draw.sample(sentences, 6)))
        for place in range(count)
    ]
    real = vectors.of(papers)
    assert real is not None
    rows = real[noise.integers(0, len(real), count)] + noise.standard_normal((count, real.shape[1]), np.float32) * np.float32(0.03)
    return made, (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def spread(values: list[float]) -> dict[str, float]:
    return {"median": float(np.median(values)), "lowest": min(values), "highest": max(values)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--papers", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    papers = list(catalogue().values())
    rows = [json.loads(line) for line in (HERE / "search_queries.jsonl").read_text().splitlines()]
    found: dict[str, Any] = {"queries": {"count": len(rows)}}
    for name, search in contestants(papers).items():
        scores = [quality(search(row["query"]), row["answers"]) for row in rows]
        found[f"{name}, all"] = {"ndcg@10": float(np.mean([one for one, _ in scores])), "recall@10": float(np.mean([one for _, one in scores]))}
        for kind in dict.fromkeys(row["kind"] for row in rows):
            found[f"{name}, {kind}"] = {"ndcg@10": float(np.mean([one for (one, _), row in zip(scores, rows, strict=True) if row["kind"] == kind]))}
    made, known = many(papers, arguments.papers)
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        index = Index(made, known, Path(folder))
        found["index of many papers"] = {"papers": arguments.papers, "seconds to make": time.perf_counter() - start}
        start = time.perf_counter()
        index = Index(made, known, Path(folder))
        found["index of many papers"]["seconds to open"] = time.perf_counter() - start
        times: dict[str, list[float]] = {}
        for _ in range(arguments.rounds):
            for row in rows:
                start = time.perf_counter()
                index.search(row["query"], 20)
                times.setdefault(row["kind"], []).append(time.perf_counter() - start)
    for kind, several in times.items():
        found[f"one answer among many papers, {kind}"] = {"seconds": spread(several)}
    whole = sorted(one for several in times.values() for one in several)
    found["one answer among many papers"] = {"seconds": spread(whole), "95 of 100 under": whole[int(0.95 * len(whole))]}
    print(json.dumps(found, indent=1))
    (HERE / "results" / "search.json").write_text(json.dumps({"found": found, "environment": environment()}, indent=1) + "\n")


if __name__ == "__main__":
    main()
