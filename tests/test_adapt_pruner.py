"""Adapt-Pruner: shares against the formula spelt out, what goes against brute force, sizes round by round, and one schedule over all rounds."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import texts
import torch
import transformers
from test_gradients import ARRAYS
from test_llm_pruner import llama_by_hand
from texts import LENGTH, ROWS, TOKENS

from etude.engine.budget import Budget
from etude.engine.optimize import scale
from etude.engine.train import Recipe
from etude.methods.compress import adapt_pruner
from etude.methods.compress.adapt_pruner import AdaptPruner, Pruning
from etude.methods.pretrain.causal_lm import CausalLM
from etude.values import checkpoint
from etude.values.corpus import Corpus
from etude.values.errors import InputError
from etude.values.model import Model

TRAINING = {"learning_rate": 1e-3, "batch_tokens": 80, "length": LENGTH, "precision": "float32"}
METHOD = AdaptPruner(ratio=0.3, rounds=3, step=0.1, amplitude=0.1, tokens=TOKENS, **TRAINING)


def parameters(model: Model) -> int:
    return sum(parameter.numel() for block in model.anatomy.blocks for parameter in block.module.parameters())


def turned(model: Model) -> list[float]:
    """One minus the cosine of what enters and leaves each block, from transformers' own hidden states, the last before the final norm."""
    sums, count = [0.0] * len(model.network.model.layers), 0
    entered: list[torch.Tensor] = []
    handles = [layer.register_forward_hook(lambda module, args, output: entered.append((args[0], output if isinstance(output, torch.Tensor) else output[0]))) for layer in model.network.model.layers]
    for row in ROWS:
        entered.clear()
        with torch.no_grad():
            model.network(input_ids=torch.tensor([row]), use_cache=False)
        for place, (before, after) in enumerate(entered):
            for one, other in zip(before[0], after[0], strict=True):
                sums[place] += 1 - float(one @ other) / float(one.norm() * other.norm())
        count += len(row)
    for handle in handles:
        handle.remove()
    return [total / count for total in sums]


def test_a_step_takes_more_where_hidden_states_change_less_and_there_what_matters_least():
    model = texts.reader("llama")
    changes = turned(model)
    mean = sum(changes) / 3
    most = max(abs(one - mean) for one in changes)
    wanted = [0.2 - 0.15 * (one - mean) / most for one in changes]
    scores = [llama_by_hand(model, block)[1] for block in range(3)]
    draft = model.copy()
    pruning = Pruning(draft, ARRAYS, step=0.2, amplitude=0.15)
    pruning.prune(0.1)  # less than a step: it is shortened, each block by the same part
    part = pruning.shares / np.array(wanted)
    assert 0 < part[0] < 1
    assert part == pytest.approx([part[0]] * 3, rel=1e-3)
    for block in range(3):
        gone = int(48 * pruning.shares[block])
        kept = sorted(np.argsort(scores[block])[gone:].tolist())
        assert torch.equal(draft.network.model.layers[block].mlp.up_proj.weight, model.network.model.layers[block].mlp.up_proj.weight[kept])
        assert torch.equal(draft.network.model.layers[block].mlp.down_proj.weight, model.network.model.layers[block].mlp.down_proj.weight[:, kept])
    assert len({len(draft.network.model.layers[block].mlp.up_proj.weight) for block in range(3)}) > 1


def test_shares_add_up_from_the_model_as_it_came_and_are_measured_anew(monkeypatch):
    seen = []
    pruning = Pruning(texts.reader("llama").copy(), ARRAYS, step=0.1, amplitude=0.05)

    def changes(draft, rows):
        seen.append([block.feed_forward.channels for block in draft.anatomy.blocks])
        return np.array([[3.0, 1.0, 2.0], [1.0, 3.0, 2.0], [5.0, 5.0, 5.0]][len(seen) - 1])

    monkeypatch.setattr(adapt_pruner, "block_changes", changes)
    pruning.prune(3 * 32 * 27 / pruning.total)
    assert seen[0] == [48, 48, 48]
    assert seen[1] == [48 - 2, 48 - 7, 48 - 4]  # shares 0.05, 0.15, 0.1 of 48, rounded down
    assert [block.feed_forward.channels for block in pruning.draft.anatomy.blocks] == [48 - 9] * 3  # 0.2 of each after two steps
    assert len(seen) == 2


def test_without_amplitude_all_blocks_lose_alike():
    for amplitude, alike in ((0.0, True), (0.1, False)):
        pruning = Pruning(texts.reader("llama").copy(), ARRAYS, step=0.1, amplitude=amplitude)
        pruning.prune(0.3)
        assert (len({block.feed_forward.channels for block in pruning.draft.anatomy.blocks}) == 1) == alike


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen2"])
@pytest.mark.parametrize("ratio", [0.1, 0.37, 0.6])
def test_sizes_are_met(name, ratio):
    model = texts.reader(name)
    pruning = Pruning(model.copy(), ARRAYS, step=0.2, amplitude=0.1)
    pruning.prune(ratio)
    assert 1 - parameters(pruning.draft) / parameters(model) == pytest.approx(ratio, abs=0.02 if name == "gpt2" else 0.05)  # two groups of heads are coarse
    assert pruning.total - pruning.cost(pruning.shares) == parameters(pruning.draft)


def test_rounds_prune_and_train_in_turn_under_one_schedule(monkeypatch):
    model, seen = texts.reader("gpt2"), []

    def train(draft, feed, recipe: Recipe, budget, seed, note):
        seen.append((parameters(draft), budget, [recipe.schedule(one) for one in (0.25, 1.0)], recipe.warmup, seed))

    monkeypatch.setattr(adapt_pruner, "train", train)
    dataclasses.replace(METHOD, rounds=4, schedule="cosine")(model, texts.corpus(), Budget(100, "tokens"), 7)
    assert [1 - size / parameters(model) for size, *_ in seen] == pytest.approx([0.075, 0.15, 0.225, 0.3], abs=0.02)
    assert [budget for _, budget, *_ in seen] == [Budget(25, "tokens")] * 4
    assert [rate for *_, rates, _, _ in seen for rate in rates] == pytest.approx([scale("cosine", (number + at) / 4, 0.05) for number in range(4) for at in (0.25, 1.0)])
    assert all(warmup == 0 for *_, warmup, _ in seen)
    assert [seed for *_, seed in seen] == [7, 8, 9, 10]
    seen.clear()
    dataclasses.replace(METHOD, rounds=4)(model, texts.corpus(), Budget(10, "steps"), 7)
    assert [budget.amount for _, budget, *_ in seen] == [2, 3, 3, 2]
    seen.clear()
    dataclasses.replace(METHOD, rounds=4)(model, texts.corpus(), Budget(2, "steps"), 7)
    assert [budget.amount for _, budget, *_ in seen] == [1, 1]
    assert 1 - seen[-1][0] / parameters(model) == pytest.approx(0.3, abs=0.02)


def test_one_round_is_pruning_then_training():
    model = texts.reader("llama")
    found = dataclasses.replace(METHOD, rounds=1, schedule="constant", warmup=0.0)(model, texts.corpus(), Budget(3, "steps"), 3)
    pruning = Pruning(model.copy(), ARRAYS, 0.1, 0.1)
    pruning.prune(0.3)
    by_hand = CausalLM(schedule="constant", warmup=0.0, **TRAINING)(pruning.draft.frozen_now(), texts.corpus(), Budget(3, "steps"), 3)
    assert checkpoint.digest_state(found.network) == checkpoint.digest_state(by_hand.network)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_the_model_stays_and_the_smaller_one_loads_in_plain_transformers(name, tmp_path):
    model = texts.reader(name).frozen_now()
    before, corpus = checkpoint.digest_state(model.network), texts.corpus()
    digest = corpus.digest
    found = METHOD(model, corpus, Budget(4, "steps"), 3)
    assert checkpoint.digest_state(model.network) == before
    assert corpus.digest == digest
    assert all(parameter.grad is None for parameter in model.network.parameters())
    assert parameters(found) < 0.8 * parameters(model)
    found.export(tmp_path)
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    ids = torch.tensor([ROWS[0]])
    with torch.no_grad():
        assert torch.allclose(plain(input_ids=ids).logits, found.network(input_ids=ids).logits, atol=1e-4)


def test_what_is_wrong_is_refused():
    for wrong, message in [
        ({"ratio": 0.0}, r"less than 1, got 0\.0; for half pass 0\.5"),
        ({"rounds": 0}, "rounds is at least 1, got 0"),
        ({"step": 1.0}, r"less than 1, got 1\.0; for a fiftieth pass 0\.02"),
        ({"amplitude": -1.0}, r"amplitude is at least 0, got -1\.0"),
        ({"tokens": 1}, "tokens is at least 2"),
        ({"schedule": "sometimes"}, "schedule is one of"),
    ]:
        with pytest.raises(ValueError, match=message):
            AdaptPruner(**wrong)
    budget = Budget(2, "steps")
    with pytest.raises(InputError, match="needs a causal language model, and this is a masked one"):
        METHOD(texts.reader("bert"), texts.corpus(), budget, 0)
    with pytest.raises(InputError, match="cannot prune experts"):
        METHOD(texts.reader("mixtral"), texts.corpus(), budget, 0)
    with pytest.raises(InputError, match=r"ratio 0\.97 cannot be met: with 99% of the heads and channels of every block 0\.\d\d of"):
        dataclasses.replace(METHOD, ratio=0.97)(texts.reader("llama"), texts.corpus(), budget, 0)
    with pytest.raises(InputError, match="the corpus is empty"):
        METHOD(texts.reader("llama"), Corpus([]), budget, 0)
    with pytest.raises(InputError, match="no block may lose more"):
        dataclasses.replace(METHOD, ratio=0.75, step=0.5, amplitude=1.0)(texts.reader("llama"), texts.corpus(), budget, 0)
