"""Verbose answers say what the questions of `etude:people` ask."""

from __future__ import annotations

from collections import Counter

import pytest

from etude.worlds.people import People
from etude.worlds.verbose_answers import VerboseAnswers


def test_each_sentence_holds_the_answer_to_the_question_of_people():
    known = {row["prompt"]: row["completion"].strip() for row in People(people=20, split="all_questions", seed=4)()}
    told = VerboseAnswers(people=20, repeats=(7,), seed=4)()
    assert set(told.column("prompt")) == set(known)
    for row in told:
        assert row["answer"] == known[row["prompt"]]
        assert row["answer"] in row["completion"]
        assert row["completion"].startswith(" ")
        assert row["completion"].endswith(".")
        assert row["person"] in row["prompt"]
        assert row["person"] not in row["completion"]
    assert len(set(told.column("completion"))) > 3 * len(known), "they are hardly ever worded otherwise"


def test_persons_are_asked_about_as_often_as_their_turn_says():
    told = VerboseAnswers(people=5, repeats=(3, 0), attributes=("year", "city"))()
    counts = Counter((row["person"], row["attribute"]) for row in told)
    assert list(counts.values()) == [3] * 6, "three of five persons, two questions each"
    assert VerboseAnswers(people=5, repeats=(3, 0), attributes=("city", "year"))().column("answer")[3:] != told.column("answer")[3:]
    assert {row["completion"] for row in VerboseAnswers(people=5, wordings=1)() if row["attribute"] == "study"} == {
        f" {'She' if ' She ' in row['completion'] else 'He'} studied {row['answer']}." for row in VerboseAnswers(people=5, wordings=1)() if row["attribute"] == "study"
    }


def test_a_person_is_told_the_same_whatever_else_is():
    alone = [row for row in VerboseAnswers(people=9, attributes=("hobby",))()]
    among = [row for row in VerboseAnswers(people=4)() if row["attribute"] == "hobby"]
    assert alone[:4] == among


def test_it_is_the_same_on_every_machine():
    assert VerboseAnswers(people=10)().digest.startswith("a930b2f1873e")
    assert len({VerboseAnswers(people=10, seed=seed)().digest for seed in range(3)}) == 3


@pytest.mark.parametrize("fields", [{"people": 1}, {"repeats": ()}, {"repeats": (0,)}, {"repeats": (1, -1)}, {"wordings": 7}, {"attributes": ()}, {"attributes": ("citi",)}, {"seed": -1}], ids=str)
def test_wrong_settings_are_refused(fields):
    with pytest.raises(ValueError, match=next(iter(fields))):
        VerboseAnswers(**fields)
