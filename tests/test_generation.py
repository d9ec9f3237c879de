"""What is right by a rule, by hand, and the measure against completions of the decoding loop."""

from __future__ import annotations

import pytest
import texts

from etude.engine.generate import generate
from etude.measures._asked import Answer
from etude.measures.generation import Generation, extract, normalise
from etude.values.corpus import Corpus
from etude.values.errors import InputError
from etude.values.generator import Generator, Policy

PROMPTS = ["The tide went", "Two crows.", "Rain"]


def asked(completions: list[str]) -> Corpus:
    return Corpus([{"prompt": prompt, "completion": completion} for prompt, completion in zip(PROMPTS, completions, strict=True)])


def test_normalising_is_that_of_squad():
    """Punctuation goes before articles, and leaves no space behind: an article that is bared by it goes too."""
    assert normalise("  The  Cat,\tand (a) dog! ") == "cat and dog"
    assert normalise("the-cat") == "thecat"
    assert normalise("Theatre, an. then") == "theatre then"
    assert normalise("A.") == ""


@pytest.mark.parametrize(
    ("rule", "said", "reference", "right"),
    [
        ("normalised", "The blue.\nand more", "blue", True),
        ("normalised", "blues", "blue", False),
        ("normalised", "it is\nblue", "blue", False),
        ("contains", "it is\nblue, I think", "blue", True),
        ("contains", "Blue", "blue", False),
        ("regex", "so #### 12\n#### 13", "6 + 6 #### 12", True),
        ("regex", "so #### 13", "6 + 6 #### 12", False),
        ("regex", "12", "6 + 6 #### 12", False),
    ],
)
def test_each_rule_by_hand(rule, said, reference, right):
    method = Generation(rule=rule, pattern=r"#### (\d+)" if rule == "regex" else None)
    assert method.right(Answer(said, reference), 0) is right


def test_a_group_without_a_part_in_the_match_extracts_nothing():
    assert extract(r"x(\d)?", "x") is None
    assert extract(r"x(\d)?(y)", "x3y x4y") == "3"


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_it_asks_what_the_decoding_loop_answers(name):
    """One reference that is the very answer, one that has more, one that is part of it."""
    model = texts.reader(name)
    if name == "t5":  # one tied to the embeddings repeats the last token for ever
        model.network.lm_head.weight = texts.torch.nn.Parameter(texts.torch.randn(texts.END + 1, 32, generator=texts.torch.Generator().manual_seed(0)))
    said = [text.strip() for text in generate(Generator(model, Policy(max_new_tokens=9)), PROMPTS)]
    assert all(said)
    corpus = asked([f" {said[0]}\n", said[1] + "x", said[2][-1]])
    (contains,) = Generation(rule="contains", new=9)(model, corpus)
    assert contains.items.tolist() == [1, 0, 1]
    assert contains.value == pytest.approx(2 / 3)
    (some,) = Generation(rule="contains", new=9, records=2)(model, corpus)
    assert (some.items.tolist(), some.item_names, some.better) == ([1, 0], ("0", "1"), "higher")


def test_a_stop_string_ends_what_is_compared():
    model = texts.reader("llama")
    said = generate(Generator(model, Policy(max_new_tokens=9)), PROMPTS)[0].strip()
    stop = said[4]
    corpus = asked([said, "-", "-"])
    assert Generation(rule="contains", new=9)(model, corpus)[0].items[0] == 1
    assert Generation(rule="contains", new=9, stop=(stop,))(model, corpus)[0].items[0] == 0


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rule": "regex"}, "pattern goes with the rule regex"),
        ({"pattern": "(a)"}, "pattern goes with the rule regex"),
        ({"rule": "regex", "pattern": "(a"}, "no regular expression"),
        ({"rule": "regex", "pattern": "a"}, "has no group"),
        ({"rule": "fuzzy"}, "contains, regex or normalised"),
        ({"records": 0}, "at least 1"),
        ({"new": 0}, "at least 1"),
        ({"stop": ("",)}, "stop"),
    ],
)
def test_wrong_fields_are_refused_at_once(fields, message):
    with pytest.raises(ValueError, match=message):
        Generation(**fields)


def test_references_that_cannot_be_compared_are_refused():
    with pytest.raises(InputError, match="record 1 is empty"):
        Generation()(texts.reader("llama"), asked(["a", " \n", "b"]))
    with pytest.raises(InputError, match="extracts nothing from the completion of record 2: 'b'"):
        Generation(rule="regex", pattern=r"(\d)", new=1)(texts.reader("llama"), asked(["1", "2", "b"]))
    with pytest.raises(InputError, match="and this is a masked one"):
        Generation()(texts.reader("bert"), asked(["a", "b", "c"]))
