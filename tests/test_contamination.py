"""Peakedness, the corrected score and their AUROC against the same by recursion and by hand."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import texts

from etude.engine.generate import generate
from etude.measures import contamination
from etude.measures.contamination import Answers, Contamination, edit_distance
from etude.measures.membership import Membership
from etude.values.corpus import Corpus
from etude.values.errors import InputError
from etude.values.generator import Generator, Policy

ASKED = Corpus([{"prompt": "Two ", "completion": "crows"}, {"prompt": "Rain", "completion": ", mostly"}, {"prompt": "The road", "completion": " with it"}])
OTHERS = Corpus([{"prompt": "Nobody", "completion": "?"}, {"prompt": "A clock", "completion": "!"}])


def distance(one, other):
    """Levenshtein's recursion as it is written."""

    @functools.cache
    def edits(i, j):
        if not i or not j:
            return i + j
        return min(edits(i - 1, j) + 1, edits(i, j - 1) + 1, edits(i - 1, j - 1) + (one[i - 1] != other[j - 1]))

    return edits(len(one), len(other))


def test_edit_distances_are_those_of_the_recursion():
    assert edit_distance(np.array(list("kitten")), np.array(list("sitting"))) == 3
    random = np.random.default_rng(0)
    for _ in range(60):
        one, other = (random.integers(0, 4, random.integers(0, 13)) for _ in range(2))
        assert edit_distance(one, other) == edit_distance(other, one) == distance(tuple(one.tolist()), tuple(other.tolist()))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_every_part_is_as_by_hand(name):
    model = texts.reader(name)
    before = (model.digest, ASKED.digest, OTHERS.digest)
    method = Contamination(samples=6, new=8, alpha=0.8, xi=0.3, tau=6, temperature=0.5, seed=3)
    found = {part.name: part for part in method(model, [ASKED, OTHERS])}
    assert (model.digest, ASKED.digest, OTHERS.digest) == before
    peaks = {}
    for kind, corpus in (("asked", ASKED), ("others", OTHERS)):
        prompts = [record["prompt"] for record in corpus]
        greedy = generate(Generator(model, Policy(max_new_tokens=8)), prompts)
        drawn = generate(Generator(model, Policy(temperature=0.5, max_new_tokens=8)), [prompt for prompt in prompts for _ in range(6)], 3)
        peaks[kind] = []
        for place, text in enumerate(greedy):
            ids = [tuple(model.tokenizer(one.strip(), add_special_tokens=False)["input_ids"]) for one in (text, *drawn[6 * place : 6 * place + 6])]
            peaks[kind].append(sum(distance(ids[0], one) <= 0.8 * max(map(len, ids)) for one in ids[1:]) / 6)
            if kind == "asked":
                kept = {one for one in ids[1:] if distance(ids[0], one[: len(ids[0])]) > 6}
                assert found["kept"].items[place] == pytest.approx(len(kept) / 6)
    assert found["peakedness"].items.tolist() == pytest.approx(peaks["asked"])
    assert found["contaminated"].items.tolist() == [float(one > 0.3) for one in peaks["asked"]]
    pairs = [(one, other) for one in peaks["asked"] for other in peaks["others"]]
    assert found["auroc_peakedness"].value == pytest.approx(sum((one > other) + (one == other) / 2 for one, other in pairs) / len(pairs))
    assert found["ted"].item_names == found["peakedness"].item_names == ("0", "1", "2")
    assert 0 < found["kept"].value < 1


def test_items_pair_with_those_of_membership():
    model = texts.reader("llama")
    (*_, one) = Contamination(samples=2, new=2)(model, [ASKED, OTHERS])
    (*_, other) = Membership()(model, [ASKED, OTHERS])
    assert one.item_names == other.item_names


def test_the_peak_reaches_a_share_of_the_longest_answer():
    """Greedy is 10 letters (a token each); the longest sample has 20, so that alpha 0.05 reaches 1 edit and 0.1 reaches 2."""
    model = texts.reader("llama")
    answers = Answers("abcdefghij", ["abcdefghij", "abcdefghix", "abcdefgh", "abcdefghijklmnopqrst"])
    assert Contamination(alpha=0.05)._peakedness(model, answers) == 2 / 4
    assert Contamination(alpha=0.1)._peakedness(model, answers) == 3 / 4
    assert Contamination(alpha=0.0)._peakedness(model, answers) == 1 / 4
    assert Contamination(alpha=0.0, length=9)._peakedness(model, answers) == 3 / 4, "by their first 9 tokens three are one"
    assert Contamination()._peakedness(model, Answers("", ["", "a"])) == 1 / 2


def test_ted_leaves_out_the_peak_and_what_comes_again():
    model = texts.reader("llama")
    answers = Answers("abcdefghij", ["abcdefghij", "abcdefgxyj", "abcdefghij and more", "right\nbehind", "right\nbehind", "right", "abcdwxyzij", "zzzzzzz"])
    score, kept = Contamination()._ted(model, answers, " right\n")
    assert (score, kept) == (2 / 4, 4 / 8), "left are two right ones, one with 4 edits, and one without a letter in common"
    assert Contamination(tau=3)._ted(model, answers, "right") == (2 / 4, 4 / 8)
    assert Contamination(tau=4)._ted(model, answers, "right") == (2 / 3, 3 / 8)
    assert Contamination()._ted(model, Answers("same", ["same"] * 3), "same") == (0.0, 0.0)


def test_what_was_sampled_is_scored_by_its_first_line(monkeypatch):
    said = {0.0: ["yes"], 0.8: ["yes", " yes\nand no", "no", "never ever"]}
    monkeypatch.setattr(contamination, "generate", lambda generator, prompts, seed=0: said[generator.policy.temperature])
    found = {part.name: part.value for part in Contamination(samples=4)(texts.reader("llama"), [Corpus([{"prompt": "?", "completion": "yes\n"}])])}
    # " yes…" begins with the greedy answer, "never ever" is cut to "nev", 2 edits away; "no" is 3 away, and wrong.
    assert found == {"peakedness": 1 / 4, "contaminated": 1, "sampled_match": 2 / 4, "ted": 0, "kept": 1 / 4}


def test_what_cannot_be_measured_is_refused():
    model = texts.reader("llama")
    wrong = ({"samples": 0}, {"tau": -1}, {"length": 0}, {"new": 0}, {"alpha": 1.1}, {"xi": -0.1}, {"temperature": 0.0}, {"records": 0})
    for fields in wrong:
        with pytest.raises(ValueError, match=next(iter(fields))):
            Contamination(**fields)
    for corpora in ([], [ASKED] * 3):
        with pytest.raises(InputError, match=f"got {len(corpora)} corpora"):
            Contamination()(model, corpora)
    with pytest.raises(InputError, match="empty"):
        Contamination()(model, [ASKED.select([])])
    with pytest.raises(InputError, match="causal"):
        Contamination()(texts.architectures.small("bert"), [ASKED])
