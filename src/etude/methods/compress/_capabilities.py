"""Capabilities among instructions: a diffusion map, its non-negative factors, and the concepts that stand together."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Sequence

import numpy as np

ROUNDS, RESTARTS = 300, 3
"""Multiplicative updates of a factorization, and how often it is begun."""
PHRASES = 1 / 3
"""Share of a text's phrases that count as its concepts, the best first (Rose et al., 2010, section 1.2.3)."""
STOP = frozenset(
    """
    a about above after again all also am an and any are as at be been before being below between both but by can could did do does doing down during each few for from further give had
    has have having he her here hers him his how i if in into is it its just let many me more most much must my no nor not now of off on once one only or other our out over own please
    same shall she should so some such than that the their them then there these they this those through to too under until up us very was we were what when where which while who whom
    whose why will with would write you your
    """.split()  # noqa: SIM905
)


def diffusion(vectors: np.ndarray, count: int) -> np.ndarray:
    """Coordinates of points (points, width) on the `count` slowest modes of a diffusion among them, (points, count), each column of length 1.

    Affinities exp(-d² / 2σ²) with σ the median distance between two points; the eigenvectors of I - D^(-1/2) A D^(-1/2) with the smallest eigenvalues.
    """
    import scipy.linalg
    from scipy.spatial.distance import pdist, squareform

    apart = pdist(vectors)
    width = float(np.median(apart)) if len(apart) else 1.0
    affinity = squareform(np.exp(-(apart**2) / (2 * width**2)) if width else np.ones_like(apart))
    np.fill_diagonal(affinity, 1)
    root = 1 / np.sqrt(affinity.sum(1))
    _, found = scipy.linalg.eigh(affinity * root[:, None] * root, subset_by_index=(len(vectors) - count, len(vectors) - 1))
    return found[:, ::-1]


def capabilities(coordinates: np.ndarray, count: int, random: np.random.Generator) -> np.ndarray:
    """Which capability each point has, (points,), numbered from 0 without gaps: the largest of its factors in S ≈ H Hᵀ, H >= 0, S the sizes of the products of all pairs of coordinates.

    The best of several starts by the squared error; updates as in Kuang et al., 2012 (equation 8, with the factor 1/2 of Ding et al., 2005).
    """
    similar = np.abs(coordinates @ coordinates.T)
    best, least = None, np.inf
    for _ in range(RESTARTS):
        factors = random.random((len(similar), count)) * np.sqrt(similar.mean() / count) * 2
        for _ in range(ROUNDS):
            factors *= 0.5 + 0.5 * (similar @ factors) / np.maximum(factors @ (factors.T @ factors), 1e-12)
        error = float(np.square(similar - factors @ factors.T).sum())
        if error < least:
            best, least = factors, error
    assert best is not None
    return np.unique(best.argmax(1), return_inverse=True)[1]


def concepts(texts: Sequence[str]) -> list[frozenset[str]]:
    """The key phrases of every text, by RAKE (Rose et al., 2010): runs of words without stop words or punctuation, ranked by their words' degree over frequency in the text; the best third."""
    found = []
    for text in texts:
        phrases = list(_phrases(text))
        frequency, degree = Counter(word for phrase in phrases for word in phrase), Counter[str]()
        for phrase in phrases:
            for word in phrase:
                degree[word] += len(phrase)
        scores = {" ".join(phrase): sum(degree[word] / frequency[word] for word in phrase) for phrase in phrases}
        ranked = sorted(scores, key=lambda phrase: (-scores[phrase], phrase))
        found.append(frozenset(ranked[: max(2, round(PHRASES * len(ranked)))]))
    return found


def _phrases(text: str) -> Sequence[tuple[str, ...]]:
    parts = re.split(r"[^\w\s'-]+|\n", text.lower())
    words = [[word for word in re.findall(r"[\w'-]+", part)] for part in parts]
    return [tuple(run) for part in words for stop, run in itertools.groupby(part, key=lambda word: word in STOP or word.isdigit()) if not stop]


class Concepts:
    """Which concepts are known, and which stood together in a record."""

    def __init__(self) -> None:
        self.beside: dict[str, set[str]] = {}

    def take(self, found: frozenset[str]) -> bool:
        """Add a record's concepts, unless two of them are both known and never stood together; returns whether it was added."""
        known = [concept for concept in found if concept in self.beside]
        if any(other not in self.beside[one] for one, other in itertools.combinations(known, 2)):
            return False
        for concept in found:
            self.beside.setdefault(concept, set()).update(found - {concept})
        return True
