"""Scores of uncertainty against the authors' formulas written out token by token, and AUROC against a count of pairs."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import pytest
import texts
import torch

from etude.engine import hidden
from etude.engine.generate import generate
from etude.measures import uncertainty
from etude.measures.uncertainty import SCORES, Said, Uncertainty, clustered, over_clusters, relevant, shared
from etude.values.corpus import Corpus
from etude.values.errors import InputError
from etude.values.generator import Generator, Policy

ASKED = Corpus([
    {"prompt": prompt, "completion": "x", "answer": answer, "plain": prompt.upper()}
    for prompt, answer in (("Two ", "o"), ("Rain", "e"), ("The road", "a"), ("A clock", "i"), ("Nobody", "t"))
])  # fmt: skip


class Answer(NamedTuple):
    text: str
    logs: list[float]
    without: list[str]


def log_probabilities(model, prompt, ids):
    """Of the tokens after the prompt, in one forward pass over one text."""
    before = [texts.END, *model.tokenizer(prompt)["input_ids"]]
    with torch.no_grad():
        table = model.network(torch.tensor([[*before, *ids]])).logits[0].double().log_softmax(-1)
    return [table[len(before) - 1 + place, token].item() for place, token in enumerate(ids)]


def by_hand(encoder, question, answers, t):
    """Every score as the paper has it; answers are without probabilities so small that they vanish."""

    def similarity(one, other):
        a, b = (hidden.states(encoder, [f"{question} {text}".strip()], layers=[-1])[0, 0].astype(np.float64) for text in (one, other))
        return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))

    total = [-sum(answer.logs) for answer in answers]
    mean = [one / len(answer.logs) for one, answer in zip(total, answers, strict=True)]
    weighted = []
    for answer in answers:
        relevance = [1 - abs(similarity(answer.text, short)) for short in answer.without]
        weighted.append(-sum(weight * log for weight, log in zip(relevance, answer.logs, strict=True)) / sum(relevance))

    def raised(nats):
        found = []
        for one, answer in enumerate(answers):
            others = sum(max(0, similarity(answer.text, other.text)) * math.exp(-nats[place]) for place, other in enumerate(answers) if place != one)
            found.append(-math.log(math.exp(-nats[one]) + others / t))
        return sum(found) / len(found)

    clusters = {}
    for answer, one in zip(answers, mean, strict=True):
        clusters[answer.text] = clusters.get(answer.text, 0) + math.exp(-one)
    semantic = sum(-math.log(one) for one in clusters.values()) / len(clusters)
    return {
        "sar": raised(weighted), "token_sar": np.mean(weighted), "sentence_sar": raised(total),
        "length_normalised_entropy": np.mean(mean), "predictive_entropy": np.mean(total), "semantic_entropy": semantic,
    }  # fmt: skip


@pytest.mark.parametrize(("name", "reading"), [("llama", "bert"), ("gpt2", "llama")])
def test_every_score_is_as_by_hand(name, reading):
    model, encoder = texts.reader(name).frozen_now(), texts.reader(reading).frozen_now()
    before = (model.digest, encoder.digest, ASKED.digest)
    method = Uncertainty(samples=4, new=6, temperature=0.3, t=0.01, key="answer", seed=2)
    found = {part.name: part for part in method(model, ASKED, encoder)}
    assert (model.digest, encoder.digest, ASKED.digest) == before
    greedy = generate(Generator(model, Policy(max_new_tokens=6)), ASKED.column("prompt"))
    right = [answer in text.lower() for answer, text in zip(ASKED.column("answer"), greedy, strict=True)]
    assert found["accuracy"].items.tolist() == [float(one) for one in right]
    drawn = method._sampled(model, ASKED.column("prompt"))
    said = generate(Generator(model, Policy(temperature=0.3, max_new_tokens=6)), [prompt for prompt in ASKED.column("prompt") for _ in range(4)], 2)
    assert [one.text for several in drawn for one in several] == [text.strip() for text in said]
    for place, (prompt, several) in enumerate(zip(ASKED.column("prompt"), drawn, strict=True)):
        answers = []
        for one in several:
            ids = next(ids for ids in _tokens(method, model, prompt) if method._text(model, ids) == one.text)
            assert one.logs.tolist() == pytest.approx(log_probabilities(model, prompt, ids), rel=1e-3, abs=1e-4)
            decode = model.tokenizer.decode
            answers.append(Answer(one.text, one.logs.tolist(), [decode([*ids[:at], *ids[at + 1 :]]).strip() for at in range(len(ids))]))
        for score, value in by_hand(encoder, prompt, answers, 0.01).items():
            assert found[score].items[place] == pytest.approx(value, rel=1e-3, abs=1e-3), score
    assert list(found)[1:7] == list(SCORES)


def _tokens(method, model, prompt):
    """The four answers as token ids."""
    from etude.values.digest import digest

    return method._complete(model, [prompt] * 4, 0.3, [int(digest(2, prompt, number)[:7], 16) for number in range(4)])


def test_auroc_is_the_share_of_pairs_in_which_the_wrong_question_is_less_certain(monkeypatch):
    random = np.random.default_rng(0)
    right, scores = random.integers(0, 2, 30).astype(bool), random.integers(0, 9, (30, 6)).astype(float)
    asked = Corpus([{"prompt": str(place), "completion": "x"} for place in range(30)])
    monkeypatch.setattr(Uncertainty, "_right", lambda self, *rest: right)
    monkeypatch.setattr(Uncertainty, "_sampled", lambda self, *rest: [])
    monkeypatch.setattr(Uncertainty, "_scores", lambda self, *rest: [tuple(row) for row in scores])
    model = texts.reader("llama")
    found = {part.name: part for part in Uncertainty()(model, asked, model)}
    for place, name in enumerate(SCORES):
        pairs = [(wrong, sure) for wrong in scores[~right, place] for sure in scores[right, place]]
        assert found[f"auroc_{name}"].value == pytest.approx(sum((wrong > sure) + (wrong == sure) / 2 for wrong, sure in pairs) / len(pairs))
        assert found[f"auroc_{name}"].item_names == found["accuracy"].item_names
        assert found[name].items.tolist() == scores[:, place].tolist()
    monkeypatch.setattr(Uncertainty, "_right", lambda self, *rest: np.ones(30, bool))
    assert not any(part.name.startswith("auroc") for part in Uncertainty()(model, asked, model))


def test_weights_shift_to_relevant_tokens_and_answers():
    logs = np.log(np.array([0.5, 0.1]))
    assert relevant(logs, np.array([1.0, 3.0])) == pytest.approx(-(0.25 * math.log(0.5) + 0.75 * math.log(0.1)))
    assert relevant(logs, np.zeros(2)) == pytest.approx(-logs.mean())
    assert relevant(np.zeros(0), np.zeros(0)) == 0
    nats = np.array([1.0, 2.0, 800.0])
    alone = shared(nats, np.eye(3), 0.001)
    assert alone.tolist() == pytest.approx(nats.tolist())
    similarity = np.array([[1, 0.5, 0], [0.5, 1, -0.4], [0, -0.4, 1]])
    assert shared(nats, similarity, 0.1)[:2].tolist() == pytest.approx([-math.log(math.exp(-1) + 5 * math.exp(-2)), -math.log(math.exp(-2) + 5 * math.exp(-1))])
    assert similarity[0, 0] == 1, "the similarities were changed"
    assert shared(np.array([1.0]), np.ones((1, 1)), 0.001).tolist() == pytest.approx([1.0])


def test_answers_that_no_exponential_holds_keep_their_order():
    nats = np.array([900.0, 905.0])
    assert shared(nats, np.eye(2), 1.0).tolist() == pytest.approx([900, 905])


def test_clusters():
    similarity = np.array([[1, 0.95, 0.2, 0.9], [0.95, 1, 0.3, 0.1], [0.2, 0.3, 1, 0.4], [0.9, 0.1, 0.4, 1]])
    assert clustered(["a", "b", "c", "a"], similarity, 1.0).tolist() == [0, 1, 2, 0]
    assert clustered(["a", "b", "c", "d"], similarity, 0.9).tolist() == [0, 0, 1, 0], "by the first of a cluster"
    assert over_clusters(np.log([2, 4, 4]), np.array([0, 0, 1])) == pytest.approx(-(math.log(3 / 4) + math.log(1 / 4)) / 2)


def test_an_answer_ends_before_its_stop_string(monkeypatch):
    model = texts.reader("llama")
    method = Uncertainty(stop=("\n", "!!"), new=9)

    def ids(text):
        return model.tokenizer(text, add_special_tokens=False)["input_ids"]

    monkeypatch.setattr(uncertainty, "complete", lambda *rest: [ids("yes.\n"), ids("no!!"), ids("perhaps"), ids("\n"), []])
    found = method._complete(model, list("abcde"), 0.0, [0] * 5)
    assert [model.tokenizer.decode(one) for one in found] == ["yes.", "no", "perhaps", "", ""]


def test_answers_without_tokens_are_certain():
    encoder = texts.reader("bert")
    silent = Said("", np.zeros(0), ())
    scores = Uncertainty()._scores(encoder, ["Why?", ""], [[silent, silent], [silent, Said("a", np.array([-1.0]), ("",))]])
    assert dict(zip(SCORES, scores[0], strict=True))["predictive_entropy"] == 0
    assert np.isfinite(scores).all()


def test_similarities_may_leave_examples_aside():
    model, encoder = texts.reader("llama"), texts.reader("bert")
    by_prompt, by_question = ({part.name: part.items for part in Uncertainty(samples=2, new=3, question=column)(model, ASKED, encoder)} for column in ("prompt", "plain"))
    assert by_prompt["token_sar"].tolist() != by_question["token_sar"].tolist()
    assert by_prompt["predictive_entropy"].tolist() == by_question["predictive_entropy"].tolist()


def test_what_cannot_be_measured_is_refused():
    for fields in ({"samples": 1}, {"new": 0}, {"temperature": 0.0}, {"t": 0.0}, {"alike": 1.1}, {"records": 0}, {"stop": ("",)}):
        with pytest.raises(ValueError, match=next(iter(fields))):
            Uncertainty(**fields)
    model = texts.reader("llama")
    with pytest.raises(InputError, match="empty"):
        Uncertainty()(model, ASKED.select([]), model)
    with pytest.raises(InputError, match="no column 'key'"):
        Uncertainty(key="key")(model, ASKED, model)
    with pytest.raises(InputError, match="causal"):
        Uncertainty()(texts.reader("bert"), ASKED, model)
