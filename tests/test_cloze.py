"""Filling in choices: where the masks stand, scores against logits read one by one, and tuning against AdamW by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import texts
import torch
import transformers as t
from torch import nn

from etude.engine import cloze, losses
from etude.engine.budget import Budget
from etude.measures.cloze import Cloze
from etude.methods.adapt.cloze_tuning import ClozeTuning
from etude.values.corpus import Corpus
from etude.values.errors import InputError
from etude.values.model import Model

CHOICES = ["a", "no", "yes"]


def masked(name: str = "bert", **more) -> Model:
    """A small masked model of bytes without dropout, whose mask is its end token."""
    if name == "modernbert":
        config = t.ModernBertConfig(vocab_size=texts.END + 1, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, max_position_embeddings=64, pad_token_id=0, **more)
        torch.manual_seed(1)
        model = Model(t.ModernBertForMaskedLM(config).eval(), texts.tokenizer())
    else:
        model = texts.reader(name, **more)
    for one in model.network.modules():
        if isinstance(one, nn.Dropout):
            one.p = 0.0
    model.tokenizer.mask_token = model.tokenizer.eos_token
    return model


def records(count: int = 6) -> Corpus:
    """Questions whose right choice follows from the first letter."""
    return Corpus([{"prompt": f"{'kmp'[place % 3]}{'x' * (place % 4)}:", "choices": CHOICES, "answer": place % 3} for place in range(count)])


def by_hand(model: Model, prompt: str, choices: list[str]) -> torch.Tensor:
    """Probabilities of the choices, from the logits at as many masks as the longest choice has bytes."""
    letters, vocabulary = texts.enumerate_bytes(), model.tokenizer.get_vocab()

    def spelt(text: str) -> list[int]:
        return [vocabulary[letters[byte]] for byte in text.encode()]

    masks = max(map(len, choices))
    logits = model.network(input_ids=torch.tensor([[*spelt(prompt), *[texts.END] * masks]])).logits[0, len(prompt) :]
    return torch.stack([torch.stack([logits[at, token] for at, token in enumerate(spelt(choice))]).mean() for choice in choices]).softmax(0)


@pytest.mark.parametrize("name", ["bert", "roberta", "distilbert", "electra", "modernbert"])
def test_probabilities_are_those_of_logits_read_one_by_one(name):
    model = masked(name)
    before = model.digest
    corpus = Corpus([{"prompt": "The tide", "choices": [" out", "in"], "answer": 1}, {"prompt": "Rain, mostly", "choices": CHOICES, "answer": 0}])
    asked = cloze.questions(model, corpus)
    logs = cloze.answers(model, asked)
    assert model.digest == before
    assert np.isneginf(logs[0, 2])
    with torch.no_grad():
        for found, record in zip(logs, corpus, strict=True):
            expected = by_hand(model, record["prompt"], record["choices"])
            np.testing.assert_allclose(np.exp(found[: len(expected)]), expected, rtol=1e-4, atol=1e-6)
        part = [cloze.scores(model.network(input_ids=torch.from_numpy(one.ids)[None]).logits, None, [one])[0] for one in asked]
    np.testing.assert_allclose(logs[1], part[1].log_softmax(0), rtol=1e-4, atol=1e-5)


def test_the_beginning_of_a_prompt_is_cut():
    model = masked()
    corpus = Corpus([{"prompt": "abcdefgh", "choices": CHOICES, "answer": 2}])
    (whole,), (cut,) = cloze.questions(model, corpus), cloze.questions(model, corpus, 6)
    assert len(whole.ids) == 11
    assert cut.ids.tolist() == whole.ids[5:].tolist()
    assert cut.places.tolist() == [3, 4, 5]
    assert [len(one) for one in cut.choices] == [1, 2, 3]
    with pytest.raises(InputError, match="no room"):
        cloze.questions(model, corpus, 3)
    long = Corpus([{"prompt": "a" * 100, "choices": CHOICES, "answer": 2}])
    assert len(cloze.questions(model, long)[0].ids) == 64  # all that this model reads


def test_two_steps_of_tuning_are_adamw_on_the_cross_entropy_of_the_choices():
    model = masked("modernbert")
    before = model.digest
    method = ClozeTuning(learning_rate=3e-3, batch_tokens=64, length=16, precision="float32", schedule="constant", warmup=0.0, weight_decay=0.0)
    tuned = method(model, records(4), Budget(2, "steps"), 0)  # four questions a step: all of them
    assert model.digest == before
    network = model.copy().network.train()
    start = {key: tensor.clone() for key, tensor in network.state_dict().items()}
    optimizer = torch.optim.AdamW([*(p for p in network.parameters() if p.ndim > 1), *(p for p in network.parameters() if p.ndim < 2)], lr=3e-3, betas=(0.9, 0.95), weight_decay=0.0)
    hand = Model(network, model.tokenizer)
    for _ in range(2):
        loss = torch.stack([-by_hand(hand, one["prompt"], one["choices"])[one["answer"]].log() for one in records(4)]).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(list(network.parameters()), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    for key, expected in network.state_dict().items():
        assert (expected - tuned.network.state_dict()[key]).abs().mean() <= 0.02 * (expected - start[key]).abs().mean() + 1e-8, key


def test_what_was_learned_is_measured():
    model = masked("modernbert")
    tuned = ClozeTuning(learning_rate=1e-2, batch_tokens=256, length=16)(model, records(12), Budget(40, "steps"), 0)
    accuracy, probability = Cloze()(tuned, records(9))
    assert accuracy.value == 1.0
    assert 0.8 < probability.value <= 1.0
    assert accuracy.item_names == tuple("012345678")
    fresh = Cloze(records=3)(model, records(9))
    assert len(fresh[0].items) == 3
    assert math.isclose(fresh[1].items[0], by_hand(model, "k:", CHOICES)[0].item(), rel_tol=1e-4)


def test_the_head_that_is_handed_on_gives_the_same_scores():
    model = masked("modernbert")
    asked = cloze.questions(model, records(2))
    ids = torch.from_numpy(np.stack([asked[0].ids, asked[0].ids]))
    with torch.no_grad():
        plain = cloze.scores(model.network(input_ids=ids).logits, None, [asked[0]] * 2)
        with losses.headless(model.network):
            assert losses.head_of(model.network) is not None
            handed = cloze.scores(model.network(input_ids=ids).logits, losses.head_of(model.network), [asked[0]] * 2)
    torch.testing.assert_close(plain, handed)


def test_what_cannot_be_asked_is_refused():
    with pytest.raises(InputError, match="and this is a causal one"):
        cloze.questions(texts.reader("llama"), records())
    with pytest.raises(InputError, match="mask token"):
        cloze.questions(texts.reader("bert"), records())
    for wrong in ({"choices": ["a"], "answer": 0}, {"choices": ["a", "b"], "answer": 2}, {"choices": ["a", ""], "answer": 0}):
        with pytest.raises(InputError, match=r"record 0|no token"):
            cloze.questions(masked(), Corpus([{"prompt": "x", **wrong}]))
    with pytest.raises(InputError, match="choices"):
        cloze.questions(masked(), texts.corpus().renamed({"text": "prompt"}))
    with pytest.raises(ValueError, match="records"):
        Cloze(records=0)
