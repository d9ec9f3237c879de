"""Waiting times on a clock of our own, and the tokens that are read meanwhile."""

from __future__ import annotations

import numpy as np
import pytest
import texts
import torch

from etude.engine import cost
from etude.measures import latency
from etude.measures.latency import Latency
from etude.values.errors import InputError


@pytest.fixture
def clock(monkeypatch):
    """Advances as each of some networks reads: by 1 second a prompt token and 10 a further one, times a factor that changes from run to run."""
    state = {"now": 0.0, "runs": [], "read": []}

    def watch(model, factors):
        forward, left = model.network.forward, iter(factors)

        def timed(*arguments, input_ids, **named):
            if input_ids.shape[1] > 1:
                state["factor"] = next(left)
            state["read"].append(tuple(input_ids.shape))
            state["now"] += state["factor"] * (input_ids.shape[1] if input_ids.shape[1] > 1 else 10)
            return forward(*arguments, input_ids=input_ids, **named)

        timed.__signature__ = latency.inspect.signature(forward)
        model.network.forward = timed

    monkeypatch.setattr(latency, "_now", lambda device: state["now"])
    state["watch"] = watch
    return state


def test_items_are_medians_of_runs_and_the_warm_up_does_not_count(clock):
    models = [texts.reader("llama"), texts.reader("gpt2")]
    clock["watch"](models[0], [1000] * 3 + [3, 1, 500] + [2, 9, 4])
    clock["watch"](models[1], [1000] * 3 + [1, 1, 1] + [1, 1, 7])
    first, further, other_first, other_further = Latency(rounds=2, repeats=3, prompt=5, batch=3, new=4)(models)
    assert first.items.tolist() == [3 * 5, 4 * 5]
    assert further.items.tolist() == [3 * 10, 4 * 10]
    assert (other_first.items.tolist(), other_further.items.tolist()) == ([5, 5], [10, 10])
    assert [(part.name, part.unit, part.better) for part in (first, further)] == [("first_token", "s", "lower"), ("further_token", "s/token", "lower")]
    assert clock["read"] == [(3, 5), *[(3, 1)] * 4] * 18
    assert first.item_names == ("round 1", "round 2")


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "mamba"])
def test_the_further_tokens_are_those_of_a_model_that_reads_all_anew(name):
    """What is timed is generating: each token follows from all before it."""
    model = texts.reader(name)
    forward, read = model.network.forward, []

    def watched(*arguments, input_ids, **named):
        read.append(input_ids)
        return forward(*arguments, input_ids=input_ids, **named)

    watched.__signature__ = latency.inspect.signature(forward)
    model.network.forward = watched
    with cost.metered() as bill:
        Latency(rounds=1, repeats=1, prompt=6, batch=2, new=4)([model])
    assert bill.tokens == 2 * 2 * (6 + 4)
    said = torch.cat(read[:5], dim=1)
    assert said.shape == (2, 10)
    with torch.no_grad():
        expected = forward(input_ids=said, use_cache=False).logits[:, 5:9].argmax(-1)
    assert said[:, 6:].tolist() == expected.tolist()


def test_a_longer_prompt_and_a_larger_batch_take_longer():
    model = texts.reader("llama")
    short, _ = Latency(rounds=2, prompt=4, new=1)([model])
    long, _ = Latency(rounds=2, prompt=60, batch=64, new=1)([model])
    assert np.all(short.items > 0)
    assert long.value > 2 * short.value


def test_other_models_and_numbers_are_refused():
    with pytest.raises(InputError, match="reads 64 tokens, and a prompt of 60 with 16 new ones"):
        Latency(prompt=60)([texts.reader("gpt2")])
    with pytest.raises(InputError, match="causal"):
        Latency()([texts.reader("bert")])
    for name in ("rounds", "repeats", "prompt", "batch", "new"):
        with pytest.raises(ValueError, match=f"{name} is at least 1"):
            Latency(**{name: 0})
