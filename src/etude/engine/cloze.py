"""Questions with choices, put to a masked model: masks stand behind the prompt, and a choice is as likely as its tokens are there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from etude.engine import batch, forest, fused, losses
from etude.engine.cost import flops_per_token, spend
from etude.engine.progress import report
from etude.engine.score import COUNTED_LENGTH, row_tokens
from etude.values.corpus import Corpus
from etude.values.errors import InputError
from etude.values.lazy import lazy
from etude.values.model import Model

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
else:
    torch = lazy("torch")

NOTHING = -1e4
"""Score of a choice that a question does not have: no probability, and no infinity in a difference."""


class Question(NamedTuple):
    """A prompt with masks behind it, and what may stand in their place."""

    ids: np.ndarray
    """(length,) as the tokenizer frames them."""
    places: np.ndarray
    """Where the masks stand, as many as the longest choice has tokens."""
    choices: tuple[np.ndarray, ...]
    """Token ids of each choice."""
    right: int
    """Place of the right one."""


def require_masked(model: Model, what: str) -> None:
    """Raises InputError unless the model restores masked tokens and its tokenizer has a mask."""
    if model.kind != "masked":
        raise InputError(f"{what} needs a masked language model, and this is a {model.kind} one ({model.base.model_type})")
    if model.tokenizer.mask_token_id is None:
        raise InputError("the tokenizer has no mask token", remedy="Set mask_token in tokenizer_config.json.")


def questions(model: Model, corpus: Corpus, length: int | None = None) -> list[Question]:
    """The records of a corpus as questions, by the columns prompt, choices (a list of texts) and answer (the place of the right one, from 0).

    length: what does not fit into so many tokens, or into what the model reads, is cut from the beginning of the prompt.
    Raises InputError for a model that is not masked, a corpus without these columns or records, a record without two choices or a right one among them, a choice without
    tokens, and choices that leave no room for a prompt.
    """
    require_masked(model, "filling in choices")
    rows = list(zip(corpus.column("prompt"), corpus.column("choices"), corpus.column("answer"), strict=True))
    if not rows:
        raise InputError("the corpus is empty")
    for place, (_, choices, answer) in enumerate(rows):
        if not isinstance(choices, list) or len(choices) < 2 or not isinstance(answer, int) or not 0 <= answer < len(choices):
            raise InputError(f"record {place} needs a list of two choices or more, and the place of the right one from 0; got {choices!r} and {answer!r}")
    known = _words(model, [choice for _, choices, _ in rows for choice in choices])
    counts = [max(len(known[choice]) for choice in choices) for _, choices, _ in rows]
    tokenizer = model.tokenizer
    framed = tokenizer([*(prompt + tokenizer.mask_token * count for (prompt, _, _), count in zip(rows, counts, strict=True)), ""], return_attention_mask=False, verbose=False)["input_ids"]
    *texts, bare = (np.array(ids, np.int64) for ids in framed)
    limits = [size for size in (length, getattr(model.config.get_text_config(), "max_position_embeddings", None)) if size is not None]
    most, found = min(limits, default=None), []
    for ids, count, (_, choices, answer) in zip(texts, counts, rows, strict=True):
        ids = _cut(ids, bare, count, most)
        places = np.flatnonzero(ids == tokenizer.mask_token_id)[-count:]
        found.append(Question(ids, places, tuple(known[choice] for choice in choices), answer))
    return found


def _words(model: Model, choices: Sequence[str]) -> dict[str, np.ndarray]:
    """Token ids of every choice."""
    different = list(dict.fromkeys(choices))
    encoded = model.tokenizer(different, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
    found = {choice: np.array(ids, np.int64) for choice, ids in zip(different, encoded, strict=True)}
    for choice, ids in found.items():
        if not len(ids):
            raise InputError(f"the choice {choice!r} has no token")
    return found


def _cut(ids: np.ndarray, bare: np.ndarray, masks: int, most: int | None) -> np.ndarray:
    """Token ids without as many of the prompt's first as are too many.  bare: those around an empty text."""
    excess = len(ids) - (most or len(ids))
    if excess <= 0:
        return ids
    if most is not None and len(bare) + masks >= most:
        raise InputError(f"{masks} masks and what stands around a text leave no room for a prompt in {most} tokens", remedy="Raise length, or give shorter choices.")
    front = forest.shared(ids, bare)
    return np.delete(ids, np.arange(front, front + excess))


def scores(said: Tensor, head: nn.Linear | None, asked: Sequence[Question]) -> Tensor:
    """A score for every choice, (questions, most choices): the mean of its tokens' logits, each at its mask, so that a softmax gives the choices' probabilities.

    With choices of one token these are the probabilities that the network gives them, brought to a sum of one (Schick and Schütze, 2021, section 3; they multiply the probabilities
    of several tokens, which is here a geometric mean, lest a choice lose by its length).
    said: (questions, length, vocabulary) logits, or what this head reads, (questions, length, width).  Where a question has fewer choices stands `NOTHING`.
    """
    entries = [(row, int(one.places[at]), int(token), choice, 1 / len(tokens)) for row, one in enumerate(asked) for choice, tokens in enumerate(one.choices) for at, token in enumerate(tokens)]
    most = max(len(one.choices) for one in asked)
    row, place, token, choice = (torch.tensor(column, device=said.device) for column in list(zip(*entries, strict=True))[:4])
    share = torch.tensor([entry[4] for entry in entries], device=said.device)
    if head is None:
        logits = said[row, place, token].float()
    else:
        logits = (said[row, place].float() * head.weight[token].float()).sum(1)
        logits = logits if head.bias is None else logits + head.bias[token].float()
    flat = torch.zeros(len(asked) * most, device=said.device).index_add(0, row * most + choice, share * logits)
    there = torch.tensor([[place < len(one.choices) for place in range(most)] for one in asked], device=said.device)
    return flat.view(len(asked), most).masked_fill(~there, NOTHING)


def answers(model: Model, asked: Sequence[Question]) -> np.ndarray:
    """What a model says of every choice, (questions, most choices): natural logarithms of probabilities that add up to one, -inf where a question has fewer.

    Cost: one forward pass over the questions.
    """
    network, pad, done = model.network, model.tokenizer.pad_token_id or 0, 0
    found = np.full((len(asked), max(len(one.choices) for one in asked)), -np.inf)
    order = sorted(range(len(asked)), key=lambda index: (-len(asked[index].ids), asked[index].ids.tobytes()))
    with torch.no_grad(), losses.headless(network), fused.fused(network):
        for group in batch.by_length([len(asked[index].ids) for index in order], row_tokens(network.device.type, network.num_parameters())):
            chosen = [order[place] for place in group]
            ids, real = (one.to(network.device) for one in batch.padded([asked[index].ids for index in chosen], pad))
            some = [asked[index] for index in chosen]
            logs = scores(network(input_ids=ids, attention_mask=real).logits, losses.head_of(network), some).log_softmax(1).double().cpu().numpy()
            found[chosen, : logs.shape[1]] = logs
            done += len(chosen)
            report("asking", done, len(asked))
    tokens = sum(len(one.ids) for one in asked)
    spend(tokens=tokens, flops=tokens * flops_per_token(network, min(max(len(one.ids) for one in asked), COUNTED_LENGTH)))
    for place, one in enumerate(asked):
        found[place, len(one.choices) :] = -np.inf
    return found
