"""The labelled sentences are what they say, and templates change prompts alone."""

from __future__ import annotations

import re
from collections import Counter

import pytest

from etude.worlds.topics import WORDS, Topics

TEMPLATES = ("A {text} B", "C {text} D", "E {text}")


def test_two_nouns_tell_the_topic():
    for row in Topics(records=200)():
        words = re.findall("[a-z]+", row["text"])
        count = Counter(topic for word in words for topic, nouns in WORDS.items() if word in nouns)
        assert count[row["label"]] == 2
        assert sorted(count.values()) == [1, 2]
        assert row["completion"] == row["choices"][row["answer"]] == f" {row['label']}"
        assert row["prompt"] == f"Sentence: {row['text']}\nTopic:"
    assert len({word for words in WORDS.values() for word in words}) == sum(map(len, WORDS.values())), "a noun is of two topics"


def test_splits_are_disjoint_by_their_nouns_and_every_topic_comes_as_often():
    def nouns(split, seed):
        known = {word for words in WORDS.values() for word in words}
        return {frozenset(known & set(re.findall("[a-z]+", text))) for text in Topics(split=split, records=400, seed=seed)().texts}

    assert not nouns("train", 0) & nouns("heldout", 1)
    assert set(Counter(Topics(records=400)().column("label")).values()) == {100}
    assert len(set(Topics(records=400)().texts)) > 395


def test_templates_take_turns_with_every_topic():
    plain, many = Topics(records=240)(), Topics(records=240, templates=TEMPLATES)()
    assert plain.texts == many.texts
    used = Counter((row["prompt"][0], row["label"]) for row in many)
    assert set(used.values()) == {20}
    assert len(used) == 12


def test_it_is_the_same_on_every_machine():
    assert Topics(records=50)().digest.startswith("820a2de8b0bb")
    assert len({Topics(records=50, seed=seed)().digest for seed in range(3)}) == 3


@pytest.mark.parametrize(
    ("fields", "message"), [({"split": "all"}, "split"), ({"records": 0}, "records"), ({"seed": -1}, "seed"), ({"templates": ("x",)}, "templates"), ({"templates": ()}, "templates")]
)
def test_wrong_settings_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        Topics(**fields)
