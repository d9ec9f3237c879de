"""Tune a masked model to fill in the right one of several choices."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from etude.engine import cloze, losses
from etude.engine.budget import Budget
from etude.engine.classify import Labelled
from etude.engine.feed import Batch
from etude.engine.train import train
from etude.methods._training import Training
from etude.values.corpus import Corpus
from etude.values.model import Model


@dataclass(frozen=True)
class ClozeTuning(Training):
    """Fine-tune all parameters of a masked model as a classifier: masks stand behind the prompt, and cross-entropy is taken over the choices that may fill them.

    Reads the columns prompt, choices and answer.  The head is the model's own, so that what comes out is a plain masked model; the measure `cloze` asks it in the same way.
    Source: no paper's of the catalogue; patterns and words for labels are those of Schick and Schütze, "Exploiting Cloze Questions", 2021 (arXiv 2001.07676), section 3, without their ensembles.
    A step has batch_tokens / length questions; what is longer loses the beginning of its prompt.  Masked models; raises InputError for others.
    Cost: the budget.
    """

    schedule: str = "linear"
    warmup: float = 0.1
    weight_decay: float = 0.01

    def apply(self, model: Model, corpus: Corpus, budget: Budget, seed: int) -> Model:
        asked = cloze.questions(model, corpus, self.length)
        tuned = model.copy()

        def loss(network: nn.Module, part: Batch) -> losses.Lost:
            some = [asked[index] for index in part.tags]
            part.masked = True
            found = cloze.scores(losses.forward(network, part), losses.head_of(network), some)
            right = torch.tensor([one.right for one in some], device=found.device)
            return losses.Lost(torch.nn.functional.cross_entropy(found, right, reduction="sum"), counted=len(some))

        train(tuned, Labelled([one.ids for one in asked], np.arange(len(asked))), self.recipe(), budget, seed, loss)
        return tuned
