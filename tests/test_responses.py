"""Answers of models and of their variants, against the measure of multiple choice and against weights changed by hand; and the bank of questions."""

from __future__ import annotations

import keyword

import numpy as np
import pytest
import texts
import torch

from etude.engine.responses import tables
from etude.measures.multiple_choice import MultipleChoice
from etude.methods.evaluate.responses import Responses
from etude.methods.evaluate.variants import Variants, prune, variant
from etude.values import checkpoint
from etude.values.corpus import Corpus
from etude.values.errors import InputError
from etude.worlds.exam import SKILLS, Exam
from etude.worlds.people import CHOICES

BANK = Corpus(
    [
        {"prompt": sentence[:8], "choices": [sentence[8:14], sentence[14:20], " no"], "answer": place % 3, "skill": "ab"[place % 2]}
        for place, sentence in enumerate(texts.SENTENCES)
        if len(sentence) > 20
    ]
)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_answers_are_those_of_multiple_choice(name):
    models = [texts.reader(name), texts.reader(name, blocks=1)]
    if name == "bert":
        for model in models:
            model.tokenizer.mask_token = model.tokenizer.eos_token
    before = [model.digest for model in models], BANK.digest
    found = Responses()(models, BANK)
    assert ([model.digest for model in models], BANK.digest) == before
    for place, model in enumerate(models):
        expected = MultipleChoice()(model, BANK)[0].items
        assert [record["correct"] for record in found if record["model"] == str(place)] == expected.tolist()
    assert found.column("item") == [str(item) for item in range(len(BANK))] * 2
    assert {skill: table.right.shape for skill, table in tables(found).items()} == {"a": (2, BANK.column("skill").count("a")), "b": (2, BANK.column("skill").count("b"))}


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_variants_are_mixed_and_pruned_by_their_numbers(name):
    base, other = texts.reader(name), texts.reader(name).copy()
    with torch.no_grad():
        for weight in other.network.parameters():
            weight += 0.01
    before = base.digest, other.digest
    layers = [list(base.anatomy.linears(block)) for block in base.anatomy.blocks]
    own = [0.2, 0.0, 0.6]
    made = variant(base, [other], layers, np.array([0.5, 0.4, *own]))
    assert (base.digest, other.digest) == before
    expected = {key: weight + 0.5 * 0.01 for key, weight in base.network.named_parameters()}
    for paths, sparsity in zip(layers, own, strict=True):
        for path in paths:
            weight = expected[f"{path}.weight"].detach().clone()
            count = round((0.75 * 0.4 + 0.25 * sparsity) * weight.numel())
            weight.flatten()[weight.abs().flatten().argsort()[:count]] = 0
            expected[f"{path}.weight"] = weight
    for key, weight in made.network.named_parameters():
        assert torch.allclose(weight, expected[key], atol=1e-6), key
    assert sum((weight == 0).sum().item() for weight in made.network.parameters()) > 1000


def test_a_variant_keeps_its_number_and_none_is_the_model_itself_twice():
    model = texts.reader("llama")
    many, few = Variants(variants=6)([model], BANK), Variants(variants=2, first=4)([model], BANK)
    assert [record for record in many if record["model"] in ("4", "5")] == list(few)
    points = Variants(variants=200, first=56)._points(2, 3)
    assert points.shape == (200, 6)
    assert (points[:, :2].max(), points[:, 2:].max(), points[:, 2:].min()) == (pytest.approx(1, abs=0.01), pytest.approx(1, abs=0.01), pytest.approx(0.5, abs=0.01))
    assert len(np.unique(points, axis=0)) == 200
    assert (points == Variants(variants=300)._points(2, 3)[56:256]).all()
    whole = Variants(variants=1, sparsity=(0.0, 1.0))  # number 0 is the point 0: the first model
    assert whole([model], BANK).column("correct") == Responses()([model], BANK).column("correct")
    weight = torch.tensor([[3.0, -1.0], [0.5, -2.0]])
    prune(weight, 0.5)
    assert weight.tolist() == [[3.0, 0.0], [0.0, -2.0]]


def test_what_cannot_be_asked_is_refused():
    model = texts.reader("llama")
    for fields in ({"variants": 0}, {"first": -1}, {"first": 9000}, {"sparsity": (0.2, 1.1)}, {"sparsity": (0.5, 0.4)}, {"mixture": -0.1}):
        with pytest.raises(ValueError, match="variants" if "first" in fields else next(iter(fields))):
            Variants(**fields)
    with pytest.raises(InputError, match="model 2 of 2 has other parameters"):
        Variants(variants=1)([model, texts.reader("llama", blocks=2)], BANK)
    for method in (Responses(), Variants(variants=1)):
        with pytest.raises(InputError, match="record 0 needs a list of two choices"):
            method([model], BANK.with_column("answer", [7] * len(BANK)))
        with pytest.raises(InputError, match="the bank of questions is empty"):
            method([model], BANK.select([]))
        with pytest.raises(InputError, match="no column 'prompt'"):
            method([model], Corpus(["a"]))
    assert checkpoint.digest_state(model.network) == checkpoint.digest_state(texts.reader("llama").network)


def test_an_exam_has_questions_on_every_skill():
    exam = Exam(skills=(*SKILLS, "prose"), items=12, seed=3)()
    assert exam == Exam(skills=(*SKILLS, "prose"), items=12, seed=3)()
    assert exam != Exam(skills=(*SKILLS, "prose"), items=12, seed=4)()
    assert exam.column("skill") == [skill for skill in (*SKILLS, "prose_2") for _ in range(12)]
    for record in exam:
        assert len(set(record["choices"])) == 4, record
        assert 0 <= record["answer"] < 4
        assert record["prompt"]
        right = record["choices"][record["answer"]]
        if record["skill"] == "keyword":
            assert all(keyword.iskeyword(choice.strip()) for choice in record["choices"])
        if record["skill"] == "largest":
            numbers = record["prompt"].split(": ")[1].split("\n")[0].split(", ")
            assert right == max(numbers, key=int) + "\n"
        if record["skill"] in CHOICES:
            assert {choice[1:] for choice in record["choices"]} <= set(CHOICES[record["skill"]])
    prompts = [record["prompt"] for record in exam if record["skill"].startswith("prose")]
    assert len(set(prompts)) == 24, "the second time the questions are others"
    places = [record["answer"] for record in Exam(skills=("sign",), items=200)()]
    assert np.bincount(places).min() > 30


def test_an_exam_that_cannot_be_held_is_refused():
    for fields in ({"skills": ()}, {"skills": ("proze",)}, {"items": 0}, {"choices": 1}, {"choices": 9}, {"context": 3}, {"seed": -1}):
        with pytest.raises(ValueError, match=next(iter(fields))):
            Exam(**fields)
