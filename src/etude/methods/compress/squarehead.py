"""Prune a model step by step while it is tuned, and hold each of its blocks to what the dense one makes."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from etude.engine import batch, distil, losses
from etude.engine.budget import Budget
from etude.engine.feed import Batch, Packed
from etude.engine.score import require_causal
from etude.engine.train import Step, train
from etude.methods._training import Training
from etude.methods.compress._masks import hold, matrices
from etude.methods.compress.magnitude import least
from etude.values.corpus import Corpus
from etude.values.model import Model


@dataclass(frozen=True)
class SquareHead(Training):
    """Zero more and more of the blocks' weights while all others are tuned, by cross-entropy plus the squared error of every block's hidden states, relative to a dense teacher's.

    The error of a block is ‖student's states - teacher's‖² / ‖teacher's‖² over the tokens of a micro-batch, so that every block counts alike; the errors are added up over the blocks.
    `divergence` adds KL(teacher ‖ student) on the logits.  Weights are pruned at `rounds` moments, the first of them before the first step and all within the
    first `ramp` of the budget; after round r the share sparsity · (1 - (1 - r / rounds)³) of each matrix is zero; between the rounds the zeros stay, and so they do until the end.
    Zeros that the model brings along count, and stay too: on a model that is as sparse as that already, nothing is pruned, and it is only tuned.
    The teacher is by default the model itself as it comes in.
    Source: Kurtic et al., "Sparse Fine-tuning for Inference Acceleration of Large Language Models", 2023 (arXiv 2310.06927), section 2, and the authors' code.
    Departures: what goes is the smallest of each matrix, the others of the authors' pruners use second-order information (to have SparseGPT's zeros, give a model that
    `compress.sparsegpt` pruned); the cubic ramp is that of Zhu and Gupta (2017), to which their earlier work holds; the last block is compared before the final norm, their code compares behind it.
    Experts are pruned one by one.  Causal models, where the paper also tunes encoder–decoders on pairs.
    The file keeps its zeros: nothing here runs faster before something sparse runs it, and the paper's speed is its runtime's.
    Defaults: the weights of the terms in the authors' script (1, 0 and 1), and 75 %, the highest share that is said to cost MPT nothing.
    Removes: single weights, which become zero.
    Cost: the budget, and with any distillation a forward pass of the teacher over every row.
    """

    paper = "squarehead-sparse-finetuning"

    sparsity: float = 0.75
    """Share of each matrix that is zero at the end, 0 < sparsity < 1."""
    rounds: int = 4
    """Moments at which weights are pruned, at least 1."""
    ramp: float = 0.5
    """Share of the budget within which they lie, at least 0 and at most 1; with 0 all is pruned at once."""
    truth: float = 1.0
    """Weight of the cross-entropy."""
    divergence: float = 0.0
    """Weight of the KL divergence of the logits."""
    temperature: float = 1.0
    """What both models' logits are divided by in it."""
    states: float = 1.0
    """Weight of the blocks' relative squared errors."""
    weight_decay: float = 0.0
    schedule: str = "linear"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.lesson(1)
        if not 0 < self.sparsity < 1:
            raise ValueError(f"sparsity is a share of the weights, more than 0 and less than 1, got {self.sparsity}; for three quarters pass 0.75")
        if self.rounds < 1:
            raise ValueError(f"rounds is at least 1, got {self.rounds}")
        if not 0 <= self.ramp <= 1:
            raise ValueError(f"ramp is a share of the budget, at least 0 and at most 1, got {self.ramp}")
        if self.optimizer != "adamw":
            raise ValueError(f"optimizer is adamw, whose updates leave zeros alone, got {self.optimizer!r}")

    def apply(self, model: Model, corpus: Corpus, budget: Budget, seed: int, teacher: Model | None = None) -> Model:
        require_causal(model, "SquareHead")
        dense = model if teacher is None else teacher
        student = model.copy()
        pruning = Pruning(student, self.sparsity, self.rounds, self.ramp)
        feed = Packed(batch.Documents(student, corpus), self.length)
        if not self.divergence and not self.states:
            train(student, feed, self.recipe(), budget, seed, pruning.before(losses.next_token), pruning.before_step)
            return student
        pairs = distil.block_pairs(student, dense)
        with distil.taught(student, dense, self.lesson(len(pairs)), pairs) as loss:
            train(student, feed, self.recipe(), budget, seed, pruning.before(loss), pruning.before_step)
        return student

    def lesson(self, blocks: int) -> distil.Lesson:
        """What the student is taught; the engine takes the mean over the blocks, the paper the sum."""
        return distil.Lesson(truth=self.truth, divergence=self.divergence, temperature=self.temperature, states=self.states * blocks, distance="relative")


class Pruning:
    """The zeros of a draft while it is trained.  What they are at a share of the budget follows from the weights and the share alone, so that a killed run finds them again."""

    def __init__(self, draft: Model, sparsity: float, rounds: int, ramp: float):
        self.matrices = matrices(draft)
        self.sparsity, self.rounds, self.ramp, self.done = sparsity, rounds, ramp, 0
        self.masked: dict[nn.Parameter, Tensor] = {}

    def due(self, progress: float) -> int:
        """Rounds that have been at this share of the budget, from 1."""
        return self.rounds if progress >= self.ramp else 1 + math.floor(progress / self.ramp * self.rounds + 1e-9)

    def before(self, loss: Callable[[nn.Module, Batch], Tensor | losses.Lost]) -> Callable[[nn.Module, Batch], Tensor | losses.Lost]:
        """A loss, before which whatever is due is pruned."""

        def pruned(network: nn.Module, batch: Batch) -> Tensor | losses.Lost:
            if self.done < self.due(batch.progress):
                self.done = self.due(batch.progress)
                self.prune(self.sparsity * (1 - (1 - self.done / self.rounds) ** 3))
            return loss(network, batch)

        return pruned

    def before_step(self, step: Step) -> None:
        hold(step, self.masked)

    @torch.no_grad()
    def prune(self, sparsity: float) -> None:
        """Zero the smallest of each matrix until this share is zero; those that are zero are the first, and stay where there are more."""
        for path, matrix in self.matrices.items():
            for weight in matrix if matrix.ndim > 2 else (matrix,):
                if int((weight == 0).sum()) < round(sparsity * weight.numel()):
                    weight.masked_fill_(least(weight.abs(), sparsity, "unstructured", path, across=True), 0)
            self.masked[matrix] = matrix == 0
