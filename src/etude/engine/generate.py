"""Completions of prompts: the one decoding loop, and the door to completion servers."""

from __future__ import annotations

import http.client
import inspect
import json
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import numpy as np
import torch
from torch import Tensor

from etude.engine import batch, score
from etude.engine.cost import spend
from etude.engine.progress import report
from etude.values.corpus import Corpus
from etude.values.digest import digest
from etude.values.errors import InputError
from etude.values.generator import Endpoint, Generator, Policy
from etude.values.model import Model

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BATCH_TOKENS = 1 << 13
"""Tokens of a batch, completions included."""
TIMEOUT = 300.0
"""Seconds to wait for a server's answer."""
LOOPBACK = ("localhost", "127.0.0.1", "::1")


def generate(generator: Generator, prompts: Sequence[str], seed: int = 0) -> list[str]:
    """The completion of every prompt, without the prompt and without the stop string that ended it.

    A sample depends on the seed, the prompt, and how often the same prompt came before: not on what else stands in the list
    (but a model's logits differ in their last bits from batch to batch, which a draw at the very edge of a token would see).
    Raises InputError if a prompt leaves no room for its completion, or if an endpoint does not answer as it should.
    Cost: one forward pass over the prompts and one a new token.
    """
    if not prompts:
        return []
    seeds = _seeds(prompts, seed)
    if isinstance(generator.source, Endpoint):
        return _ask_all(generator.source, generator.policy, prompts, seeds)
    return _complete_all(generator.source, generator.policy, prompts, seeds)


def _seeds(prompts: Sequence[str], seed: int) -> list[int]:
    """A seed for every prompt; the second time that a prompt comes it gets another one."""
    seen: Counter[str] = Counter()
    seeds = []
    for prompt in prompts:
        seeds.append(int(digest(seed, prompt, seen[prompt])[:7], 16))  # 28 bits: what every server takes
        seen[prompt] += 1
    return seeds


# A model.


def _complete_all(model: Model, policy: Policy, prompts: Sequence[str], seeds: Sequence[int]) -> list[str]:
    if model.kind not in ("causal", "seq2seq"):
        raise InputError(f"generating needs a causal or an encoder–decoder model, and this is a {model.kind} one ({model.base.model_type})")
    encoded = _encode(model, prompts)
    sizes = [len(ids) + policy.max_new_tokens for ids in encoded]
    _check_room(model, encoded, policy)
    texts = [""] * len(prompts)
    done = 0
    for group in batch.by_length(sizes, _room(model)):
        for index, text in zip(group, _complete(model, policy, [encoded[i] for i in group], [seeds[i] for i in group]), strict=True):
            texts[index] = text
        done += len(group)
        report("generating", done, len(prompts))
    return texts


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
def _complete(model: Model, policy: Policy, prompts: list[np.ndarray], seeds: list[int]) -> list[str]:
    """One batch, a token a round, until every row has ended."""
    network, ends = model.network, _ends(model)
    inputs = _first_inputs(network, prompts)
    randoms = [torch.Generator().manual_seed(seed) for seed in seeds]
    new: list[list[int]] = [[] for _ in prompts]
    open_rows = list(range(len(prompts)))
    for done in range(policy.max_new_tokens):
        output = network(**inputs, use_cache=True)
        spend(tokens=len(open_rows) if done else sum(map(len, prompts)))
        draws = torch.stack([torch.rand((), generator=random) for random in randoms])
        chosen = choose(output.logits[:, -1], policy, draws)
        for row, token in [(row, token) for row, token in enumerate(chosen.tolist()) if row in open_rows]:
            if token not in ends:
                new[row].append(token)
            if token in ends or (policy.stop and _cut(_text(model, prompts[row], new[row]), policy.stop)[1]):
                open_rows.remove(row)
        if not open_rows:
            break
        inputs = _next_inputs(inputs, output, chosen)
    return [_cut(_text(model, prompt, ids), policy.stop)[0] for prompt, ids in zip(prompts, new, strict=True)]


def choose(logits: Tensor, policy: Policy, draws: Tensor) -> Tensor:
    """The next token of every row.

    logits: (rows, tokens); draws: (rows,), uniform in [0, 1), of which each row uses its own.  Returns (rows,).
    Source: the smallest set of tokens with probability top_p, as in Holtzman et al., 2020, section 3.1.
    """
    if policy.temperature == 0:
        return logits.argmax(-1)
    ordered, tokens = (logits.float() / policy.temperature).sort(dim=-1, descending=True, stable=True)
    cumulative = ordered.softmax(-1).cumsum(-1)
    kept = 1 + (cumulative[:, :-1] < policy.top_p).sum(-1, keepdim=True)
    total = cumulative.gather(-1, kept - 1)
    place = torch.searchsorted(cumulative, draws.to(cumulative)[:, None] * total, right=True).minimum(kept - 1)
    return tokens.gather(-1, place)[:, 0]


def _first_inputs(network: PreTrainedModel, prompts: list[np.ndarray]) -> dict[str, Any]:
    """Arguments of the first forward pass.  Padding stands before a prompt that is continued, and behind one that an encoder reads."""
    whole = network.config.is_encoder_decoder
    ids, mask = _padded(prompts, left=not whole)
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


def _padded(rows: list[np.ndarray], left: bool) -> tuple[Tensor, Tensor]:
    """Ids and mask, each (rows, longest)."""
    ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, real in enumerate(rows):
        place = slice(ids.shape[1] - len(real), None) if left else slice(0, len(real))
        ids[row, place] = torch.from_numpy(real)
        mask[row, place] = 1
    return ids, mask


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


def _cut(text: str, stop: Sequence[str]) -> tuple[str, bool]:
    """The text up to the first stop string, and whether there was one."""
    places = [place for place in (text.find(string) for string in stop) if place >= 0]
    return (text[: min(places)], True) if places else (text, False)


# An endpoint.


def _ask_all(endpoint: Endpoint, policy: Policy, prompts: Sequence[str], seeds: Sequence[int]) -> list[str]:
    texts = []
    for prompt, seed in zip(prompts, seeds, strict=True):
        texts.append(_cut(_ask(endpoint, policy, prompt, seed), policy.stop)[0])
        report("asking", len(texts), len(prompts), endpoint.url)
    return texts


def _ask(endpoint: Endpoint, policy: Policy, prompt: str, seed: int) -> str:
    address = endpoint.url.rstrip("/") + "/completions"
    body: dict[str, Any] = {
        "model": endpoint.model, "prompt": prompt, "max_tokens": policy.max_new_tokens, "temperature": policy.temperature, "top_p": policy.top_p, "seed": seed,
    }  # fmt: skip
    if policy.stop:
        body["stop"] = list(policy.stop)
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {endpoint.key}"} if endpoint.key else {})
    answer = _post(address, json.dumps(body).encode(), headers)
    try:
        data = json.loads(answer)
        text = data["choices"][0]["text"]
        spend(tokens=int((data.get("usage") or {}).get("total_tokens", 0)))
    except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise InputError(f"{address} answered with no completion: {answer[:200].decode(errors='replace')}", remedy="Is it an OpenAI-compatible server?") from error
    return str(text)


class _Stay(urllib.request.HTTPRedirectHandler):
    """Follow no redirect: it would carry the key to another host."""

    def redirect_request(self, *arguments: Any, **named: Any) -> None:
        return None


def _post(address: str, body: bytes, headers: dict[str, str]) -> bytes:
    """Send and receive.  Raises InputError if the server cannot be reached, is too slow, or refuses."""
    if urlsplit(address).scheme not in ("http", "https"):
        raise InputError(f"an endpoint's url begins with http:// or https://, got {address}")
    handlers: list[urllib.request.BaseHandler] = [_Stay()]
    if urlsplit(address).hostname in LOOPBACK:
        handlers.append(urllib.request.ProxyHandler({}))
    request = urllib.request.Request(address, body, headers, method="POST")
    try:
        with urllib.request.build_opener(*handlers).open(request, timeout=TIMEOUT) as response:
            return bytes(response.read())
    except urllib.error.HTTPError as error:
        said = error.read(300).decode(errors="replace").strip()
        remedy = "Set the key's environment variable." if error.code in (401, 403) else None
        raise InputError(f"{address} answered {error.code} {error.reason}: {said}", remedy=remedy) from error
    except TimeoutError as error:
        raise InputError(f"{address} did not answer within {TIMEOUT:g} seconds") from error
    except (OSError, http.client.HTTPException) as error:  # urllib.error.URLError is an OSError
        reason = getattr(error, "reason", error)
        slow = isinstance(reason, TimeoutError)
        raise InputError(f"{address} did not answer within {TIMEOUT:g} seconds" if slow else f"{address} cannot be reached: {reason}", remedy="Is the server running?") from error
