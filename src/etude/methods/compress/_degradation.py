"""How far a pruned model has gone from the original, record by record."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from etude.engine import batch, fused, losses, prompted
from etude.engine.cost import flops_per_token, spend
from etude.engine.feed import Batch
from etude.engine.progress import report
from etude.engine.score import COUNTED_LENGTH
from etude.values.errors import InputError
from etude.values.model import Model

ELEMENTS = 1 << 24
"""Of logits that are held at once."""


@dataclass(frozen=True)
class Degradation:
    """Of every record; arrays are (records,)."""

    divergence: np.ndarray
    """Mean Jensen–Shannon divergence between the two models over the completion's tokens, in nats a token."""
    nats: np.ndarray
    """Mean negative log-probability of the completion's tokens under the pruned model."""
    tokens: np.ndarray
    """Of prompt and completion."""


@torch.no_grad()
def degradation(pruned: Model, original: Model, pairs: Sequence[tuple[str, str]]) -> Degradation:
    """Compare two models that read the same tokens on the completions of some pairs, each given its prompt.

    Raises InputError for a pair without a token, or one longer than the models read.  Cost: a forward pass of both over the pairs.
    """
    encoded = prompted.encode(pruned, pairs)
    rows = [np.concatenate([one.prompt, one.completion]) for one in encoded]
    limit = min(getattr(one.config.get_text_config(), "max_position_embeddings", None) or max(map(len, rows)) for one in (pruned, original))
    for place, (row, one) in enumerate(zip(rows, encoded, strict=True)):
        if not len(one.completion):
            raise InputError(f"record {place} has no completion to compare the models on", remedy="Leave out records whose completion is empty.")
        if len(row) > limit:
            raise InputError(f"record {place} has {len(row)} tokens, and the models read {limit} at once", remedy="Leave out longer records.")
    networks = (pruned.network, original.network)
    vocabulary = int(networks[0].get_output_embeddings().weight.shape[0])  # type: ignore[union-attr]
    found = Degradation(np.zeros(len(rows)), np.zeros(len(rows)), np.array([len(row) for row in rows]))
    done, total = 0, sum(map(len, rows))
    with fused.fused(networks[0]), fused.fused(networks[1]):
        for group in batch.by_length([len(row) for row in rows], max(64, ELEMENTS // vocabulary)):
            ids, _ = batch.padded([rows[index] for index in group])
            ids = ids.to(networks[0].device)
            first, second = (losses.forward(network, Batch(ids, ids)).float() for network in networks)
            for place, index in enumerate(group):
                begin, end = len(encoded[index].prompt), len(rows[index])
                here = slice(begin - 1, end - 1)
                found.divergence[index] = float(jensen_shannon(first[place, here], second[place, here]).mean())
                found.nats[index] = float(torch.nn.functional.cross_entropy(first[place, here], ids[place, begin:end]))
            done += sum(len(rows[index]) for index in group)
            report("comparing with the original", done, total)
    spend(tokens=2 * total, flops=total * sum(flops_per_token(network, COUNTED_LENGTH) for network in networks))
    return found


def jensen_shannon(one: Tensor, other: Tensor) -> Tensor:
    """Divergence between the distributions of two rows of logits each, (rows,) nats, from 0 to ln 2."""
    common = min(one.shape[-1], other.shape[-1])
    p, q = one[..., :common].log_softmax(-1), other[..., :common].log_softmax(-1)
    middle = torch.logaddexp(p, q) - np.log(2)
    return (((p - middle) * p.exp()).sum(-1) + ((q - middle) * q.exp()).sum(-1)) / 2
