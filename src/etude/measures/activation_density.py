"""How many of the feed-forward activations are not zero."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from etude.engine import activations, batch, hidden
from etude.engine.cost import flops_per_token, spend
from etude.engine.progress import report
from etude.engine.score import COUNTED_LENGTH, ROW_TOKENS
from etude.method import MEASUREMENTS, Method
from etude.values.corpus import Corpus
from etude.values.errors import InputError
from etude.values.lazy import lazy
from etude.values.measurement import Measurement
from etude.values.model import Model

if TYPE_CHECKING:
    import torch
else:
    torch = lazy("torch")


@dataclass(frozen=True)
class ActivationDensity(Method):
    """Share of the numbers that feed-forward layers hold between their two sides whose size is more than `threshold`: what a kernel that skips zeros has left to multiply.

    The mean over a text's tokens, with those that the tokenizer puts around it, over channels and over blocks; of a gated layer it is the product of the gate and its other half.
    Each text is an item, with its tokens as weight.
    As Runwal et al. ("From PEFT to DEFT", 2025) count, with a threshold of zero.  Networks whose activation function is never quite zero need a higher one.
    Causal, masked and encoder models.  Raises InputError for others, for experts, and for an empty text or one that is longer than the model reads and than no `window` cuts.
    Cost: one forward pass over the texts.
    """

    threshold: float = 0.0
    """Sizes up to this count as zero, at least 0."""
    window: int | None = None
    """Cut texts to so many tokens; by default none is cut."""

    def __post_init__(self) -> None:
        if not self.threshold >= 0:
            raise ValueError(f"threshold is at least 0, got {self.threshold}")

    def apply(self, model: Model, corpus: Corpus) -> MEASUREMENTS:
        if model.kind == "seq2seq":
            raise InputError(f"activation density needs a model of one stack, and this is a {model.kind} one ({model.base.model_type})")
        rows, paths = hidden.encoded(model, corpus.texts, self.window), activations.outputs(model, "activation density")
        network: Any = model.network
        lengths, shares, done = [len(row) for row in rows], np.zeros(len(rows)), 0
        with torch.no_grad(), activations.watched(network, paths) as seen:
            for chosen in batch.by_length(lengths, ROW_TOKENS.get(network.device.type, 8192)):
                ids, real = (one.to(network.device) for one in batch.padded([rows[index] for index in chosen], model.tokenizer.pad_token_id or 0))
                network(input_ids=ids, attention_mask=real)
                alive = torch.stack([(read.abs() > self.threshold).float().mean(-1).reshape(ids.shape) for read in seen]).mean(0)
                shares[chosen] = ((alive * real).sum(1) / real.sum(1)).cpu().numpy()
                seen.clear()
                done += int(real.sum())
                report("reading", done, sum(lengths))
        spend(tokens=done, flops=done * flops_per_token(network, COUNTED_LENGTH))
        names = corpus.column("path") if "path" in corpus.columns else range(len(rows))
        return (Measurement("density", shares, weights=np.array(lengths, float), item_names=tuple(map(str, names))),)
