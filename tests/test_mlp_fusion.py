"""MLP fusion: k-means against another implementation, fused layers against a sum over clusters, and its training against Adam's first step."""

from __future__ import annotations

import numpy as np
import pytest
import texts
import torch
from architectures import small

from etude.engine.budget import Budget
from etude.methods.compress._clusters import clusters, inertia
from etude.methods.compress.mlp_fusion import RULES, MLPFusion
from etude.methods.compress.mlp_fusion_tuning import MLPFusionTuning
from etude.methods.pretrain.causal_lm import CausalLM
from etude.values import checkpoint
from etude.values.anatomy import weight_of
from etude.values.corpus import Corpus
from etude.values.errors import InputError
from etude.values.model import Model

ARCHITECTURES = ["llama", "phi3", "gpt2", "gpt_neox", "opt", "bert", "t5", "bart"]


def logits(model: Model) -> torch.Tensor:
    return checkpoint.outputs(model.network, checkpoint.probe(model.network))


def rows_of(model: Model, layer) -> np.ndarray:
    """Units spelt out one number after another, (units, weights)."""
    found = []
    for channel in range(layer.channels):
        unit: list[float] = []
        for path, offsets in layer.inputs.items():
            module = model.network.get_submodule(path)
            for offset in offsets:
                unit += weight_of(module)[offset + channel].tolist()
                if getattr(module, "bias", None) is not None:
                    unit.append(module.bias[offset + channel].item())
        found.append(unit + weight_of(model.network.get_submodule(layer.output))[:, channel].tolist())
    return np.array(found, np.float32)


# K-means.


def test_clusters_that_lie_apart_are_found():
    random = torch.Generator().manual_seed(0)
    truth = torch.arange(60) % 6
    points = 20 * torch.randn(6, 9, generator=random)[truth] + 0.1 * torch.randn(60, 9, generator=random)
    found = clusters(points, 6, 3, random)
    assert len({(int(a), int(b)) for a, b in zip(truth, found, strict=True)}) == 6


@pytest.mark.parametrize("count", [3, 12, 40])
def test_clusters_are_as_tight_as_those_of_scikit_learn(count):
    sklearn = pytest.importorskip("sklearn.cluster")
    points = np.random.default_rng(1).standard_t(4, size=(80, 7)).astype(np.float32)
    reference = sklearn.KMeans(count, n_init=30, random_state=0).fit(points)
    found = clusters(torch.from_numpy(points), count, 30, torch.Generator().manual_seed(2))
    by_hand = sum(((points[found.numpy() == one] - points[found.numpy() == one].mean(0)) ** 2).sum() for one in range(count))
    assert inertia(torch.from_numpy(points), found, count) == pytest.approx(by_hand, rel=1e-5)
    assert by_hand < 1.02 * reference.inertia_
    assert sorted(set(found.tolist())) == list(range(count))


def test_nothing_moves_any_more_in_what_k_means_gives():
    points = torch.randn(50, 4, generator=torch.Generator().manual_seed(3))
    labels = clusters(points, 8, 1, torch.Generator().manual_seed(4))
    means = torch.stack([points[labels == one].mean(0) for one in range(8)])
    assert torch.cdist(points, means).argmin(1).equal(labels)


def test_points_that_are_all_alike_still_fill_every_cluster():
    labels = clusters(torch.ones(9, 3), 4, 2, torch.Generator().manual_seed(0))
    assert sorted(set(labels.tolist())) == [0, 1, 2, 3]


# Fusing.


def repeated(name: str, distinct: int) -> Model:
    """A model in whose feed-forward layers only so many units are different, the others copies of them."""
    model = small(name)
    for block in model.anatomy.blocks:
        layer = block.feed_forward
        source = [channel if channel < distinct else (channel * channel) % distinct for channel in range(layer.channels)]
        for path, offsets in layer.inputs.items():
            module = model.network.get_submodule(path)
            for offset in offsets:
                rows = slice(offset, offset + layer.channels)
                weight_of(module).detach()[rows] = weight_of(module).detach()[rows][source].clone()
                if getattr(module, "bias", None) is not None:
                    module.bias.detach()[rows] = module.bias.detach()[rows][source].clone()
        columns = weight_of(model.network.get_submodule(layer.output)).detach()
        columns.copy_(columns[:, source].clone())
    return model


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_units_that_are_copies_are_fused_without_loss(name):
    model = repeated(name, 12).frozen_now()
    channels = model.anatomy.blocks[0].feed_forward.channels
    fused = MLPFusion(width=12 / channels, spared=0.0, restarts=3)(model, seed=1)
    assert {block.feed_forward.channels for block in fused.anatomy.blocks} == {12}
    assert torch.allclose(logits(fused), logits(model), atol=1e-4 * logits(model).abs().max().item())
    for choose in ("magnitude", "sketch", "random"):
        other = MLPFusion(width=12 / channels, spared=0.0, choose=choose)(model, seed=1)
        assert not torch.allclose(logits(other), logits(model), atol=1e-2 * logits(model).abs().max().item())


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_a_fused_unit_is_the_mean_of_its_cluster_and_writes_as_often_as_it_has_members(name):
    model = small(name)
    fused = MLPFusion(width=0.25, spared=0.4, restarts=2)(model, seed=0)
    counts = MLPFusion(width=0.25, spared=0.4, restarts=2).narrow(model.copy(), 0)
    for place, (old, new) in enumerate(zip(model.anatomy.blocks, fused.anatomy.blocks, strict=True)):
        before, after = rows_of(model, old.feed_forward), rows_of(fused, new.feed_forward)
        if place < 1:  # 0.4 of three blocks
            assert np.array_equal(before, after)
            continue
        assert len(after) == len(before) // 4
        sizes = counts[old.feed_forward.output].numpy()
        means = after.copy()
        means[:, -32:] /= sizes[:, None]
        cluster = ((before[:, None].astype(np.float64) - means[None]) ** 2).sum(2).argmin(1)
        assert np.array_equal(np.bincount(cluster, minlength=len(after)), sizes)
        for unit in range(len(after)):
            assert np.abs(before[cluster == unit].mean(0) - means[unit]).max() < 1e-5


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_magnitude_keeps_the_units_with_the_largest_product_of_norms(name):
    model = small(name)
    pruned = MLPFusion(width=0.5, spared=0.0, choose="magnitude")(model, seed=0)
    for old, new in zip(model.anatomy.blocks, pruned.anatomy.blocks, strict=True):
        before = rows_of(model, old.feed_forward)
        scores = [np.sqrt((unit[:-32] ** 2).sum() * (unit[-32:] ** 2).sum()) for unit in before]
        best = sorted(sorted(range(len(before)), key=lambda unit: -scores[unit])[: len(before) // 2])
        assert np.array_equal(rows_of(pruned, new.feed_forward), before[best])


def test_a_sketch_keeps_a_linear_layer_on_average():
    """With S Gaussian the mean of W₂ S Sᵀ W₁ is W₂ W₁."""
    model = small("gpt2")
    layer = model.anatomy.blocks[0].feed_forward
    units = rows_of(model, layer).astype(np.float64)
    whole = units[:, -32:].T @ units[:, :-32]
    total = np.zeros_like(whole)
    for seed in range(60):
        sketch = rows_of(pruned := MLPFusion(width=0.5, spared=0.0, choose="sketch")(model, seed=seed), pruned.anatomy.blocks[0].feed_forward).astype(np.float64)
        total += sketch[:, -32:].T @ sketch[:, :-32]
    assert np.abs(total / 60 - whole).mean() < 0.3 * np.abs(whole).mean()
    assert np.corrcoef((total / 60).ravel(), whole.ravel())[0, 1] > 0.95


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
@pytest.mark.parametrize("choose", RULES)
def test_the_model_stays_and_the_fused_one_is_saved_and_exported(name, choose, tmp_path):
    model = small(name).frozen_now()
    before = checkpoint.digest_state(model.network)
    fused = MLPFusion(width=0.25, choose=choose, restarts=2)(model, seed=3)
    assert checkpoint.digest_state(model.network) == before
    assert fused.frozen
    assert fused.parameters < model.parameters
    fused.save(tmp_path / "saved")
    assert torch.allclose(logits(Model.load(tmp_path / "saved")), logits(fused), atol=1e-5 * logits(fused).abs().max().item())
    fused.export(tmp_path / "exported")
    import transformers

    plain = type(fused.network).from_pretrained(tmp_path / "exported")
    assert isinstance(plain, transformers.PreTrainedModel)
    assert torch.allclose(checkpoint.outputs(plain.eval(), checkpoint.probe(plain)), logits(fused), atol=1e-4 * logits(fused).abs().max().item())


def test_blocks_of_equal_width_make_a_plain_checkpoint(tmp_path):
    fused = MLPFusion(width=0.5, spared=0.0, restarts=1)(small("llama"), seed=0)
    assert fused.plain
    fused.save(tmp_path)
    assert Model.load(tmp_path).config.intermediate_size == 24


def test_wrong_settings_and_models_are_refused():
    for width in (0, 1, -0.1):
        with pytest.raises(ValueError, match=f"less than 1, got {width}"):
            MLPFusion(width=width)
        with pytest.raises(ValueError, match=f"less than 1, got {width}"):
            MLPFusionTuning(width=width)
    with pytest.raises(ValueError, match="spared is a share of the blocks"):
        MLPFusion(spared=1)
    with pytest.raises(ValueError, match="choose is one of fusion, magnitude, sketch, random, got 'best'"):
        MLPFusion(choose="best")
    with pytest.raises(ValueError, match="restarts is at least 1, got 0"):
        MLPFusion(restarts=0)
    with pytest.raises(InputError, match="has them"):
        MLPFusion()(small("mixtral"), seed=0)
    with pytest.raises(InputError, match="no feed-forward layers to narrow in this mamba"):
        MLPFusion()(small("mamba"), seed=0)
    with pytest.raises(InputError, match="has them"):
        MLPFusionTuning()(small("mixtral"), texts.corpus(), Budget(1, "steps"), seed=0)


# Training.

ONE = dict(width=0.25, spared=0.4, restarts=2)
STEP = dict(schedule="constant", warmup=0.0, weight_decay=0.0, batch_tokens=256, length=32, learning_rate=1e-4, precision="float32")


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_step_of_adam_moves_outgoing_weights_by_the_size_of_their_cluster(name):
    """Adam's first step is the learning rate in the direction of the gradient's sign; with the sizes apart it counts as often as the unit does."""
    model = texts.reader(name).frozen_now()
    before = checkpoint.digest_state(model.network)
    counts = MLPFusion(**ONE).narrow(model.copy(), 0)
    fused = MLPFusion(**ONE)(model, seed=0)
    apart = MLPFusionTuning(**ONE, **STEP)(model, texts.corpus(), Budget(1, "steps"), seed=0)
    folded = CausalLM(**STEP)(fused, texts.corpus(), Budget(1, "steps"), seed=0)
    assert checkpoint.digest_state(model.network) == before
    assert set(counts) == {model.anatomy.blocks[place].feed_forward.output for place in (1, 2)}
    for path, module in fused.network.named_modules():
        if not (isinstance(module, torch.nn.Linear) or type(module).__name__ == "Conv1D") or path == "lm_head":
            continue
        start = weight_of(module)
        moved, plain = (((weight_of(model.network.get_submodule(path)) - start) / STEP["learning_rate"]).detach() for model in (apart, folded))
        sizes = counts.get(path, torch.ones(start.shape[1]))
        sure = plain.abs() > 0.99  # some gradients are as small as Adam's epsilon
        assert sure.float().mean() > 0.8
        assert torch.allclose((moved / sizes)[sure], plain[sure], atol=0.02)
    assert max(sizes.max() for sizes in counts.values()) > 1


def test_without_a_step_the_sizes_change_nothing():
    model = texts.reader("llama")
    idle = MLPFusionTuning(**ONE, **{**STEP, "learning_rate": 1e-30})(model, texts.corpus(), Budget(1, "steps"), seed=0)
    assert torch.allclose(logits(idle), logits(MLPFusion(**ONE)(model, seed=0)), atol=1e-5)
    assert len(idle.history) == 1
    assert {type(module) for module in idle.network.modules()} == {type(module) for module in model.network.modules()}


def test_completions_alone_are_learnt_where_there_are_prompts():
    model = texts.reader("llama")
    pairs = Corpus([{"prompt": "Q: tide\nA:", "completion": " out", "text": "nothing of this"}] * 8)
    others = Corpus([{"prompt": "Q: tide\nA:", "completion": " out", "text": "else"}] * 8)
    one, same = (MLPFusionTuning(**ONE, **STEP)(model, corpus, Budget(2, "steps"), seed=0) for corpus in (pairs, others))
    assert checkpoint.digest_state(one.network) == checkpoint.digest_state(same.network)


def test_a_masked_model_is_tuned_by_restoring(tiny):
    model = Model.load(tiny / "masked")
    tuned = MLPFusionTuning(**ONE, **STEP)(model, Corpus.read(tiny / "text.jsonl"), Budget(2, "steps"), seed=0)
    assert tuned.kind == "masked"
    assert tuned.parameters < model.parameters
