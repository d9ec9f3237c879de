"""Completions of prompts, by a model or an endpoint."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from etude.engine import attention, batch, decode, endpoint, losses, score
from etude.engine.cost import spend
from etude.engine.decode import Guide, choose, guided
from etude.engine.progress import report
from etude.values.corpus import Corpus
from etude.values.digest import digest
from etude.values.errors import InputError
from etude.values.generator import Endpoint, Generator, Policy
from etude.values.model import Model

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BATCH_TOKENS = 1 << 13
"""Tokens of a padded batch, completions included."""


def generate(generator: Generator, prompts: Sequence[str], seed: int = 0, guide: Guide | None = None) -> list[str]:
    """The completion of every prompt, without the prompt and without the stop string that ended it.

    A sample depends on the seed, the prompt, and how often the same prompt came before: not on what else stands in the list
    (but a model's logits differ in their last bits from batch to batch, which a draw at the very edge of a token would see).
    guide: a decoding method's look at every step, of a model.
    Raises InputError if a prompt leaves no room for its completion, or if an endpoint does not answer as it should.
    Cost: one forward pass over the prompts, what all begin with once, and one a new token for many completions at once.
    """
    if not prompts:
        return []
    seeds, policy = _seeds(prompts, seed), generator.policy
    if isinstance(generator.source, Endpoint):
        if guide is not None:
            raise InputError("a decoding method that looks at every step needs a model, and this is an endpoint")
        texts = []
        for prompt, one in zip(prompts, seeds, strict=True):
            texts.append(_cut(endpoint.ask(generator.source, policy, prompt, one), policy.stop)[0])
            report("asking", len(texts), len(prompts), generator.source.url)
        return texts
    model = generator.source
    encoded = _encode(model, prompts)
    new = complete(model, policy, encoded, seeds, guide)
    return [_cut(_text(model, prompt, ids), policy.stop)[0] for prompt, ids in zip(encoded, new, strict=True)]


def complete(model: Model, policy: Policy, prompts: Sequence[np.ndarray], seeds: Sequence[int], guide: Guide | None = None) -> list[list[int]]:
    """New tokens of prompts that are token ids, up to a stop string's last token; without the token that ends a text.

    Raises InputError if the model neither continues nor answers text, or a prompt leaves no room.  Cost: as `generate`.
    """
    if model.kind not in ("causal", "seq2seq"):
        raise InputError(f"generating needs a causal or an encoder–decoder model, and this is a {model.kind} one ({model.base.model_type})")
    _check_room(model, prompts, policy)
    network, ends = model.network, _ends(model)

    def stopped(index: int, new: list[int]) -> bool:
        return bool(policy.stop) and _says(model, prompts[index], new, policy.stop)

    longest = max(map(len, prompts)) + policy.max_new_tokens
    with losses.headless(network), attention.by_piece(network, longest) as pieces:
        if pieces:
            return decode.complete(network, policy, prompts, seeds, ends, stopped, guide)
    return _together(model, policy, prompts, seeds, stopped, guide or Guide())


def _seeds(prompts: Sequence[str], seed: int) -> list[int]:
    """A seed for every prompt; the second time that a prompt comes it gets another one."""
    seen: Counter[str] = Counter()
    seeds = []
    for prompt in prompts:
        seeds.append(int(digest(seed, prompt, seen[prompt])[:7], 16))  # 28 bits: what every server takes
        seen[prompt] += 1
    return seeds


def _encode(model: Model, prompts: Sequence[str]) -> list[np.ndarray]:
    """Token ids: for a causal model with its start token, for an encoder as its tokenizer frames a text."""
    if model.kind == "causal":
        return batch.encode(model, Corpus(list(prompts)))
    return [np.array(ids, dtype=np.int64) for ids in model.tokenizer(list(prompts))["input_ids"]]


def _check_room(model: Model, encoded: Sequence[np.ndarray], policy: Policy) -> None:
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    longest = max(len(ids) for ids in encoded)
    needed = longest + policy.max_new_tokens - 1 if model.kind == "causal" else max(longest, policy.max_new_tokens)
    if limit is not None and needed > limit:
        raise InputError(f"the model reads {limit} tokens, and a prompt of {longest} with {policy.max_new_tokens} new ones is longer", remedy="Shorten the prompt, or lower max_new_tokens.")


def _room(model: Model) -> int:
    """Tokens of a batch: fewer where the network cannot help making the logits of the whole prompt."""
    return BATCH_TOKENS if model.kind == "seq2seq" or "logits_to_keep" in _takes(model.network) else score.batch_tokens(model, BATCH_TOKENS)


def _takes(network: PreTrainedModel) -> list[str]:
    return list(inspect.signature(network.forward).parameters)


@torch.no_grad()
def _together(model: Model, policy: Policy, prompts: Sequence[np.ndarray], seeds: Sequence[int], stopped: Callable[[int, list[int]], bool], guide: Guide) -> list[list[int]]:
    """Batches that are padded, a token a round until every row has ended: for networks that keep to one length, have a state, or an encoder."""
    found: list[list[int]] = [[] for _ in prompts]
    done = 0
    for group in batch.by_length([len(ids) + policy.max_new_tokens for ids in prompts], _room(model)):
        for index, new in zip(group, _batch(model, policy, [prompts[i] for i in group], [seeds[i] for i in group], group, stopped, guide), strict=True):
            found[index] = new
        done += len(group)
        report("generating", done, len(prompts))
    return found


def _batch(model: Model, policy: Policy, prompts: list[np.ndarray], seeds: list[int], names: list[int], stopped: Callable[[int, list[int]], bool], guide: Guide) -> list[list[int]]:
    network, ends = model.network, _ends(model)
    inputs = _first_inputs(network, prompts)
    draws = torch.stack([torch.rand(policy.max_new_tokens, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
    new: list[list[int]] = [[] for _ in prompts]
    open_rows = list(range(len(prompts)))
    for done in range(policy.max_new_tokens):
        output = network(**inputs, use_cache=True)
        spend(tokens=len(open_rows) if done else sum(map(len, prompts)))
        logits = output.logits[:, -1]
        if type(guide) is not Guide:
            logits = torch.stack([guided(guide, one, np.concatenate([prompts[row], new[row]]).astype(np.int64)) for row, one in enumerate(logits)])
        chosen = choose(logits, policy, draws[:, done])
        for row, token in [(row, token) for row, token in enumerate(chosen.tolist()) if row in open_rows]:
            if token not in ends:
                new[row].append(token)
            if token in ends or stopped(names[row], new[row]):
                open_rows.remove(row)
        if not open_rows:
            break
        inputs = _next_inputs(inputs, output, chosen)
    return new


def _first_inputs(network: PreTrainedModel, prompts: list[np.ndarray]) -> dict[str, Any]:
    """Arguments of the first forward pass.  Padding stands before a prompt that is continued, and behind one that an encoder reads."""
    whole = network.config.is_encoder_decoder
    ids, mask = batch.padded(prompts, left=not whole)
    ids, mask = ids.to(network.device), mask.to(network.device)
    if whole:
        start = getattr(network.config, "decoder_start_token_id", None)
        if start is None:
            raise InputError(f"the config of this {network.config.model_type} names no decoder_start_token_id", remedy="Set it in config.json.")
        read = network.get_encoder()(input_ids=ids, attention_mask=mask)
        return {"encoder_outputs": read, "attention_mask": mask, "decoder_input_ids": torch.full_like(ids[:, :1], start)}
    takes = _takes(network)
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
    if "position_ids" in takes:
        inputs["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
    if "logits_to_keep" in takes:
        inputs["logits_to_keep"] = 1
    return inputs


def _next_inputs(inputs: dict[str, Any], output: Any, chosen: Tensor) -> dict[str, Any]:
    """Arguments of the pass that reads only the tokens just chosen."""
    following = inputs | {"decoder_input_ids" if "decoder_input_ids" in inputs else "input_ids": chosen[:, None]}
    if "cache_params" in output:  # a recurrent network: what was padding has left no trace in its state
        return following | {"cache_params": output.cache_params, "attention_mask": None}
    following["past_key_values"] = output.past_key_values
    if "position_ids" in inputs:
        following["position_ids"] = inputs["position_ids"][:, -1:] + 1
    if "decoder_input_ids" not in inputs:  # what an encoder read stays masked as it was
        mask = inputs["attention_mask"]
        following["attention_mask"] = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=-1)
    return following


def _ends(model: Model) -> set[int]:
    """Tokens that end a completion: the tokenizer's end of text, and what the config names (chat models name several)."""
    named = model.config.get_text_config().eos_token_id
    return {token for token in (model.tokenizer.eos_token_id, *(named if isinstance(named, list) else [named])) if token is not None}


def _text(model: Model, prompt: np.ndarray, new: list[int]) -> str:
    """What the new tokens say after the prompt: a decoder that trims the first space of a text would trim a completion's."""

    def decode(ids: list[int]) -> str:
        return str(model.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    if model.kind != "causal":
        return decode(new)
    before, whole = decode(prompt.tolist()), decode([*prompt.tolist(), *new])
    return whole.removeprefix(before) if whole.startswith(before) else decode(new)


def _says(model: Model, prompt: np.ndarray, new: list[int], stop: Sequence[str]) -> bool:
    """Whether a stop string ends in the last token.  The last few tokens tell, unless some of them say nothing."""
    longest = max(map(len, stop))
    tail = str(model.tokenizer.decode(new[-2 * longest - 8 :], skip_special_tokens=True, clean_up_tokenization_spaces=False))
    if len(tail) < 2 * longest or len(new) <= 2 * longest + 8:
        tail = _text(model, prompt, new)
    return _cut(tail, stop)[1]


def _cut(text: str, stop: Sequence[str]) -> tuple[str, bool]:
    """The text up to the first stop string, and whether there was one."""
    places = [place for place in (text.find(string) for string in stop) if place >= 0]
    return (text[: min(places)], True) if places else (text, False)
