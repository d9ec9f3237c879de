"""Distil a masked model into one of fewer layers in four stages, each of which changes one thing: the teacher, the text, or the loss."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from etude.engine import batch, cloze, fused, losses
from etude.engine.budget import Budget
from etude.engine.classify import Labelled
from etude.engine.cloze import Question
from etude.engine.distil import same_tokens
from etude.engine.eager import eager
from etude.engine.feed import Batch, Cut
from etude.engine.train import train
from etude.methods._training import Training
from etude.methods.compress import _latent
from etude.values.corpus import Corpus
from etude.values.errors import InputError
from etude.values.model import Model

STAGES = ("general", "general_enhanced", "task_adaptive", "task_specific")
INITIAL = ("blocks", "random")


@dataclass(frozen=True)
class ErnieTiny(Training):
    """Progressive distillation: a student with fewer blocks learns first what the pretrained teacher makes of general text, and at last the task.

    ``general``: hidden states and attention maps of the pretrained teacher, `model`, on general text.  ``general_enhanced``: the same of the fine-tuned one, `tuned`.
    ``task_adaptive``: the same on the task's text.  ``task_specific``: adds KL(teacher ‖ student) over the choices, and cross-entropy with the right one.
    Every stage begins with the student of the one before; linear maps that are trained with it align widths.  Blocks are paired evenly, the last standing for the last.
    The student is made of the pretrained model's blocks, evenly spread from its first to its last, or drawn anew; or it is given, as narrow as you like.
    Source: Su et al., "ERNIE-Tiny: A Progressive Distillation Framework for Pretrained Transformer Compression", 2021 (arXiv 2106.02241): the four stages.
    Departures: we read the abstract and summaries, not the text, and chose the distances: KL of attention distributions as MiniLM has it, and the squared error of states divided by the teacher's
    mean square, as streams without norms behind the blocks (unlike BERT's) have any scale.  No embeddings are compared.  Classification is filling in one of some choices at masks behind a prompt
    (`adapt.cloze_tuning` makes the teacher), so that the head is the model's own.  A stage has a schedule of its own, and an equal share of the budget unless `shares` says otherwise.
    Other sequences of stages are the paper's rivals; ``task_specific`` alone with `truth` alone is plain fine-tuning of the student.
    Reads the general corpus's text, and the task's prompt, choices and answer.  Masked models of one stack that show their attention.  Raises InputError for others, or for another tokenizer.
    Removes: whole blocks.
    Cost: the budget, with a forward pass of a teacher over every row; attention maps are held.
    """

    paper = "ernie-tiny"

    blocks: int = 4
    """Blocks of the student, at least 1; 4 of 12 in the paper."""
    initial: str = "blocks"
    """``blocks`` of the pretrained model, or ``random``, all weights drawn anew."""
    stages: tuple[str, ...] = STAGES
    """Which of ``general``, ``general_enhanced``, ``task_adaptive`` and ``task_specific``, in this order."""
    shares: tuple[float, ...] = ()
    """Parts of the budget that the stages get, in proportion; equal ones by default."""
    states: float = 1.0
    """Weight of the blocks' states, a mean over the blocks."""
    maps: float = 1.0
    """Weight of the attention maps, a mean over the blocks."""
    divergence: float = 1.0
    """Weight of KL(teacher ‖ student) over the choices, times the temperature's square."""
    truth: float = 1.0
    """Weight of the cross-entropy with the right choice."""
    temperature: float = 1.0
    """What both models' scores are divided by in the divergence."""
    schedule: str = "linear"
    warmup: float = 0.1
    weight_decay: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.blocks < 1:
            raise ValueError(f"blocks is at least 1, got {self.blocks}")
        if self.initial not in INITIAL:
            raise ValueError(f"initial is {' or '.join(INITIAL)}, got {self.initial!r}")
        if not self.stages or list(self.stages) != [stage for stage in STAGES if stage in self.stages]:
            raise ValueError(f"stages are some of {', '.join(STAGES)}, in this order, got {', '.join(map(str, self.stages)) or 'none'}")
        if self.shares and (len(self.shares) != len(self.stages) or not min(self.shares) > 0):
            raise ValueError(f"shares has a part more than 0 for each of the {len(self.stages)} stages, got {self.shares}")
        if min(self.states, self.maps, self.divergence, self.truth) < 0 or not self.temperature > 0:
            raise ValueError(f"weights are 0 or more and temperature is more than 0, got {self.states}, {self.maps}, {self.divergence}, {self.truth} and {self.temperature}")
        if not self.states + self.maps > 0 and self.stages != STAGES[-1:]:
            raise ValueError("states or maps is more than 0, for the stages that learn nothing else")
        if not self.states + self.maps + self.divergence + self.truth > 0:
            raise ValueError("one of states, maps, divergence and truth is more than 0")

    def apply(self, model: Model, tuned: Model, corpus: Corpus, task: Corpus, budget: Budget, seed: int, student: Model | None = None) -> Model:
        for one in (model, tuned, *([student] if student else [])):
            cloze.require_masked(one, "ERNIE-Tiny")
            if len(one.anatomy.stacks) != 1:
                raise InputError(f"ERNIE-Tiny needs one stack of blocks, and this {one.base.model_type} has {len(one.anatomy.stacks)}")
        asked = cloze.questions(tuned, task, self.length)
        draft = self._student(model, seed) if student is None else student.copy()
        for one in (model, tuned):
            same_tokens(draft, one, "ERNIE-Tiny")
        general = Cut(batch.Documents(draft, corpus), self.length)
        questions = Labelled([one.ids for one in asked], np.arange(len(asked)))
        parts, deep = split(budget, self.shares or (1.0,) * len(self.stages)), bool(self.states or self.maps)
        with ExitStack() as stack:
            if deep:
                wide = [_latent.check(one.network, sum(one.anatomy.stacks.values()), "ERNIE-Tiny")[0] for one in (draft, model, tuned)]
                stack.enter_context(_latent.widened(draft.network, sum(draft.anatomy.stacks.values()), wide[0], wide[1:]))
                stack.enter_context(eager(draft.network))
            for place, (stage, part) in enumerate(zip(self.stages, parts, strict=True)):
                known = model if stage == STAGES[0] else tuned
                with Teaching(self, draft, known, stage, asked) as teaching:
                    train(draft, general if stage in STAGES[:2] else questions, self.recipe(), part, seed + place, teaching.loss, note=stage)
        return draft

    def _student(self, model: Model, seed: int) -> Model:
        """A draft with so many of the model's blocks, or of that shape."""
        count = sum(model.anatomy.stacks.values())
        if self.blocks > count:
            raise InputError(f"a student of {self.blocks} blocks cannot be made of {count}", remedy="Lower blocks, or give a student.")
        draft = model.copy()
        kept = [round(place) for place in np.linspace(0, count - 1, self.blocks).tolist()]
        draft.anatomy.drop([place for place in range(count) if place not in kept])
        if self.initial == "random":
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                for module in draft.network.modules():
                    draft.network._init_weights(module)
        return draft


class Teaching:
    """The loss of one stage, inside a context; the teacher is only looked at."""

    def __init__(self, method: ErnieTiny, student: Model, teacher: Model, stage: str, asked: list[Question]):
        self.method, self.student, self.stage, self.asked = method, student, stage, asked
        self.known = teacher.sharing().network
        self.deep, self.last = bool(method.states or method.maps), stage == STAGES[-1]
        self.pairs = list(enumerate(_latent.spread(*(sum(one.anatomy.stacks.values()) for one in (student, teacher)))))

    def __enter__(self) -> Teaching:
        self.stack = ExitStack()
        for enter in (losses.headless, fused.fused, *([eager] if self.deep else [])):
            self.stack.enter_context(enter(self.known))
        return self

    def __exit__(self, *error: object) -> None:
        self.stack.close()

    def loss(self, network: nn.Module, part: Batch) -> losses.Lost:
        """Of the stage, in nats and errors a row."""
        method, rows, parts = self.method, len(part.ids), {}
        part = dataclasses.replace(part, masked=True)
        said = _latent.look(network, part, self.deep)
        total = said.said.new_zeros(())
        if self.deep or (self.last and method.divergence):
            with torch.no_grad():
                told = _latent.look(self.known, part, self.deep)
        if self.deep:
            parts["states"] = self._mean(lambda mine, its: _latent.states_apart(_latent.mapped(network, mine, said.states[mine], told.states[its].shape[-1]), told.states[its], part.mask))
            parts["maps"] = self._mean(lambda mine, its: _latent.attentions_apart(said.attentions[mine], told.attentions[its], part.mask))
            total = method.states * parts["states"] + method.maps * parts["maps"]
        if self.last:
            some = [self.asked[index] for index in part.tags]
            scores = cloze.scores(said.said, losses.head_of(network), some)
            parts["cross_entropy"] = torch.nn.functional.cross_entropy(scores, torch.tensor([one.right for one in some], device=scores.device))
            total = total + method.truth * parts["cross_entropy"]
            if method.divergence:
                theirs = cloze.scores(told.said, losses.head_of(self.known), some)
                parts["kl"] = divergence(scores, theirs, method.temperature)
                total = total + method.divergence * method.temperature**2 * parts["kl"]
        return losses.Lost(total * rows, counted=rows, parts={name: value.detach() * rows for name, value in parts.items()})

    def _mean(self, apart: Callable[[int, int], Tensor]) -> Tensor:
        return torch.stack([apart(mine, its) for mine, its in self.pairs]).mean()


def divergence(scores: Tensor, theirs: Tensor, temperature: float) -> Tensor:
    """Mean KL(teacher ‖ student) over the choices, (questions, choices) scores each, in nats."""
    log_q, log_p = ((one / temperature).log_softmax(1) for one in (scores, theirs))
    return torch.nn.functional.kl_div(log_q, log_p, reduction="batchmean", log_target=True)


def split(budget: Budget, shares: tuple[float, ...]) -> list[Budget]:
    """A budget in these proportions; steps are whole, and at least one."""
    ends = np.cumsum(shares) / sum(shares) * budget.amount
    if budget.unit == "steps":
        ends = np.floor(ends + 0.5)
    amounts = np.diff(ends, prepend=0.0).tolist()
    return [Budget(max(1.0, amount) if budget.unit == "steps" else amount, budget.unit) for amount in amounts]
