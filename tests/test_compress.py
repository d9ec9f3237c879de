"""Pruning methods against brute force: every number computed anew, row by row, from explicitly spelt-out tokens."""

from __future__ import annotations

import numpy as np
import pytest
import texts
import torch
from architectures import NAMES, small
from texts import LENGTH, ROWS, TOKENS, inputs_of, linear_layers, matrix, quiet

from etude.methods.compress.drop_blocks import DropBlocks
from etude.methods.compress.flap import FLAP
from etude.methods.compress.magnitude import Magnitude
from etude.methods.compress.sleb import SLEB
from etude.methods.compress.wanda import Wanda
from etude.values import checkpoint
from etude.values.errors import InputError
from etude.values.model import Model

THREE = ["llama", "gpt2", "gemma2"]


def logits(model: Model) -> torch.Tensor:
    return checkpoint.outputs(model.network, checkpoint.probe(model.network))


def close(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.allclose(one, other, atol=1e-5 * max(1.0, other.abs().max().item()), rtol=0)


METHODS = [
    (Magnitude(), False),
    (Wanda(tokens=TOKENS, length=LENGTH), True),
    (FLAP(ratio=0.3, tokens=TOKENS, length=LENGTH), True),
    (SLEB(blocks=0.34, tokens=TOKENS, length=LENGTH), True),
    (DropBlocks(blocks=0.34, choose="cosine", tokens=TOKENS, length=LENGTH), True),
]


@pytest.mark.parametrize("name", THREE)
@pytest.mark.parametrize(("method", "reads"), METHODS, ids=lambda item: type(item).__name__)
def test_the_model_stays_and_the_pruned_one_survives_saving(name, method, reads, tmp_path):
    model = texts.reader(name).frozen_now()
    before, corpus = checkpoint.digest_state(model.network), texts.corpus()
    digest = corpus.digest
    pruned = method(model, seed=0, calibration=corpus) if isinstance(method, DropBlocks) else method(model, corpus) if reads else method(model)
    assert checkpoint.digest_state(model.network) == before
    assert corpus.digest == digest
    assert not any(part._forward_hooks or part._forward_pre_hooks for network in (model.network, pruned.network) for part in network.modules())
    assert pruned.frozen
    assert not close(logits(pruned), logits(model))
    pruned.save(tmp_path)
    assert torch.equal(logits(Model.load(tmp_path)), logits(pruned))


@pytest.mark.parametrize("name", NAMES)
def test_magnitude_zeroes_the_smallest_of_every_layer_and_touches_nothing_else(name):
    model = small(name)
    pruned = Magnitude(sparsity=0.3)(model)
    layers = [path for stack in model.anatomy.stacks for path in linear_layers(model.network) if path.startswith(stack + ".")]
    wanted = {f"{path}.weight": model.network.state_dict()[f"{path}.weight"].numpy().copy() for path in layers}
    matrices = list(wanted.values())
    if name == "mixtral":
        for key, tensor in model.network.state_dict().items():
            if tensor.ndim == 3:
                wanted[key] = tensor.numpy().copy()
                matrices += list(wanted[key])
    for weight in matrices:
        sizes = sorted(abs(value) for row in weight.tolist() for value in row)
        weight[np.abs(weight) <= sizes[round(0.3 * weight.size) - 1]] = 0
    assert len(layers) >= 6
    for key, tensor in pruned.network.state_dict().items():
        reference = wanted.get(key, model.network.state_dict()[key].numpy())
        assert np.array_equal(tensor.numpy(), reference), key


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize(("pattern", "sparsity"), [("2:4", 0.5), ("1:4", 0.25)])
def test_a_pattern_zeroes_n_of_m_consecutive_inputs(name, pattern, sparsity):
    model = small(name)
    pruned = Magnitude(sparsity=sparsity, pattern=pattern)(model)
    gone, several = int(pattern[0]), int(pattern[2])
    for path, module in linear_layers(model.network.get_submodule(next(iter(model.anatomy.stacks)))).items():
        before, after = matrix(module), matrix(pruned.network.get_submodule(f"{next(iter(model.anatomy.stacks))}.{path}"))
        for row in range(0, len(before), 7):
            for begin in range(0, before.shape[1], several):
                part = before[row, begin : begin + several]
                smallest = sorted(range(several), key=lambda i: abs(part[i]))[:gone]
                assert np.flatnonzero(after[row, begin : begin + several] == 0).tolist() == sorted(smallest)


def test_equal_weights_do_not_make_more_zeros_than_asked_for():
    model = small("llama")
    with torch.no_grad():
        model.network.model.layers[0].mlp.up_proj.weight.fill_(1.0)
    pruned = Magnitude(sparsity=0.25)(model)
    assert int((pruned.network.model.layers[0].mlp.up_proj.weight == 0).sum()) == 32 * 48 // 4


@pytest.mark.parametrize("method", [Magnitude, Wanda])
def test_a_wrong_sparsity_or_pattern_is_refused(method):
    for sparsity in (0, 1, -0.1):
        with pytest.raises(ValueError, match=f"less than 1, got {sparsity}"):
            method(sparsity=sparsity)
    with pytest.raises(ValueError, match="unstructured or n:m such as 2:4, got 'half'"):
        method(pattern="half")
    with pytest.raises(ValueError, match="0 < n < m, got '4:4'"):
        method(pattern="4:4")
    with pytest.raises(ValueError, match=r"1:4 zeroes 0.25 of the weights, and sparsity says 0.5"):
        method(pattern="1:4")
    with pytest.raises(InputError, match=r"multiple of 5 inputs, and \S+ has 32"):
        method(sparsity=0.2, pattern="1:5", **({"length": 64} if method is Wanda else {}))(texts.reader("llama"), *([texts.corpus()] if method is Wanda else []))


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "qwen2"])
@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_wanda_zeroes_what_brute_force_zeroes(name, pattern):
    model = texts.reader(name)
    hand = model.copy()
    pruned = Wanda(tokens=TOKENS, length=LENGTH, pattern=pattern)(model, texts.corpus())
    stack = next(iter(hand.anatomy.stacks))
    for place in range(len(hand.network.get_submodule(stack))):
        layers = {f"{stack}.{place}.{path}": module for path, module in linear_layers(hand.network.get_submodule(f"{stack}.{place}")).items()}
        for path, module in layers.items():
            read = inputs_of(hand.network, [path])
            norms, weight = np.sqrt((read[path] ** 2).sum(0)), matrix(module)
            assert len(read[path]) == sum(map(len, ROWS))
            size = 4 if pattern == "2:4" else weight.shape[1]
            for output in weight:
                for begin in range(0, len(output), size):
                    scores = np.abs(output[begin : begin + size]) * norms[begin : begin + size]
                    output[begin + np.argsort(scores)[: size // 2]] = 0  # a view: this zeroes the layer's own weight
    for key, wanted in hand.network.state_dict().items():
        assert torch.equal(pruned.network.state_dict()[key], wanted), key
    magnitude = Magnitude(pattern=pattern)(model).network.state_dict()
    assert any(not torch.equal(magnitude[key], wanted) for key, wanted in hand.network.state_dict().items())


def test_what_cannot_be_pruned_by_calibration_is_refused():
    for method in (Wanda(), FLAP()):
        with pytest.raises(InputError, match="cannot prune experts"):
            method(small("mixtral"), texts.corpus())
        with pytest.raises(InputError, match="causal"):
            method(small("bert"), texts.corpus())
        with pytest.raises(ValueError, match="at least 3, got 9 and 2"):
            type(method)(tokens=9, length=2)
    with pytest.raises(InputError, match="no heads and no feed-forward"):
        FLAP()(small("mamba"), texts.corpus())
    with pytest.raises(InputError, match="cannot be met"):
        FLAP(ratio=0.99, length=64)(texts.reader("llama"), texts.corpus())
    for ratio in (0, 1):
        with pytest.raises(ValueError, match=f"less than 1, got {ratio}"):
            FLAP(ratio=ratio)


def block_parameters(model: Model) -> int:
    return sum(parameter.numel() for block in model.anatomy.blocks for parameter in block.module.parameters())


def flap_by_hand(model: Model, ratio: float):
    """Heads and channels to delete, by block, and every projection's mean input; what a unit costs is found by deleting it."""
    blocks, full = model.anatomy.blocks, block_parameters(model)
    read = inputs_of(model.network, [path for block in blocks for path in (block.attention.output, block.feed_forward.output)])
    units = []  # score, block, kind, members, parameters
    for block in blocks:
        for kind, part in (("heads", block.attention), ("channels", block.feed_forward)):
            inputs, weight = read[part.output], matrix(model.network.get_submodule(part.output)).astype(np.float64)
            score = [inputs[:, j].var(ddof=1) * sum(w * w for w in weight[:, j]) for j in range(weight.shape[1])]
            score = (np.array(score) - np.mean(score)) / np.std(score)
            if kind == "channels":
                gone = model.copy()
                gone.anatomy.drop_channels({block.index: [0]})
                new = [(score[j], block.index, kind, (j,), full - block_parameters(gone)) for j in range(len(score))]
            else:
                groups = part.groups if len(part.groups) > 1 else [(head,) for head in part.groups[0]]
                gone = model.copy()
                gone.anatomy.drop_heads({block.index: groups[0]})
                width = part.head_dim
                new = [(np.mean([score[h * width + i] for h in group for i in range(width)]), block.index, kind, tuple(group), full - block_parameters(gone)) for group in groups]
            units += sorted(new)[:-1]  # the best stays
    units.sort()
    sums = np.cumsum([0] + [unit[4] for unit in units])
    chosen = units[: int(np.argmin(np.abs(sums - ratio * full)))]
    cuts = {kind: {block.index: sorted(m for unit in chosen if unit[1:3] == (block.index, kind) for m in unit[3]) for block in blocks} for kind in ("heads", "channels")}
    return cuts, {path: inputs.mean(0) for path, inputs in read.items()}


def silenced(model: Model, cuts, means) -> torch.Tensor:
    """Logits of the whole model with the chosen input channels held at zero, or at their means."""
    hooks = []
    for block in model.anatomy.blocks:
        width = block.attention.head_dim
        columns = [head * width + i for head in cuts["heads"][block.index] for i in range(width)]
        for path, gone in ((block.attention.output, columns), (block.feed_forward.output, cuts["channels"][block.index])):

            def hold(module, args, gone=gone, mean=means and means[path]):
                value = args[0].clone()
                value[..., gone] = torch.tensor(mean[gone], dtype=torch.float32) if means else 0.0
                return (value,)

            hooks.append(model.network.get_submodule(path).register_forward_pre_hook(hold))
    found = logits(model)
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.parametrize(("name", "compensate"), [("llama", True), ("llama", False), ("gpt2", True), ("gpt2", False), ("gemma2", True), ("qwen2", True), ("falcon", True)])
def test_flap_deletes_what_brute_force_chooses_and_holds_it_at_its_mean(name, compensate):
    model = quiet(name)
    cuts, means = flap_by_hand(model, 0.4)
    assert any(cuts["heads"].values())
    assert any(cuts["channels"].values())
    pruned = FLAP(ratio=0.4, compensate=compensate, tokens=TOKENS, length=LENGTH)(model, texts.corpus())
    for old, new in zip(model.anatomy.blocks, pruned.anatomy.blocks, strict=True):
        assert new.attention.heads == old.attention.heads - len(cuts["heads"][old.index])
        assert new.feed_forward.channels == old.feed_forward.channels - len(cuts["channels"][old.index])
    assert close(logits(pruned), silenced(model, cuts, means if compensate else None))
    assert not close(logits(pruned), silenced(model, cuts, None if compensate else means))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("ratio", [0.1, 0.2, 0.5])
def test_flap_meets_its_ratio(name, ratio):
    model = quiet(name)
    pruned = FLAP(ratio=ratio, compensate=False, tokens=TOKENS, length=LENGTH)(model, texts.corpus())
    head_group = 3072 if name == "llama" else 4 * 8 * 32 + 24
    assert abs(block_parameters(model) - block_parameters(pruned) - ratio * block_parameters(model)) <= head_group / 2
    assert len({(block.attention.heads, block.feed_forward.channels) for block in pruned.anatomy.blocks}) > 1


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen2"])
def test_compensation_restores_the_mean_output(name):
    """Of the first block's attention, whose kept heads read what they read before."""
    model = quiet(name)
    path = model.anatomy.blocks[0].attention.output

    def mean_output(pruned: Model) -> np.ndarray:
        module = pruned.network.get_submodule(path)
        bias = module.bias.detach().numpy() if module.bias is not None else 0
        return (inputs_of(pruned.network, [path])[path] @ matrix(module).T.astype(np.float64) + bias).mean(0)

    found = {compensate: FLAP(ratio=0.5, compensate=compensate, tokens=TOKENS, length=LENGTH)(model, texts.corpus()) for compensate in (True, False)}
    assert found[True].anatomy.blocks[0].attention.heads < 4
    assert np.allclose(mean_output(found[True]), mean_output(model), atol=1e-5)
    assert not np.allclose(mean_output(found[False]), mean_output(model), atol=1e-3)


def test_flap_of_uneven_widths_loads_in_plain_transformers(tmp_path):
    pruned = FLAP(ratio=0.4, tokens=TOKENS, length=LENGTH)(quiet("llama"), texts.corpus())
    assert len({block.feed_forward.channels for block in pruned.anatomy.blocks}) > 1
    assert len({block.attention.heads for block in pruned.anatomy.blocks}) > 1
    assert not pruned.plain
    pruned.export(tmp_path)
    assert not (tmp_path / "edits.json").exists()
    plain = type(pruned.network).from_pretrained(tmp_path).eval()
    assert close(checkpoint.outputs(plain, checkpoint.probe(plain)), logits(pruned))


def test_flap_goes_on_from_a_model_that_was_pruned_before(tmp_path):
    method = FLAP(ratio=0.2, tokens=TOKENS, length=LENGTH)
    once = method(quiet("llama"), texts.corpus())
    twice = method(once, texts.corpus())
    assert twice.parameters < once.parameters
    twice.save(tmp_path)
    assert close(logits(Model.load(tmp_path)), logits(twice))


def loss_without(network: torch.nn.Module, stack: str, skipped: set[int]) -> float:
    """Mean loss a token over the rows with these blocks made to hand on what they are given."""

    def pass_on(module, args, kwargs, output):
        hidden = args[0] if args else kwargs["hidden_states"]
        return hidden if isinstance(output, torch.Tensor) else (hidden, *output[1:])

    hooks = [network.get_submodule(f"{stack}.{place}").register_forward_hook(pass_on, with_kwargs=True) for place in skipped]
    losses = []
    with torch.no_grad():
        for row in ROWS:
            scores = network(input_ids=torch.tensor([row]), use_cache=False).logits[0].double()
            losses += [float(scores[t].logsumexp(0) - scores[t, row[t + 1]]) for t in range(len(row) - 1)]
    for hook in hooks:
        hook.remove()
    return sum(losses) / len(losses)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_sleb_takes_the_block_that_brute_force_misses_least_in_every_round(name):
    model = texts.reader(name, blocks=4)
    stack = next(iter(model.anatomy.stacks))
    skipped: set[int] = set()
    for _ in range(2):
        losses = {place: loss_without(model.network, stack, skipped | {place}) for place in range(4) if place not in skipped}
        skipped.add(min(losses, key=losses.__getitem__))
    kept = [place for place in range(4) if place not in skipped]
    pruned = SLEB(blocks=0.5, tokens=TOKENS, length=LENGTH)(model, texts.corpus())
    blocks = pruned.network.get_submodule(stack)
    assert len(blocks) == 2
    for block, place in zip(blocks, kept, strict=True):
        wanted = model.network.get_submodule(f"{stack}.{place}").state_dict()
        assert all(torch.equal(tensor, wanted[key]) for key, tensor in block.state_dict().items())


@pytest.mark.parametrize(("name", "norm"), [("llama", "norm"), ("gpt2", "ln_f"), ("gemma2", "norm")])
def test_cosine_drops_the_blocks_that_turn_the_stream_least(name, norm):
    model = texts.reader(name, blocks=4)
    stack = next(iter(model.anatomy.stacks))
    bare = model.copy().network
    setattr(bare.base_model, norm, torch.nn.Identity())  # so that the last hidden state is what the last block writes
    turned = np.zeros(4)
    with torch.no_grad():
        for row in ROWS:
            states = [state[0].double().numpy() for state in bare(input_ids=torch.tensor([row]), output_hidden_states=True).hidden_states]
            for place in range(4):
                for before, after in zip(states[place], states[place + 1], strict=True):
                    turned[place] += 1 - before @ after / np.sqrt((before @ before) * (after @ after))
    kept = sorted(np.argsort(turned)[2:].tolist())
    pruned = DropBlocks(blocks=0.5, choose="cosine", tokens=TOKENS, length=LENGTH)(model, seed=0, calibration=texts.corpus())
    for block, place in zip(pruned.network.get_submodule(stack), kept, strict=True):
        wanted = model.network.get_submodule(f"{stack}.{place}").state_dict()
        assert all(torch.equal(tensor, wanted[key]) for key, tensor in block.state_dict().items())


def test_the_other_rules_drop_the_first_the_last_or_what_the_seed_says():
    model = texts.reader("llama", blocks=4)

    def kept(choose: str, seed: int = 0) -> list[int]:
        pruned = DropBlocks(blocks=0.5, choose=choose)(model, seed=seed)
        originals = [block.mlp.up_proj.weight for block in model.network.model.layers]
        return [next(i for i, weight in enumerate(originals) if torch.equal(weight, block.mlp.up_proj.weight)) for block in pruned.network.model.layers]

    assert kept("first") == [2, 3]
    assert kept("last") == [0, 1]
    draws = [kept("random", seed) for seed in range(8)]
    assert draws == [kept("random", seed) for seed in range(8)]
    assert len({tuple(draw) for draw in draws}) > 2
    with pytest.raises(InputError, match="needs calibration text"):
        DropBlocks(choose="cosine")(model, seed=0)
    with pytest.raises(ValueError, match="choose is one of"):
        DropBlocks(choose="middle")
