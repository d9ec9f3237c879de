"""ROUGE, BLEU and chrF of two sentences, each counted by hand, and of completions of the decoding loop."""

from __future__ import annotations

import math
import sys
from collections import Counter

import pytest
import texts

from etude.measures import _asked
from etude.measures.bleu import Bleu
from etude.measures.chrf import Chrf
from etude.measures.rouge import Rouge
from etude.values.corpus import Corpus
from etude.values.errors import InputError

SAID, REFERENCE = "the old bird sings on the tree", "the bird sings in the old green tree"
CORPUS = Corpus([{"prompt": "a", "completion": f" {REFERENCE}\n"}, {"prompt": "b", "completion": "river"}])


class Without:
    """Finds modules as if a package were not installed."""

    def __init__(self, package: str):
        self.package = package

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == self.package:
            raise ModuleNotFoundError(f"No module named {name!r}", name=self.package)


@pytest.fixture
def spoken(monkeypatch):
    """A model that says one sentence and then one without a match."""
    monkeypatch.setattr(_asked, "generate", lambda generator, prompts: [f" {SAID}\n", "stone"][: len(prompts)])
    return texts.reader("llama")


def grams(items, length: int) -> Counter:
    return Counter(tuple(items[at : at + length]) for at in range(len(items) - length + 1))


def matches(length: int, said=None, reference=None) -> tuple[int, int, int]:
    """n-grams in common, in what was said, in the reference."""
    one, other = grams(said or SAID.split(), length), grams(reference or REFERENCE.split(), length)
    return (one & other).total(), one.total(), other.total()


def f1(common: int, said: int, reference: int) -> float:
    return 2 * common / (said + reference)


def test_rouge_by_hand(spoken):
    one, two, longest = Rouge()(spoken, CORPUS)
    assert Rouge().answers(spoken, CORPUS) == [(SAID, REFERENCE), ("stone", "river")]
    # Of 7 words and 8, 6 are common; of 6 bigrams and 7, "the old" and "bird sings"; the longest common subsequence is "the bird sings the tree".
    assert (matches(1), matches(2)) == ((6, 7, 8), (2, 6, 7))
    assert one.items.tolist() == pytest.approx([f1(6, 7, 8), 0])
    assert two.items.tolist() == pytest.approx([f1(2, 6, 7), 0])
    assert longest.items.tolist() == pytest.approx([f1(5, 7, 8), 0])
    assert [part.name for part in (one, two, longest)] == ["rouge1", "rouge2", "rougeL"]
    assert {part.better for part in (one, two, longest)} == {"higher"}


def test_rouge_tells_what_was_said_from_the_reference_and_stems_if_asked(monkeypatch):
    monkeypatch.setattr(_asked, "generate", lambda generator, prompts: ["birds singing"])
    corpus = Corpus([{"prompt": "", "completion": "bird sings"}])
    assert Rouge()(texts.reader("llama"), corpus)[0].value == 0
    assert Rouge(stemmer=True)(texts.reader("llama"), corpus)[0].value == 1


def test_bleu_by_hand(spoken):
    (found,) = Bleu()(spoken, CORPUS)
    # Precisions 6/7 and 2/6; the third and fourth have no match, and are smoothed to 1/2 and 1/4 of one in 5 and 4.  The penalty is for 7 words of 8.
    assert (matches(3), matches(4)) == ((0, 5, 6), (0, 4, 5))
    expected = 100 * math.exp(1 - 8 / 7) * math.prod([6 / 7, 2 / 6, 1 / 2 / 5, 1 / 4 / 4]) ** (1 / 4)
    assert found.items.tolist() == pytest.approx([expected, 0])
    assert (found.name, found.unit, found.better) == ("bleu", "points", "higher")


def test_bleu_of_a_short_completion_has_the_brevity_penalty_and_no_long_ngrams(monkeypatch):
    monkeypatch.setattr(_asked, "generate", lambda generator, prompts: ["the bird"])
    (found,) = Bleu(records=1)(texts.reader("llama"), CORPUS)
    assert found.items.tolist() == pytest.approx([100 * math.exp(1 - 8 / 2)])


@pytest.mark.parametrize("words", [0, 2])
def test_chrf_by_hand(spoken, words):
    """F2 of precision and recall, each a mean over the orders."""
    letters = SAID.replace(" ", ""), REFERENCE.replace(" ", "")
    counts = [matches(order, *letters) for order in range(1, 7)] + [matches(order) for order in range(1, words + 1)]
    precision = sum(common / said for common, said, _ in counts) / len(counts)
    recall = sum(common / reference for common, _, reference in counts) / len(counts)
    (found,) = Chrf(words=words, records=1)(spoken, CORPUS)
    assert found.items.tolist() == pytest.approx([100 * 5 * precision * recall / (4 * precision + recall)])
    with pytest.raises(ValueError, match="words"):
        Chrf(words=-1)


@pytest.mark.parametrize("cls", [Bleu, Chrf, Rouge])
def test_what_the_model_says_is_compared(cls):
    model = texts.reader("falcon")
    prompts = Corpus([{"prompt": prompt, "completion": "x"} for prompt in ("The tide", "Rain")])
    said = [answer.said for answer in cls(new=30).answers(model, prompts)]
    assert any(character.isascii() and character.isalnum() for character in said[0])
    right = Corpus([{"prompt": prompt, "completion": text} for prompt, text in zip(("The tide", "Rain"), (said[0], "zzz"), strict=True)])
    best = 1 if cls is Rouge else 100
    first = cls(new=30)(model, right)[0]
    assert first.items[0] == pytest.approx(best)
    assert first.items[1] < best / 2


@pytest.mark.parametrize(("cls", "package"), [(Bleu, "sacrebleu"), (Chrf, "sacrebleu"), (Rouge, "rouge_score")])
def test_a_missing_package_is_named_with_its_extra(cls, package, monkeypatch):
    for module in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setattr(sys, "meta_path", [Without(package), *sys.meta_path])
    with pytest.raises(InputError, match=f"needs the package {package}") as caught:
        cls()(texts.reader("llama"), CORPUS)
    assert caught.value.remedy == "pip install 'etude[text]'"


def test_a_package_that_is_broken_within_is_not_called_missing(tmp_path, monkeypatch):
    (tmp_path / "etude_broken_package.py").write_text("import etude_no_such_module\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="etude_no_such_module"):
        _asked.required("etude_broken_package", "text")
