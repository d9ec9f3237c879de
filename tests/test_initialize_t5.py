"""A fresh encoder–decoder: its sizes, and that its attention begins where it says."""

from __future__ import annotations

import pytest
import torch

from etude.engine.corrupt import Spans
from etude.methods.pretrain.initialize_t5 import InitializeT5
from etude.values.corpus import Corpus
from etude.values.errors import InputError
from etude.values.model import Model

TEXT = Corpus([f"def f{number}(a, b):\n    return a * {number} + b\n" for number in range(50)])
SIZE = dict(vocabulary=320, hidden_size=64, blocks=2, heads=4, intermediate_size=96)


@pytest.fixture(scope="module")
def model() -> Model:
    return InitializeT5(**SIZE)(TEXT, seed=0)


def attentions(model: Model, source: torch.Tensor, target: torch.Tensor):
    model.network.set_attn_implementation("eager")
    with torch.no_grad():
        return model.network(input_ids=source, decoder_input_ids=target, output_attentions=True)


def test_it_is_a_t5_whose_tokenizer_has_sentinels_and_which_survives_saving(model, tmp_path):
    assert (model.kind, model.base.model_type) == ("seq2seq", "t5")
    assert len(Spans.of(model).sentinels) == 32
    assert model.tokenizer.decode(model.tokenizer("return a * 3")["input_ids"]) == "return a * 3"
    model.save(tmp_path)
    again, ids = Model.load(tmp_path), torch.arange(20)[None] + 100
    assert again.config.scale_decoder_outputs is False
    with torch.no_grad():
        found = [one.network(input_ids=ids, decoder_input_ids=ids[:, :7]).logits for one in (model, again)]
    torch.testing.assert_close(*found)
    assert 0.1 < found[0].std() < 1.5  # neither flat nor sure of anything


def test_a_sentinel_in_the_target_finds_the_same_one_in_the_source():
    model = InitializeT5(**(SIZE | dict(hidden_size=192, heads=6)))(TEXT, seed=0)
    sentinels = torch.tensor(Spans.of(model).sentinels[:5])
    source = torch.arange(100, 160)[None].clone()
    places = torch.tensor([3, 17, 30, 42, 55])
    source[0, places] = sentinels
    first = attentions(model, source, sentinels[None]).cross_attentions[0][0]  # (heads, target, source)
    assert (first.argmax(2) == places).all()
    assert first[:, torch.arange(5), places].mean() > 0.3


def test_heads_of_the_encoder_look_near_by_turns_to_the_left_and_right(model):
    ids = torch.randint(100, 300, (1, 61), generator=torch.Generator().manual_seed(0))
    found = attentions(model, ids, ids)
    for head, row in enumerate(found.encoder_attentions[0][0, :, 30]):
        left, right = row[:30].sum(), row[31:].sum()
        assert (left > 5 * right) if head % 2 == 0 else (right > 5 * left)
    assert found.encoder_attentions[0][0, 0, 30, 28:31].sum() > 0.8
    assert found.decoder_attentions[0][0, 0, 30, 28:31].sum() > 0.8


def test_seeds_give_other_weights_and_the_same_tokenizer(model):
    other = InitializeT5(**SIZE)(TEXT, seed=1)
    assert not torch.equal(other.network.shared.weight, model.network.shared.weight)
    assert other.tokenizer.get_vocab() == model.tokenizer.get_vocab()


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="sentinels"):
        InitializeT5(vocabulary=280)
    with pytest.raises(ValueError, match="multiple of heads"):
        InitializeT5(heads=5)
    with pytest.raises(InputError, match="empty"):
        InitializeT5()(Corpus(TEXT.table.slice(0, 0)), seed=0)
