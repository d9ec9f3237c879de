"""Greedy output approximation against brute force over spelt-out tokens: what goes, and what the weights that stay are fitted to."""

from __future__ import annotations

import numpy as np
import pytest
import texts
import torch
import transformers
from texts import LENGTH, TOKENS, inputs_of, matrix

from etude.methods.compress._units import sites
from etude.methods.compress.greedy_output import GreedyOutput, fit, greedily
from etude.values import checkpoint
from etude.values.edits import Narrow, positions
from etude.values.errors import InputError
from etude.values.model import Model

NAMES = ["llama", "gpt2", "gemma2", "gpt_neox", "opt", "phi3"]
SMALL = dict(tokens=TOKENS, length=LENGTH)


def logits(model: Model) -> torch.Tensor:
    return checkpoint.outputs(model.network, checkpoint.probe(model.network))


def kept_of(pruned: Model, path: str, size: int, dim: int) -> list[int]:
    """Rows (0) or columns (1) of a layer that were kept, as the edits say; a layer of GPT-2 lies the other way round."""
    turned = dim if isinstance(pruned.network.get_submodule(path), torch.nn.Linear) else 1 - dim
    found = [positions(edit.kept) for edit in pruned.edits if isinstance(edit, Narrow) and edit.module == path and ("weight", turned) in edit.names]
    return found[0] if found else list(range(size))


def by_hand(read: np.ndarray, weight: np.ndarray, units: list[list[int]], count: int) -> list[int]:
    """Which units go: every candidate's error is computed anew from the tokens."""
    gone: list[int] = []
    for _ in range(count):
        errors = {}
        for unit in range(len(units)):
            if unit not in gone:
                columns = [column for one in [*gone, unit] for column in units[one]]
                errors[unit] = ((read[:, columns] @ weight[:, columns].T) ** 2).sum()
        gone.append(min(errors, key=errors.__getitem__))
    return sorted(gone)


@pytest.mark.parametrize("name", NAMES)
def test_units_go_one_by_one_each_the_one_that_adds_least_to_the_error(name):
    model = texts.reader(name)
    pruned = GreedyOutput(ratio=0.4, repair=False, **SMALL)(model, texts.corpus())
    masked = model.copy()
    lost: dict[bool, list[int]] = {True: [], False: []}
    order = [path for path, module in model.network.named_modules() if path in {site.output for site in sites(model, "")}]
    for site in sorted(sites(model, ""), key=lambda one: order.index(one.output)):
        weight = matrix(model.network.get_submodule(site.output)).astype(np.float64)
        units = [site.columns(unit) for unit in site.units]
        kept = kept_of(pruned, site.output, weight.shape[1], 1)
        gone = [unit for unit, columns in enumerate(units) if not set(columns) & set(kept)]
        assert gone == by_hand(inputs_of(masked.network, [site.output])[site.output], weight, units, len(gone))
        lost[site.attention].append(len(gone))
        columns = [column for unit in gone for column in units[unit]]
        matrix(masked.network.get_submodule(site.output))[:, columns] = 0
    for kind, counts in lost.items():  # the same share in every block, to a unit
        assert max(counts) > 0, kind
        assert max(counts) - min(counts) <= 1
    assert torch.allclose(logits(pruned), logits(masked), atol=1e-4 * logits(masked).abs().max().item())


def least_squares(read: np.ndarray, wanted: np.ndarray, start: np.ndarray, damping: float) -> np.ndarray:
    """(outputs, channels) by numpy's own solver: every token is an equation, and the damping one more a channel."""
    hold = np.sqrt(damping * (read**2).mean() * len(read))
    rows = np.concatenate([read, hold * np.eye(read.shape[1])])
    return np.linalg.lstsq(rows, np.concatenate([wanted, hold * start.T]), rcond=None)[0].T


@pytest.mark.parametrize("name", NAMES)
def test_every_layer_that_stays_is_the_least_squares_fit_to_the_whole_models_output(name):
    """What a layer of the finished model reads is what it read when it was fitted: whatever comes before it was finished then."""
    model = texts.reader(name)
    pruned = GreedyOutput(ratio=0.4, damping=0.05, **SMALL)(model, texts.corpus())
    outputs = {site.output for site in sites(model, "")}
    paths = [path for block in model.anatomy.blocks for path in model.anatomy.linears(block)]
    whole, own = inputs_of(model.network, paths), inputs_of(pruned.network, paths)
    moved = 0
    for path in paths:
        before, after = (matrix(one.network.get_submodule(path)).astype(np.float64) for one in (model, pruned))
        columns, rows = kept_of(pruned, path, before.shape[1], 1), kept_of(pruned, path, before.shape[0], 0)
        if path not in outputs:
            assert columns == list(range(before.shape[1]))
        expected = least_squares(own[path], whole[path] @ before.T, before[:, columns], 0.05)[rows]
        assert np.abs(after - expected).max() < 2e-3 * np.abs(expected).max(), path
        moved += np.abs(after - before[rows][:, columns]).max() > 1e-2 * np.abs(before).max()
    assert moved > len(paths) / 2


def test_a_fit_to_what_has_not_changed_changes_nothing():
    random = torch.Generator().manual_seed(0)
    weight, read = torch.randn(5, 7, generator=random), torch.randn(40, 7, generator=random).double()
    moment = read.T @ read / 40
    assert torch.allclose(fit(weight, moment, moment, 0.01), weight, atol=1e-6)


def test_a_fit_takes_over_what_a_lost_channel_shared_with_one_that_stays():
    read = torch.randn(200, 4, generator=torch.Generator().manual_seed(1)).double()
    read[:, 3] = 2 * read[:, 0]
    weight = torch.arange(8.0).reshape(2, 4)
    moment = read.T @ read / 200
    fitted = fit(weight, moment, moment, 1e-9, torch.tensor([True, True, True, False]))
    assert torch.allclose(fitted, torch.tensor([[0.0 + 2 * 3, 1, 2], [4 + 2 * 7, 5, 6]]), atol=1e-4)


def test_the_choice_sees_what_units_have_in_common():
    """Alone 0 and 1 write least after 2; together they write nothing, and go before 3, which writes less than either."""
    read = torch.randn(500, 4, generator=torch.Generator().manual_seed(2)).double()
    read[:, 1] = -read[:, 0]
    weight = torch.tensor([[1.0, 1.0, 3.0, 1.2]])
    model = texts.reader("gpt2")
    site = next(site for site in sites(model, "") if not site.attention)
    site = type(site)(0, False, site.output, 1, [(0,), (1,), (2,), (3,)], np.ones(4))
    assert greedily(weight, read.T @ read / 500, site, 2) == [0, 1]


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
@pytest.mark.parametrize("repair", [True, False])
def test_the_model_stays_and_the_pruned_one_is_smaller_saved_and_exported(name, repair, tmp_path):
    model, corpus = texts.reader(name).frozen_now(), texts.corpus()
    before, rotate = checkpoint.digest_state(model.network), getattr(transformers.models.llama.modeling_llama, "apply_rotary_pos_emb", None)
    pruned = GreedyOutput(ratio=0.3, repair=repair, **SMALL)(model, corpus)
    assert checkpoint.digest_state(model.network) == before
    assert corpus.digest == texts.corpus().digest
    assert transformers.models.llama.modeling_llama.apply_rotary_pos_emb is rotate
    assert not any(part._forward_hooks or part._forward_pre_hooks for network in (model.network, pruned.network) for part in network.modules())
    blocks = [sum(parameter.numel() for block in one.anatomy.blocks for parameter in block.module.parameters()) for one in (model, pruned)]
    assert abs(1 - blocks[1] / blocks[0] - 0.3) < 0.08
    pruned.save(tmp_path / "saved")
    assert torch.allclose(logits(Model.load(tmp_path / "saved")), logits(pruned), atol=1e-5)
    pruned.export(tmp_path / "exported")
    plain = type(pruned.network).from_pretrained(tmp_path / "exported")
    assert torch.allclose(checkpoint.outputs(plain.eval(), checkpoint.probe(plain)), logits(pruned), atol=1e-4 * logits(pruned).abs().max().item())


def test_wrong_settings_and_models_are_refused():
    for ratio in (0, 1):
        with pytest.raises(ValueError, match=f"less than 1, got {ratio}"):
            GreedyOutput(ratio=ratio)
    with pytest.raises(ValueError, match="damping is more than 0, got 0"):
        GreedyOutput(damping=0)
    with pytest.raises(ValueError, match="tokens is at least 2"):
        GreedyOutput(tokens=1)
    with pytest.raises(InputError, match="this is a masked one"):
        GreedyOutput(**SMALL)(texts.reader("bert"), texts.corpus())
    with pytest.raises(InputError, match="has them"):
        GreedyOutput(**SMALL)(texts.reader("mixtral"), texts.corpus())
    with pytest.raises(InputError, match="cannot be met"):
        GreedyOutput(ratio=0.99, **SMALL)(texts.reader("llama"), texts.corpus())
