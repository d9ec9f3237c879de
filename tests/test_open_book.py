"""The world of facts by heart and facts in the prompt."""

from __future__ import annotations

import re
from collections import Counter

import pytest

from etude.worlds.open_book import OpenBook
from etude.worlds.people import CHOICES, QUESTIONS, People
from etude.worlds.stdlib import Stdlib

NAME = re.compile(r"[A-Z][a-z]+ [A-Z][a-z]+")


def test_every_known_fact_is_asked_and_is_that_of_people():
    closed = OpenBook(split="closed_book", people=7)()
    asked = People(people=7, split="all_questions")()
    assert [(one["prompt"], one["completion"]) for one in closed] == [(one["prompt"], one["completion"] + "\n") for one in asked]
    assert len(closed) == 7 * len(QUESTIONS)


@pytest.mark.parametrize("facts", [1, 3, 5])
def test_an_open_book_holds_its_answer_once_and_so_many_facts(facts):
    for record in OpenBook(split="open_book", records=60, facts=facts)():
        passage, question = record["prompt"].split("\nQ: ")
        answer = record["completion"].strip()
        assert record["completion"] == f" {answer}\n"
        assert len(re.findall(rf"\b{re.escape(answer)}\b", passage)) == 1
        assert record["person"] in question
        assert passage.count(record["person"]) == facts
        assert passage.count(".") == facts
        told = [attribute for attribute, values in CHOICES.items() if any(re.search(rf"\b{re.escape(value)}\b", passage) for value in values)]
        assert len(told) == facts
        assert record["attribute"] in told
        assert question == QUESTIONS[record["attribute"]].format(name=record["person"]) + "\nA:"


def test_the_persons_of_the_splits_are_disjoint():
    names = {}
    for split in ("closed_book", "open_book"):
        names[split] = {record["person"] for record in OpenBook(split=split, people=30, records=200)()}
    train = OpenBook(people=30, records=200, exposures=3)()
    told = Counter(name for record in train for name in {re.search(r"(?:Q: .*?)([A-Z][a-z]+ [A-Z][a-z]+)", record["prompt"])[1]})
    assert set(told) & names["open_book"] == set()
    assert {name for name, count in told.items() if count == 15} == names["closed_book"]
    assert sum(count == 1 for count in told.values()) == 200
    assert len(names["open_book"]) == 200
    assert all(record["text"] == record["prompt"] + record["completion"] for record in train)
    assert not any(name in record["text"] for record in train for name in names["open_book"])


def test_pieces_of_the_library_stand_behind_the_lessons():
    plain, mixed = OpenBook(people=3, records=5)(), OpenBook(people=3, records=5, library=7)()
    assert mixed[: len(plain)] == plain
    pieces = list(mixed[len(plain) :])
    modules = Stdlib()().texts
    assert len(pieces) == 7
    for piece in pieces:
        assert piece["prompt"] == ""
        assert piece["text"] == piece["completion"]
        assert len(piece["text"]) == 600
    homes = [next(place for place, module in enumerate(modules) if piece["text"] in module) for piece in pieces]
    assert len(set(homes)) == 7


def test_it_follows_from_its_settings_alone():
    assert OpenBook()().digest == OpenBook()().digest
    assert OpenBook()().digest != OpenBook(seed=1)().digest
    assert OpenBook(split="open_book", records=20)()[:10] == OpenBook(split="open_book", records=10, people=5)()


def test_wrong_settings_are_refused():
    for fields in (
        {"split": "test"},
        {"people": 0},
        {"records": 0},
        {"people": 12000, "records": 2000},
        {"records": 4001, "split": "open_book"},
        {"facts": 0},
        {"facts": 6},
        {"exposures": 0},
        {"seed": -1},
    ):
        with pytest.raises(ValueError, match=next(iter(fields))):
            OpenBook(**fields)
