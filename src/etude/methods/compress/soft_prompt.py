"""Train a soft prompt: vectors before the text, and nothing else."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from etude.engine.batch import Documents
from etude.engine.budget import Budget
from etude.engine.feed import Cut, Row
from etude.engine.score import require_causal
from etude.engine.train import train
from etude.methods._training import Training
from etude.values.corpus import Corpus
from etude.values.errors import InputError
from etude.values.lazy import lazy
from etude.values.model import Model
from etude.values.prompt import NAME, Prompt

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = lazy("torch")


@dataclass(frozen=True)
class SoftPrompt(Training):
    """Freeze a model, as after pruning or quantization, and train vectors that it reads before every text, so that it predicts text like the corpus's better.

    What comes out is the model with its prompt: whatever reads or scores it later has the prompt before each text.  `measures.dynamic_prompting` chooses among several such models'.
    Source: prompt tuning as in Lester et al., "The Power of Scale for Parameter-Efficient Prompt Tuning", 2021 (arXiv 2104.08691), in the service of compressed models: Hoang et al., "Do Compressed
    LLMs Forget Knowledge?" ("(Dynamic) Prompting might be all you need to repair Compressed LLMs"), 2023 (arXiv 2310.00867).
    Departures: written from the abstract and reviews of the latter, which say neither how long its prompts are nor how they were trained: length and learning rate are ours.  The vectors begin as
    embeddings of tokens that are drawn from the corpus.  A row is a part of one document, never several.
    A saved model holds the whole network beside the prompt, and only Étude loads it.
    Raises InputError for a model that is not causal, has a prompt already, or cannot read prompt and row together.
    Removes: nothing; it adds `prompt` vectors.
    Cost: the budget; backward passes form no gradient of the weights.  Every later text is `prompt` tokens longer.
    """

    paper = "inference-time-dynamic-prompting"

    prompt: int = 20
    """Vectors, at least 1."""
    learning_rate: float = 3e-2
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.prompt < 1:
            raise ValueError(f"prompt is a number of vectors, at least 1, got {self.prompt}")

    def apply(self, model: Model, corpus: Corpus, budget: Budget, seed: int) -> Model:
        require_causal(model, "a soft prompt")
        limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        if limit is not None and self.prompt + self.length > limit:
            raise InputError(f"the model reads {limit} tokens, and a prompt of {self.prompt} with a row of {self.length} is longer", remedy="Lower prompt or length.")
        prompted = model.copy()
        prompted.edit(Prompt(self.prompt))
        network = prompted.network
        asked = {name: parameter.requires_grad for name, parameter in network.named_parameters()}
        network.requires_grad_(False)
        documents = Documents(prompted, corpus)
        vectors = getattr(network, NAME)
        with torch.no_grad():
            vectors.copy_(network.get_input_embeddings()(self._drawn(documents, seed).to(vectors.device)))
        vectors.requires_grad_(True)
        train(prompted, Parts(documents, self.length + 1), self.recipe(), budget, seed)
        for name, parameter in network.named_parameters():
            parameter.requires_grad_(asked[name])
        return prompted

    def _drawn(self, documents: Documents, seed: int) -> Tensor:
        """Tokens from some of the corpus's documents, (prompt,)."""
        random = np.random.default_rng([seed, 2310])
        some = random.permutation(len(documents))[:16].tolist()
        return torch.from_numpy(random.choice(np.concatenate(list(documents.take(some))), self.prompt))


class Parts(Cut):
    """Each row a part of one document, and the next tokens as labels."""

    def take(self, count: int, progress: float) -> list[Row]:
        found: list[Row] = []
        for _ in range(1000 * count):
            (row,) = super().take(1, progress)
            if len(row.ids) > 1:
                found.append(Row(row.ids[:-1], row.ids[1:]))
            if len(found) == count:
                return found
        raise InputError("the corpus has hardly a text of a token")
