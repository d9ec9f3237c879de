"""What compression takes, against answers decoded by hand and ratios taken by hand."""

from __future__ import annotations

import functools
import math

import numpy as np
import pytest
import texts
import torch
from texts import END, reader

from etude.engine.budget import Budget
from etude.measures.llm_kick import LLMKick, drops, rises
from etude.methods.adapt.instruction_tuning import InstructionTuning
from etude.methods.compress.magnitude import Magnitude
from etude.methods.compress.round_to_nearest import RoundToNearest
from etude.values.corpus import Corpus
from etude.values.errors import InputError
from etude.values.measurement import Measurement

KNOWN = [("Ada:", " red\n"), ("Bo:", " blue\n"), ("Cy:", " green\n"), ("Di:", " grey\n"), ("Ed:", " pink\n"), ("Flo:", " black\n")]
SHOWN = [(f"{name} {colour}. {name}:", f" {colour}\n") for name, colour in (("Gus", "red"), ("Hal", "blue"), ("Ida", "grey"), ("Jo", "pink"))]
METHOD = LLMKick(new=6, tokens=48)


def corpus(pairs):
    return Corpus([{"prompt": prompt, "completion": completion} for prompt, completion in pairs])


@functools.cache
def grid(name):
    """A model that was taught the answers, and two compressed ones."""
    dense = InstructionTuning(learning_rate=3e-3, batch_tokens=256, length=48)(reader(name).frozen_now(), corpus(KNOWN + SHOWN), Budget(80, "steps"), seed=0)
    return [dense, Magnitude(sparsity=0.6)(dense), RoundToNearest(bits=2, group=None)(dense)]


def said(model, prompt):
    """The likeliest six tokens, one after another, as text."""
    ids = [END, *model.tokenizer(prompt)["input_ids"]]
    begin = len(ids)
    for _ in range(6):
        with torch.no_grad():
            token = int(model.network(torch.tensor([ids])).logits[0, -1].argmax())
        if token == END:
            break
        ids.append(token)
    return model.tokenizer.decode(ids[begin:])


def loss(model, text):
    ids = torch.tensor([[END, *model.tokenizer(text)["input_ids"]]])
    with torch.no_grad():
        logs = model.network(ids).logits[0].double().log_softmax(-1)
    return [-logs[place, token].item() for place, token in enumerate(ids[0, 1:].tolist())]


def named(found, models):
    each = len(found) // models
    return [{one.name: one for one in found[begin : begin + each]} for begin in range(0, len(found), each)]


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_parts_are_those_by_hand(name):
    models, text = grid(name), Corpus([text[:40] for text in texts.SENTENCES])
    closed, opened = corpus(KNOWN), corpus(SHOWN)
    before = [one.digest for one in (*models, closed, opened, text)]
    found = named(METHOD(models, closed, opened, text), 3)
    assert [one.digest for one in (*models, closed, opened, text)] == before
    right = {
        part: [[said(model, prompt).strip().split("\n")[0].strip() == completion.strip() for prompt, completion in pairs] for model in models]
        for part, pairs in (("closed_book", KNOWN), ("open_book", SHOWN))
    }
    assert np.mean(right["closed_book"][0]) > 0.6, "nothing was learned, so that nothing was tested"
    perplexities = [math.exp(np.mean([value for one in text.texts for value in loss(model, one)])) for model in models]
    for place, parts in enumerate(found):
        for part, answers in right.items():
            assert parts[part].items.tolist() == [float(one) for one in answers[place]]
            drop = 1 - np.mean(answers[place]) / np.mean(answers[0])
            assert parts[f"{part}_drop"].value == pytest.approx(drop)
            assert parts[f"{part}_broken"].value == (drop > 0.05)
        rise = perplexities[place] / perplexities[0] - 1
        assert parts["perplexity"].value == pytest.approx(perplexities[place], rel=1e-4)
        assert parts["perplexity_rise"].value == pytest.approx(rise, abs=2e-4)
        assert parts["text_drop"].value == pytest.approx(1 - perplexities[0] / perplexities[place], abs=2e-4)
        assert parts["perplexity_broken"].value == (rise > 0.05)
        assert parts["unseen"].value == (parts["closed_book_broken"].value > parts["perplexity_broken"].value)
    assert (found[0]["closed_book_drop"].value, found[0]["perplexity_rise"].value) == (0, pytest.approx(0))
    assert any(parts["closed_book_drop"].value > 0 for parts in found[1:]), "nothing was lost, so that nothing was tested"


def test_influences_have_the_ratio_as_mean_and_its_spread():
    random = np.random.default_rng(0)
    draws = []
    for _ in range(600):
        dense = (random.random(150) < 0.8).astype(float)
        draws.append((dense * (random.random(150) < 0.6), dense))
    items = [drops(right, dense) for right, dense in draws]
    assert [one.mean() for one in items] == pytest.approx([1 - right.mean() / dense.mean() for right, dense in draws])
    assert np.mean([one.std() / math.sqrt(150) for one in items]) == pytest.approx(np.std([one.mean() for one in items]), rel=0.1)


def test_the_rise_of_a_perplexity_has_the_spread_of_a_ratio():
    random, found, errors = np.random.default_rng(1), [], []
    for _ in range(600):
        weights, nats = random.integers(20, 60, 80).astype(float), random.normal(3, 0.4, 80)
        dense = Measurement("perplexity", nats, weights=weights, scale="exp")
        other = Measurement("perplexity", nats + random.normal(0.2, 0.1, 80), weights=weights, scale="exp")
        items = rises(other, dense)
        assert items.mean() == pytest.approx(other.value / dense.value - 1)
        found.append(items.mean())
        errors.append(items.std() / math.sqrt(80))
    assert np.mean(errors) == pytest.approx(np.std(found), rel=0.1)


def test_a_dense_model_that_knows_nothing_has_nothing_to_lose():
    found = {one.name for one in METHOD([reader("llama").frozen_now()], corpus(KNOWN), corpus(SHOWN), texts.corpus())}
    assert found == {"perplexity", "perplexity_rise", "text_drop", "perplexity_broken", "closed_book", "open_book"}


def test_what_cannot_be_compared_is_refused():
    model, text = reader("llama").frozen_now(), texts.corpus()
    for fields in ({"tolerance": -0.1}, {"new": 0}, {"records": 0}, {"tokens": 0}):
        with pytest.raises(ValueError, match=next(iter(fields))):
            LLMKick(**fields)
    with pytest.raises(InputError, match="needs a dense model"):
        METHOD([], corpus(KNOWN), corpus(SHOWN), text)
    with pytest.raises(InputError, match="has no column"):
        METHOD([model], Corpus([{"prompt": "a"}]), corpus(SHOWN), text)
    with pytest.raises(InputError, match="record 0 is empty"):
        METHOD([model], corpus([("a", " ")]), corpus(SHOWN), text)
    with pytest.raises(InputError, match="causal"):
        METHOD([reader("bert")], corpus(KNOWN), corpus(SHOWN), text)
