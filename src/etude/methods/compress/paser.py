"""Choose from a pool of instructions those by which a pruned model recovers."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from etude.engine import hidden, prompted
from etude.engine.distil import same_tokens
from etude.engine.score import require_causal
from etude.method import Method
from etude.methods.compress._capabilities import Concepts, capabilities, concepts, diffusion
from etude.methods.compress._clusters import clusters as kmeans
from etude.methods.compress._degradation import degradation
from etude.values.corpus import Corpus
from etude.values.errors import InputError
from etude.values.model import Model

RULES = ("degradation", "perplexity", "kmeans")
MOST = 20_000
"""Records whose similarities are held at once."""


@dataclass(frozen=True)
class PASER(Method):
    """Select recovery data for a pruned model: cluster by capability, share the budget by what was lost there, and take what lost most for its length.

    Vectors of the instructions go through a diffusion map (heat kernel with the median distance as its width, the K eigenvectors of the normalised Laplacian with the smallest eigenvalues),
    whose similarities are factored by non-negative matrices: a record's capability is its largest factor.  A record's loss is the mean Jensen–Shannon divergence, in nats a token of its
    completion, between the original and the pruned model; its worth is that over log(tokens²).  Within a cluster records come by their worth, and one is passed over if two of its concepts
    (key phrases, by RAKE) are both known from records chosen before and never stood together in one.
    Source: He et al., "PASER: Post-Training Data Selection for Efficient Pruned Large Language Model Recovery", 2025 (arXiv 2502.12594), sections 3.2 to 3.4, and its authors' code.
    Departures: the divergence is taken over the tokens of the completion given the prompt (the authors' code reads the prompt alone); a budget that a cluster cannot fill, all its consistent
    records being chosen, goes to the best records that are left anywhere; the factorization is the symmetric one (Kuang et al., 2012), begun from the seed, best of three.
    `choose` has the baselines: ``perplexity`` takes what the pruned model predicts worst, ``kmeans`` as much of every k-means cluster of the vectors, drawn at random.
    Gives a corpus: train on it with any method.  Raises InputError if the models do not read the same tokens, for an empty pool, and for one of more than 20,000 records.
    Removes: nothing; it selects data for recovery.
    Cost: a forward pass of both models and one of the encoder over the pool; memory and time for the similarities of all pairs of records.
    """

    paper = "paser"

    share: float = 0.1
    """Share of the pool that is chosen, 0 < share <= 1, at least one record; 4 to 20 % in the paper."""
    clusters: int = 8
    """Capabilities that are told apart; fewer where the pool has fewer records."""
    choose: str = "degradation"
    """``degradation``, ``perplexity`` or ``kmeans``."""
    consistent: bool = True
    """Whether records with conflicting concepts are passed over."""

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise ValueError(f"share is a share of the pool, more than 0 and at most 1, got {self.share}; for a tenth pass 0.1")
        if self.clusters < 1:
            raise ValueError(f"clusters is at least 1, got {self.clusters}")
        if self.choose not in RULES:
            raise ValueError(f"choose is one of {', '.join(RULES)}, got {self.choose!r}")

    def draws_random(self) -> bool:
        return self.choose != "perplexity"

    def apply(self, model: Model, original: Model, corpus: Corpus, encoder: Model, seed: int) -> Corpus:
        require_causal(model, "PASER")
        same_tokens(model, original, "PASER")
        pairs = prompted.pairs_of(corpus)
        if len(pairs) > MOST:
            raise InputError(f"PASER compares every record with every other, and {len(pairs):,} are more than {MOST:,}", remedy="Draw some first, with curate.sample.")
        count = max(1, round(self.share * len(pairs)))
        lost = degradation(model, original, pairs) if self.choose != "kmeans" else None
        if self.choose == "perplexity":
            assert lost is not None
            chosen = np.argsort(-lost.nats, kind="stable")[:count]
            return corpus.select(np.sort(chosen).tolist())
        random = np.random.default_rng(seed)
        vectors = hidden.states(encoder, [prompt or completion for prompt, completion in pairs], layers=[-1], window=_window(encoder))[0].astype(np.float64)
        groups = min(self.clusters, len(pairs))
        if lost is None:
            labels = kmeans(torch.from_numpy(vectors), groups, 3, torch.Generator().manual_seed(seed)).numpy()
            return corpus.select(np.sort(evenly(labels, count, random)).tolist())
        labels = capabilities(diffusion(vectors, groups), groups, random)
        worth = lost.divergence / np.log(np.maximum(lost.tokens, 2) ** 2)
        budgets = shared(np.array([lost.divergence[labels == group].mean() for group in range(labels.max() + 1)]), count)
        found = concepts([f"{prompt} {completion}" for prompt, completion in pairs]) if self.consistent else None
        return corpus.select(np.sort(selected(labels, budgets, worth, found, count)).tolist())


def selected(labels: np.ndarray, budgets: np.ndarray, worth: np.ndarray, found: list[frozenset[str]] | None, count: int) -> np.ndarray:
    """Records (count,): of each cluster as many as its budget, the worthiest first, those in conflict with what was chosen before passed over; then the worthiest of the rest."""
    graph, chosen = Concepts(), []
    order = np.argsort(-worth, kind="stable")
    for group in np.argsort(-budgets, kind="stable"):
        left = int(budgets[group])
        for record in order[labels[order] == group]:
            if not left:
                break
            if found is None or graph.take(found[record]):
                chosen.append(int(record))
                left -= 1
    rest = [int(record) for record in order if int(record) not in set(chosen)]
    return np.array([*chosen, *rest[: count - len(chosen)]])


def shared(means: np.ndarray, count: int) -> np.ndarray:
    """Whole numbers in proportion to some means that sum to count, by largest remainders."""
    exact = count * (means / means.sum() if means.sum() > 0 else np.full(len(means), 1 / len(means)))
    found = np.floor(exact).astype(int)
    found[np.argsort(-(exact - found), kind="stable")[: count - found.sum()]] += 1
    return found


def evenly(labels: np.ndarray, count: int, random: np.random.Generator) -> np.ndarray:
    """Records (count,) drawn from the clusters in turn, until there are enough."""
    waiting = [random.permutation(np.flatnonzero(labels == group)).tolist() for group in np.unique(labels)]
    found: list[int] = []
    while len(found) < count:
        for several in waiting:
            if several and len(found) < count:
                found.append(several.pop())
    return np.array(found)


def _window(encoder: Model) -> int | None:
    """Longest text that the encoder reads, in tokens."""
    limit = getattr(encoder.config.get_text_config(), "max_position_embeddings", None)
    return min(256, limit) if limit else 256
