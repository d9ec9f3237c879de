"""LoRA: what it merges, what it leaves alone, and that it learns."""

from __future__ import annotations

import pytest
import torch
from texts import reader

from etude.engine import batch
from etude.engine.budget import Budget
from etude.engine.score import mean_loss
from etude.methods.adapt import lora
from etude.methods.adapt.lora import LoRA
from etude.values import checkpoint
from etude.values.anatomy import weight_of
from etude.values.corpus import Corpus
from etude.values.errors import InputError
from etude.values.model import Model

TEXT = Corpus(["the cat sat on the mat and the dog sat on the log. ", "a cat and a dog sat on a mat. "] * 4)
STEPS = Budget(3, "steps")


def small_lora(**fields) -> LoRA:
    return LoRA(**{"rank": 2, "alpha": 6.0, "learning_rate": 0.02, "batch_tokens": 64, "length": 32, "schedule": "constant", "warmup": 0.0, **fields})


def cut(name: str) -> Model:
    """A model without its second block, and with other channels gone from each block that stays."""
    model = reader(name)
    model.anatomy.drop([1])
    model.anatomy.drop_channels({0: [0, 5, 7], 1: list(range(10, 30))})
    return model.frozen_now()


MODELS = {"llama": lambda: reader("llama").frozen_now(), "gpt2": lambda: reader("gpt2").frozen_now(), "cut llama": lambda: cut("llama"), "cut gpt2": lambda: cut("gpt2")}


def requests(model: Model) -> dict[str, bool]:
    return {name: parameter.requires_grad for name, parameter in model.network.named_parameters()}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("targets", ["all", "attention"])
def test_what_comes_out_is_the_base_plus_the_scaled_product(name, targets, monkeypatch, tmp_path):
    model = MODELS[name]()
    before, asked = checkpoint.digest_state(model.network), requests(model)
    caught = {}

    def watch(network: torch.nn.Module) -> None:
        for path, module in network.named_modules():
            if hasattr(module, "lora_A"):
                caught[path] = (module.lora_A["default"].weight.detach().clone(), module.lora_B["default"].weight.detach().clone())
        assert {key for key, parameter in network.named_parameters() if parameter.requires_grad} == {f"{p}.lora_{x}.default.weight" for p in caught for x in "AB"}
        merge(network)

    merge = lora.merge
    monkeypatch.setattr(lora, "merge", watch)
    adapted = small_lora(targets=targets)(model, TEXT, STEPS, 0)

    assert checkpoint.digest_state(model.network) == before
    assert set(caught) == wanted_paths(model, targets)
    for path, (a, b) in caught.items():
        assert b.abs().max() > 0
        by_hand = weight_of(model.network.get_submodule(path)) + 6.0 / 2 * (b @ a)
        torch.testing.assert_close(weight_of(adapted.network.get_submodule(path)), by_hand, atol=1e-6, rtol=1e-6)
    changed = {key for key, tensor in adapted.network.state_dict().items() if not torch.equal(tensor, model.network.state_dict()[key])}
    assert changed == {f"{path}.weight" for path in caught}
    check_plain(adapted, model, asked)
    adapted.save(tmp_path)
    assert checkpoint.digest_state(Model.load(tmp_path).network) == checkpoint.digest_state(adapted.network)


def wanted_paths(model: Model, targets: str) -> set[str]:
    """The answer written by name, which the method itself never does."""
    suffixes = {
        ("llama", "all"): ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"), ("llama", "attention"): ("q_proj", "k_proj", "v_proj"),
        ("gpt2", "all"): ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"), ("gpt2", "attention"): ("attn.c_attn",),
    }[model.base.model_type, targets]  # fmt: skip
    return {path for path, _ in model.network.named_modules() if path.endswith(suffixes)}


def check_plain(adapted: Model, model: Model, asked: dict[str, bool]) -> None:
    """Nothing of peft is left, and everything but the weights and the history is the input's."""
    assert not any(type(module).__module__.startswith("peft") for module in adapted.network.modules())
    assert not hasattr(adapted.network, "peft_config")
    assert requests(adapted) == asked
    assert all(asked.values())
    assert adapted.edits == model.edits
    assert not adapted.network.training
    assert (len(model.history), [row["step"] for row in adapted.history]) == (0, [1])


@pytest.mark.parametrize("name", ["llama", "cut gpt2"])
def test_training_lowers_the_loss(name):
    model = MODELS[name]()
    rows = batch.encode(model, TEXT)
    loss = mean_loss(model, rows)
    one = mean_loss(small_lora(learning_rate=0.003)(model, TEXT, Budget(1, "steps"), 0), rows)
    many = mean_loss(small_lora()(model, TEXT, Budget(30, "steps"), 0), rows)
    assert one < loss
    assert many < loss - 1  # a nat; the random weights beneath stay as they are


def test_a_seed_decides_every_bit():
    model = MODELS["gpt2"]()
    digests = [checkpoint.digest_state(small_lora(dropout=0.1)(model, TEXT, STEPS, seed).network) for seed in (0, 0, 1)]
    assert digests[0] == digests[1] != digests[2]


def test_parameters_that_were_frozen_stay_so():
    model = reader("llama")
    model.network.lm_head.weight.requires_grad_(False)
    asked = requests(model)
    assert requests(small_lora()(model.frozen_now(), TEXT, STEPS, 0)) == asked
    assert asked["lm_head.weight"] is False


@pytest.mark.parametrize("name", ["qwen3", "phi3", "gpt_neox", "falcon", "opt", "mixtral"])
def test_other_architectures(name):
    model = reader(name).frozen_now()
    adapted = small_lora()(model, TEXT, STEPS, 0)
    assert checkpoint.difference(adapted.network, model.network) > 1e-3
    check_plain(adapted, model, requests(model))


def test_what_cannot_be_adapted_is_refused():
    with pytest.raises(InputError, match="no attention heads"):
        small_lora(targets="attention")(reader("mamba").frozen_now(), TEXT, STEPS, 0)
    with pytest.raises(InputError, match="does not adapt this mamba"):
        small_lora()(reader("mamba").frozen_now(), TEXT, STEPS, 0)
    with pytest.raises(InputError, match="causal"):
        small_lora()(reader("bert").frozen_now(), TEXT, STEPS, 0)


@pytest.mark.parametrize(("fields", "match"), [({"rank": 0}, "rank"), ({"alpha": 0}, "alpha"), ({"targets": "mlp"}, "targets"), ({"dropout": 1.0}, "dropout"), ({"schedule": "no"}, "schedule")])
def test_hyperparameters_out_of_range(fields, match):
    with pytest.raises(ValueError, match=match):
        LoRA(**fields)
