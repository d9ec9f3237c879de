"""Losses against a teacher: what it says of every token, and what it makes of it block by block."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from etude.engine import fused, losses, varlen
from etude.engine.feed import Batch
from etude.values.errors import InputError
from etude.values.lazy import lazy
from etude.values.model import Model

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from etude.engine import functions
else:
    torch, functions = lazy("torch"), lazy("etude.engine.functions")

DISTANCES = ("squared", "relative", "cosine")
MAPS = "_distillation_maps"
"""Name under which a student carries its linear maps to the teacher's width while it is taught."""


@dataclass(frozen=True)
class Lesson:
    """What a student is taught, as weights of the terms of its loss a token."""

    truth: float = 0.0
    """Of the cross-entropy with the labels, in nats."""
    divergence: float = 1.0
    """Of KL(teacher ‖ student) at `temperature`, times its square (Hinton et al., 2015, section 2), in nats."""
    temperature: float = 1.0
    """What both models' logits are divided by."""
    states: float = 0.0
    """Of the mean distance of the blocks' hidden states, over the pairs."""
    distance: str = "relative"
    """``squared``: mean over the channels of the squared difference; ``relative``: that divided by the mean square of the teacher's states over the micro-batch, so that every
    block counts alike (SquareHead; Kurtic et al., 2023, section 2); ``cosine``: one minus the cosine."""

    def __post_init__(self) -> None:
        if min(self.truth, self.divergence, self.states) < 0 or not self.truth + self.divergence + self.states > 0:
            raise ValueError(f"the weights of a lesson are 0 or more, and one is more; got truth {self.truth}, divergence {self.divergence}, states {self.states}")
        if not self.temperature > 0:
            raise ValueError(f"temperature is more than 0, got {self.temperature}")
        if self.distance not in DISTANCES:
            raise ValueError(f"distance is one of {', '.join(DISTANCES)}, got {self.distance!r}")


def same_tokens(student: Model, teacher: Model, what: str) -> None:
    """Raises InputError unless both read the same tokens."""
    if teacher.kind != student.kind:
        raise InputError(f"{what}'s student is a {student.kind} model, and its teacher a {teacher.kind} one")
    if student.has_tokenizer != teacher.has_tokenizer or (student.has_tokenizer and student.tokenizer.get_vocab() != teacher.tokenizer.get_vocab()):
        raise InputError(f"{what}'s teacher has another tokenizer than the student", remedy="Only models that read the same tokens can be compared token by token.")


def block_pairs(student: Model, teacher: Model, kept: Sequence[int] | None = None) -> list[tuple[str, str]]:
    """For each block of the student the path of the block of the teacher that it should resemble.

    kept: for each of the student's blocks the place of its model in the teacher; by default blocks are spread evenly, the last standing for the last.
    """
    mine, theirs = student.anatomy.blocks, teacher.anatomy.blocks
    places = kept if kept is not None else [(place + 1) * len(theirs) // len(mine) - 1 for place in range(len(mine))]
    return [(one.path, theirs[place].path) for one, place in zip(mine, places, strict=True)]


@contextmanager
def taught(student: Model, teacher: Model, lesson: Lesson, pairs: Sequence[tuple[str, str]] = ()) -> Iterator[Callable[[nn.Module, Batch], losses.Lost]]:
    """The loss of a lesson, for `engine.train.train` and a draft of a student; the teacher is only looked at.

    pairs: paths of a block of the student and of one of the teacher, for `states`; where their widths differ a linear map from the student's to the
    teacher's is trained with the student, and forgotten at the end.  Parts of the loss go into the history: ``cross_entropy`` and ``kl`` (nats a token) and ``states``.
    Raises InputError if the two do not read the same tokens.
    Cost: a forward pass of the teacher over every row, which the bill counts; logits are held a chunk of tokens at a time.
    """
    same_tokens(student, teacher, "distillation")
    seen: dict[str, Tensor] = {}
    network, known = student.network, teacher.sharing().network
    with ExitStack() as stack:
        for enter in (losses.headless, varlen.by_document, fused.fused):
            stack.enter_context(enter(known))
        if lesson.states:
            for mine, theirs in pairs:
                stack.enter_context(_watched(network.get_submodule(mine), f"student {mine}", seen))
                stack.enter_context(_watched(known.get_submodule(theirs), f"teacher {theirs}", seen))
            stack.enter_context(_maps(network, _widths(network, known, pairs, seen)))

        def loss(runner: nn.Module, batch: Batch) -> losses.Lost:
            with torch.no_grad():
                told, _ = losses.counted(losses.forward(known, batch), batch.labels)
            said, labels = losses.counted(losses.forward(runner, batch), batch.labels)
            total, truth, divergence = _words(lesson, said, losses.head_of(runner), told, losses.head_of(known), labels)
            parts = {"cross_entropy": truth.detach(), "kl": divergence.detach()}
            if lesson.states:
                apart = torch.stack([_apart(lesson.distance, _mapped(network, mine, seen[f"student {mine}"]), seen[f"teacher {theirs}"], batch) for mine, theirs in pairs]).mean()
                total, parts["states"] = total + lesson.states * len(labels) * apart, len(labels) * apart.detach()
                seen.clear()
            return losses.Lost(total, parts=parts)

        yield loss


def _words(lesson: Lesson, said: Tensor, head: nn.Linear | None, told: Tensor, teacher_head: nn.Linear | None, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The lesson's loss of words, and its two terms without their weights: cross-entropy, and KL(teacher ‖ student) at the temperature.  All summed over the tokens."""
    squared = lesson.divergence * lesson.temperature**2
    if head is not None and teacher_head is not None:
        terms = (lesson.truth, squared, lesson.temperature)
        return functions.Taught.apply(said, head.weight, head.bias, told, teacher_head.weight, teacher_head.bias, labels, terms, losses.CHUNK_ELEMENTS)  # type: ignore[no-any-return]
    scores, known = (one.float() if own is None else torch.nn.functional.linear(one, own.weight, own.bias).float() for one, own in ((said, head), (told, teacher_head)))
    common = min(scores.shape[1], known.shape[1])
    truth = torch.nn.functional.cross_entropy(scores, labels, reduction="sum")
    log_q, log_p = (scores / lesson.temperature).log_softmax(1)[:, :common], (known[:, :common] / lesson.temperature).log_softmax(1)
    divergence = torch.nn.functional.kl_div(log_q, log_p, reduction="sum", log_target=True)
    return lesson.truth * truth + squared * divergence, truth, divergence


def _apart(distance: str, mine: Tensor, theirs: Tensor, batch: Batch) -> Tensor:
    """Mean distance over the tokens that are no padding; states are (rows, length, width)."""
    mine, theirs = mine.float().flatten(0, -2), theirs.float().flatten(0, -2)
    mask = batch.mask if batch.targets is None or batch.mask is None else None
    if mask is not None and mask.numel() == len(mine):
        mine, theirs = mine[mask.flatten()], theirs[mask.flatten()]
    if distance == "cosine":
        return 1 - torch.nn.functional.cosine_similarity(mine, theirs, dim=1).mean()
    apart = (mine - theirs).square().mean()
    return apart / theirs.square().mean().clamp(min=1e-12) if distance == "relative" else apart


@contextmanager
def _watched(module: nn.Module, name: str, seen: dict[str, Tensor]) -> Iterator[None]:
    """Keep what a block gave last."""

    def look(module: nn.Module, given: Any, made: Any) -> None:
        seen[name] = made if isinstance(made, torch.Tensor) else made[0]

    handle = module.register_forward_hook(look)
    try:
        yield
    finally:
        handle.remove()


def _widths(network: nn.Module, known: nn.Module, pairs: Sequence[tuple[str, str]], seen: dict[str, Tensor]) -> dict[str, tuple[int, int]]:
    """Of the pairs whose widths differ, the student's and the teacher's.  Cost: a pass of each over two tokens."""
    with torch.no_grad():
        for one in (network, known):
            ids = torch.zeros((1, 2), dtype=torch.long, device=next(one.parameters()).device)
            losses.forward(one, Batch(ids, ids, targets=ids if one.config.is_encoder_decoder else None, masked=True))  # type: ignore[union-attr]
    found = {mine: (seen[f"student {mine}"].shape[-1], seen[f"teacher {theirs}"].shape[-1]) for mine, theirs in pairs}
    seen.clear()
    return {path: widths for path, widths in found.items() if widths[0] != widths[1]}


@contextmanager
def _maps(network: nn.Module, widths: dict[str, tuple[int, int]]) -> Iterator[None]:
    """Linear maps that the student carries while it learns, so that the loop trains them and checkpoints keep them; at first a cut of the identity."""
    if widths:
        maps = torch.nn.ModuleDict()
        for path, (narrow, wide) in widths.items():
            linear = torch.nn.Linear(narrow, wide, bias=False)
            torch.nn.init.eye_(linear.weight)
            maps[path.replace(".", "/")] = linear
        network.add_module(MAPS, maps.to(next(network.parameters()).device))
    try:
        yield
    finally:
        network._modules.pop(MAPS, None)


def _mapped(network: nn.Module, path: str, states: Tensor) -> Tensor:
    maps: Any = getattr(network, MAPS, {})
    key = path.replace(".", "/")
    return maps[key](states) if key in maps else states
