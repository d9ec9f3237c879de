"""The audit of adapted models against questions asked one by one, and its bootstrap against drawing indices."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from texts import END, reader

from etude.measures.head_to_head import FORMATS, VERDICTS, HeadToHead, Result, bootstrap
from etude.values.corpus import Corpus
from etude.values.errors import InputError

FEW = ("{prompt}", "Q {prompt}\nA", "{prompt} is", "so {prompt}?")
WORDS = ["tide", "crow", "rope", "mill", "snow", "road", "May", "rain"]


def exam(count: int, seed: int, marked: int | None = None) -> Corpus:
    """Questions whose right choice is drawn, or always the word of this place."""
    random, rows = np.random.default_rng(seed), []
    for place in range(count):
        first, second = random.permutation(len(WORDS))[:2] if marked is None else (marked, (marked + 1 + place % 7) % 8)
        answer, choices = int(random.integers(2)), [f" {WORDS[first]}", f" {WORDS[second]}"]
        rows.append({"prompt": f"{WORDS[random.integers(8)]}{place}", "choices": choices if answer == 0 else choices[::-1], "answer": answer})
    return Corpus(rows)


def right(model, row, template, shown, rows):
    """Whether one question is answered rightly, its text scored alone."""
    header = "".join(f"{template.replace('{prompt}', rows[one]['prompt'])}{rows[one]['choices'][rows[one]['answer']]}\n\n" for one in shown)
    logs = []
    for choice in row["choices"]:
        before = header + template.replace("{prompt}", row["prompt"])
        prompt, whole = ([END, *model.tokenizer(text)["input_ids"]] for text in (before, before + choice))
        with torch.no_grad():
            said = model.network(torch.tensor([whole])).logits[0].double().log_softmax(-1)
        logs.append(sum(said[place - 1, whole[place]].item() for place in range(len(prompt), len(whole))))
    return float(np.argmax(logs) == row["answer"])


def named(found):
    """Measurements of each model, by name."""
    each = next((place for place in range(1, len(found)) if found[place].name == found[0].name), len(found))
    return [{one.name: one for one in found[begin : begin + each]} for begin in range(0, len(found), each)]


@pytest.mark.parametrize("shots", [0, 1])
def test_every_model_is_given_the_prompt_that_suits_it_and_the_base_also_the_others(shots):
    models = [reader("llama").frozen_now(), reader("gpt2").frozen_now()]
    corpora = [exam(24, 1), exam(18, 2)]
    before = [*(model.digest for model in models), *(corpus.digest for corpus in corpora)]
    method = HeadToHead(formats=FEW, shots=shots, draws=2, validation=0.5, resamples=200)
    base, adapted = named(method(models, corpora, seed=5))
    assert [*(model.digest for model in models), *(corpus.digest for corpus in corpora)] == before
    expected: dict[str, list[float]] = {"accuracy": [], "difference": [], "naive_difference": [], "base": []}
    choices = []
    for place, corpus in enumerate(corpora):
        rows = list(corpus)
        split = method._split(len(rows), np.random.default_rng([5, place, 1]), place)
        used = [*split.test, *split.validation, *(one for draw in split.draws for one in draw)]
        assert sorted(used) == list(range(len(rows))), "a record is for two things, or for nothing"
        assert len(split.test) == len(rows) // 2
        pool = [(template, shown) for template in FEW for shown in split.draws]
        values = [[np.mean([right(model, rows[one], *way, rows) for one in split.validation]) for way in pool] for model in models]
        mine = [pool[value.index(max(value))] for value in values]
        choices.append(mine)
        own = [[right(model, rows[one], *way, rows) for one in split.test] for model, way in zip(models, mine, strict=True)]
        shared = [right(models[0], rows[one], *mine[1], rows) for one in split.test]
        expected["accuracy"] += own[1]
        expected["base"] += own[0]
        expected["difference"] += np.subtract(own[1], own[0]).tolist()
        expected["naive_difference"] += np.subtract(own[1], shared).tolist()
    for name in ("accuracy", "difference", "naive_difference"):
        assert adapted[name].items.tolist() == expected[name], name
    assert base["accuracy"].items.tolist() == expected["base"]
    assert adapted["same_prompt"].items.tolist() == [float(one == other) for one, other in choices]
    assert {one != other for one, other in choices} != {False}, "every model chose the same, so that nothing was tested"
    assert not base["difference"].items.any()
    assert base["tie"].items.tolist() == [1.0, 1.0]
    assert base["accuracy"].item_names == adapted["accuracy"].item_names
    assert base["win_rate"].items.tolist() == adapted["win_rate"].items.tolist() == adapted["win"].items.tolist()
    assert adapted["naive_win_rate"].item_names == ("model 1, task 1", "model 1, task 2")


def test_the_test_is_the_same_for_every_seed_and_examples_are_not():
    method = HeadToHead(shots=2, draws=2)
    splits = [method._split(40, np.random.default_rng(seed), 0) for seed in range(4)]
    assert all((one.test == splits[0].test).all() for one in splits)
    assert len({one.draws[0] for one in splits}) > 1


def test_a_model_beside_itself_ties_everywhere():
    model = reader("llama").frozen_now()
    _, same = named(HeadToHead(formats=FEW, resamples=50)([model, model], [exam(20, 3)], seed=0))
    assert (same["tie"].value, same["win"].value, same["loss"].value, same["naive_win"].value, same["same_prompt"].value) == (1, 0, 0, 0, 1)
    assert (same["low"].value, same["high"].value) == (0, 0)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_model_that_was_taught_the_answers_wins_and_the_untaught_one_loses(name):
    from etude.engine.budget import Budget
    from etude.methods.adapt.instruction_tuning import InstructionTuning

    corpus, base = exam(80, 4, marked=1), reader(name).frozen_now()
    taught = InstructionTuning(learning_rate=3e-3, batch_tokens=256, length=48)(
        base, Corpus([{"prompt": row["prompt"], "completion": row["choices"][row["answer"]]} for row in exam(80, 5, marked=1)]), Budget(30, "steps"), seed=0
    )
    _, other = named(HeadToHead(formats=FEW[:2], resamples=500)([base, taught], [corpus], seed=0))
    wins = {verdict: other[verdict].value for verdict in VERDICTS}
    back = named(HeadToHead(formats=FEW[:2], resamples=500)([taught, base], [corpus], seed=0))[1]
    assert other["accuracy"].value > 0.9, "nothing was learned, so that nothing was tested"
    assert other["difference"].value > 0.15
    assert wins["win"] == wins["naive_win"] == wins["pointwise_win"] == 1
    assert back["loss"].value == 1
    assert other["low"].value <= other["difference"].value <= other["high"].value


def test_the_bootstrap_is_that_of_drawing_questions():
    random = np.random.default_rng(0)
    items = random.choice([-1.0, 0.0, 1.0], 90, p=[0.1, 0.6, 0.3])
    means = items[random.integers(len(items), size=(20_000, len(items)))].mean(1)
    found = bootstrap(items, 20_000, 0.9, np.random.default_rng(1))
    assert found == pytest.approx(np.quantile(means, [0.05, 0.95]), abs=1.01 / 90)
    error = items.std() / np.sqrt(len(items))
    assert found == pytest.approx([items.mean() - 1.645 * error, items.mean() + 1.645 * error], abs=0.02)
    assert bootstrap(np.zeros(7), 10, 0.95, random) == (0, 0)


def test_verdicts_follow_the_interval_and_the_naive_ones_do_not():
    own, worse = np.repeat([1.0, 0.0], [53, 47]), np.repeat([1.0, 0.0], [50, 50])
    near = Result(own, worse, worse, True, (-0.01, 0.07), (-0.01, 0.07)).verdicts()
    assert (near["win"], near["tie"], near["loss"], near["naive_win"], near["pointwise_win"], near["shared_win"]) == (False, True, False, True, True, False)
    clear = Result(own, worse, own, False, (0.01, 0.07), (0.0, 0.0)).verdicts()
    assert (clear["win"], clear["tie"], clear["naive_win"], clear["naive_loss"], clear["shared_win"]) == (True, False, False, False, False)
    lost = Result(worse, own, own, True, (-0.07, -0.01), (-0.07, -0.01)).verdicts()
    assert (lost["loss"], lost["tie"], lost["naive_loss"], lost["naive_win"]) == (True, False, True, False)


def test_masked_models_choose_too_and_a_base_alone_has_no_rates():
    model = reader("bert")
    model.tokenizer.mask_token = model.tokenizer.eos_token
    (alone,) = named(HeadToHead(formats=("{prompt}",), resamples=10)([model.frozen_now()], [exam(8, 6)], seed=0))
    assert len(alone["accuracy"].items) == 4
    assert not any(name.endswith("rate") for name in alone)


def test_what_cannot_be_compared_is_refused():
    assert len(set(FORMATS)) == 11
    wrong = ({"formats": ()}, {"shots": -1}, {"draws": 0}, {"validation": 1.0}, {"validation": 0.0}, {"level": 1.0}, {"resamples": 0}, {"records": 1})
    for fields in wrong:
        with pytest.raises(ValueError, match=next(iter(fields)).rstrip("s")):
            HeadToHead(**fields)
    with pytest.raises(ValueError, match="names a column in braces"):
        HeadToHead(formats=("no column",))
    model = reader("llama").frozen_now()
    with pytest.raises(InputError, match="got 1 and 0"):
        HeadToHead()([model], [], seed=0)
    with pytest.raises(InputError, match="has no column 'choices'"):
        HeadToHead()([model], [Corpus([{"prompt": "a", "answer": 0}])], seed=0)
    with pytest.raises(InputError, match="record 1 of task 2 needs a list of two choices"):
        HeadToHead()([model], [exam(4, 0), Corpus([*exam(1, 0), {"prompt": "a", "choices": [" b", " c"], "answer": 2}])], seed=0)
    with pytest.raises(InputError, match="task 1 has 20 records, 10 of them for validation: too few for 5 draws of 2 examples"):
        HeadToHead(shots=2, draws=5)([model], [exam(20, 0)], seed=0)
    with pytest.raises(InputError, match="has no column 'question'"):
        HeadToHead(formats=("{question}", "{prompt}"))([model], [exam(8, 0)], seed=0)
