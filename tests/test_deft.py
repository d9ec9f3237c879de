"""Activation density counted by hand, and the penalty that lowers it, against sums written out."""

from __future__ import annotations

import numpy as np
import pytest
import texts
import torch
from architectures import small

from etude.engine import batch
from etude.engine.budget import Budget
from etude.engine.feed import Packed
from etude.measures.activation_density import ActivationDensity
from etude.methods.adapt.lora import LoRA
from etude.methods.compress.deft import DEFT
from etude.methods.pretrain.initialize import Initialize
from etude.values import checkpoint
from etude.values.anatomy import weight_of
from etude.values.corpus import Corpus
from etude.values.errors import InputError
from etude.values.model import Model

SMALL = dict(batch_tokens=64, length=32, learning_rate=1e-2)
CORPUS = Corpus(texts.SENTENCES * 4)


def middle(name: str, model: Model, ids: torch.Tensor) -> list[torch.Tensor]:
    """What every block's feed-forward layer holds between its two sides, found by the names of this architecture's modules: (length, channels) each."""
    network, found = model.network, []
    blocks = {"llama": "model.layers", "gpt2": "transformer.h", "opt": "model.decoder.layers", "gpt_neox": "gpt_neox.layers"}[name]
    second = {"llama": "mlp.down_proj", "gpt2": "mlp.c_proj", "opt": "fc2", "gpt_neox": "mlp.dense_4h_to_h"}[name]
    hooks = [block.get_submodule(second).register_forward_pre_hook(lambda module, args: found.append(args[0].detach().reshape(-1, args[0].shape[-1]))) for block in network.get_submodule(blocks)]
    with torch.no_grad():
        network(input_ids=ids)
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.parametrize(("name", "threshold"), [("opt", 0.0), ("gpt2", 0.05), ("llama", 0.05)])
def test_density_is_the_share_of_activations_above_the_threshold(name, threshold):
    model = texts.reader(name).frozen_now()
    before = model.digest
    (found,) = ActivationDensity(threshold=threshold, window=30)(model, texts.corpus())
    assert model.digest == before
    shares, tokens = [], []
    for sentence in texts.SENTENCES:
        ids = [texts.END, *model.tokenizer(sentence)["input_ids"]][:30]
        layers = middle(name, model, torch.tensor([ids]))
        shares.append(np.mean([(layer.abs() > threshold).float().mean().item() for layer in layers]))
        tokens.append(len(ids))
    assert np.allclose(found.items, shares, atol=1e-6)
    assert found.value == pytest.approx(np.average(shares, weights=tokens))
    assert (found.name, found.better) == ("density", "lower")
    assert 0.1 < found.value < 0.95, "a threshold that tells nothing apart"


@pytest.mark.parametrize("name", ["gpt_neox", "llama"])  # without dropout
@pytest.mark.parametrize("penalty", ["density", "magnitude"])
def test_the_first_step_says_the_penalty_of_the_untouched_model(name, penalty):
    """B is zero at first: the loss of the first step is that of the model, plus the weighted penalty, both written out here over the packed rows."""
    model = texts.reader(name).frozen_now()
    feed = Packed(batch.Documents(model, CORPUS), 32)
    feed.begin(5)
    rows = feed.take(2, 0.0)
    method = DEFT(weight=3.0, epsilon=1e-3, penalty=penalty, **SMALL)
    tuned = method(model, CORPUS, Budget(1, "steps"), seed=5)
    total = penalties = count = 0.0
    for row in rows:
        positions = np.arange(32) if row.positions is None else row.positions
        begins = [*np.flatnonzero(positions == 0), 32]
        labels = np.full(32, -100) if row.labels is None else row.labels
        for begin, end in zip(begins, begins[1:]):  # noqa: B905, RUF007
            ids = torch.from_numpy(row.ids[begin:end])[None]
            with torch.no_grad():
                logs = model.network(input_ids=ids).logits[0].log_softmax(1)
            wanted = labels[begin:end]
            total -= sum(logs[place, label].item() for place, label in enumerate(wanted) if label >= 0)
            count += (wanted >= 0).sum()
            for layer in middle(name, model, ids):
                value = layer.abs() if penalty == "magnitude" else layer**2 / (layer**2 + 1e-3)
                penalties += value.mean(1).sum().item() / 64 / len(model.anatomy.blocks)
    (first,) = tuned.history
    assert first[penalty] == pytest.approx(penalties, rel=1e-3)
    assert first["loss"] == pytest.approx(total / count + 3.0 * penalties, rel=1e-3)


def test_without_weight_it_is_lora():
    model = texts.reader("llama").frozen_now()
    settings = dict(rank=4, alpha=8.0, **SMALL)
    plain = LoRA(**settings)(model, CORPUS, Budget(4, "steps"), seed=2)
    ours = DEFT(weight=0.0, **settings)(model, CORPUS, Budget(4, "steps"), seed=2)
    for path in (path for block in model.anatomy.blocks for path in model.anatomy.linears(block)):
        old, one, two = (weight_of(each.network.get_submodule(path)) for each in (model, plain, ours))
        assert torch.allclose(one, two, atol=1e-5)
        assert not torch.allclose(one, old, atol=1e-4)


def test_a_relu_network_gets_sparser_and_its_shape_stays(tmp_path):
    model = texts.reader("opt").frozen_now()
    before, measure = model.digest, ActivationDensity(window=30)
    plain = DEFT(weight=0.0, **SMALL)(model, CORPUS, Budget(30, "steps"), seed=0)
    sparse = DEFT(weight=5.0, epsilon=1e-1, **SMALL)(model, CORPUS, Budget(30, "steps"), seed=0)
    assert model.digest == before
    densities = [measure(one, texts.corpus())[0].value for one in (plain, sparse)]
    assert densities[1] < 0.8 * densities[0]
    assert checkpoint.shapes(sparse.network) == checkpoint.shapes(model.network)
    assert not any(part._forward_pre_hooks for part in sparse.network.modules())
    assert all(parameter.requires_grad for parameter in sparse.network.parameters())
    sparse.export(tmp_path)


def test_padding_counts_in_no_penalty_of_a_masked_model():
    read = torch.tensor([[[0.0, 2.0], [1.0, 0.0]], [[3.0, 0.0], [50.0, 50.0]]])
    mask = torch.tensor([[True, True], [True, False]])
    assert DEFT(penalty="magnitude").penalised(read, mask).item() == pytest.approx(6 / 6)
    assert DEFT(epsilon=1.0).penalised(read, mask).item() == pytest.approx((0.8 + 0.5 + 0.9) / 6)
    model = Initialize(kind="masked", vocabulary=300, hidden_size=32, blocks=2, heads=4, key_value_heads=2, intermediate_size=48, max_length=128)(CORPUS, seed=0)
    tuned = DEFT(epsilon=1e-4, **SMALL)(model, CORPUS, Budget(12, "steps"), seed=0)
    assert 0 < tuned.history[-1]["density"] < 1
    assert np.isfinite(ActivationDensity()(tuned, CORPUS)[0].items).all()


def test_what_does_not_fit_is_refused():
    for settings in (dict(weight=-1), dict(epsilon=0), dict(penalty="l0"), dict(rank=0), dict(alpha=0), dict(share=1)):
        with pytest.raises(ValueError, match="got"):
            DEFT(**settings)
    with pytest.raises(ValueError, match="threshold"):
        ActivationDensity(threshold=-1)
    seq2seq = Model(small("t5").network, texts.tokenizer())
    experts = Model(small("mixtral").network, texts.tokenizer())
    with pytest.raises(InputError, match="and this is a seq2seq"):
        DEFT()(seq2seq, CORPUS, Budget(1, "steps"), seed=0)
    with pytest.raises(InputError, match="and this is a seq2seq"):
        ActivationDensity()(seq2seq, CORPUS)
    with pytest.raises(InputError, match="without experts"):
        DEFT()(experts, CORPUS, Budget(1, "steps"), seed=0)
    with pytest.raises(InputError, match="without experts"):
        ActivationDensity(window=30)(experts, CORPUS)
