"""Search: words, typos and meaning together.

Words are ranked by BM25 (tantivy); one that no paper has is read as the beginning of one that some have, or as one misspelt; and where the sentence encoder is installed, papers that say the same in
other words come too.  Both scores are brought to 0…1 and added (a convex combination; Bruch et al., "An Analysis of Fusion Functions for Hybrid Retrieval", 2023).
"""

from __future__ import annotations

import functools
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from etude.papers import encoder
from etude.papers.catalogue import Paper
from etude.values.digest import digest
from etude.values.lazy import lazy

if TYPE_CHECKING:
    import tantivy
else:
    tantivy = lazy("tantivy")

MEANING = 0.5
"""Weight of the meaning beside the words."""
TITLE, BODY = 2.5, 1.0
"""How much more a word in the title or the name counts than one in the text."""
CANDIDATES = 300
"""Papers that either ranking may propose."""
GUESSES = 8
"""Words that stand for one which no paper has."""
SAMPLED = 10_000
"""Papers among which the middle one is looked for."""
KEPT_FROM = 2000
"""From so many papers on the index is kept on the disk."""
VERSION = 1
"""Of the index's layout."""


@dataclass(frozen=True)
class Hit:
    """A paper that was found."""

    paper: Paper
    score: float
    words: float
    """What its words gave, 0 to 1."""
    meaning: float
    """What its meaning gave, 0 to 1; 0 without the encoder."""


def text_of(paper: Paper) -> str:
    """What is searched of a paper beside its title."""
    return " ".join(filter(None, (paper.does, paper.claim, paper.takes, paper.abstract, *paper.related)))


class Index:
    """Papers, ready to be searched.

    papers: all of them.  vectors: (papers, width) of length 1 each, or None to search by words alone.  folder: where a large index is kept; by default none is.
    Cost: some 20 ms for 500 papers, some seconds for 100,000 the first time; a search takes a few milliseconds.
    """

    def __init__(self, papers: Sequence[Paper], vectors: np.ndarray | None = None, folder: Path | None = None):
        self.papers, self.vectors = list(papers), vectors
        self.exact: dict[str, int] = {}
        for place, paper in reversed(list(enumerate(self.papers))):
            for name in (paper.slug, paper.name, paper.arxiv or paper.slug):
                self.exact[_plain(name)] = place
        self.index = _opened(self.papers, folder)
        self.searcher = self.index.searcher()
        builder = tantivy.TextAnalyzerBuilder(tantivy.Tokenizer.simple()).filter(tantivy.Filter.lowercase())
        self.stem = builder.filter(tantivy.Filter.stemmer("english")).build().analyze
        stopped = tantivy.TextAnalyzerBuilder(tantivy.Tokenizer.simple()).filter(tantivy.Filter.lowercase()).filter(tantivy.Filter.stopword("english"))
        self.telling = stopped.build().analyze

    @functools.cached_property
    def vocabulary(self) -> dict[int, list[str]]:
        """Every word that some paper has, by its length."""
        found: dict[int, list[str]] = {}
        for word, _ in self.searcher.terms_with_prefix("words", ""):
            found.setdefault(len(word), []).append(word)
        return found

    def _known(self, word: str) -> bool:
        """Whether some paper has a word, or one of the same stem."""
        return bool(self.searcher.doc_freq("words", word)) or any(self.searcher.doc_freq(field, stem) for stem in self.stem(word) for field in ("title", "body"))

    def search(self, query: str, limit: int = 20, among: Callable[[Paper], bool] | None = None, vector: np.ndarray | None = None) -> list[Hit]:
        """The papers that a query means, best first.

        among: which papers may be found; all by default.  vector: of the query, if it is known already.
        A query without a letter or digit finds nothing.
        """
        if not re.search(r"\w", query):
            return []
        most = len(self.papers) if among or len(self.papers) <= KEPT_FROM else max(CANDIDATES, limit)
        words = self._by_words(query, most)
        meaning = self._by_meaning(query, vector) if self.vectors is not None else None
        places = set(words)
        if meaning is not None:
            places |= set(np.argpartition(-meaning, most - 1)[:most].tolist() if most < len(meaning) else range(len(meaning)))
        exact = self.exact.get(_plain(query))
        if exact is not None:
            places.add(exact)
        found = []
        for place in places:
            if among and not among(self.papers[place]):
                continue
            said, meant = words.get(place, 0.0), float(meaning[place]) if meaning is not None else 0.0
            score = (1 - MEANING) * said + MEANING * meant if meaning is not None else said
            found.append(Hit(self.papers[place], score + (place == exact), said, meant))
        found.sort(key=lambda hit: (-hit.score, hit.paper.slug))
        return found[:limit]

    def _by_words(self, query: str, most: int) -> dict[int, float]:
        """Scores by place of the papers in which words of the query stand, as a share of the highest."""
        words = self.telling(_joined(query)) or self.stem(query)
        last = words[-1] if re.search(r"\w$", query) else None
        wanted = [(tantivy.Occur.Should, self._word(word, word == last)) for word in dict.fromkeys(words)]
        found = self.searcher.search(tantivy.Query.boolean_query(wanted), most, count=False).hits
        if not found:
            return {}
        best = found[0][0]
        return {place: score / best for (score, _), place in zip(found, self.searcher.fast_field_values("place", [address for _, address in found]), strict=True)}

    def _word(self, word: str, unfinished: bool) -> Any:
        """What finds a word: its stem, or where no paper has that, words which it may begin or stand for."""
        guesses = [word]
        if not self._known(word):
            begun = [term for term, _ in self.searcher.terms_with_prefix("words", word, limit=GUESSES)] if unfinished and len(word) > 1 else []
            near = [term for length in range(len(word) - 2, len(word) + 3) for term in self.vocabulary.get(length, ())]
            guesses = begun or list(corrected(word, near))
        schema = self.index.schema
        stems = dict.fromkeys(stem for guess in guesses for stem in self.stem(guess))
        terms = [tantivy.Query.boost_query(tantivy.Query.term_query(schema, field, stem), boost / (1 + (guesses[0] != word))) for stem in stems for field, boost in (("title", TITLE), ("body", BODY))]
        return tantivy.Query.boolean_query([(tantivy.Occur.Should, term) for term in terms]) if terms else tantivy.Query.empty_query()

    def _by_meaning(self, query: str, vector: np.ndarray | None) -> np.ndarray:
        """How near each paper is to the query, from the middle one (0) to the nearest (1)."""
        assert self.vectors is not None
        near = self.vectors @ (encoder.encoder().vectors([query])[0] if vector is None else vector)
        middle, top = float(np.median(near[:: 1 + len(near) // SAMPLED])), float(near.max())
        return np.clip((near - middle) / max(top - middle, 1e-6), 0, 1)

    def like(self, paper: Paper, limit: int = 6) -> list[Paper]:
        """The papers nearest to one of these: by meaning, else by the words of its title and of what it does."""
        place = next(place for place, one in enumerate(self.papers) if one.slug == paper.slug)
        if self.vectors is not None:
            near = self.vectors @ self.vectors[place]
            order = np.argsort(-near, kind="stable")[: limit + 1].tolist()
        else:
            scores = self._by_words(f"{paper.title} {paper.does or paper.abstract} ", limit + 1)
            order = sorted(scores, key=lambda one: -scores[one])
        return [self.papers[one] for one in order if one != place][:limit]


def corrected(word: str, vocabulary: Collection[str]) -> dict[str, int]:
    """Words that one may be a misspelling of, with how many letters are wrong: one in a word of up to seven, two in a longer one; a swap of two neighbours is one.

    The nearest come first; a wrong first letter is not looked for in words under five letters.
    """
    from rapidfuzz import process
    from rapidfuzz.distance import OSA

    if len(word) < 4:
        return {}
    found = process.extract(word, list(vocabulary), scorer=OSA.distance, score_cutoff=1 if len(word) < 8 else 2, limit=GUESSES)
    near = {term: int(distance) for term, distance, _ in found if len(term) > 2 and (len(word) > 4 or term[0] == word[0])}
    best = min(near.values(), default=0)
    return {term: distance for term, distance in near.items() if distance == best}


def _plain(name: str) -> str:
    return "".join(character for character in name.casefold() if character.isalnum())


def _joined(text: str) -> str:
    """Words with hyphens also as one word, so that pre-training is found as pretraining."""
    return re.sub(r"\b(\w+)-(\w+)\b", r"\1-\2 \1\2", text)


def _opened(papers: list[Paper], folder: Path | None) -> Any:
    """The index of these papers: from its folder, or made."""
    if folder is None or len(papers) < KEPT_FROM:
        return _made(papers, None)
    target = folder / f"index-{digest([VERSION, *((paper.slug, paper.title, text_of(paper)) for paper in papers)])[:16]}"
    if not target.exists():
        folder.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(dir=folder, prefix=".index-"))
        try:
            _made(papers, aside)
            for old in folder.glob("index-*"):
                shutil.rmtree(old, ignore_errors=True)
            os.replace(aside, target)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    return tantivy.Index.open(str(target))


def _made(papers: list[Paper], folder: Path | None) -> Any:
    schema = tantivy.SchemaBuilder()
    schema.add_text_field("title", tokenizer_name="en_stem")
    schema.add_text_field("body", tokenizer_name="en_stem")
    schema.add_text_field("words", tokenizer_name="default", index_option="basic")
    schema.add_unsigned_field("place", fast=True)
    index = tantivy.Index(schema.build(), path=str(folder) if folder else None)
    writer = index.writer(heap_size=60_000_000, num_threads=1)
    for place, paper in enumerate(papers):
        title, body = _joined(f"{paper.title} {paper.name}"), _joined(text_of(paper))
        document = tantivy.Document()
        for field, text in (("title", title), ("body", body), ("words", f"{title} {body}")):
            document.add_text(field, text)
        document.add_unsigned("place", place)
        writer.add_document(document)
    writer.commit()
    writer.wait_merging_threads()
    index.reload()
    return index
