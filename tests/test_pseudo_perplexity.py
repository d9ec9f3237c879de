"""Pseudo-perplexity and minimal pairs against what they say they are."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from texts import corpus, reader

from etude.measures.pseudo_perplexity import PseudoPerplexity
from etude.methods.curate.minimal_pairs import MinimalPairs
from etude.values.corpus import Corpus
from etude.values.errors import InputError


@pytest.mark.parametrize("name", ["bert", "electra"])
def test_it_is_the_mean_over_tokens_hidden_one_by_one(name):
    model = reader(name)
    model.tokenizer.mask_token = model.tokenizer.eos_token
    before = model.frozen_now().digest
    total, count = 0.0, 0
    for text in corpus().texts[:3]:
        ids = torch.tensor([model.tokenizer(text)["input_ids"][:10]])
        for place in range(ids.shape[1]):
            hidden = ids.clone()
            hidden[0, place] = model.tokenizer.mask_token_id
            with torch.no_grad():
                total -= model.network(input_ids=hidden).logits[0, place].double().log_softmax(-1)[ids[0, place]].item()
            count += 1
    (found,) = PseudoPerplexity(tokens=10, records=3)(model=model, corpus=corpus())
    assert found.value == pytest.approx(math.exp(total / count), rel=1e-4)
    assert found.weights.sum() == count
    assert model.digest == before


def test_a_causal_model_is_refused():
    with pytest.raises(InputError, match="masked"):
        PseudoPerplexity()(model=reader("llama").frozen_now(), corpus=corpus())


@pytest.mark.parametrize("mistake", ["order", "word"])
def test_each_pair_is_a_line_and_one_mistake(mistake):
    text = corpus()
    lines = {" ".join(line.split()) for one in text.texts for line in one.splitlines()}
    found = MinimalPairs(mistake=mistake, shortest=3, longest=30)(corpus=text, seed=1)
    right = [choices[answer] for choices, answer in zip(found.column("choices"), found.column("answer"), strict=True)]
    wrong = [choices[1 - answer] for choices, answer in zip(found.column("choices"), found.column("answer"), strict=True)]
    assert set(right) <= lines
    assert len(set(right)) == len(right)
    for one, other in zip(right, wrong, strict=True):
        one, other = one.split(), other.split()
        places = [place for place, (a, b) in enumerate(zip(one, other, strict=True)) if a != b]
        assert len(places) == (2 if mistake == "order" else 1)
        if mistake == "order":
            assert places[1] == places[0] + 1
            assert sorted(one) == sorted(other)
    assert 0 < np.mean(found.column("answer")) < 1
    assert MinimalPairs(mistake=mistake, shortest=3, longest=30)(corpus=text, seed=1).digest == found.digest
    assert MinimalPairs(mistake=mistake, shortest=3, longest=30)(corpus=text, seed=2).digest != found.digest


def test_a_corpus_without_such_lines_is_refused():
    with pytest.raises(InputError, match="no line"):
        MinimalPairs()(corpus=Corpus(["one two", "a a a a a a"]), seed=0)
