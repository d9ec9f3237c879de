"""Narrow every layer of a masked model for all of its early exits at once, while they learn together from the model as it was."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from etude.engine import cloze, exits, fused, losses
from etude.engine.budget import Budget
from etude.engine.classify import Labelled
from etude.engine.cloze import Question
from etude.engine.distil import same_tokens
from etude.engine.feed import Batch, Row
from etude.engine.train import train
from etude.methods._training import Training
from etude.methods.compress import _slender
from etude.values.corpus import Corpus
from etude.values.model import Model

SOFT = 0.9
"""Weight of the guide's predictions beside the labels in the loss whose gradient tells what is important; the authors' code has it fixed."""


@dataclass(frozen=True)
class CostEff(Training):
    """Slender layers and early exits, made for each other: what is cut is what all exits together miss least, and all exits learn together.

    First the model, as wide as it is, gets an exit behind every block; all learn the fine-tuned model's predictions and the labels, in equal parts (the assistant).  Then, at `rounds` moments,
    heads and feed-forward channels of every block and channels of the residual stream are cut, those whose |weight| · Σ |gradient| is least, of a loss that is summed over the exits; between
    the rounds and afterwards every exit learns from the assistant's exit at its place, and every block from the assistant's block (relative squared error of the states).
    The gradient that a block gets is the mean of those of the exits behind it.  At inference a question leaves at the first exit whose entropy is below a threshold: the measure `early_exit`.
    Source: Shen et al., "COST-EFF: Collaborative Optimization of Spatial and Temporal Efficiency with Slenderized Multi-exit Language Models", 2022, and the authors' code.
    Departures: that code factorises the embeddings and leaves the stream as wide; here the stream's channels go by the same importance, with the embeddings' columns.  It learns states alone
    for most of a pruning period, here predictions and states together.  Classification is filling in one of some choices at masks behind a prompt (`adapt.cloze_tuning` makes the model): an exit is
    a norm, a matrix and a norm of its own before the model's words, where the authors' is a classifier on the first token.  Each phase has a schedule of its own.
    Without `exits` it is width pruning alone, and the model as it comes in is what it learns from; with `width` and `stream` 1 early exit alone, and the whole budget is the assistant's.
    The fine-tuned model that the assistant learns from is the `teacher`, by default the model itself.
    Reads the columns prompt, choices and answer.  Masked models of one stack without experts; raises InputError for others.  With exits only Étude loads what is saved; `export` refuses it.
    Removes: heads, feed-forward channels, residual channels; blocks that a question does not reach are not computed.
    Cost: the budget, with a forward pass of a teacher over every question; a forward and a backward pass over `records` questions a round.
    """

    paper = "cost-eff"

    width: float = 0.5
    """Share of every block's heads and feed-forward channels that stays, 0 < width <= 1; 6 of 12 heads in the authors' script."""
    stream: float = 0.5
    """Share of the residual channels that stays, 0 < stream <= 1; the authors' script gives the embeddings the share of the heads."""
    exits: bool = True
    """Whether the model has an exit behind every block, or its own head alone."""
    rounds: int = 6
    """Moments at which is cut, in equal steps, at least 1; the authors cut a head of every block at each."""
    assistant: float = 0.25
    """Share of the budget in which the exits learn before anything is cut, 0 < assistant < 1."""
    pruning: float = 0.4
    """Share of the rest of the budget that is spent between the first round and the end of the last, 0 < pruning < 1."""
    states: float = 1.0
    """Weight of the blocks' states, summed over the blocks as the predictions are over the exits."""
    temperature: float = 1.0
    """What both models' scores are divided by."""
    records: int = 256
    """Questions whose gradients are added up in a round; the authors take all."""
    schedule: str = "linear"
    warmup: float = 0.1
    weight_decay: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("width", "stream"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name} is the share that stays, more than 0 and at most 1, got {getattr(self, name)}; for half pass 0.5")
        for name in ("assistant", "pruning"):
            if not 0 < getattr(self, name) < 1:
                raise ValueError(f"{name} is a share of the budget, more than 0 and less than 1, got {getattr(self, name)}")
        if self.rounds < 1 or self.records < 1:
            raise ValueError(f"rounds and records are at least 1, got {self.rounds} and {self.records}")
        if self.states < 0 or not self.temperature > 0:
            raise ValueError(f"states is at least 0 and temperature more than 0, got {self.states} and {self.temperature}")
        if not self.exits and not self.slender:
            raise ValueError("with width and stream 1 and without exits there is nothing to do")

    @property
    def slender(self) -> bool:
        """Whether anything is cut."""
        return self.width < 1 or self.stream < 1

    def apply(self, model: Model, corpus: Corpus, budget: Budget, seed: int, teacher: Model | None = None) -> Model:
        known = model if teacher is None else teacher
        for one in (model, known):
            cloze.require_masked(one, "COST-EFF")
        same_tokens(model, known, "COST-EFF")
        asked, draft = cloze.questions(model, corpus, self.length), model.copy()
        if self.slender:
            _slender.stream_places(model)  # refuses what cannot be cut
        if self.exits and not exits.heads(draft.network):
            exits.attach(draft)
        feed = Labelled([one.ids for one in asked], np.arange(len(asked)))
        first, *parts = self.plan(budget)
        if first is not None:
            with Lesson(self, draft, known, asked) as lesson:
                train(draft, feed, self.recipe(), first, seed, lesson.first, note="assistant")
        if not parts:
            return draft
        guide, full = draft.copy(), Shape.of(draft)
        kept = list(range(full.stream))
        sample = np.random.default_rng(seed).permutation(len(asked))[: self.records]
        for place, part in enumerate(parts):
            assert part is not None
            if place < self.rounds:
                with Lesson(self, draft, guide, asked, kept) as lesson:
                    found = _slender.salience(draft.network, batches(feed, asked, sample, self.batch_tokens // self.length), lesson.important)
                goal = full.after((place + 1) / self.rounds, self.width, self.stream)
                left = _slender.narrow(draft, found, goal.heads, goal.channels, goal.stream)
                kept = [kept[channel] for channel in left]
            with Lesson(self, draft, guide, asked, kept) as lesson:
                train(draft, feed, self.recipe(), part, seed + 1 + place, lesson.second, note="slenderizing" if place < self.rounds else "recovering")
        return draft

    def plan(self, budget: Budget) -> list[Budget | None]:
        """What the assistant gets, None without exits; and, if anything is cut, every round and what comes after.  Steps are whole, and at least one."""
        if not self.slender:
            return [budget]
        first = self.assistant if self.exits else 0.0
        shares = [first, *[(1 - first) * self.pruning / self.rounds] * self.rounds, (1 - first) * (1 - self.pruning)]
        ends = np.cumsum(shares) * budget.amount
        amounts = np.diff(np.floor(ends + 0.5) if budget.unit == "steps" else ends, prepend=0.0).tolist()
        found: list[Budget | None] = [Budget(max(1.0, amount) if budget.unit == "steps" else max(1e-9, amount), budget.unit) for amount in amounts]
        return found if self.exits else [None, *found[1:]]


@dataclass(frozen=True)
class Shape:
    """How many heads and channels each block has, and the stream."""

    heads: dict[int, int]
    channels: dict[int, int]
    stream: int

    @classmethod
    def of(cls, model: Model) -> Shape:
        blocks = model.anatomy.blocks
        return cls(
            {block.index: block.attention.heads for block in blocks if block.attention is not None},
            {block.index: block.feed_forward.channels for block in blocks if block.feed_forward is not None},
            _slender.width(model),
        )

    def after(self, done: float, width: float, stream: float) -> Shape:
        """What is left when this share of the way to these shares is done."""

        def left(full: int, share: float) -> int:
            return max(1, round(full * (1 - done * (1 - share))))

        return Shape({block: left(full, width) for block, full in self.heads.items()}, {block: left(full, width) for block, full in self.channels.items()}, left(self.stream, stream))


class Lesson:
    """The losses against one teacher, inside a context; the teacher is only looked at.  Every loss is in nats and errors a question."""

    def __init__(self, method: CostEff, student: Model, teacher: Model, asked: list[Question], kept: list[int] | None = None):
        self.method, self.asked, self.kept, self.stack = method, asked, kept, ExitStack()
        self.network, self.known = student.network, teacher.sharing().network
        self.mine, self.theirs = exits.block_paths(student), exits.block_paths(teacher)

    def __enter__(self) -> Lesson:
        for enter in (losses.headless, fused.fused):
            self.stack.enter_context(enter(self.known))
        self.seen = self.stack.enter_context(exits.watched(self.network, self.mine, balanced=True))
        self.told = self.stack.enter_context(exits.watched(self.known, self.theirs))
        return self

    def __exit__(self, *error: object) -> None:
        self.stack.close()

    def first(self, network: nn.Module, part: Batch) -> losses.Lost:
        """Half the labels, half the teacher's last word, at every exit."""
        mine, theirs, some = self._look(network, part)
        truth = sum_over(mine, lambda one: nn.functional.cross_entropy(one, right(some, one), reduction="sum"))
        soft = sum_over(mine, lambda one: self._soft(one, theirs[-1]))
        return losses.Lost((truth + soft) / 2, counted=len(some), parts={"cross_entropy": truth.detach(), "kl": soft.detach()})

    def second(self, network: nn.Module, part: Batch) -> losses.Lost:
        """The guide's word exit by exit, and its states block by block."""
        mine, theirs, some = self._look(network, part)
        soft = torch.stack([self._soft(one, other) for one, other in zip(mine, theirs, strict=True)]).sum()
        apart = len(some) * torch.stack([self._apart(self.seen[block], self.told[block], part.mask) for block in sorted(self.seen)]).sum()
        return losses.Lost(soft + self.method.states * apart, counted=len(some), parts={"kl": soft.detach(), "states": apart.detach()})

    def important(self, network: nn.Module, part: Batch) -> Tensor:
        """What tells the importance: labels and the guide's word, over all exits, a mean over the questions."""
        mine, theirs, some = self._look(network, part)
        truth = sum_over(mine, lambda one: nn.functional.cross_entropy(one, right(some, one), reduction="sum"))
        soft = torch.stack([self._soft(one, other) for one, other in zip(mine, theirs, strict=True)]).sum()
        return (SOFT * soft + (1 - SOFT) * truth) / len(some)

    def _look(self, network: nn.Module, part: Batch) -> tuple[list[Tensor], list[Tensor], list[Question]]:
        """Scores of the student's and the teacher's exits, and the questions."""
        some = [self.asked[index] for index in part.tags]
        part = dataclasses.replace(part, masked=True)
        with torch.no_grad():
            theirs = exits.scores(self.known, part, some, self.told)
        return exits.scores(network, part, some, self.seen), theirs, some

    def _soft(self, mine: Tensor, theirs: Tensor) -> Tensor:
        """KL(teacher ‖ student) over the choices, times the temperature's square, summed over the questions."""
        log_q, log_p = ((one / self.method.temperature).log_softmax(1) for one in (mine, theirs))
        return self.method.temperature**2 * nn.functional.kl_div(log_q, log_p, reduction="sum", log_target=True)

    def _apart(self, mine: Tensor, theirs: Tensor, mask: Tensor | None) -> Tensor:
        """Relative squared error of states over the real tokens and the channels that the student still has."""
        if self.kept is not None and len(self.kept) < theirs.shape[-1]:
            theirs = theirs[..., self.kept]
        mine, theirs = (one.float() if mask is None else one[mask].float() for one in (mine, theirs))
        return (mine - theirs).square().mean() / theirs.square().mean().clamp(min=1e-12)


def sum_over(scores: list[Tensor], term: Callable[[Tensor], Tensor]) -> Tensor:
    """The sum of a term over the exits."""
    return torch.stack([term(one) for one in scores]).sum()


def right(some: list[Question], like: Tensor) -> Tensor:
    """Places of the right choices, (questions,)."""
    return torch.tensor([one.right for one in some], device=like.device)


def batches(feed: Labelled, asked: list[Question], sample: np.ndarray, size: int) -> Iterator[Batch]:
    """These questions, so many at a time."""
    rows = [Row(asked[index].ids, asked[index].ids, tag=index) for index in sample.tolist()]
    for begin in range(0, len(rows), max(1, size)):
        yield feed.collate(rows[begin : begin + max(1, size)])
