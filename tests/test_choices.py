"""Choosing between completions against counting by hand, and calibration against its textbook sums."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from texts import END, reader

from etude.measures.calibration import Calibration, gaps, risks
from etude.measures.multiple_choice import MultipleChoice
from etude.values.corpus import Corpus
from etude.values.errors import InputError

ROWS = [
    {"prompt": f"Q{place}:", "choices": choices, "answer": place % 2}
    for place, choices in enumerate([[" a", " tide"], [" crow", " b", " rain"], [" x", " y"], ["z", " rope goes"], [" é", " e"], [" it", " was"]])
]


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("shots", [0, 2])
def test_the_likeliest_choice_is_that_of_counting_by_hand(name, shots):
    model = reader(name).frozen_now()
    before = model.digest
    header = "".join(f"{row['prompt']}{row['choices'][row['answer']]}\n\n" for row in ROWS[:shots])
    right = {"accuracy": [], "accuracy_per_byte": [], "right_probability": []}
    for row in ROWS[shots:]:
        logs = []
        for choice in row["choices"]:
            prompt, whole = ([END, *model.tokenizer(text)["input_ids"]] for text in (header + row["prompt"], header + row["prompt"] + choice))
            with torch.no_grad():
                said = model.network(torch.tensor([whole])).logits[0].double().log_softmax(-1)
            logs.append(sum(said[place - 1, whole[place]].item() for place in range(len(prompt), len(whole))))
        right["accuracy"].append(np.argmax(logs) == row["answer"])
        right["accuracy_per_byte"].append(np.argmax([log / len(choice.encode()) for log, choice in zip(logs, row["choices"], strict=True)]) == row["answer"])
        right["right_probability"].append(np.exp(logs[row["answer"]]) / np.exp(logs).sum())
    found = MultipleChoice(shots=shots)(model=model, corpus=Corpus(ROWS))
    for measurement in found:
        np.testing.assert_allclose(measurement.items, np.array(right[measurement.name], float), rtol=1e-3)
        assert measurement.item_names == tuple(str(place) for place in range(shots, len(ROWS)))
    assert model.digest == before


@pytest.mark.parametrize("name", ["t5", "bert"])
def test_other_kinds_choose_too(name):
    model = reader(name)
    model.tokenizer.mask_token = model.tokenizer.eos_token
    (accuracy, *_) = MultipleChoice()(model=model.frozen_now(), corpus=Corpus(ROWS))
    assert len(accuracy.items) == len(ROWS)


def test_calibration_has_its_items():
    model = reader("llama").frozen_now()
    found = {one.name: one for one in Calibration()(model=model, corpus=Corpus(ROWS))}
    accuracy = MultipleChoice()(model=model, corpus=Corpus(ROWS))[0]
    assert {"ece", "brier", "selective_risk"} <= set(found)
    assert all(len(one.items) == len(ROWS) for one in found.values())
    assert found["ece"].value >= 0
    right = accuracy.items > 0
    assert 0 < right.sum() < len(right)
    logs = {measurement.name: measurement for measurement in MultipleChoice()(model=model, corpus=Corpus(ROWS))}["right_probability"].items
    assert all(found["brier"].items[right] < 2 * (1 - logs[right]) ** 2 + 1e-9)
    assert 0 <= found["auroc"].value <= 1
    assert np.count_nonzero(found["selective_risk"].items) == np.sum(accuracy.items == 0)


pairs = st.lists(st.tuples(st.sampled_from([0.1, 0.25, 0.4, 0.5, 0.75, 1.0]), st.booleans()), min_size=1, max_size=30)


@given(pairs, st.integers(1, 7))
@settings(max_examples=200, deadline=None)
def test_expected_calibration_error(rows, bins):
    confidence, right = np.array([row[0] for row in rows]), np.array([row[1] for row in rows], float)
    total = 0.0
    for place in range(bins):
        inside = (confidence > place / bins) & (confidence <= (place + 1) / bins)
        if inside.any():
            total += inside.mean() * abs(confidence[inside].mean() - right[inside].mean())
    assert gaps(confidence, right, bins).mean() == pytest.approx(total, abs=1e-12)


@given(pairs)
@settings(max_examples=200, deadline=None)
def test_selective_risk_is_the_mean_of_risks_over_coverages(rows):
    confidence, right = np.array([row[0] + place * 1e-6 for place, row in enumerate(rows)]), np.array([row[1] for row in rows], float)
    order = np.argsort(-confidence)
    errors = 1 - right[order]
    assert risks(confidence, right).mean() == pytest.approx(np.mean([errors[: count + 1].mean() for count in range(len(rows))]))


def test_ties_in_confidence_share_their_places():
    assert risks(np.array([0.5, 0.5]), np.array([1.0, 0.0])).mean() == pytest.approx((1 / 2 + 0 / 1 + 1 / 2 + 1 / 1) / 4)


@pytest.mark.parametrize("row", [{"choices": [" a"], "answer": 0}, {"choices": [" a", " b"], "answer": 2}, {"choices": [" a", ""], "answer": 0}])
def test_a_question_that_is_none_is_refused(row):
    with pytest.raises(InputError, match="record 6 needs"):
        MultipleChoice()(model=reader("llama").frozen_now(), corpus=Corpus([*ROWS, {"prompt": "Q", **row}]))
    with pytest.raises(InputError, match="nothing to ask"):
        MultipleChoice(shots=6)(model=reader("llama").frozen_now(), corpus=Corpus(ROWS))
