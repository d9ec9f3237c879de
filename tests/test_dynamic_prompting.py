"""Soft prompts against the same vectors as tokens of a larger vocabulary, and the choice among them against attention weights that are computed by hand."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import texts
import torch
from architectures import small

from etude.engine.budget import Budget
from etude.engine.score import likelihoods
from etude.measures.dynamic_prompting import DynamicPrompting
from etude.measures.perplexity import Perplexity
from etude.methods.compress.soft_prompt import SoftPrompt
from etude.values import checkpoint
from etude.values.corpus import Corpus
from etude.values.errors import InputError
from etude.values.model import Model
from etude.values.prompt import NAME, Prompt, prompt_of

CAUSAL = ["llama", "gpt2", "gemma2", "opt"]
COUNT = 5


def prompted(model: Model, seed: int, count: int = COUNT) -> Model:
    """The model with a prompt of noise."""
    draft = model.copy()
    draft.edit(Prompt(count))
    with torch.no_grad():
        vectors = getattr(draft.network, NAME)
        vectors.copy_(model.network.get_input_embeddings().weight.std() * torch.randn(vectors.shape, generator=torch.Generator().manual_seed(seed)))
    return draft


def logits(model: Model, prompt: torch.Tensor, row: list[int]) -> torch.Tensor:
    """By hand: what the bare model says of each token of a row after the prompt's vectors."""
    with torch.no_grad():
        embedded = model.network.get_input_embeddings()(torch.tensor([row]))
        return model.network(inputs_embeds=torch.cat([prompt[None], embedded], 1), use_cache=False).logits[0, len(prompt) :]


@pytest.mark.parametrize("name", CAUSAL)
def test_a_prompt_stands_before_every_text(name, tmp_path):
    model = texts.reader(name)
    with_prompt = prompted(model, 1)
    prompt = prompt_of(with_prompt)
    assert prompt_of(model) is None
    assert prompt.shape == (COUNT, model.network.get_input_embeddings().weight.shape[1])
    rows = texts.ROWS[:3]
    length = max(map(len, rows))
    ids, mask = torch.zeros(3, length, dtype=torch.long), torch.zeros(3, length, dtype=torch.long)
    for place, row in enumerate(rows):
        ids[place, : len(row)], mask[place, : len(row)] = torch.tensor(row), 1
    with torch.no_grad():
        together = with_prompt.network(input_ids=ids, attention_mask=mask, use_cache=False).logits
    for place, row in enumerate(rows):
        torch.testing.assert_close(together[place, : len(row)], logits(model, prompt, row), rtol=1e-4, atol=1e-4)
    with_prompt.frozen_now().save(tmp_path)
    again = Model.load(tmp_path)
    probe = checkpoint.probe(model.network)
    assert torch.equal(checkpoint.outputs(again.network, probe), checkpoint.outputs(with_prompt.network, probe))
    assert torch.equal(prompt_of(again), prompt)
    copied = again.copy()
    with torch.no_grad():
        getattr(copied.network, NAME).zero_()
    assert torch.equal(checkpoint.outputs(again.network, probe), checkpoint.outputs(with_prompt.network, probe))  # the copy has a prompt of its own
    assert not torch.equal(checkpoint.outputs(copied.network, probe), checkpoint.outputs(with_prompt.network, probe))


@pytest.mark.parametrize("name", CAUSAL)
def test_the_engine_scores_texts_after_their_prompt(name):
    model = texts.reader(name)
    with_prompt = prompted(model, 2)
    rows = [np.array(row) for row in texts.ROWS]
    found = likelihoods(with_prompt, rows, [2] * len(rows))
    for row, one in zip(texts.ROWS, found, strict=True):
        by_hand = logits(model, prompt_of(with_prompt), row).log_softmax(1)
        np.testing.assert_allclose(one.logs, [float(by_hand[place - 1, row[place]]) for place in range(2, len(row))], rtol=1e-4, atol=1e-4)
    bare, after = (Perplexity(window=48, stride=24)(one.frozen_now(), texts.corpus())[0].value for one in (model, with_prompt))
    assert bare != after


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_it_writes_on_with_a_cache_as_without(name):
    with_prompt = prompted(texts.reader(name), 3)
    ids = torch.tensor([texts.ROWS[0][:9]])
    written = with_prompt.network.generate(ids, max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0)
    for _ in range(6):
        with torch.no_grad():
            ids = torch.cat([ids, with_prompt.network(input_ids=ids, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(written, ids)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_training_moves_the_prompt_alone_and_helps(name, tmp_path):
    model = texts.reader(name).frozen_now()
    before, corpus = checkpoint.digest_state(model.network), texts.corpus()
    method = SoftPrompt(prompt=4, length=32, batch_tokens=256, learning_rate=0.05)
    tuned = method(model, corpus, budget=Budget(30, "steps"), seed=0)
    assert checkpoint.digest_state(model.network) == before
    state = tuned.network.state_dict()
    assert prompt_of(tuned).shape[0] == 4
    state.pop(NAME)
    assert all(torch.equal(value, model.network.state_dict()[key]) for key, value in state.items())
    assert all(parameter.requires_grad for parameter in tuned.network.parameters())
    losses = [row["loss"] for row in tuned.history]
    assert losses[-1] < losses[0] - 0.05
    start = SoftPrompt(prompt=4, length=32, batch_tokens=256, learning_rate=1e-12)(model, corpus, budget=Budget(1, "steps"), seed=0)
    read = model.network.get_input_embeddings().weight
    assert all((read == vector).all(1).any() for vector in prompt_of(start))  # it begins as tokens
    with pytest.raises(InputError, match="soft prompt already"):
        method(tuned, corpus, budget=Budget(1, "steps"), seed=0)
    with pytest.raises(InputError, match="causal"):
        method(small("bert"), corpus, budget=Budget(1, "steps"), seed=0)
    with pytest.raises(InputError, match="is longer"):
        SoftPrompt(prompt=40, length=32, batch_tokens=256)(model, corpus, budget=Budget(1, "steps"), seed=0)
    with pytest.raises(ValueError, match="prompt is a number"):
        SoftPrompt(prompt=0)


def paid(model: Model, prompts: list[torch.Tensor], row: list[int], apart: bool) -> list[float]:
    """Mean attention of a row's tokens but the first to a vector of each prompt, from queries and keys, for a Llama without grouped heads told apart."""
    network = model.network
    sizes = [len(prompt) for prompt in prompts]
    total, most = sum(sizes), max(sizes)
    length = total + len(row)
    x = torch.cat([*prompts, network.get_input_embeddings()(torch.tensor(row)).detach()])
    owner = [place for place, size in enumerate(sizes) for _ in range(size)] + [-1] * len(row)
    seen = torch.tensor([[key <= query and (not apart or owner[query] in (-1, owner[key])) for key in range(length)] for query in range(length)])
    places = [most - size + place for size in sizes for place in range(size)] + list(range(most, most + len(row))) if apart else list(range(length))
    config = network.config
    width = config.head_dim
    angle = torch.tensor(places)[:, None] * 10000.0 ** -(torch.arange(0, width, 2) / width)

    def turned(values):  # (heads, length, width)
        one, two = values.chunk(2, -1)
        return torch.cat([one * angle.cos() - two * angle.sin(), two * angle.cos() + one * angle.sin()], -1)

    found = []
    with torch.no_grad():
        for layer in network.model.layers:
            read = layer.input_layernorm(x)
            q, k, v = (getattr(layer.self_attn, part)(read).unflatten(1, (-1, width)).transpose(0, 1) for part in ("q_proj", "k_proj", "v_proj"))
            k, v = (one.repeat_interleave(len(q) // len(one), 0) for one in (k, v))
            scores = (turned(q) @ turned(k).transpose(1, 2) / width**0.5).masked_fill(~seen, -torch.inf).softmax(-1)
            found.append(scores[:, total + 1 :, :total].mean((0, 1)))
            x = x + layer.self_attn.o_proj((scores @ v).transpose(0, 1).flatten(1))
            x = x + layer.mlp(layer.post_attention_layernorm(x))
    return [float(part.mean()) for part in torch.stack(found).mean(0).split(sizes)]


@pytest.mark.parametrize("apart", [False, True])
def test_attention_is_that_of_queries_and_keys(apart):
    model = texts.reader("llama")
    prompts = [prompt_of(prompted(model, seed, count)) for seed, count in ((1, 3), (2, 5), (3, 4))]
    rows = [row[:12] for row in texts.ROWS if len(row) >= 12]
    found = DynamicPrompting(apart=apart)._attention(model, prompts, [np.array(row) for row in rows])
    np.testing.assert_allclose(found, [paid(model, prompts, row, apart) for row in rows], rtol=1e-4)
    if apart:  # then their order does not matter
        turned = DynamicPrompting(apart=True)._attention(model, prompts[::-1], [np.array(row) for row in rows])
        np.testing.assert_allclose(turned[:, ::-1], found, rtol=1e-4)
    assert model.network.config._attn_implementation == "sdpa"


def test_parts_are_those_of_every_text_and_prompt():
    model = texts.reader("llama")
    bank = [prompted(model, seed).frozen_now() for seed in (4, 5, 6)]
    one, other = Corpus(texts.SENTENCES[:4]), Corpus([{"text": text, "path": f"{place}.txt"} for place, text in enumerate(texts.SENTENCES[4:])])
    measure = DynamicPrompting(context=10, tokens=15)
    parts = measure([model.frozen_now(), *bank], [one, other])
    count = len(parts) // 4
    assert [part.name for part in parts[:count]] == [part.name for part in parts[count : 2 * count]]
    found = {part.name: part for part in parts[:count]}
    encoded = [next(row for row in texts.rows(200) if bytes_of(row) == text.encode()) for text in texts.SENTENCES]
    kept = [index for index, row in enumerate(encoded) if len(row) > 11]
    assert found["mean"].item_names == tuple(f"1 {index}" if index < 4 else f"2 {index - 4}.txt" for index in kept)
    nats = np.zeros((4, len(kept)))
    for place, index in enumerate(kept):
        row = encoded[index][:26]
        for prompt, vectors in enumerate([torch.zeros(0, texts.reader("llama").config.hidden_size), *map(prompt_of, bank)]):
            said = logits(model, vectors, row).log_softmax(1)
            nats[prompt, place] = -np.mean([float(said[at - 1, row[at]]) for at in range(11, len(row))])
    weights = np.array([len(encoded[index][:26]) - 11 for index in kept])
    scores = np.array([paid(model, list(map(prompt_of, bank)), encoded[index][:11], False) for index in kept])
    chosen, right = scores.argmax(1), nats[1:].argmin(0)
    every = np.arange(len(kept))
    best = 1 + int((nats[1:] * weights).sum(1).argmin())
    wanted = {"unprompted": nats[0], "prompt_2": nats[2], "mean": nats[1:].mean(0), "best": nats[best], "selected": nats[1 + chosen, every], "oracle": nats[1 + right, every]}
    for name, items in wanted.items():
        np.testing.assert_allclose(found[name].items, items, rtol=1e-4)
        assert found[name].value == pytest.approx(np.exp((items * weights).sum() / weights.sum()), rel=1e-4)
    np.testing.assert_array_equal(found["hits"].items, chosen == right)
    np.testing.assert_array_equal(found["chosen_3"].items, chosen == 2)
    assert found["oracle"].value <= min(found["selected"].value, found["best"].value)


def bytes_of(row: list[int]) -> bytes:
    letters = {place: byte for byte, place in ((byte, texts.tokenizer().get_vocab()[letter]) for byte, letter in texts.enumerate_bytes().items())}
    return bytes(letters[token] for token in row[1:])


def test_a_bank_of_another_model_is_refused():
    model = texts.reader("llama")
    bank = [prompted(model, seed).frozen_now() for seed in (1, 2)]
    other = copy.deepcopy(bank[1].copy())
    with torch.no_grad():
        other.network.get_input_embeddings().weight.add_(1)
    measure, corpus = DynamicPrompting(context=4, tokens=8), texts.corpus()
    model.frozen_now()
    for models, words in (([], "needs a model"), (bank, "first model has a soft prompt"), ([model, model], "model 2 of the list has no soft prompt"), ([model, bank[0], other], "other weights")):
        with pytest.raises(InputError, match=words):
            measure(models, [corpus])
    with pytest.raises(InputError, match="no text has more than the 999"):
        DynamicPrompting(context=999)([model, *bank], [corpus])
    with pytest.raises(InputError, match="causal"):
        measure([small("bert")], [corpus])
    with pytest.raises(ValueError, match="context and tokens"):
        DynamicPrompting(context=0)
