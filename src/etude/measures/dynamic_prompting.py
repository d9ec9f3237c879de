"""Which of several soft prompts a text's tokens attend to, and what is won by reading the text after that one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from etude.engine import batch
from etude.engine.cost import flops_per_token, spend
from etude.engine.progress import report
from etude.engine.score import COUNTED_LENGTH, likelihoods, require_causal
from etude.method import MEASUREMENTS, Method
from etude.values.corpus import Corpus
from etude.values.errors import InputError
from etude.values.lazy import lazy
from etude.values.measurement import HIGHER, Measurement
from etude.values.model import Model
from etude.values.prompt import NAME, prompt_of

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PreTrainedModel
else:
    torch = lazy("torch")

ROWS = 16
"""Texts whose attention is looked at at once."""


@dataclass(frozen=True)
class DynamicPrompting(Method):
    """Inference-time dynamic prompting: all prompts stand before the beginning of a text, and that is kept to which the text's tokens attend most.

    The first model is the one without a prompt, every further one is the same with a soft prompt (`compress.soft_prompt`): ``of: [compressed, prompted]``, ``on: [code, news, …]``.
    Of every text the first `context` tokens are given, and choose; the `tokens` after them are scored.  So a choice never sees what it is judged by.  Texts that are not longer
    than the context are left out.
    A prompt's score is the attention that the text's tokens, the start token aside, pay to one of its vectors, the mean over vectors, tokens, heads and layers.  Parts, all perplexities of the
    texts of all corpora together, each text an item, and the same beside every model:

    - ``unprompted``: without a prompt; ``prompt_1``, ``prompt_2``, …: each prompt for all texts, and their geometric mean, ``mean``; ``best``: that of the single prompt that has the lowest on
      these very texts;
    - ``selected``: with the prompt that each text's attention chose; ``oracle``: with that which gives each text its scored tokens most probably: the least that any choice among
      single prompts can reach;
    - ``hits``: share of the texts whose choice is the oracle's; ``chosen_1``, …: share of the texts that chose each prompt.

    A measure, and no model, since a choice needs to know what of a text is given, which only a measure that scores texts knows.
    Source: Hoang et al., "Do Compressed LLMs Forget Knowledge?" ("(Dynamic) Prompting might be all you need to repair Compressed LLMs"), 2023 (arXiv 2310.00867).
    Departures: written from the abstract and reviews of the paper: which layers' attention counts there could not be found, and here all do.  In one row the first prompt has the first token, to which
    many networks attend whatever it is, and the last prompt is the nearest; `apart` undoes both, and is not in the paper.
    Raises InputError for models that are not causal, a prompt before the first model, other weights than its, and where no text is long enough.
    Cost: for every prompt a pass over the texts, and one over the contexts with all prompts before them.
    """

    paper = "inference-time-dynamic-prompting"

    context: int = 64
    """Tokens of a text that are given, and whose attention chooses, at least 1."""
    tokens: int = 192
    """Tokens after them that are scored, at most, at least 1."""
    apart: bool = False
    """Whether no prompt sees another and all have the same places before the text; else they stand in a row, in the order in which they are given."""

    def __post_init__(self) -> None:
        if self.context < 1 or self.tokens < 1:
            raise ValueError(f"context and tokens are at least 1, got {self.context} and {self.tokens}")

    def apply(self, models: list[Model], corpora: list[Corpus]) -> MEASUREMENTS:
        prompts = _prompts(models)
        texts, names = self._texts(models[0], corpora)
        nats = np.stack([[-one.logs.mean(dtype=np.float64) for one in likelihoods(model, texts, [self.context + 1] * len(texts))] for model in models])
        weights = np.array([len(text) - self.context - 1 for text in texts], float)
        bare, single = nats[0], nats[1:]  # (texts,), (prompts, texts)
        parts = {"unprompted": bare, **{f"prompt_{place + 1}": one for place, one in enumerate(single)}}
        choices: dict[str, np.ndarray] = {}
        if prompts:
            chosen = self._attention(models[0], prompts, [text[: self.context + 1] for text in texts]).argmax(1)
            right, every = single.argmin(0), np.arange(len(texts))
            best = int(np.average(single, axis=1, weights=weights).argmin())
            parts |= {"mean": single.mean(0), "best": single[best], "selected": single[chosen, every], "oracle": single[right, every]}
            choices = {"hits": chosen == right, **{f"chosen_{place + 1}": chosen == place for place in range(len(prompts))}}
        found = [Measurement(name, items, weights=weights, scale="exp", item_names=names) for name, items in parts.items()]
        found += [Measurement(name, items.astype(float), better=HIGHER, item_names=names) for name, items in choices.items()]
        return tuple(one for _ in models for one in found)

    def _texts(self, model: Model, corpora: Sequence[Corpus]) -> tuple[list[np.ndarray], tuple[str, ...]]:
        """Beginnings of the texts that are long enough, with the start token, and their names."""
        texts, names = [], []
        for place, corpus in enumerate(corpora):
            known = corpus.column("path") if "path" in corpus.columns else range(len(corpus))
            for name, document in zip(known, batch.encode(model, corpus), strict=True):
                if len(document) > self.context + 1:
                    texts.append(document[: self.context + 1 + self.tokens])
                    names.append(f"{place + 1} {name}")
        if not texts:
            raise InputError(f"no text has more than the {self.context} tokens that are given", remedy="Lower `context`, or give longer texts.")
        return texts, tuple(names)

    def _attention(self, model: Model, prompts: Sequence[Tensor], contexts: Sequence[np.ndarray]) -> np.ndarray:
        """Mean attention of every context's tokens to a vector of every prompt, (texts, prompts) float64; contexts all have one length."""
        network = model.network
        sizes = [len(prompt) for prompt in prompts]
        total, length = sum(sizes), len(contexts[0])
        found = []
        with torch.no_grad(), _eager(network):
            before = torch.cat([prompt.to(network.device) for prompt in prompts])
            given = _apart(sizes, length, network.dtype, network.device) if self.apart else {}
            for begin in range(0, len(contexts), ROWS):
                ids = torch.from_numpy(np.stack(contexts[begin : begin + ROWS])).to(network.device)
                embedded = network.get_input_embeddings()(ids)
                whole = torch.cat([before.to(embedded.dtype).expand(len(ids), -1, -1), embedded], 1)
                layers = network(inputs_embeds=whole, use_cache=False, output_attentions=True, **{name: one.expand(len(ids), *one.shape[1:]) for name, one in given.items()}).attentions
                paid = torch.stack([layer[:, :, total + 1 :, :total].float().mean((1, 2)) for layer in layers]).mean(0)  # (rows, vectors)
                found.append(torch.stack([part.mean(1) for part in paid.split(sizes, 1)], 1).double().cpu().numpy())
                report("looking at attention", begin + len(ids), len(contexts))
        tokens = len(contexts) * (total + length)
        spend(tokens=tokens, flops=tokens * flops_per_token(network, COUNTED_LENGTH))
        return np.concatenate(found)


def _prompts(models: Sequence[Model]) -> list[Tensor]:
    """The prompts of all models but the first.  Raises InputError if these are not the same model with and without prompts."""
    for model in models:
        require_causal(model, "dynamic prompting")
    if not models:
        raise InputError("a choice needs a model without a prompt, and some with one", remedy="As in `of: [compressed, prompted]`.")
    if prompt_of(models[0]) is not None:
        raise InputError("the first model has a soft prompt, and should be the one without")
    plain = models[0].network.state_dict()
    found = []
    for place, model in enumerate(models[1:], 1):
        prompt, state = prompt_of(model), model.network.state_dict()
        if prompt is None:
            raise InputError(f"model {place + 1} of the list has no soft prompt", remedy="Train one with compress.soft_prompt.")
        state.pop(NAME)
        if state.keys() != plain.keys() or any(state[key].shape != plain[key].shape or not torch.equal(state[key], plain[key]) for key in plain):
            raise InputError(f"model {place + 1} of the list has other weights than the first", remedy="A bank of prompts belongs to one frozen model.")
        found.append(prompt)
    return found


def _apart(sizes: Sequence[int], length: int, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    """Mask (1, 1, tokens, tokens) and positions (1, tokens) under which each prompt sees itself alone, and all end where the text begins."""
    owner = torch.cat([torch.full((size,), place) for place, size in enumerate(sizes)] + [torch.full((length,), -1)])
    place = torch.arange(len(owner))
    seen = (place[None] <= place[:, None]) & ((owner[:, None] == -1) | (owner[:, None] == owner[None]))
    mask = torch.zeros(seen.shape, dtype=dtype).masked_fill_(~seen, torch.finfo(dtype).min)[None, None]
    most = max(sizes)
    positions = torch.cat([torch.arange(most - size, most) for size in sizes] + [torch.arange(most, most + length)])[None]
    return {"attention_mask": mask.to(device), "position_ids": positions.to(device)}


@contextmanager
def _eager(network: PreTrainedModel) -> Iterator[None]:
    """Inside, attention is computed such that its weights can be looked at."""
    config = network.config
    before = config._attn_implementation
    config._attn_implementation = "eager"
    try:
        yield
    finally:
        config._attn_implementation = before
