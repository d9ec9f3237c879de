"""Partial binarization against elimination with explicit inverses, and its training against the formulas written out."""

from __future__ import annotations

import numpy as np
import pytest
import texts
import torch
from architectures import small
from test_second_order import GROUPS, by_hand, close_weights, eliminated
from texts import LENGTH, TOKENS, linear_layers, matrix

from etude.engine.budget import Budget
from etude.methods.compress.pb_llm import PBLLM
from etude.methods.compress.pb_llm_tuning import Binary, PBLLMTuning
from etude.values import checkpoint
from etude.values.errors import InputError
from etude.values.model import Model

GIVEN = {"tokens": TOKENS, "length": LENGTH, "damp": 0.1, "group": 16}


def partly(choose, share):
    def plan(first, columns, roots):
        scores = np.abs(columns) if choose == "magnitude" else columns**2 / roots
        kept = np.zeros(scores.size, bool)
        kept[np.argsort(-scores.T.ravel(), kind="stable")[: round(share * scores.size)]] = True
        kept = kept.reshape(scores.T.shape).T
        scale = np.array([np.abs(row[~chosen]).mean() if (~chosen).any() else 0 for row, chosen in zip(columns, kept, strict=True)])
        low, high = np.minimum(columns.min(1), 0), np.maximum(columns.max(1), 0)
        step = (high - low) / 255
        zero = np.round(-low / step)
        return lambda place, column, live: np.where(kept[:, place], step * (np.clip(np.round(column / step) + zero, 0, 255) - zero), np.where(column < 0, -scale, scale))

    return plan


@pytest.mark.parametrize("name", ["llama", "opt"])
@pytest.mark.parametrize(("choose", "share"), [("hessian", 0.1), ("magnitude", 0.3), ("magnitude", 0.0)])
def test_it_is_elimination_with_explicit_inverses(name, choose, share):
    model = texts.reader(name)
    before = checkpoint.digest_state(model.network)
    made = PBLLM(salient=share, choose=choose, **GIVEN)(model, texts.corpus(), 0)
    hand = by_hand(model, GROUPS[name], lambda weight, moments: eliminated(weight, moments, 0.1, partly(choose, share), 16))
    close_weights(made, hand)
    assert checkpoint.digest_state(model.network) == before


def test_without_compensation_every_weight_is_its_own_affair():
    model = texts.reader("llama")
    made = PBLLM(salient=0.0, compensate=False, group=8, tokens=TOKENS, length=LENGTH)(model, texts.corpus(), 0)
    for path, module in linear_layers(model.network.model.layers).items():
        old, new = matrix(module), matrix(made.network.model.layers.get_submodule(path))
        for begin in range(0, old.shape[1], 8):
            part = old[:, begin : begin + 8]
            np.testing.assert_allclose(new[:, begin : begin + 8], np.sign(part) * np.abs(part).mean(1, keepdims=True), rtol=1e-5)


def test_random_choices_follow_the_seed_and_the_others_need_none():
    model = texts.reader("llama")
    method = PBLLM(choose="random", **GIVEN)
    digests = [checkpoint.digest_state(method(model, texts.corpus(), seed).network) for seed in (0, 0, 1)]
    assert digests[0] == digests[1] != digests[2]
    assert method.draws_random()
    assert not PBLLM().draws_random()


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_training_keeps_the_salient_and_leaves_signs(name, tmp_path):
    model = texts.reader(name)
    before = checkpoint.digest_state(model.network)
    made = PBLLMTuning(salient=0.25, learning_rate=1e-2, batch_tokens=64, length=16, precision="float32")(model, texts.corpus(), Budget(8, "steps"), 0)
    assert checkpoint.digest_state(model.network) == before
    stack = next(iter(model.anatomy.stacks))
    flipped = 0
    for path, module in linear_layers(model.network.get_submodule(stack)).items():
        old, new = matrix(module), matrix(made.network.get_submodule(f"{stack}.{path}"))
        kept = np.abs(old) >= np.sort(np.abs(old).ravel())[-round(0.25 * old.size)]
        assert np.array_equal(new[kept], old[kept])
        for row, chosen in zip(new, kept, strict=True):
            sizes = np.abs(row[~chosen])
            assert np.ptp(sizes) < 1e-6 * sizes.max() if len(sizes) else True
        flipped += int((np.sign(new) != np.sign(old)).sum())
    assert flipped
    assert torch.equal(made.network.get_input_embeddings().weight, model.network.get_input_embeddings().weight)
    assert made.history[-1]["loss"] > 0
    made.save(tmp_path)
    assert Model.load(tmp_path).plain


def test_the_gradient_passes_the_sign():
    weight = torch.tensor([[0.5, -0.25, 3.0, -0.5], [2.0, 0.1, -0.3, 0.2]])
    binary = Binary(weight, 0.25, 0)
    latent = torch.tensor([[0.5, -0.25, 9.0, -1.5], [9.0, 0.1, -0.3, 0.2]], requires_grad=True)
    made = binary(latent)
    scale = [(0.5 + 0.25 + 1.5) / 3, (0.1 + 0.3 + 0.2) / 3]
    torch.testing.assert_close(made, torch.tensor([[scale[0], -scale[0], 3.0, -scale[0]], [2.0, scale[1], -scale[1], scale[1]]]))
    slope = torch.arange(8.0).view(2, 4)
    made.backward(slope)
    torch.testing.assert_close(latent.grad, torch.tensor([[0.0, 1.0, 0.0, 0.0], [0.0, 5.0, 6.0, 7.0]]))


def test_what_cannot_be_binarized_is_refused():
    for method, more in ((PBLLM(), (0,)), (PBLLMTuning(), (Budget(1, "steps"), 0))):
        with pytest.raises(InputError, match="cannot prune experts"):
            method(small("mixtral"), texts.corpus(), *more)
        with pytest.raises(InputError, match="causal"):
            method(small("bert"), texts.corpus(), *more)
    for wrong in ({"salient": 1}, {"choose": "best"}, {"group": 0}, {"damp": 0}, {"tokens": 1}):
        with pytest.raises(ValueError, match=r"salient|choose|group|damp|tokens"):
            PBLLM(**wrong)
    with pytest.raises(ValueError, match="salient"):
        PBLLMTuning(salient=-0.1)
