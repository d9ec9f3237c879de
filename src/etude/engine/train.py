"""The one training loop.

A method hands it a loss and what to read; the loop owns the order, the budget, precision, accumulation, clipping, schedule, optimizer, checkpoints,
exact resumption, divergence and the record.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from etude.engine import fused, losses, optimize, parallel, resume, varlen
from etude.engine.batch import IGNORED
from etude.engine.budget import Budget
from etude.engine.cost import spend
from etude.engine.feed import Batch, Feed, Row
from etude.engine.optimize import OPTIMIZERS, SCHEDULES
from etude.engine.progress import report
from etude.values.errors import StepError
from etude.values.lazy import lazy
from etude.values.model import Model

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
    from transformers import PreTrainedModel

    Loss = Callable[[nn.Module, Batch], "Tensor | losses.Lost"]
else:
    torch = lazy("torch")

COMPILE_FROM = 1e14
"""Floating-point operations of a run from which compiling the network, up to a minute, is worth its while on a processor; it gains little where documents are short."""
MICRO_TOKENS = {"cpu": 4096, "cuda": 32768}
"""Tokens of a micro-batch: on a processor few, since its memory is for other things too, and enough for what each operation costs beside its work."""
LARGE, LARGE_MICRO_TOKENS = 10_000_000, 1024
"""From so many parameters on, a processor takes fewer tokens at once: their activations are most of what training holds, and what it costs in speed is little."""
EXPLODED = 8.0
"""A loss so many times its first is no learning any more."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How to train; the fields have the meaning that the same names have in the methods."""

    learning_rate: float
    optimizer: str = "adamw"
    schedule: str | Callable[[float], float] = "cosine"
    """By name, or the share of the peak at a share of the budget."""
    warmup: float = 0.02
    batch_tokens: int = 8192
    length: int = 512
    micro_tokens: int | None = None
    """Tokens in a micro-batch; by default as suits the device.  It changes rounding alone."""
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float = 1.0
    precision: str = "auto"
    """``float32``, ``bfloat16`` for the products (weights and sums stay float32), or ``auto``: bfloat16 where the machine multiplies it faster."""
    checkpointing: bool = False
    """Whether activations are computed again in the backward pass, instead of kept."""

    def __post_init__(self) -> None:
        if isinstance(self.schedule, str) and self.schedule not in SCHEDULES:
            raise ValueError(f"schedule is one of {', '.join(SCHEDULES)}, got {self.schedule!r}")
        if self.optimizer not in OPTIMIZERS:
            raise ValueError(f"optimizer is one of {', '.join(OPTIMIZERS)}, got {self.optimizer!r}")
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate is more than 0, got {self.learning_rate}")
        if not 2 <= self.length <= self.batch_tokens:
            raise ValueError(f"length is at least 2 and at most batch_tokens ({self.batch_tokens}), got {self.length}")


@dataclass
class Step:
    """What a method may look at, and change, before an optimizer step: the gradients are there, summed, divided and not yet clipped."""

    network: PreTrainedModel
    optimizers: list[torch.optim.Optimizer]
    number: int
    """From 1."""
    progress: float
    """Share of the budget that was spent before it."""
    learning_rate: float


def train(
    model: Model,
    feed: Feed,
    recipe: Recipe,
    budget: Budget,
    seed: int,
    loss: Loss = losses.next_token,
    before_step: Callable[[Step], None] | None = None,
    *,
    alone: bool = False,
    note: str = "training",
) -> None:
    """Train the parameters of a draft that ask for gradients, in place, and append to its history.

    Killed and begun again inside `resume.keeping`, it goes on from its last checkpoint and ends with the same bits.  In several processes (those of
    ``torchrun`` or ``accelerate launch``) each takes its share of every step's rows; with ``--use_fsdp`` also of the parameters, without checkpoints
    within the step, with AdamW alone and no look at the gradients.
    alone: for a method whose loss or look keeps state of its own, which no checkpoint and no other process has: a killed run begins anew.
    Raises StepError when such a method is started in several processes, and when the loss is not finite or explodes, saying at which step and in which rows; the weights of the step before are kept.
    Cost: the budget.
    """
    model.require_draft()
    if alone and parallel.processes() > 1:
        raise StepError("this method keeps state that processes do not share: start it in one process")
    _Training(model, feed, recipe, budget, seed, loss, before_step, alone, note).run()


@dataclass
class _Training:
    model: Model
    feed: Feed
    recipe: Recipe
    budget: Budget
    seed: int
    loss: Loss
    before_step: Callable[[Step], None] | None
    alone: bool
    note: str
    step: int = 0
    tokens: int = 0
    flops_per_token: float = 0.0
    elapsed: float = 0.0
    first: float = 0.0
    asked: list[float] = field(default_factory=list)
    """The progress at which each step's rows were taken: what brings the feed to where it was."""
    history: list[dict[str, float]] = field(default_factory=list)

    def run(self) -> None:
        network = self.network = self._shards() if parallel.sharding() else self.model.network
        torch.manual_seed(self.seed)
        self.optimizers = optimize.optimizers(network, self.recipe.optimizer, self.recipe.learning_rate, self.recipe.weight_decay, self.recipe.betas)
        self.slot = resume.Slot(None) if self.alone or parallel.sharding() else resume.slot()
        self.feed.begin(self.seed)
        self.rows_a_step = max(1, self.recipe.batch_tokens // self.recipe.length)
        self._go_on()
        if self.recipe.checkpointing:
            network.gradient_checkpointing_enable()
        network.train()
        with losses.headless(network), varlen.by_document(network), ExitStack() as self.equals:
            self.equals.enter_context(fused.fused(network))
            self.runner: nn.Module = network
            while self._spent() < 1:
                self._step()
        network.eval()
        if self.recipe.checkpointing:
            network.gradient_checkpointing_disable()
        network.zero_grad(set_to_none=True)
        if network is not self.model.network:
            parallel.put_together(network, self.model.network)
        spend(tokens=self.tokens, flops=self.tokens * self.flops_per_token)
        self.model.record(self.history)

    def _shards(self) -> PreTrainedModel:
        if self.before_step or self.recipe.optimizer != "adamw":
            what = "looks at its gradients before a step" if self.before_step else f"trains with {self.recipe.optimizer}"
            raise StepError(f"a method that {what} needs whole parameters, and these processes share them out: start them without --use_fsdp")
        return parallel.shards(self.model.network, self.model.anatomy.stacks)

    def _step(self) -> None:
        start, progress, network = time.perf_counter(), self._spent(), self.network
        planned = max(2.0, self._planned() / self.recipe.batch_tokens)
        at = max(progress, 1e-8 if self.step else 1 / planned)
        factor = self.recipe.schedule(at) if callable(self.recipe.schedule) else optimize.scale(self.recipe.schedule, at, self.recipe.warmup)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self.recipe.learning_rate * factor * group.get("factor", 1.0)
        self.asked.append(progress)
        mean, parts, real = self._gradients(self.feed.take(self.rows_a_step, progress), progress)
        self._check(mean)
        trained = optimize.parameters(self.optimizers)
        if self.before_step:
            self.before_step(Step(network, self.optimizers, self.step + 1, progress, self.recipe.learning_rate * factor))
        if self.recipe.clip:
            torch.nn.utils.clip_grad_norm_(trained, self.recipe.clip)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.step, self.tokens, self.elapsed = self.step + 1, self.tokens + real, self.elapsed + time.perf_counter() - start
        if self.step == 1 or self.step % 10 == 0:
            row = {"step": self.step, "tokens": self.tokens, "loss": round(mean, 5), "learning_rate": self.recipe.learning_rate * factor}
            self.history.append({**row, **{name: round(value, 5) for name, value in parts.items()}})
        if self.slot.due():
            self._keep()
        report(self.note, min(1.0, self._spent()), 1.0, f"loss {mean:.3f}, {self.tokens / self.elapsed:,.0f} tokens/s")

    def _gradients(self, rows: list[Row], progress: float) -> tuple[float, dict[str, float], int]:
        """Gradients of one step's mean loss, a micro-batch at a time; the loss, its parts, and the tokens that are no padding."""
        network, totals = self.network, {"": 0.0}
        count, real = 0, 0
        own = self._micro(parallel.share(rows))
        for place, part in enumerate(own + [rows[:1]] * (parallel.most(len(own)) - len(own))):
            batch = self.feed.collate(part).to(network.device)
            batch.progress = progress
            if self.runner is not network and len(part) > 1:
                for tensor in (batch.ids, batch.positions):
                    if tensor is not None:
                        torch._dynamo.maybe_mark_dynamic(tensor, 0)
            with self._counting(batch), self._precision(network.device), varlen.documents(network, batch.positions):
                found = self.loss(self._runner(), batch)
                lost = found if isinstance(found, losses.Lost) else losses.Lost(found)
                (lost.total if place < len(own) else 0 * lost.total).backward()
            if place >= len(own):
                continue  # another process has more to do, and needs this one's shards
            totals[""] += lost.total.item()
            for name, value in lost.parts.items():
                totals[name] = totals.get(name, 0.0) + value.item()
            count += int((batch.labels != IGNORED).sum()) if lost.counted is None else lost.counted
            real += batch.real
        gradients = [parameter.grad for parameter in optimize.parameters(self.optimizers) if parameter.grad is not None]
        count, real, totals = parallel.gather(gradients, count, real, totals)
        torch._foreach_div_(gradients, max(1, count))
        means = {name: value / max(1, count) for name, value in totals.items()}
        return means.pop(""), means, real

    def _micro(self, rows: list[Row]) -> list[list[Row]]:
        """Rows in micro-batches.  Where attention keeps to documents by itself, rows of one length are all of one kind.

        Elsewhere those of whole documents need no mask, and come first; and none is of a single row if it can be helped: a compiled network would be
        compiled once more for it.
        """
        if varlen.on(self.network) and len({len(row.ids) for row in rows}) == 1:
            rows = [row if row.positions is not None else row._replace(positions=np.arange(len(row.ids))) for row in rows]
        size = max(1, (self.recipe.micro_tokens or self._micro_tokens()) // self.recipe.length)
        whole = sorted((row for row in rows if row.positions is None), key=lambda row: -len(row.ids))
        packed = [row for row in rows if row.positions is not None]
        if packed and size > 1:
            while whole and (len(whole) % size == 1 or len(packed) % size == 1):
                packed.append(whole.pop())
        return [kind[at : at + size] for kind in (whole, packed) for at in range(0, len(kind), size)]

    def _micro_tokens(self) -> int:
        device = self.network.device.type
        large = device == "cpu" and self.network.num_parameters() >= LARGE
        return LARGE_MICRO_TOKENS if large else MICRO_TOKENS.get(device, 8192)

    def _runner(self) -> nn.Module:
        """The network, compiled from the second step on if the run is long enough to be worth it."""
        if self.feed.even and self.runner is self.network and self.step > 0 and self._planned() * self.flops_per_token >= COMPILE_FROM:
            self.equals.close()  # the compiler makes its own of the operations as they stand
            self.runner = torch.compile(self.network)  # type: ignore[assignment]
        return self.runner

    def _precision(self, device: torch.device) -> Any:
        if self.recipe.precision == "float32" or (self.recipe.precision == "auto" and not multiplies_bfloat16(device)):
            return nullcontext()
        return torch.autocast(device.type, torch.bfloat16)

    def _counting(self, batch: Batch) -> Any:
        """Counts the operations of the very first micro-batch: real ones, of what is trained here."""
        if self.flops_per_token:
            return nullcontext()
        return _Counter(self, batch)

    # Budget.

    def _spent(self) -> float:
        """Share of the budget that is spent."""
        return {"steps": self.step, "tokens": self.tokens, "flops": self.tokens * self.flops_per_token, "seconds": self.elapsed}[self.budget.unit] / self.budget.amount

    def _planned(self) -> float:
        """Tokens of the whole run; 0 if the budget does not say."""
        match self.budget.unit:
            case "tokens":
                return self.budget.amount
            case "steps":
                return self.budget.amount * self.recipe.batch_tokens
            case "flops":
                return self.budget.amount / self.flops_per_token if self.flops_per_token else 0.0
            case _:
                return 0.0  # seconds say nothing of tokens, and must not be spent on compiling

    # What goes wrong, and going on.

    def _check(self, mean: float) -> None:
        if self.step == 0:
            self.first = max(abs(mean), 1.0)
        if math.isfinite(mean) and abs(mean) <= EXPLODED * self.first:
            return
        self.network.zero_grad(set_to_none=True)
        self.asked.pop()
        self._keep()
        what = f"the loss became {mean:.4g}" + ("" if not math.isfinite(mean) else f", from {self.first:.4g} at first,")
        at = self.step * self.rows_a_step
        kept = f"; the weights of step {self.step} are kept in {self.slot.path}" if self.slot.path and self.step else ""
        raise StepError(f"{what} at step {self.step + 1}, in rows {at} to {at + self.rows_a_step - 1} of its order: the learning rate {self.recipe.learning_rate:g} may be too high{kept}")

    def _keep(self) -> None:
        """Write everything that the steps to come depend on."""
        if not parallel.main() or not self.step:
            return
        trained = optimize.parameters(self.optimizers)
        names = {id(parameter): name for name, parameter in self.model.network.named_parameters()}
        tensors = {f"parameter.{names[id(parameter)]}": parameter for parameter in trained} | dict(optimize.state(self.optimizers)) | {"random": torch.get_rng_state()}
        if self.model.network.device.type == "cuda":
            tensors["random.cuda"] = torch.cuda.get_rng_state(self.model.network.device)
        numbers = {name: getattr(self, name) for name in ("step", "tokens", "flops_per_token", "elapsed", "first", "asked", "history")}
        self.slot.save(tensors, numbers)

    def _go_on(self) -> None:
        """Take up a checkpoint, if there is one."""
        found = self.slot.load()
        if found is None:
            return
        tensors, numbers = found
        network = self.model.network
        with torch.no_grad():
            for name, parameter in network.named_parameters():
                if f"parameter.{name}" in tensors:
                    parameter.copy_(tensors[f"parameter.{name}"])
        optimize.restore(self.optimizers, tensors)
        torch.set_rng_state(tensors["random"])
        if "random.cuda" in tensors:
            torch.cuda.set_rng_state(tensors["random.cuda"], network.device)
        vars(self).update(numbers)
        for progress in self.asked:
            self.feed.take(self.rows_a_step, progress)


class _Counter:
    """Operations of the forward and backward passes inside, for one token of a batch."""

    def __init__(self, training: _Training, batch: Batch):
        from torch.utils.flop_counter import FlopCounterMode

        self.training, self.batch, self.mode = training, batch, FlopCounterMode(display=False)

    def __enter__(self) -> None:
        self.mode.__enter__()

    def __exit__(self, *error: Any) -> None:
        self.mode.__exit__(*error)
        self.training.flops_per_token = self.mode.get_total_flops() / max(1, self.batch.real)


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether the device has units for products of bfloat16."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        has: Sequence[Any] = [getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported")]
        return any(one is not None and one() for one in has)
    return False
