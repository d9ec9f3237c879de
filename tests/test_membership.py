"""Scores of membership against tokens scored one text at a time, and AUROC against a count of pairs."""

from __future__ import annotations

import math
import zlib

import numpy as np
import pytest
import texts
import torch

from etude.engine import batch
from etude.measures.membership import SCORES, Membership, auroc_items, min_k
from etude.values.corpus import Corpus
from etude.values.errors import InputError
from etude.values.measurement import HIGHER

OTHERS = Corpus(["The Mill had closed for the Winter.", "three crows", "A rope; a harbour; a MASTER.", "Snow, mostly, and the road.", "Twice a day it rains in May."])


def logs(model, text):
    """Log-probability of every token of one text, without batches."""
    ids = torch.from_numpy(batch.encode(model, Corpus([text]))[0])
    with torch.no_grad():
        table = model.network(input_ids=ids[None]).logits[0].double().log_softmax(-1)
    return [table[place, token].item() for place, token in enumerate(ids[1:].tolist())]


def by_hand(model, text, percent):
    found = sorted(logs(model, text))
    few = found[: max(1, math.floor(len(found) * percent / 100))]
    loss, lowered = (-sum(one) / len(one) for one in (found, logs(model, text.lower())))
    return {"min_k_prob": sum(few) / len(few), "loss": loss, "zlib": loss / (8 * len(zlib.compress(text.encode()))), "lowercase": lowered / loss}


def auroc(members, others):
    """The share of pairs in which the member has the higher score, ties half."""
    return sum(1.0 if one > other else 0.5 if one == other else 0.0 for one in members for other in others) / (len(members) * len(others))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_scores_and_aurocs_are_those_by_hand(name):
    model, members = texts.reader(name), Corpus([text[:60] for text in texts.SENTENCES])  # GPT-2 reads 64 tokens here
    before = (model.digest, members.digest, OTHERS.digest)
    found = {part.name: part for part in Membership()(model, [members, OTHERS])}
    assert (model.digest, members.digest, OTHERS.digest) == before
    mine, theirs = ([by_hand(model, text, 20) for text in corpus.texts] for corpus in (members, OTHERS))
    assert list(found) == [*SCORES, *(f"auroc_{score}" for score in SCORES)]
    for score, (_, better) in SCORES.items():
        assert found[score].items.tolist() == pytest.approx([one[score] for one in mine], rel=1e-4)
        sign = 1 if better == HIGHER else -1
        assert found[f"auroc_{score}"].value == pytest.approx(auroc([sign * one[score] for one in mine], [sign * one[score] for one in theirs]))
        assert found[f"auroc_{score}"].item_names[:1] + found[f"auroc_{score}"].item_names[-1:] == ("member 0", "other 4")
    assert all(one["min_k_prob"] < -one["loss"] for one in mine)
    assert {found[f"auroc_{score}"].item_names for score in SCORES} == {found["auroc_loss"].item_names}, "they could not be paired"


def test_a_model_that_read_the_members_ranks_them_first(tiny):
    from etude.engine.budget import Budget
    from etude.methods.pretrain.causal_lm import CausalLM
    from etude.values.model import Model

    base = Model.load(tiny / "base")
    members, others = (Corpus(Corpus.read(tiny / "text.jsonl").texts[part]) for part in (slice(0, 8), slice(8, 16)))
    trained = CausalLM(learning_rate=1e-2, batch_tokens=512, length=128)(base, members, Budget(60, "steps"), seed=0)
    value = {part.name: part.value for part in Membership(window=128, stride=64)(trained, [members, others])}
    assert min(value["auroc_loss"], value["auroc_min_k_prob"]) > 0.75


def test_the_lowest_tokens_are_rounded_down_but_at_least_one():
    logs = np.log(np.array([0.5, 0.1, 0.9, 0.2, 0.4, 0.3, 0.8], np.float32))
    assert min_k(logs, 20) == pytest.approx(math.log(0.1))  # 1.4 tokens
    assert min_k(logs, 30) == pytest.approx((math.log(0.1) + math.log(0.2)) / 2)  # 2.1 tokens
    assert min_k(logs, 100) == pytest.approx(np.log([0.5, 0.1, 0.9, 0.2, 0.4, 0.3, 0.8]).mean())
    assert min_k(logs[:2], 20) == pytest.approx(math.log(0.1))


def test_influences_have_the_auroc_as_mean_and_its_variance():
    random = np.random.default_rng(0)
    members, others = random.integers(0, 6, 9).astype(float), random.integers(0, 5, 14).astype(float)  # many ties
    items = auroc_items(members, others)
    value = auroc(members, others)
    assert items.shape == (23,)
    assert items.mean() == pytest.approx(value)
    shares = [auroc([one], others) for one in members], [auroc(members, [one]) for one in others]
    expected = sum(np.var(one) / len(one) for one in shares)  # DeLong et al., 1988, the two components
    assert np.var(items) / len(items) == pytest.approx(expected)
    assert auroc_items(others, members).mean() == pytest.approx(1 - value)
    assert auroc_items(np.ones(3), np.ones(2)).tolist() == [0.5] * 5


def test_intervals_cover_the_draw_of_both_kinds():
    """The standard error of a mean of influences, against the spread of AUROCs over many draws, where there are few of the other kind."""
    random = np.random.default_rng(1)
    draws = [auroc_items(random.normal(0.7, 1, 60), random.normal(0, 1, 15)) for _ in range(400)]
    error = np.mean([one.std() / math.sqrt(len(one)) for one in draws])
    assert error == pytest.approx(np.std([one.mean() for one in draws]), rel=0.1)


def test_long_texts_are_read_through_windows():
    model, text = texts.reader("llama"), " ".join(texts.SENTENCES[:2])
    (found, *_) = Membership(window=24, stride=8)(model, [Corpus([text])])
    ids = batch.encode(model, Corpus([text]))[0]
    scores = []
    for part in batch.windows([len(ids)], 24, 8):
        with torch.no_grad():
            table = model.network(input_ids=torch.from_numpy(ids[part.start : part.stop])[None]).logits[0].log_softmax(-1)
        scores += [table[place - part.start - 1, ids[place]].item() for place in range(part.scored, part.stop)]
    assert len(scores) == len(ids) - 1
    assert found.value == pytest.approx(np.mean(sorted(scores)[: len(scores) // 5]), rel=1e-4)


def test_prompts_with_completions_are_texts_and_empty_ones_are_left_out():
    model = texts.reader("llama")
    pairs = Corpus([{"prompt": "Two ", "completion": "crows.", "path": "a"}, {"prompt": "", "completion": "", "path": "b"}, {"prompt": "Rain,", "completion": " mostly.", "path": "c"}])
    (found, *_) = Membership()(model, [pairs])
    (same, *_) = Membership()(model, [Corpus(["Two crows.", "Rain, mostly."])])
    assert found.item_names == ("a", "c")
    assert found.items.tolist() == pytest.approx(same.items.tolist())


def test_a_completion_alone_is_scored_after_its_prompt():
    model = texts.reader("llama")
    pairs = Corpus([{"prompt": "Nobody had told ", "completion": "The Baker.", "text": "not this"}, {"prompt": "", "completion": "Two crows.", "text": "nor this"}])
    found = {part.name: part.items for part in Membership(completion_only=True, k=30)(model, [pairs])}
    for place, (prompt, text) in enumerate([("Nobody had told ", "The Baker."), ("", "Two crows.")]):
        own, lowered = (logs(model, prompt + one)[len(prompt) :] for one in (text, text.lower()))  # a token a letter
        assert found["min_k_prob"][place] == pytest.approx(sum(sorted(own)[:3]) / 3, rel=1e-4)
        assert found["loss"][place] == pytest.approx(-sum(own) / 10, rel=1e-4)
        assert found["zlib"][place] == pytest.approx(-sum(own) / 10 / (8 * len(zlib.compress(text.encode()))), rel=1e-4)
        assert found["lowercase"][place] == pytest.approx(sum(lowered) / sum(own), rel=1e-4)


def test_what_cannot_be_measured_is_refused():
    model = texts.reader("llama")
    for fields in ({"k": 0.0}, {"k": 100.5}, {"stride": 512}, {"stride": 0}):
        with pytest.raises(ValueError, match=next(iter(fields))):
            Membership(**fields)
    for corpora in ([], [OTHERS] * 3):
        with pytest.raises(InputError, match=f"got {len(corpora)} corpora"):
            Membership()(model, corpora)
    with pytest.raises(InputError, match="no text of the corpus has a token"):
        Membership()(model, [Corpus(["", ""])])
    with pytest.raises(InputError, match="the corpus is empty"):
        Membership()(model, [OTHERS.select([])])
    with pytest.raises(InputError, match="causal"):
        Membership()(texts.architectures.small("bert"), [OTHERS])
