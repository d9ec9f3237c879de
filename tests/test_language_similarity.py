"""Cosines against those of single sentences, correlations against scipy, and the parallel languages."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import scipy.stats
import texts
import torch

from etude.engine import batch
from etude.measures.language_similarity import LanguageSimilarity
from etude.values import checkpoint
from etude.values.corpus import Corpus
from etude.values.errors import InputError
from etude.worlds.parallel import ADJECTIVES, NOUNS, TOPICS, VERBS, Parallel, Phrase, Sentence, Spoken, concept, made

SAID = {
    "base": (0.5, ["Two crows.", "A bird runs.", "Snow falls."]),
    "b": (0.1, ["owT sworc.", "drib snur.", "wonS."]),
    "c": (0.3, ["Zwei.", "Vogel.", "Eis."]),
    "d": (0.1, ["xx.", "y.", "zz z."]),
}
SMALL = Corpus([{"text": text, "language": language, "sentence": place, "share": share} for language, (share, some) in SAID.items() for place, text in enumerate(some)])


def last_states(model, text: str) -> list[np.ndarray]:
    """Of each layer, the last token's state of one text alone."""
    ids = torch.from_numpy(batch.encode(model, Corpus([text]))[0])[None] if model.kind == "causal" else torch.tensor([model.tokenizer(text)["input_ids"]])
    with torch.no_grad():
        return [one[0, -1].double().numpy() for one in model.network(input_ids=ids, output_hidden_states=True).hidden_states]


def cosine(one: np.ndarray, other: np.ndarray) -> float:
    return float(one @ other / np.linalg.norm(one) / np.linalg.norm(other))


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
@pytest.mark.parametrize("layers", [None, (0, -2)])
def test_similarities_are_those_by_hand(name, layers):
    model = texts.reader(name)
    before = checkpoint.digest_state(model.network), SMALL.digest
    found = {part.name: part for part in LanguageSimilarity(layers=layers)(model, SMALL)}
    assert (checkpoint.digest_state(model.network), SMALL.digest) == before
    states = {(row["language"], row["sentence"]): last_states(model, row["text"]) for row in SMALL}
    chosen = range(1, 4) if layers is None else [0, 2]
    for language in "bcd":
        expected = [np.mean([cosine(states[language, place][layer], states["base", place][layer]) for layer in chosen]) for place in range(3)]
        assert found[f"similarity_{language}"].items == pytest.approx(np.array(expected), abs=1e-5)
        assert found[f"similarity_{language}"].item_names == ("0", "1", "2")
    assert found["similarity"].value == pytest.approx(np.mean([found[f"similarity_{language}"].value for language in "bcd"]))
    assert "similarity_base" not in found


def test_correlations_are_spearmans():
    found = {part.name: part for part in LanguageSimilarity()(texts.reader("llama"), SMALL)}
    score = [found[f"similarity_{language}"].value for language in "bcd"]
    lost = [found[f"bits_per_byte_{language}"].value for language in "bcd"]
    assert found["rank_by_share"].value == pytest.approx(scipy.stats.spearmanr(score, [0.1, 0.3, 0.1]).statistic)
    assert found["rank_by_loss"].value == pytest.approx(-scipy.stats.spearmanr(score, lost).statistic)
    assert found["loss_rank_by_share"].value == pytest.approx(-scipy.stats.spearmanr(lost, [0.1, 0.3, 0.1]).statistic)
    assert found["rank_by_share"].item_names == ("b", "c", "d")
    assert "bits_per_byte_base" in found


def test_losses_are_those_of_perplexity():
    from etude.measures.perplexity import Perplexity

    model = texts.reader("llama")
    found = {part.name: part.value for part in LanguageSimilarity()(model, SMALL)}
    for language in ("base", "c"):
        own = {part.name: part.value for part in Perplexity()(model, SMALL.keep(lambda row, language=language: row["language"] == language))}
        assert found[f"bits_per_byte_{language}"] == pytest.approx(own["bits_per_byte"], rel=1e-5)


def test_the_reference_is_chosen_and_a_language_is_like_itself():
    model = texts.reader("llama")
    found = {part.name: part.value for part in LanguageSimilarity(reference="c")(model, SMALL)}
    plain = {part.name: part.value for part in LanguageSimilarity()(model, SMALL)}
    assert found["similarity_base"] == pytest.approx(plain["similarity_c"])
    twice = Corpus([{**row, "language": language} for row in SMALL if row["language"] == "base" for language in ("one", "other")])
    assert {part.name: part for part in LanguageSimilarity()(model, twice)}["similarity_other"].items == pytest.approx(np.ones(3), abs=1e-6)


def test_without_shares_or_losses_there_are_only_similarities():
    plain = Corpus([{key: row[key] for key in ("text", "language", "sentence")} for row in SMALL])
    assert [part.name for part in LanguageSimilarity()(texts.reader("bert"), plain)] == ["similarity", "similarity_b", "similarity_c", "similarity_d"]
    names = [part.name for part in LanguageSimilarity()(texts.reader("llama"), plain)]
    assert "rank_by_loss" in names
    assert "rank_by_share" not in names


def test_corpora_that_are_not_parallel_are_refused():
    model = texts.reader("llama")
    with pytest.raises(InputError, match="no language 'x'"):
        LanguageSimilarity(reference="x")(model, SMALL)
    with pytest.raises(InputError, match="with others beside it"):
        LanguageSimilarity()(model, SMALL[:3])
    with pytest.raises(InputError, match="sentence '2' is not in 'd'"):
        LanguageSimilarity()(model, SMALL[:11])
    with pytest.raises(InputError, match="one is there twice"):
        LanguageSimilarity()(model, Corpus([*SMALL, SMALL[0]]))
    with pytest.raises(InputError, match="share is one number for each language"):
        LanguageSimilarity()(model, SMALL.with_column("share", [0.1 * place for place in range(12)]))
    with pytest.raises(InputError, match="language"):
        LanguageSimilarity()(model, Corpus(["a"]))
    with pytest.raises(ValueError, match="layers are one or more"):
        LanguageSimilarity(layers=())


# The world.

HAND = Spoken(tuple(f"f{place}" for place in range(6)) + tuple(f"w{place}" for place in range(TOPICS * (NOUNS + VERBS + ADJECTIVES))), ("subject", "verb", "object"), True, True, True)
MEANING = Sentence(Phrase(concept(0, 0, 0), (), False), concept(0, 1, 1), Phrase(concept(0, 0, 2), (concept(0, 2, 3),), True), Phrase(concept(1, 0, 0), (), False), True, True, True)


def test_a_sentence_is_said_in_each_order():
    """Topic 0 has nouns w0 to w7, verbs w8 to w12 and adjectives w13 to w16; topic 1 begins with w17.  f0 article, f1 plural, f2 past, f3 place, f4 time, f5 negation."""
    assert HAND.say(MEANING) == "f4 f0 w0 w9 f2 f5 f0 w16 f1 w2 f3 f0 w17."
    other = Spoken(HAND.words, ("object", "verb", "subject"), False, False, False)
    assert other.say(MEANING) == "w2 f1 w16 f0 f5 f2 w9 w0 f0 w17 f0 f3 f4."


def test_languages_share_no_word_and_say_the_same():
    languages = made(9, 0)
    every = [word for language in languages for word in language.words]
    assert len(set(every)) == len(every) == 9 * 142
    assert (languages[0].order, languages[0].adjective_first, languages[0].article_first, languages[0].mark_first) == (("subject", "verb", "object"), True, True, True)
    assert all((one.order, one.adjective_first, one.article_first, one.mark_first) != (languages[0].order, True, True, True) for one in languages[1:])
    assert made(4, 0) == languages[:4]
    assert made(4, 1) != languages[:4]
    corpus = Parallel(split="parallel", records=30)()
    assert corpus.column("language")[:9] == [f"language_{place}" for place in range(9)]
    assert corpus.column("sentence")[:10] == [0] * 9 + [1]
    numbers = [{word: place for place, word in enumerate(language.words)} for language in languages]
    for sentence in range(30):
        said = [Counter(numbers[place][word] for word in text.rstrip(".").split()) for place, text in enumerate(corpus.texts[9 * sentence : 9 * sentence + 9])]
        assert all(one == said[0] for one in said), "the words of one language do not translate into the others'"


def test_texts_come_by_their_shares():
    corpus = Parallel(records=4000, shares=(6, 3, 1))()
    counts = Counter(corpus.column("language"))
    for language, share in (("language_0", 0.6), ("language_1", 0.3), ("language_2", 0.1)):
        assert abs(counts[language] / 4000 - share) < 0.03
    assert set(zip(corpus.column("language"), corpus.column("share"), strict=True)) == {("language_0", 0.6), ("language_1", 0.3), ("language_2", 0.1)}
    assert Parallel(records=50, shares=(6, 3, 1))().texts == corpus.texts[:50]
    words = set(made(3, 0)[2].words)
    assert all(set(row["text"].replace(".", "").split()) <= words for row in corpus if row["language"] == "language_2")


def test_a_text_has_a_topic():
    corpus, language = Parallel(records=300, only=1)(), made(2, 0)[1]
    own = []
    for row in corpus:
        topics = Counter((language.words.index(word) - 6) // 17 for word in row["text"].replace(".", "").split() if word not in language.words[:6])
        own.append(topics[int(row["topic"].removeprefix("topic_"))] / topics.total())
    assert np.mean(own) == pytest.approx(0.8 + 0.2 / 8, abs=0.02)


def test_one_language_and_shuffled_words():
    whole, one = Parallel(split="heldout", records=40)(), Parallel(split="heldout", records=40, only=2)()
    assert one.texts == [row["text"] for row in whole if row["language"] == "language_2"]
    assert not set(whole.texts) & set(Parallel(split="parallel", records=40)().texts)
    assert set(Parallel(records=30, only=0)().column("language")) == {"language_0"}
    some = Parallel(split="heldout", records=40, only=2, shuffled=0.5)()
    assert 10 < some.column("order").count("shuffled") < 30
    for plain, text, order in zip(one.texts, some.texts, some.column("order"), strict=True):
        assert sorted(text.rstrip(".").split()) == sorted(plain.rstrip(".").split())
        assert (text == plain) == (order == "written")
    both = Parallel(split="parallel", records=9, shuffled=0.5)()
    assert all(len(set(both.column("order")[9 * place : 9 * place + 9])) == 1 for place in range(9))


def test_worlds_that_cannot_be_are_refused():
    for settings in ({"split": "x"}, {"records": 0}, {"shares": (1.0,)}, {"shares": (1.0, 0.0)}, {"only": 9}, {"shuffled": 2.0}, {"seed": -1}):
        with pytest.raises(ValueError, match=next(iter(settings))):
            Parallel(**settings)
