"""Train a causal language model on text."""

from __future__ import annotations

from dataclasses import dataclass

from etude.engine import batch
from etude.engine.budget import Budget
from etude.engine.score import require_causal
from etude.engine.train import Recipe, train
from etude.method import Method
from etude.values.corpus import Corpus
from etude.values.model import Model


@dataclass(frozen=True)
class CausalLM(Method):
    """Predict every next token, with all parameters trained.

    Documents are packed into rows in which none sees another.  Defaults are those of small-model pretraining: AdamW with
    betas 0.9 and 0.95, decay 0.1 on matrices, gradients clipped at 1 (Brown et al., 2020, appendix B).  Cost: the budget.
    """

    learning_rate: float = 1e-3
    """Peak learning rate."""
    optimizer: str = "adamw"
    """``adamw``, or ``muon`` for Muon on the blocks' matrices and AdamW on the rest."""
    schedule: str = "cosine"
    """``constant``, ``linear``, ``cosine``, ``wsd`` (the last fifth falls linearly) or ``inverse_sqrt``."""
    warmup: float = 0.02
    """Share of the budget over which the learning rate rises."""
    batch_tokens: int = 8192
    """Tokens in an optimizer step."""
    length: int = 512
    """Tokens in a row."""
    weight_decay: float = 0.1
    """Decoupled decay of matrices."""

    def __post_init__(self) -> None:
        self._recipe()

    def _recipe(self) -> Recipe:
        return Recipe(
            learning_rate=self.learning_rate, optimizer=self.optimizer, schedule=self.schedule, warmup=self.warmup,
            batch_tokens=self.batch_tokens, length=self.length, weight_decay=self.weight_decay,
        )  # fmt: skip

    def apply(self, model: Model, corpus: Corpus, budget: Budget, seed: int) -> Model:
        require_causal(model, "causal language modelling")
        trained = model.copy()
        train(trained, batch.Documents(trained, corpus), self._recipe(), budget, seed)
        return trained
