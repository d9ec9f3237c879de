"""The one training loop.

A method hands it a loss; the loop owns the data order, the budget, the schedule, accumulation, clipping, the optimizer and the record.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from etude.engine import batch
from etude.engine.batch import IGNORED
from etude.engine.budget import Budget
from etude.engine.cost import spend
from etude.engine.progress import report
from etude.values.errors import StepError
from etude.values.lazy import lazy
from etude.values.model import Model

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
    from transformers import PreTrainedModel

    Loss = Callable[[nn.Module, "Batch"], Tensor]
    """Sum of the loss over the counted labels of a batch, in nats; the loop divides by their number."""
else:
    torch = lazy("torch")

SCHEDULES = ("constant", "linear", "cosine", "wsd", "inverse_sqrt")
OPTIMIZERS = ("adamw", "muon")
COMPILE_FROM = 1e14
"""Floating-point operations of a run from which compiling the network, up to a minute, is worth its while on a processor."""


class Batch(NamedTuple):
    """A micro-batch on the model's device, each tensor (rows, length)."""

    ids: Tensor
    labels: Tensor
    """The next token at each place, -100 where none counts."""
    positions: Tensor


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How to train; the fields have the meaning that the same names have in the methods."""

    learning_rate: float
    optimizer: str = "adamw"
    schedule: str = "cosine"
    warmup: float = 0.02
    batch_tokens: int = 8192
    length: int = 512
    micro_tokens: int = 8192
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float = 1.0

    def __post_init__(self) -> None:
        if self.schedule not in SCHEDULES:
            raise ValueError(f"schedule is one of {', '.join(SCHEDULES)}, got {self.schedule!r}")
        if self.optimizer not in OPTIMIZERS:
            raise ValueError(f"optimizer is one of {', '.join(OPTIMIZERS)}, got {self.optimizer!r}")
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate is more than 0, got {self.learning_rate}")
        if not 2 <= self.length <= self.batch_tokens:
            raise ValueError(f"length is at least 2 and at most batch_tokens ({self.batch_tokens}), got {self.length}")


def next_token_loss(network: nn.Module, batch: Batch) -> Tensor:
    """Cross-entropy of the next token, summed over the counted labels, in nats."""
    logits = network(input_ids=batch.ids, position_ids=batch.positions, use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), batch.labels.flatten(), ignore_index=IGNORED, reduction="sum")


def scale(schedule: str, progress: float, warmup: float) -> float:
    """The learning rate's share of its peak when this share of the budget is spent.

    ``wsd`` holds the peak and falls linearly to zero over the last fifth; ``cosine`` and ``linear`` end at zero; ``inverse_sqrt``
    falls with the root of the progress from the end of the warm-up on.
    """
    if warmup > 0 and progress < warmup:
        return max(progress, 1e-8) / warmup
    after = (progress - warmup) / max(1e-9, 1 - warmup)
    match schedule:
        case "constant":
            return 1.0
        case "linear":
            return max(0.0, 1 - after)
        case "cosine":
            return 0.5 * (1 + math.cos(math.pi * min(1.0, after)))
        case "wsd":
            return min(1.0, max(0.0, (1 - progress) / 0.2))
        case _:
            return math.sqrt(max(warmup, 0.01) / max(progress, warmup, 0.01))


def train(model: Model, documents: batch.Documents, recipe: Recipe, budget: Budget, seed: int, loss: Loss = next_token_loss) -> None:
    """Train the parameters of a draft that ask for gradients, in place, and append to its history.

    documents: packed into rows of `recipe.length` in which none sees another.
    Raises StepError when the loss is not finite, saying at which step.  Cost: the budget.
    """
    model.require_draft()
    network = model.network
    flops = _flops_per_token(network, loss, recipe)
    torch.manual_seed(seed)
    rows_a_step = max(1, recipe.batch_tokens // recipe.length)
    planned = _planned_tokens(budget, flops, rows_a_step * recipe.length)
    runner: nn.Module = network
    if planned * flops >= COMPILE_FROM:
        runner = torch.compile(network)  # type: ignore[assignment]
    optimizers = _optimizers(network, recipe)
    trained = [parameter for group in optimizers for parameter in _parameters(group)]
    rows = batch.epochs(documents, recipe.length, seed)
    network.train()
    history: list[dict[str, float]] = []
    start, step, tokens = time.perf_counter(), 0, 0
    while (spent := _spent(budget, step, tokens, tokens * flops, time.perf_counter() - start)) < 1:
        factor = scale(recipe.schedule, max(spent, 1e-8 if step else (1 / max(2.0, planned / recipe.batch_tokens))), recipe.warmup)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = recipe.learning_rate * factor
        mean = _step(runner, network, rows, rows_a_step, recipe, optimizers, trained, loss)
        step, tokens = step + 1, tokens + rows_a_step * recipe.length
        if not math.isfinite(mean):
            raise StepError(f"the loss became {mean} at step {step}: the learning rate {recipe.learning_rate:g} may be too high")
        elapsed = time.perf_counter() - start
        if step == 1 or step % 10 == 0:
            history.append({"step": step, "tokens": tokens, "loss": round(mean, 5), "learning_rate": recipe.learning_rate * factor})
        report("training", min(1.0, _spent(budget, step, tokens, tokens * flops, elapsed)), 1.0, f"loss {mean:.3f}, {tokens / elapsed:,.0f} tokens/s")
    spend(tokens=tokens, flops=tokens * flops)
    network.eval()
    network.zero_grad(set_to_none=True)
    model.record(history)


def _step(
    runner: nn.Module, network: PreTrainedModel, rows: Iterator[tuple[np.ndarray, ...]], count: int, recipe: Recipe, optimizers: list[torch.optim.Optimizer], trained: list[nn.Parameter], loss: Loss
) -> float:
    """One optimizer step over `count` rows, a micro-batch at a time; returns the mean loss of a label."""
    taken = [next(rows) for _ in range(count)]
    ids, labels, positions = (torch.from_numpy(np.stack(parts)) for parts in zip(*taken, strict=True))
    counted = int((labels != batch.IGNORED).sum())
    micro = max(1, recipe.micro_tokens // recipe.length)
    total = 0.0
    for begin in range(0, count, micro):
        part = Batch(*(tensor[begin : begin + micro].to(network.device) for tensor in (ids, labels, positions)))
        value = loss(runner, part) / max(1, counted)
        value.backward()
        total += value.item()
    if math.isfinite(total):
        if recipe.clip:
            torch.nn.utils.clip_grad_norm_(trained, recipe.clip)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    return total


def _optimizers(network: nn.Module, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """AdamW without decay on vectors; with ``muon``, Muon on the matrices of the blocks at an update size that matches AdamW's."""
    named = [(name, parameter) for name, parameter in network.named_parameters() if parameter.requires_grad]
    embeddings = {id(module.weight) for module in network.modules() if isinstance(module, torch.nn.Embedding)}
    matrices = [p for _, p in named if p.ndim >= 2]
    vectors = [p for _, p in named if p.ndim < 2]
    inner = [p for p in matrices if p.ndim == 2 and id(p) not in embeddings] if recipe.optimizer == "muon" else []
    outer = [p for p in matrices if not any(p is q for q in inner)]
    groups = [{"params": outer, "weight_decay": recipe.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    groups = [group for group in groups if group["params"]]
    optimizers: list[torch.optim.Optimizer] = []
    if groups:
        optimizers.append(torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=recipe.betas, fused=True))
    if inner:
        optimizers.append(torch.optim.Muon(inner, lr=recipe.learning_rate, weight_decay=recipe.weight_decay, adjust_lr_fn="match_rms_adamw"))
    if not optimizers:
        raise StepError("nothing to train: no parameter asks for gradients")
    return optimizers


def _flops_per_token(network: PreTrainedModel, loss: Loss, recipe: Recipe) -> float:
    """Floating-point operations of training on one token, counted over a real forward and backward pass: what is frozen costs no gradient."""
    from torch.utils.flop_counter import FlopCounterMode

    length = min(128, recipe.length)
    ids = torch.full((1, length), 10, device=network.device)
    with FlopCounterMode(display=False) as counter:
        loss(network, Batch(ids, ids, torch.arange(length, device=network.device)[None])).backward()
    network.zero_grad(set_to_none=True)
    return counter.get_total_flops() / length


def _parameters(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _planned_tokens(budget: Budget, flops: float, step_tokens: int) -> float:
    match budget.unit:
        case "tokens":
            return budget.amount
        case "steps":
            return budget.amount * step_tokens
        case "flops":
            return budget.amount / flops
        case _:
            return 0.0  # seconds say nothing of tokens, and must not be spent on compiling


def _spent(budget: Budget, step: int, tokens: int, flops: float, seconds: float) -> float:
    """Share of the budget that is spent."""
    return {"steps": step, "tokens": tokens, "flops": flops, "seconds": seconds}[budget.unit] / budget.amount
