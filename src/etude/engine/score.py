"""Per-token log-probabilities over a corpus."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F

from etude.engine import batch
from etude.engine.cost import spend
from etude.engine.progress import report
from etude.values.corpus import Corpus
from etude.values.errors import InputError
from etude.values.model import Model

LOGIT_ELEMENTS = 1 << 26
"""At most so many logits at once: 256 MiB in float32."""


def batch_tokens(model: Model, most: int = 8192) -> int:
    """How many tokens fit into one forward pass."""
    return max(64, min(most, LOGIT_ELEMENTS // int(model.config.get_text_config().vocab_size)))


def require_causal(model: Model, what: str) -> None:
    """Raises InputError unless the model predicts the next token."""
    if model.kind != "causal":
        raise InputError(f"{what} needs a causal language model, and this is a {model.kind} one ({model.base.model_type})")


@torch.no_grad()
def log_probabilities(model: Model, documents: Sequence[np.ndarray], *, window: int = 512, stride: int = 256) -> list[np.ndarray]:
    """Natural log-probability of every token after a document's first, float32, one array a document.

    documents: token ids with their start token.  Long ones are covered by overlapping windows: each token after the first
    window has at least `window - stride` tokens before it.  Cost: about window / stride forward passes over the tokens.
    """
    require_causal(model, "scoring")
    network = model.network
    parts = batch.windows([len(document) for document in documents], window, stride)
    scores = [np.zeros(len(document) - 1, np.float32) for document in documents]
    total, done = sum(part.stop - part.start for part in parts), 0
    for group in batch.by_length([part.stop - part.start for part in parts], batch_tokens(model)):
        chosen = [parts[index] for index in group]
        ids = torch.zeros(len(chosen), max(part.stop - part.start for part in chosen), dtype=torch.long)
        for row, part in enumerate(chosen):
            ids[row, : part.stop - part.start] = torch.from_numpy(documents[part.document][part.start : part.stop])
        logits = network(input_ids=ids.to(network.device), use_cache=False).logits
        for row, part in enumerate(chosen):
            begin, end = part.scored - part.start, part.stop - part.start
            wanted = ids[row, begin:end].to(logits.device)
            loss = F.cross_entropy(logits[row, begin - 1 : end - 1].float(), wanted, reduction="none")
            scores[part.document][part.scored - 1 : part.stop - 1] = -loss.cpu().numpy()
        done += sum(part.stop - part.start for part in chosen)
        report("scoring", done, total)
    spend(tokens=total)
    return scores


def mean_loss(model: Model, documents: Sequence[np.ndarray], *, window: int = 512) -> float:
    """Mean negative log-likelihood a token, in nats."""
    scores = log_probabilities(model, documents, window=window, stride=window)
    return -float(np.concatenate(scores).mean(dtype=np.float64))


def sample_rows(model: Model, corpus: Corpus, tokens: int, length: int) -> list[np.ndarray]:
    """The first `tokens` tokens of a corpus in rows of at most `length`, each with its start token: a calibration set."""
    rows: list[np.ndarray] = []
    left = tokens
    for record in range(len(corpus)):
        (document,) = batch.encode(model, corpus[record : record + 1])
        for begin in range(1, len(document), length - 1):
            part = document[begin : begin + min(length - 1, left)]
            if left <= 0 or len(part) < 2:
                break
            rows.append(np.concatenate([document[:1], part]))
            left -= len(part)
        if left <= 0:
            break
    return rows
