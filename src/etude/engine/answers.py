"""What a model of any kind says of completions: causal, masked and encoder–decoder."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from etude.engine import batch, forest, fused, losses, prompted, score
from etude.engine.cost import flops_per_token, spend
from etude.engine.progress import report
from etude.engine.score import COUNTED_LENGTH, Scored, Wanted, row_tokens
from etude.values.errors import InputError
from etude.values.lazy import lazy
from etude.values.model import Model

if TYPE_CHECKING:
    import torch
else:
    torch = lazy("torch")


def of_completions(model: Model, pairs: Sequence[tuple[str, str]], *, greedy: bool = False) -> list[Scored]:
    """Log-probabilities of every completion's tokens after its prompt.

    A causal model reads on; an encoder–decoder reads the prompt and writes the completion; of a masked model it is the pseudo-log-likelihood, each token
    of the completion hidden in turn.  Cost: one forward pass over what pairs do not share, one over prompts and completions, or one a token.
    """
    if model.kind == "causal":
        encoded = prompted.encode(model, pairs)
        return score.likelihoods(model, [np.concatenate(pair) for pair in encoded], [len(pair.prompt) for pair in encoded], greedy=greedy)
    if model.kind == "seq2seq":
        sources, targets = (_framed(model, [pair[side] for pair in pairs]) for side in (0, 1))
        return target_likelihoods(model, sources, targets, greedy=greedy)
    texts = [np.array(ids, np.int64) for ids in model.tokenizer([prompt + completion for prompt, completion in pairs])["input_ids"]]
    prompts = _framed(model, [prompt for prompt, _ in pairs])
    asked = [_inner(model, text, forest.shared(prompt, text)) for prompt, text in zip(prompts, texts, strict=True)]
    return pseudo_likelihoods(model, texts, asked, greedy=greedy)


def _framed(model: Model, texts: Sequence[str]) -> list[np.ndarray]:
    """Token ids, as the tokenizer frames a text."""
    return [np.array(ids, np.int64) for ids in model.tokenizer(list(texts))["input_ids"]]


def _inner(model: Model, text: np.ndarray, begin: int = 0) -> np.ndarray:
    """Places from `begin` on that are no special tokens."""
    places = np.arange(begin, len(text))
    return places[~np.isin(text[places], model.tokenizer.all_special_ids)]


def pseudo_likelihoods(model: Model, texts: Sequence[np.ndarray], asked: Sequence[np.ndarray] | None = None, *, greedy: bool = False) -> list[Scored]:
    """Log-probability of each asked token given all others of its text, of a masked model (Salazar et al., 2020, section 2).

    texts: token ids as the tokenizer frames them; asked: places in each, by default all that are no special tokens.
    Raises InputError for another model, or a tokenizer without a mask token.  Cost: a forward pass over the text for each asked token.
    """
    token, pad = model.tokenizer.mask_token_id, model.tokenizer.pad_token_id or 0
    if model.kind != "masked" or token is None:
        raise InputError(f"pseudo-log-likelihoods need a masked language model with a mask token, and this is a {model.kind} one ({model.base.model_type})")
    asked = [_inner(model, text) for text in texts] if asked is None else asked
    wanted, network, done = Wanted(texts, [0] * len(texts), greedy), model.network, 0
    copies = [(index, int(place)) for index, places in enumerate(asked) for place in places]
    lengths = [len(texts[index]) for index, _ in copies]
    with torch.no_grad(), losses.headless(network), fused.fused(network):
        for group in _batches(lengths, [texts[index].tobytes() + place.to_bytes(4, "big") for index, place in copies], model):
            chosen = np.array([copies[one] for one in group])
            ids, real = batch.padded([texts[index] for index in chosen[:, 0]], pad)
            ids[torch.arange(len(group)), torch.from_numpy(chosen[:, 1])] = token
            states = network(input_ids=ids.to(network.device), attention_mask=real.to(network.device)).logits.flatten(0, 1)
            wanted.read(network, states, np.arange(len(group)) * ids.shape[1] + chosen[:, 1], chosen)
            done += len(group)
            report("scoring", done, len(copies))
    spend(tokens=sum(lengths), flops=sum(lengths) * flops_per_token(network, min(max(lengths, default=1), COUNTED_LENGTH)))
    return wanted.at(asked)


def target_likelihoods(model: Model, sources: Sequence[np.ndarray], targets: Sequence[np.ndarray], *, greedy: bool = False) -> list[Scored]:
    """Log-probabilities of every target's tokens, of an encoder–decoder that has read its source.

    Both are token ids as the tokenizer frames them.  Targets of one source follow each other in a batch, and the source is read once in it.
    Raises InputError for another model, or a config without decoder_start_token_id.  Cost: a forward pass over sources and targets.
    """
    network = model.network
    start = getattr(network.config, "decoder_start_token_id", None)
    if model.kind != "seq2seq" or start is None:
        raise InputError(f"scoring targets needs an encoder–decoder whose config names decoder_start_token_id, and this is a {model.kind} model ({model.base.model_type})")
    wanted, done, pad = Wanted(targets, [0] * len(targets), greedy), 0, model.tokenizer.pad_token_id or 0
    pairs = list(zip(sources, targets, strict=True))
    sizes, longest = [len(source) + len(target) for source, target in pairs], [max(map(len, pair)) for pair in pairs]
    with torch.no_grad(), losses.headless(network), fused.fused(network):
        for group in _batches(longest, [source.tobytes() + target.tobytes() for source, target in pairs], model):
            distinct = {sources[index].tobytes(): sources[index] for index in group}
            place = {name: row for row, name in enumerate(distinct)}
            read, mask = batch.padded(list(distinct.values()), pad)
            read, mask = read.to(network.device), mask.to(network.device)
            encoded = network.get_encoder()(input_ids=read, attention_mask=mask)
            rows = torch.tensor([place[sources[index].tobytes()] for index in group], device=network.device)
            encoded.last_hidden_state = encoded.last_hidden_state[rows]
            shifted, _ = batch.padded([np.concatenate([[start], targets[index][:-1]]) for index in group], pad)
            states = network(encoder_outputs=encoded, attention_mask=mask[rows], decoder_input_ids=shifted.to(network.device), use_cache=False).logits.flatten(0, 1)
            places = [np.arange(len(targets[index])) for index in group]
            at = np.concatenate([row * shifted.shape[1] + one for row, one in enumerate(places)])
            wanted.read(network, states, at, np.stack([np.repeat(group, [len(one) for one in places]), np.concatenate(places)], 1))
            done += sum(sizes[index] for index in group)
            report("scoring", done, sum(sizes))
    spend(tokens=sum(sizes), flops=sum(sizes) * flops_per_token(network, min(max(longest, default=1), COUNTED_LENGTH)))
    return wanted.found()


def _batches(lengths: Sequence[int], keys: Sequence[bytes], model: Model) -> Iterator[list[int]]:
    """Items in batches of like length, in an order that does not depend on theirs."""
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], keys[index]))
    most = row_tokens(model.network.device.type, model.network.num_parameters())
    if losses.head_of(model.network) is None:
        most = score.batch_tokens(model, most)
    for group in batch.by_length([lengths[index] for index in order], most):
        yield [order[place] for place in group]
