"""Vectors that a model reads before every text, as if tokens had these embeddings: a soft prompt."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from etude.values.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from etude.values.model import Model

NAME = "soft_prompt"
"""Parameter of the network, (tokens, width of the embeddings)."""


@dataclass(frozen=True)
class Prompt:
    """Let a causal network read so many vectors of its own before every row of tokens; what it says after them alone is not given.

    Rows hold one text each: packed rows, whose positions begin anew, are refused with ValueError, so that training and scoring take their ways for networks that cannot do this.
    """

    tokens: int

    def apply(self, network: nn.Module) -> None:
        import torch

        if hasattr(network, NAME):
            raise InputError("the model has a soft prompt already", remedy="Train the new one on the model without it.")
        weight: Any = network.get_input_embeddings().weight  # type: ignore[operator]
        network.register_parameter(NAME, torch.nn.Parameter(torch.zeros(self.tokens, weight.shape[1], dtype=weight.dtype, device=weight.device)))
        network.register_forward_pre_hook(_before, with_kwargs=True)
        network.register_forward_hook(_after, with_kwargs=True)


def prompt_of(model: Model) -> Tensor | None:
    """The model's soft prompt, (tokens, width), if it has one."""
    found: Tensor | None = getattr(model.network, NAME, None)
    return None if found is None else found.detach()


def _before(network: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Put the prompt before the tokens, unless a cache has it already, and count it in masks and positions."""
    import torch

    given = dict(kwargs)
    ids = args[0] if args else given.pop("input_ids", None)
    if ids is None:
        raise ValueError("a network with a soft prompt reads token ids")
    prompt, rows = getattr(network, NAME), len(ids)
    count = len(prompt)
    mask, positions, past = (given.get(name) for name in ("attention_mask", "position_ids", "past_key_values"))
    if mask is not None:
        if mask.ndim != 2:
            raise ValueError("a network with a soft prompt takes masks of tokens alone")
        given["attention_mask"] = torch.cat([mask.new_ones(rows, count), mask], 1)
    if positions is not None:
        if bool(((positions == 0).sum(1) > 1).any()):
            raise ValueError("a network with a soft prompt reads one text a row")
        given["position_ids"] = positions + count
    if past is not None and past.get_seq_length():
        return (), {**given, "input_ids": ids}
    if positions is not None:
        given["position_ids"] = torch.cat([torch.arange(count, device=positions.device).expand(len(positions), -1), positions + count], 1)
    texts = network.get_input_embeddings()(ids)
    return (), {**given, "inputs_embeds": torch.cat([prompt.to(texts.dtype).expand(rows, -1, -1), texts], 1)}


def _after(network: Any, args: tuple[Any, ...], kwargs: dict[str, Any], made: Any) -> Any:
    """Leave out what was said after the prompt's own vectors."""
    embedded = kwargs.get("inputs_embeds")
    if embedded is not None and made.logits.shape[1] == embedded.shape[1]:
        made.logits = made.logits[:, len(getattr(network, NAME)) :]
    return made
