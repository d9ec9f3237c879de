"""Per-token log-probabilities over a corpus."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from etude.engine import batch
from etude.engine.cost import flops_per_token, spend
from etude.engine.progress import report
from etude.values.corpus import Corpus
from etude.values.errors import InputError
from etude.values.lazy import lazy
from etude.values.model import Model

if TYPE_CHECKING:
    import torch
else:
    torch = lazy("torch")

COUNTED_LENGTH = 128
"""Tokens of the pass whose operations are counted for the bill."""
LOGIT_ELEMENTS = 1 << 26
"""At most so many logits at once: 256 MiB in float32."""


def batch_tokens(model: Model, most: int = 8192) -> int:
    """How many tokens fit into one forward pass."""
    return max(64, min(most, LOGIT_ELEMENTS // int(model.config.get_text_config().vocab_size)))


def require_causal(model: Model, what: str) -> None:
    """Raises InputError unless the model predicts the next token."""
    if model.kind != "causal":
        raise InputError(f"{what} needs a causal language model, and this is a {model.kind} one ({model.base.model_type})")


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
        with torch.no_grad():
            logits = network(input_ids=ids.to(network.device), use_cache=False).logits
        for row, part in enumerate(chosen):
            begin, end = part.scored - part.start, part.stop - part.start
            wanted = ids[row, begin:end].to(logits.device)
            loss = torch.nn.functional.cross_entropy(logits[row, begin - 1 : end - 1].float(), wanted, reduction="none")
            scores[part.document][part.scored - 1 : part.stop - 1] = -loss.cpu().numpy()
        done += sum(part.stop - part.start for part in chosen)
        report("scoring", done, total)
    spend(tokens=total, flops=total * flops_per_token(network, min(window, COUNTED_LENGTH)))
    return scores


def mean_loss(model: Model, documents: Sequence[np.ndarray], *, window: int = 512) -> float:
    """Mean negative log-likelihood a token, in nats."""
    scores = log_probabilities(model, documents, window=window, stride=window)
    return -float(np.concatenate(scores).mean(dtype=np.float64))


def sample_rows(model: Model, corpus: Corpus, tokens: int, length: int) -> list[np.ndarray]:
    """The first `tokens` tokens of a corpus in rows of at most `length`, each with its start token: a calibration set."""
    most = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if not 2 < length <= (most or length):
        raise InputError(f"a calibration row has 3 to {most or 'any number of'} tokens for this model, got {length}", remedy="Set `length` of the method.")
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


def block_changes(model: Model, rows: Sequence[np.ndarray]) -> np.ndarray:
    """How far each block turns the residual stream: one minus the cosine of its input and output, averaged over tokens.

    rows: token ids, each at most as long as the model reads.  Returns (blocks,), float64.  Cost: one forward pass over the rows.
    """
    require_causal(model, "measuring blocks")
    network = model.network
    blocks = [network.get_submodule(f"{stack}.{place}") for stack, count in model.anatomy.stacks.items() for place in range(count)]
    sums, counted = np.zeros(len(blocks)), 0
    real: torch.Tensor

    def watch(index: int):  # type: ignore[no-untyped-def]
        def hook(module: torch.nn.Module, args: tuple[torch.Tensor, ...], kwargs: dict[str, torch.Tensor], output: torch.Tensor | tuple[torch.Tensor, ...]) -> None:
            before = args[0] if args else kwargs["hidden_states"]
            after = output if isinstance(output, torch.Tensor) else output[0]
            sums[index] += (1 - torch.nn.functional.cosine_similarity(before.float(), after.float(), dim=-1))[real].sum().item()

        return hook

    handles = [block.register_forward_hook(watch(index), with_kwargs=True) for index, block in enumerate(blocks)]
    try:
        for ids, real in padded_batches(model, rows):
            with torch.no_grad():
                network(input_ids=ids, use_cache=False)
            counted += int(real.sum())
            report("measuring blocks", counted, sum(map(len, rows)))
    finally:
        for handle in handles:
            handle.remove()
    spend(tokens=counted, flops=counted * flops_per_token(network, COUNTED_LENGTH))
    return sums / counted


def padded_batches(model: Model, rows: Sequence[np.ndarray]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Rows in batches of like length on the model's device: ids, and which of them are real; a causal model's real tokens never see the padding."""
    for group in batch.by_length([len(row) for row in rows], batch_tokens(model)):
        ids = torch.zeros(len(group), len(rows[group[0]]), dtype=torch.long)
        real = torch.zeros_like(ids, dtype=torch.bool)
        for place, index in enumerate(group):
            ids[place, : len(rows[index])] = torch.from_numpy(rows[index])
            real[place, : len(rows[index])] = True
        yield ids.to(model.network.device), real.to(model.network.device)
