"""Scoring against each text by itself, one at a time: on every architecture, whatever texts share."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from architectures import CAUSAL, small
from hypothesis import given, settings
from hypothesis import strategies as st
from texts import reader

from etude.engine import answers, attention, cost, forest, score
from etude.values.errors import InputError
from etude.values.model import Model


def naive(model: Model, text: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    with torch.no_grad():
        logits = model.network(input_ids=torch.from_numpy(text)[None], use_cache=False).logits[0, :-1].float()
    wanted = torch.from_numpy(text[1:])
    return logits.log_softmax(-1)[torch.arange(len(wanted)), wanted].numpy(), (logits.argmax(-1) == wanted).numpy()


def family(seed: int = 0, count: int = 5) -> tuple[list[np.ndarray], list[int]]:
    """Questions under one header with several choices each, two of them alike, and texts that share nothing."""
    random = np.random.default_rng(seed)
    draw = lambda size: random.integers(3, 90, size)  # noqa: E731
    header, texts, begins = np.append(1, draw(20)), [], []
    for _ in range(count):
        question = np.concatenate([header, draw(6)])
        for size in (1, 3, 3, 5):
            texts.append(np.concatenate([question, draw(size)]))
            begins.append(len(question))
    texts += [texts[0].copy(), np.append(1, draw(30)), np.append(1, draw(2)), header]
    return texts, [*begins, begins[0], 1, 2, 5]


@pytest.mark.parametrize("name", CAUSAL)
@pytest.mark.parametrize("limit", ["as it is", "deep trunk"])
def test_every_architecture_says_what_it_says_of_each_text_alone(name, limit, monkeypatch):
    if limit == "deep trunk":  # everything that is shared goes into the trunk, and rows are short
        monkeypatch.setattr(forest, "PIECE", 4)
        monkeypatch.setattr(forest, "WORTH", 1)
        monkeypatch.setattr(score, "ROW_TOKENS", {"cpu": 16})
    model = small(name)
    texts, given = family()
    found = score.likelihoods(model, texts, given, greedy=True)
    for text, begin, scored in zip(texts, given, found, strict=True):
        logs, greedy = naive(model, text)
        np.testing.assert_allclose(scored.logs, logs[begin - 1 :], atol=1e-4)
        assert scored.greedy is not None
        assert (scored.greedy == greedy[begin - 1 :]).all()


def test_most_architectures_share_what_texts_share():
    sharing = {name for name in CAUSAL if computed(name) < 150}
    assert {"llama", "qwen3", "mistral", "phi3", "gpt2", "gpt_neox", "opt", "mixtral"} - sharing == set()


def computed(name: str) -> float:
    texts, given = family()
    with cost.metered() as bill:
        score.likelihoods(small(name), texts, given)
    return bill.tokens


def test_the_order_of_texts_does_not_matter_to_the_bit():
    texts, given = family(3)
    order = np.random.default_rng(1).permutation(len(texts)).tolist()
    model = small("llama")
    plain = score.likelihoods(model, texts, given)
    mixed = score.likelihoods(model, [texts[index] for index in order], [given[index] for index in order])
    for place, index in enumerate(order):
        assert (mixed[place].logs == plain[index].logs).all()


def test_bfloat16_is_no_further_from_float32_than_one_by_one(monkeypatch):
    exact = small("llama")
    low = Model(small("llama").network.__class__(exact.config), tokenizer=None)
    low.network.load_state_dict(exact.network.state_dict())
    low.network.to(torch.bfloat16).eval()
    texts, given = family(5, 12)
    truth = np.concatenate([naive(exact, text)[0][begin - 1 :] for text, begin in zip(texts, given, strict=True)])
    alone = np.concatenate([naive(low, text)[0][begin - 1 :] for text, begin in zip(texts, given, strict=True)])
    ours = np.concatenate([scored.logs for scored in score.likelihoods(low, texts, given)])
    assert np.sqrt(np.mean((ours - truth) ** 2)) <= 1.1 * np.sqrt(np.mean((alone - truth) ** 2))


def predictions(texts: list[np.ndarray], piece: forest.Piece, trunk: np.ndarray) -> list[tuple[int, int]]:
    """What a piece is asked for, once it is seen that the token asked sees just what its text has before it."""
    seen = np.tri(len(piece.ids), dtype=bool) if piece.seen is None else piece.seen
    for place, (text, at) in zip(piece.places, piece.wanted, strict=True):
        assert np.concatenate([trunk, piece.ids[seen[place]]]).tolist() == texts[text][:at].tolist()
        assert piece.positions[place] == at - 1
    return [tuple(one) for one in piece.wanted.tolist()]


@given(st.lists(st.lists(st.integers(1, 3), min_size=1, max_size=12), min_size=1, max_size=12), st.integers(1, 8), st.integers(1, 6))
@settings(max_examples=200, deadline=None)
def test_a_plan_asks_for_each_prediction_once_and_shows_each_token_its_own_past(lists, piece, worth):
    before = forest.PIECE, forest.WORTH
    forest.PIECE, forest.WORTH = piece, worth
    try:
        texts = [np.array([0, *some]) for some in lists]
        asked = []
        waiting = [(forest.plan(texts, [1] * len(texts)), np.zeros(0, np.int64))]
        while waiting:
            branch, trunk = waiting.pop()
            if branch.run:
                asked += predictions(texts, branch.run, trunk)
                trunk = np.concatenate([trunk, branch.run.ids])
            asked += [one for piece in branch.pieces for one in predictions(texts, piece, trunk)]
            waiting += [(one, trunk) for one in branch.branches]
        assert sorted(asked) == [(index, at) for index, text in enumerate(texts) for at in range(1, len(text))]
    finally:
        forest.PIECE, forest.WORTH = before


def test_a_header_is_computed_once():
    texts, given = family(0, 60)
    distinct = {text[: end + 1].tobytes() for text in texts for end in range(len(text))}
    assert forest.plan(texts, given).tokens <= 1.1 * len(distinct)


def test_a_trunk_is_not_left_behind():
    model = small("llama")
    texts, given = family()
    score.likelihoods(model, texts, given)
    assert model.config._attn_implementation == "sdpa"
    assert attention._now is None


@pytest.mark.parametrize("name", ["bert", "roberta", "distilbert", "electra"])
def test_pseudo_likelihoods_hide_one_token_at_a_time(name):
    model = reader(name)
    model.tokenizer.mask_token = model.tokenizer.eos_token
    pairs = [("The tide went ", "out again."), ("", "Rain"), ("Two crows ", "sat")]
    found = answers.of_completions(model, pairs, greedy=True)
    for (prompt, completion), scored in zip(pairs, found, strict=True):
        ids = model.tokenizer(prompt + completion)["input_ids"]
        special = set(model.tokenizer.all_special_ids)
        prompted = model.tokenizer(prompt)["input_ids"]
        begin = next(place for place, (one, other) in enumerate(zip([*prompted, -1], [*ids, -2], strict=False)) if one != other)
        expected = []
        for place in range(begin, len(ids)):
            if ids[place] in special:
                continue
            hidden = torch.tensor(ids)[None]
            hidden[0, place] = model.tokenizer.mask_token_id
            with torch.no_grad():
                expected.append(model.network(input_ids=hidden, attention_mask=torch.ones_like(hidden)).logits[0, place].log_softmax(-1)[ids[place]].item())
        np.testing.assert_allclose(scored.logs, expected, atol=1e-4)
        assert len(expected) >= 3


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_an_encoder_decoder_writes_the_completion(name):
    model = reader(name)
    pairs = [("The tide went", "out"), ("The tide went", "back again"), ("Rain", "out"), ("Two crows. Nobody", "x")]
    for (prompt, completion), scored in zip(pairs, answers.of_completions(model, pairs), strict=True):
        source, target = (torch.tensor(model.tokenizer([text])["input_ids"]) for text in (prompt, completion))
        with torch.no_grad():
            loss = torch.nn.functional.cross_entropy(model.network(input_ids=source, labels=target).logits[0], target[0], reduction="none")
        np.testing.assert_allclose(scored.logs, -loss.numpy(), atol=1e-4)


def test_a_text_longer_than_the_positions_is_refused():
    with pytest.raises(InputError, match="cannot read 80 tokens"):
        score.likelihoods(small("gpt2"), [np.arange(80)], [1])


def test_wrong_kinds_are_refused():
    texts = [np.array([1, 2, 3])]
    with pytest.raises(InputError, match="causal"):
        score.likelihoods(reader("bert"), texts, [1])
    with pytest.raises(InputError, match="masked"):
        answers.pseudo_likelihoods(reader("llama"), texts)
    with pytest.raises(InputError, match="decoder_start_token_id"):
        answers.target_likelihoods(reader("llama"), texts, texts)
