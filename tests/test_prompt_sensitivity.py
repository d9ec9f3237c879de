"""Sensitivity and consistency against sums over all pairs, and prompts asked one at a time."""

from __future__ import annotations

import itertools
import math
from collections import Counter

import numpy as np
import pytest
import texts
import torch
from scipy.stats import spearmanr

from etude.engine.wording import check, fill
from etude.measures import prompt_sensitivity
from etude.measures.prompt_sensitivity import FRAMES, PromptSensitivity, consistencies, entropies
from etude.values.corpus import Corpus
from etude.values.errors import InputError
from etude.values.measurement import HIGHER, LOWER

TEMPLATES = ("{text} Kind:", "Kind of {text}?", "What is {text}\n", "{text}")
CHOICES = [" a", " tide", " b"]
ROWS = Corpus([{"text": text, "choices": CHOICES, "answer": place % 3} for place, text in enumerate(["rain", "two crows", "A clock", "the mill", "snow", "the baker", "a rope"])])


def likeliest(model, prompt, choices):
    """The choice of the highest log-probability after the prompt, one text at a time."""
    logs = []
    for choice in choices:
        before, whole = ([texts.END, *model.tokenizer(text)["input_ids"]] for text in (prompt, prompt + choice))
        with torch.no_grad():
            said = model.network(torch.tensor([whole])).logits[0].double().log_softmax(-1)
        logs.append(sum(said[place - 1, whole[place]].item() for place in range(len(before), len(whole))))
    return int(np.argmax(logs))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_every_part_is_as_by_hand(name):
    model = texts.reader(name).frozen_now()
    before = (model.digest, ROWS.digest)
    found = {part.name: part for part in PromptSensitivity(templates=TEMPLATES)(model, ROWS)}
    assert (model.digest, ROWS.digest) == before
    predicted = [[likeliest(model, fill(template, row), CHOICES) for template in TEMPLATES] for row in ROWS]
    assert len({tuple(one) for one in predicted}) > 1
    counts = [Counter(one) for one in predicted]
    right = [row["answer"] for row in ROWS]
    entropy = [-sum(n / 4 * math.log(n / 4) for n in one.values()) / math.log(3) for one in counts]
    assert found["sensitivity"].items.tolist() == pytest.approx(entropy)
    assert found["accuracy"].items.tolist() == [one[answer] / 4 for one, answer in zip(counts, right, strict=True)]
    assert found["first_accuracy"].items.tolist() == [float(one[0] == answer) for one, answer in zip(predicted, right, strict=True)]
    by_question = []
    for one in range(7):
        others = [other for other in range(7) if other != one and right[other] == right[one]]
        by_question.append(np.mean([1 - sum(abs(counts[one][label] - counts[other][label]) for label in range(3)) / 8 for other in others]))
    assert found["consistency"].value == pytest.approx(np.mean(by_question))
    assert found["sensitivity"].item_names[:3] == ("0 (a)", "1 (tide)", "2 (b)")
    assert {part.item_names for part in found.values()} == {found["sensitivity"].item_names}
    assert (found["sensitivity"].better, found["consistency"].better) == (LOWER, HIGHER)


@pytest.mark.parametrize("name", ["bert", "t5"])
def test_other_kinds_are_asked_too(name):
    model = texts.reader(name)
    model.tokenizer.mask_token = model.tokenizer.eos_token
    (sensitivity, *_) = PromptSensitivity(templates=TEMPLATES)(model.frozen_now(), ROWS)
    assert len(sensitivity.items) == len(ROWS)
    assert 0 <= sensitivity.items.min() <= sensitivity.items.max() <= 1


def test_the_ends_of_the_scales():
    assert entropies(np.array([[1.0, 0, 0], [1 / 3, 1 / 3, 1 / 3], [0.5, 0.5, 0]])).tolist() == pytest.approx([0, 1, math.log(2) / math.log(3)])
    same, opposite = np.array([[1.0, 0], [1.0, 0]]), np.array([[1.0, 0], [0, 1.0]])
    assert consistencies(same, np.zeros(2))[0].tolist() == [1, 1]
    assert consistencies(opposite, np.zeros(2))[0].tolist() == [0, 0]
    assert consistencies(opposite, np.array([0, 1]))[0].size == 0, "they are of different classes"


def test_consistency_is_the_mean_over_pairs_and_its_spread_that_of_the_mean():
    random = np.random.default_rng(0)

    def draw(count):
        shares = random.dirichlet([1, 0.5, 0.5], count)
        items, kept = consistencies(shares, np.zeros(count))
        pairs = [1 - np.abs(one - other).sum() / 2 for one, other in itertools.combinations(shares, 2)]
        assert items.mean() == pytest.approx(np.mean(pairs))
        assert len(kept) == count
        return items

    draws = [draw(40) for _ in range(400)]
    error = np.mean([one.std() / math.sqrt(len(one)) for one in draws])
    assert error == pytest.approx(np.std([one.mean() for one in draws]), rel=0.15)


def test_questions_without_a_partner_are_left_out_of_consistency_alone(monkeypatch):
    monkeypatch.setattr(prompt_sensitivity, "predictions", lambda model, questions: [np.array([0, 1]), np.array([1, 1]), np.array([0, 1])][: len(questions)])
    rows = Corpus([{"text": "x", "choices": [" a", " b"], "answer": answer} for answer in (0, 1, 0)])
    found = {part.name: part for part in PromptSensitivity(templates=TEMPLATES[:2])(texts.reader("llama"), rows)}
    assert found["sensitivity"].items.tolist() == [1, 0, 1]
    assert found["accuracy"].items.tolist() == [0.5, 1, 0.5]
    assert found["consistency"].items.tolist() == [1, 1]
    assert found["consistency"].item_names == ("0 (a)", "2 (a)")
    assert found["accuracy_correlation"].value == pytest.approx(spearmanr([1, 0, 1], [0.5, 1, 0.5]).statistic)
    assert "consistency" not in {part.name for part in PromptSensitivity(templates=TEMPLATES[:2], records=2)(texts.reader("llama"), rows)}


def test_records_may_be_the_rewordings():
    model = texts.reader("llama").frozen_now()
    spread = Corpus([{"prompt": fill(template, row), "choices": CHOICES, "answer": row["answer"], "which": f"q{place}"} for template in TEMPLATES for place, row in enumerate(ROWS)])
    (by_record, *_), (by_template, *_) = (PromptSensitivity(group="which")(model, spread), PromptSensitivity(templates=TEMPLATES)(model, ROWS))
    assert by_record.items.tolist() == by_template.items.tolist()
    assert by_record.item_names[0] == "q0 (a)"
    (few, *_) = PromptSensitivity(group="which", records=3)(model, spread)
    assert few.items.tolist() == by_record.items[:3].tolist()
    both = PromptSensitivity(group="which", templates=("{prompt}", "{prompt}!")).questions(spread)
    assert [len(question.asked) for question in both] == [8] * 7


def test_prompts_are_framed_where_nothing_else_is_known():
    rows = Corpus([{"prompt": "Which?", "choices": choices, "answer": 0} for choices in ([" x", " y"], [" z", " y"])])
    first, second = PromptSensitivity().questions(rows)
    assert [prompt for prompt, _ in first.asked] == [frame.replace("{prompt}", "Which?") for frame in FRAMES]
    assert (first.name, second.name) == ("0", "1"), "their classes have no common names"


def test_templates_take_columns_and_leave_other_braces():
    assert fill("{a}: {b} {} {c d} {a}", {"a": 1, "b": "{a}"}) == "1: {a} {} {c d} 1"
    with pytest.raises(InputError, match=r"no column 'txt'.*\n.*'text'"):
        fill("{txt}", {"text": "x"})
    with pytest.raises(ValueError, match="names a column"):
        check(["{a}", "plain"])


def test_what_cannot_be_measured_is_refused():
    for fields, message in (
        ({"templates": ("{text}",)}, "two wordings"),
        ({"templates": ("{text}", "text")}, "names a column"),
        ({"templates": ("{text}", "{text}")}, "twice"),
        ({"records": 0}, "records"),
    ):
        with pytest.raises(ValueError, match=message):
            PromptSensitivity(**fields)
    model, method = texts.reader("llama"), PromptSensitivity(templates=TEMPLATES)
    good = {"text": "x", "choices": [" a", " b"], "answer": 0}
    for rows, message in (
        ([], "no column"),
        ([{"text": "x", "answer": 0}], "no column 'choices'"),
        ([{**good, "answer": 2}], "place of the right one"),
        ([{**good, "choices": [" a"]}], "two choices or more"),
        ([good, {**good, "choices": [" a", " b", " c"]}], "record 1 has 3 choices and record 0 has 2"),
    ):
        with pytest.raises(InputError, match=message):
            method(model, Corpus(rows))
    with pytest.raises(InputError, match="no column 'text'"):
        method(model, Corpus([{"choices": [" a", " b"], "answer": 0}]))
    grouped = [{"prompt": "x", "which": "q", "choices": [" a", " b"], "answer": answer} for answer in (0, 1)]
    with pytest.raises(InputError, match="record 1 rewords question q"):
        PromptSensitivity(group="which")(model, Corpus(grouped))
    with pytest.raises(InputError, match="question q has one wording"):
        PromptSensitivity(group="which")(model, Corpus(grouped[:1]))
