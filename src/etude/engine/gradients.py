"""The gradient of the loss over calibration rows: what first-order importance is made of."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from etude.engine import batch, fused, losses
from etude.engine.cost import flops_per_token, spend
from etude.engine.feed import Batch
from etude.engine.progress import report
from etude.engine.score import COUNTED_LENGTH, require_causal
from etude.engine.train import LARGE, LARGE_MICRO_TOKENS, MICRO_TOKENS
from etude.values.errors import InputError
from etude.values.model import Model


def gradients(model: Model, rows: Sequence[np.ndarray], names: Collection[str] | None = None) -> dict[str, Tensor]:
    """Gradient of the mean next-token loss over all predicted tokens of the rows, by parameter name, each of its parameter's shape.

    rows: token ids, each with its start token and as long as the model reads; row by row every token but the first is predicted.  names: of which
    parameters, by default of all; a tied one may be named by any of its names, and stands under each that was asked for.  A parameter that the
    loss does not depend on has a gradient of zeros.  The model stays as it was: dropout is off, and what asks for gradients asks for them afterwards.
    Raises InputError for a model that does not predict the next token, and for rows without a token to predict.
    Cost: a forward and a backward pass over the rows, a micro-batch at a time; memory for one gradient.
    """
    require_causal(model, "measuring gradients")
    network = model.network
    named = dict(network.named_parameters(remove_duplicate=False))
    chosen = {name: named[name] for name in (named if names is None else names)}
    tokens = sum(map(len, rows))
    count = tokens - len(rows)
    if not count:
        raise InputError("the calibration rows have no token to predict", remedy="Give text of at least two tokens.")
    done = 0
    with _asking(network, chosen.values()), losses.headless(network), fused.fused(network):
        for part in _batches(rows, _micro_tokens(network)):
            losses.next_token(network, part.to(network.device)).div(count).backward()
            done += int((part.labels != batch.IGNORED).sum()) + len(part.labels)
            report("measuring gradients", done, tokens)
        found = {name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad for name, parameter in chosen.items()}
    spend(tokens=tokens, flops=3 * tokens * flops_per_token(network, COUNTED_LENGTH))
    return found


@contextmanager
def _asking(network: nn.Module, chosen: Collection[nn.Parameter]) -> Iterator[None]:
    """Inside, these parameters alone ask for gradients, and have none yet; afterwards everything is as it was."""
    wanted = {id(parameter) for parameter in chosen}
    before = [(parameter, parameter.requires_grad, parameter.grad) for parameter in network.parameters()]
    training = network.training
    network.eval()
    for parameter, _, _ in before:
        parameter.grad = None
        parameter.requires_grad_(id(parameter) in wanted)
    try:
        with torch.enable_grad():
            yield
    finally:
        for parameter, asked, gradient in before:
            parameter.requires_grad_(asked)
            parameter.grad = gradient
        network.train(training)


def _batches(rows: Sequence[np.ndarray], most: int) -> Iterator[Batch]:
    """Rows of like length, padded on the right, which a causal model's real tokens never see; the labels are the next tokens."""
    for group in batch.by_length([len(row) for row in rows], most):
        ids = torch.zeros(len(group), len(rows[group[0]]), dtype=torch.long)
        labels = torch.full_like(ids, batch.IGNORED)
        for place, row in enumerate(torch.from_numpy(rows[index]) for index in group):
            ids[place, : len(row)] = row
            labels[place, : len(row) - 1] = row[1:]
        yield Batch(ids, labels)


def _micro_tokens(network: nn.Module) -> int:
    device = next(network.parameters()).device.type
    large = device == "cpu" and sum(parameter.numel() for parameter in network.parameters()) >= LARGE
    return LARGE_MICRO_TOKENS if large else MICRO_TOKENS.get(device, 8192)
