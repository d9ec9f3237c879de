"""Recover a pruned model by low-rank updates whose rank a small network chooses, layer by layer."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from etude.engine import batch, losses
from etude.engine.budget import Budget
from etude.engine.feed import Batch, Packed
from etude.engine.progress import report, silent
from etude.engine.score import mean_loss, require_causal, sample_rows
from etude.engine.train import train
from etude.methods._lora import inject, merge
from etude.methods._training import Training
from etude.methods.compress._ranks import Allocations, Ranks, predicted
from etude.values.anatomy import weight_of
from etude.values.corpus import Corpus
from etude.values.errors import InputError
from etude.values.model import Model


@dataclass(frozen=True)
class RankAdaptor(Training):
    """Give the linear layers of each block updates alpha / rank · B · A of a rank of its own, since pruning damages the blocks unevenly, and find these ranks by trying some and predicting others.

    `samples` random lists of ranks are tried: the model is trained with each for a short while and scored on text that was kept back.  A perceptron learns to predict the
    score from the ranks; of `candidates` further random lists the one that it expects most of is tried next, and the perceptron is fitted anew, `rounds` times.  With the list that did
    best the model is trained for all that is left of the budget, from where it was, on the whole text; the updates are added to the weights, and the history says the ranks.
    No list has more parameters than rank `rank` has in every block.
    Source: Zhou et al., "RankAdaptor: Hierarchical Rank Allocation for Efficient Fine-Tuning Pruned LLMs via Performance Model", 2025 (arXiv 2406.15734).
    The paper's: ranks from 2 to 12 by two steps around LoRA's 8, one rank a layer, a perceptron of three hidden layers, candidates sampled, measured, and learnt from.
    Departures: the paper counts neither trials nor what its predictor learnt on other models beforehand; here nothing is learnt beforehand, and what the trials read, in training
    and in scoring, comes out of the one budget.  They are scored by the loss, not by benchmarks.  An update's scale does not depend on its rank, so that lists differ in ranks alone.
    Each trial has the schedule in short.  How many are tried first and afterwards, and for how long, is ours.
    With one sample and no round nothing is tried: random ranks, with the whole budget.  Where the trials' share has fewer steps than there are trials, so many are tried; with fewer than
    two, none.  Raises InputError for a budget in other units than steps or tokens, a corpus of one document, or a model with a block without linear layers.  Causal models.
    Removes: nothing; it recovers a pruned model.
    Cost: the budget, and copies of the model.
    """

    paper = "rankadaptor"

    rank: int = 8
    """The budget of parameters: as many as updates of this rank have in every block."""
    alpha: float = 16.0
    """Every update is scaled by alpha / rank."""
    ranks: tuple[int, ...] = (2, 4, 6, 8, 10, 12)
    """What a block's rank may be, in rising order, from at most `rank` to at least `rank`."""
    samples: int = 8
    """Random lists of ranks that are tried first, at least 1."""
    rounds: int = 4
    """Lists that are tried because they are predicted to be best, at least 0."""
    candidates: int = 1000
    """Random lists among which the predicted best is looked for in a round, at least 1."""
    share: float = 0.5
    """Share of the budget that all trials together may spend, more than 0 and less than 1."""
    tokens: int = 4096
    """Tokens of kept text by which a trial is scored, at least 2; they count like a trial's training."""
    schedule: str = "linear"
    weight_decay: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank < 1 or not self.alpha > 0:
            raise ValueError(f"rank is at least 1 and alpha more than 0, got {self.rank} and {self.alpha}")
        if not self.ranks or list(self.ranks) != sorted(set(self.ranks)) or not 1 <= self.ranks[0] <= self.rank <= self.ranks[-1]:
            raise ValueError(f"ranks rise from 1 or more, and rank ({self.rank}) lies among them, got {self.ranks}")
        if self.samples < 1 or self.rounds < 0 or self.candidates < 1 or self.tokens < 2:
            raise ValueError(f"samples and candidates are at least 1, rounds 0 and tokens 2, got {self.samples}, {self.candidates}, {self.rounds} and {self.tokens}")
        if not 0 < self.share < 1:
            raise ValueError(f"share is a share of the budget, more than 0 and less than 1, got {self.share}; for a half pass 0.5")

    def apply(self, model: Model, corpus: Corpus, budget: Budget, seed: int) -> Model:
        require_causal(model, "RankAdaptor")
        search = Search(self, model, corpus, budget, seed)
        ranks = search.run()
        recovered = search.trained(corpus, ranks, search.left)
        asked = {name: parameter.requires_grad for name, parameter in model.network.named_parameters()}
        for name, parameter in recovered.network.named_parameters():
            parameter.requires_grad_(asked[name])
        return recovered


class Search:
    """Trials of ranks, and what of the budget is left after them."""

    def __init__(self, method: RankAdaptor, model: Model, corpus: Corpus, budget: Budget, seed: int):
        if budget.unit not in ("steps", "tokens"):
            raise InputError(f"RankAdaptor divides its budget and must know its tokens, and a budget of {budget} does not say them", remedy="Give the budget in steps or tokens.")
        self.method, self.model, self.corpus, self.seed = method, model, corpus, seed
        self.a_step = max(1, method.batch_tokens // method.length) * method.length
        self.left = budget.amount * (self.a_step if budget.unit == "steps" else 1)
        self.layers = [list(model.anatomy.linears(block)) for block in model.anatomy.blocks]
        costs = tuple(sum(sum(weight_of(model.network.get_submodule(path)).shape) for path in paths) for paths in self.layers)
        if not all(costs):
            raise InputError(f"a block of this {model.base.model_type} has no linear layers to adapt")
        self.allocations = Allocations(method.ranks, costs, method.rank * sum(costs))
        self.random = np.random.default_rng(seed)
        self.tried: list[Ranks] = []
        self.losses: list[float] = []

    def run(self) -> Ranks:
        """The list of ranks that did best; one drawn at random if none could be tried."""
        method = self.method
        count, room = method.samples + method.rounds, method.share * self.left
        count = min(count, int(room / (self.a_step + method.tokens)))
        if count < 2:
            return self.allocations.draw(self.random)
        kept, rest = self._parted()
        rows = sample_rows(self.model, kept, method.tokens, method.length)
        read = sum(map(len, rows))
        steps = max(1, int((room / count - read) / self.a_step))
        chosen = self.allocations.several(min(count, method.samples), self.random)
        while len(self.tried) < count:
            chosen = chosen or self._promising()
            if not chosen:
                break
            report("trying ranks", len(self.tried), count)
            ranks = chosen.pop(0)
            with silent():
                trial = self.trained(rest, ranks, steps * self.a_step)
                self.losses.append(mean_loss(trial, rows, window=method.length))
            self.tried.append(ranks)
            self.left -= steps * self.a_step + read
        return self.tried[int(np.argmin(self.losses))]

    def _promising(self) -> list[Ranks]:
        """Of random lists that were not tried the one with the lowest predicted loss; none if there is none."""
        candidates = self.allocations.several(self.method.candidates, self.random, self.tried)
        return [candidates[int(np.argmin(predicted(self.tried, self.losses, candidates, self.seed)))]] if candidates else []

    def _parted(self) -> tuple[Corpus, Corpus]:
        """Documents by which trials are scored, at most half of all, and those that they are trained on."""
        if len(self.corpus) < 2:
            raise InputError("RankAdaptor keeps documents back to score its trials, and the corpus has only one", remedy="Split it into several.")
        order, found = self.random.permutation(len(self.corpus)), 0
        for count in range(1, len(order) // 2 + 1):
            (ids,) = batch.encode(self.model, self.corpus.select([int(order[count - 1])]))
            found += len(ids) - 1
            if found >= self.method.tokens:
                break
        return self.corpus.select(order[:count].tolist()), self.corpus.select(order[count:].tolist())

    def trained(self, corpus: Corpus, ranks: Ranks, tokens: float) -> Model:
        """A draft that was trained with these ranks, its updates merged."""
        draft = self.model.copy()
        inject(draft, {path: rank for paths, rank in zip(self.layers, ranks, strict=True) for path in paths}, self.method.alpha / self.method.rank, self.seed)

        def loss(network: nn.Module, part: Batch) -> losses.Lost:
            counted = float((part.labels != batch.IGNORED).sum())
            return losses.Lost(losses.next_token(network, part), parts={f"rank.{block}": torch.tensor(counted * rank) for block, rank in enumerate(ranks)})

        train(draft, Packed(batch.Documents(draft, corpus), self.method.length), self.method.recipe(), Budget(tokens, "tokens"), self.seed, loss)
        merge(draft.network)
        return draft
