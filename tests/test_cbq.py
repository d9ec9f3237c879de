"""Cross-block quantization against spelt-out rules: outliers by brute force, rounding and its gradients by hand, windows against whole passes of both models."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import texts
import torch
import transformers
from architectures import small
from texts import LENGTH, ROWS, TOKENS, inputs_of, linear_layers, matrix

from etude.engine.score import sample_rows
from etude.engine.stream import groups_of
from etude.methods.compress import cbq
from etude.methods.compress._outliers import bound, factors, scale_activations, truncate
from etude.methods.compress._rounding import ROUNDINGS, Rounded, rectified, unrectified
from etude.methods.compress.cbq import CBQ
from etude.methods.compress.round_to_nearest import RoundToNearest
from etude.values import checkpoint
from etude.values.errors import InputError
from etude.values.model import Model

GIVEN = {"tokens": TOKENS, "length": LENGTH, "batch_tokens": 120}


def bound_by_hand(values, coarse, fine):
    """Every way to part the suspects, tried in turn."""
    ordered = sorted(float(value) for value in values)
    low, high = np.quantile(ordered, [0.25, 0.75])
    plain = [value for value in ordered if value <= high + coarse * (high - low)]
    suspects = ordered[len(plain) :]
    best, found = -math.inf, ordered[-1]
    for kept in range(len(suspects) + 1):
        largest = (plain + suspects[:kept])[-1]
        gap = suspects[kept] - largest if kept < len(suspects) else 0.0
        merit = gap**2 - fine * (np.var(suspects[:kept]) if kept else 0.0)
        if merit > best + 1e-15:
            best, found = merit, largest
    return found


@pytest.mark.parametrize("seed", range(6))
def test_the_largest_that_is_no_outlier_is_that_of_brute_force(seed):
    draw = np.random.default_rng(seed)
    values = np.abs(draw.standard_t(2 + seed, size=50 + 37 * seed))
    for coarse, fine in ((1.5, 1.0), (0.5, 0.2), (3.0, 5.0), (0.0, 0.0)):
        assert bound(torch.from_numpy(values), coarse, fine) == pytest.approx(bound_by_hand(values, coarse, fine), rel=1e-12)


def test_outliers_that_stand_apart_are_found_and_nothing_else():
    values = torch.cat([torch.linspace(0, 1, 41), torch.tensor([1.9, 2.0, 9.0, 9.5])])
    assert bound(values, 1.0, 1.0) == 2.0
    assert bound(torch.linspace(0, 1, 41), 1.5, 1.0) == 1.0
    assert factors(torch.ones(8), 1.5, 1.0) is None
    by = factors(torch.tensor([1.0, 1.0, 1.1, 0.9, 1.0, 16.0]), 1.5, 1.0)
    torch.testing.assert_close(by, torch.tensor([1.0, 1.0, 1.0, 1.0, 1.0, (16 / 1.1) ** 0.5]))
    weight = torch.cat([torch.linspace(-1, 1, 40), torch.tensor([-7.0, 8.0])]).view(6, 7)
    truncate(weight, 1.5, 1.0)
    assert weight.abs().max() == 1


# Whether the network before the outlier lets it be scaled: norm before attention, before the feed-forward layer, and that layer's channels.
SCALED = {"llama": (True, True, True), "gpt2": (True, True, False), "opt": (True, True, True), "gemma2": (False, False, True)}


@pytest.mark.parametrize("name", SCALED)
def test_activations_are_scaled_where_the_network_computes_the_same_afterwards(name):
    model = texts.reader(name)
    channel = 5
    with torch.no_grad():  # in the first block one channel of everything that is read stands out
        for path, module in model.anatomy.blocks[0].module.named_modules():
            if getattr(getattr(module, "weight", None), "ndim", 0) == 1 and "post" not in path.replace("post_attention", "").replace("feedforward", "post"):
                module.weight[channel] = 40.0
        for path in model.anatomy.blocks[0].feed_forward.inputs:
            matrix(model.network.get_submodule(path))[channel] *= 60
            bias = model.network.get_submodule(path).bias
            if bias is not None:
                bias[channel] = 200.0  # past any activation function
    rows = sample_rows(model, texts.corpus(), TOKENS, LENGTH)
    groups, _ = groups_of(model, model.anatomy.blocks, rows)
    paths = [group[0] for group in groups[0]]
    draft = model.copy()
    before, probe = inputs_of(model.network, paths), checkpoint.probe(model.network)
    scaled = scale_activations(draft, rows, groups, 1.5, 1.0)
    torch.testing.assert_close(checkpoint.outputs(draft.network, probe), checkpoint.outputs(model.network, probe), rtol=1e-4, atol=1e-4)
    after = inputs_of(draft.network, paths)
    first, feed = paths[0], model.anatomy.blocks[0].feed_forward
    second = next(group[0] for group in groups[0] if set(group) & set(feed.inputs))
    for path, wanted in zip((first, second, feed.output), SCALED[name], strict=True):
        old, new = (np.abs(some[path]).max(0) for some in (before, after))
        by = factors(torch.from_numpy(old), 1.5, 1.0)
        assert (path in scaled) == (wanted and by is not None), path
        np.testing.assert_allclose(new, old / by.numpy() if path in scaled else old, rtol=1e-3, atol=1e-4)
    assert scaled


@pytest.mark.parametrize(("name", "rounding", "symmetric"), [("llama", "lora", False), ("llama", "nearest", True), ("gpt2", "full", False), ("opt", "lora", True)])
def test_without_learning_it_rounds_to_the_nearest_level(name, rounding, symmetric):
    model = texts.reader(name).frozen_now()
    before = model.digest
    grid = {"bits": 3, "group": 12, "symmetric": symmetric}
    made = CBQ(**grid, **GIVEN, rounding=rounding, outliers=False, epochs=1, scale_rate=0.0, rounding_rate=0.0)(model, texts.corpus(), seed=0)
    assert model.digest == before
    wanted = RoundToNearest(**grid)(model)
    assert set(made.edits) == set(wanted.edits)
    for key, tensor in wanted.network.state_dict().items():
        gap = (made.network.state_dict()[key] - tensor).abs() > 1e-5
        assert gap.float().mean() < 2e-3, key  # a weight half way between two levels


def test_the_rectified_sigmoid_and_its_inverse():
    values = torch.tensor([-9.0, -1.0, 0.0, 1.0, 9.0], dtype=torch.float64)
    by_hand = [min(1.0, max(0.0, 1.2 / (1 + math.exp(-value)) - 0.1)) for value in values.tolist()]
    torch.testing.assert_close(rectified(values), torch.tensor(by_hand, dtype=torch.float64))
    shares = torch.linspace(0, 1, 11, dtype=torch.float64)
    torch.testing.assert_close(rectified(unrectified(shares)), shares)


@pytest.mark.parametrize("along", [0, 1])
@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_rounding_and_its_gradients_are_those_of_the_rules(along, rounding):
    """Element by element in plain Python."""
    random = torch.Generator().manual_seed(3)
    weight = torch.randn(6, 10, generator=random)
    one = Rounded(weight, 2, 4, False, rounding, 2, along, random)
    with torch.no_grad():
        one.steps.normal_(std=0.2, generator=random)
        for parameter in one.corrections():
            parameter.normal_(std=0.7, generator=random)
    slope = torch.randn(6, 10, generator=random)
    made = one(weight if along else weight.T.contiguous())
    made = made if along else made.T
    (made * slope).sum().backward()
    shift = torch.zeros(6, 10) if rounding == "nearest" else one.shift if rounding == "full" else one.left @ one.right
    by_step, by_shift = torch.zeros_like(one.steps), torch.zeros(6, 10)
    for row, column in itertools.product(range(6), range(10)):
        part = column // 4
        scale = float(one.scale[row, part]) * math.exp(float(one.steps[row, part].detach()))
        zero, w = float(one.zero[row, part]), float(weight[row, column])
        below = math.floor(w / scale)
        v = math.log((w / scale - below + 0.1) / (1.1 - (w / scale - below))) + float(shift[row, column].detach())
        level = round(w / scale) if rounding == "nearest" else below + (v >= 0)
        clipped = min(max(level + zero, -2), 1)
        assert float(made[row, column].detach()) == pytest.approx(scale * (clipped - zero), abs=1e-5)
        inside = clipped == level + zero
        sigmoid = 1 / (1 + math.exp(-v))
        h = 1.2 * sigmoid * (1 - sigmoid) if 0 < 1.2 * sigmoid - 0.1 < 1 else 0.0
        by_step[row, part] += float(slope[row, column]) * scale * (clipped - zero - (w / scale if inside else 0.0))
        by_shift[row, column] = float(slope[row, column]) * scale * h * inside
    torch.testing.assert_close(one.steps.grad, by_step, rtol=1e-3, atol=1e-3)
    if rounding == "full":
        torch.testing.assert_close(one.shift.grad, by_shift, rtol=1e-3, atol=1e-3)
    elif rounding == "lora":
        torch.testing.assert_close(one.left.grad, by_shift @ one.right.detach().T, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(one.right.grad, one.left.detach().T @ by_shift, rtol=1e-3, atol=1e-3)


def test_windows_slide_over_all_blocks():
    def listed(blocks, **fields):
        return [list(window) for window in CBQ(**fields).windows(blocks)]

    assert listed(6) == [[0, 1], [1, 2], [2, 3], [3, 4], [4, 5]]
    assert listed(6, window=1, overlap=0) == [[0], [1], [2], [3], [4], [5]]
    assert listed(6, window=4, overlap=2) == [[0, 1, 2, 3], [2, 3, 4, 5]]
    assert listed(6, window=4, overlap=1) == [[0, 1, 2, 3], [2, 3, 4, 5]]
    assert listed(3, window=8, overlap=1) == [[0, 1, 2]]
    assert listed(1) == [[0]]


def hidden(network, row):
    """Hidden states before every block and after the last, of one row alone, (length, width) each."""
    found = []
    stack = next(module for module in network.modules() if isinstance(module, torch.nn.ModuleList))
    hooks = [block.register_forward_hook(lambda module, args, made: found.append((made if isinstance(made, torch.Tensor) else made[0])[0].clone())) for block in stack]
    hooks.append(stack[0].register_forward_pre_hook(lambda module, args, kwargs: found.append((args[0] if args else kwargs["hidden_states"])[0].clone()), with_kwargs=True))
    with torch.no_grad():
        network(input_ids=torch.tensor([row]), use_cache=False)
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox"])
def test_a_window_reads_what_both_models_give_and_wants_what_the_first_one_does(name, monkeypatch):
    model = texts.reader(name).frozen_now()
    seen = []
    learn = CBQ._learn

    def look(self, blocks, learned, sides, wanted, random, turn):
        seen.append(([block.index for block in blocks], [[batch.hidden[batch.real].clone() for batch in side] for side in sides], [w[batch.real] for w, batch in zip(wanted, sides[0], strict=True)]))
        learn(self, blocks, learned, sides, wanted, random, turn)

    monkeypatch.setattr(CBQ, "_learn", look)
    made = CBQ(bits=3, group=None, window=1, overlap=0, epochs=2, **GIVEN)(model, texts.corpus(), seed=0)
    rows = sorted(ROWS, key=len, reverse=True)  # longest first, as batches take them
    theirs, mine = ([hidden(network, row) for row in rows] for network in (model.network, made.network))
    assert [blocks for blocks, _, _ in seen] == [[0], [1], [2]]
    for (block,), sides, wanted in seen:
        for got, whole, place in ((sides[0], theirs, block), (sides[1], mine, block), (wanted, theirs, block + 1)):
            torch.testing.assert_close(torch.cat(got), torch.cat([states[place] for states in whole]), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_the_first_step_goes_down_the_slope_of_the_loss(name):
    """One step of Adam moves every scale by its rate, against the sign of a gradient that is computed on the whole network."""
    model = texts.reader(name)
    given = {"bits": 3, "group": 16, "symmetric": True, "outliers": False, "rounding": "nearest", "tokens": 30, "length": 40, "batch_tokens": 4096}
    made = CBQ(window=3, overlap=0, epochs=1, scale_rate=0.01, **given)(model, texts.corpus(), seed=0)
    (row,) = texts.rows(40, 30)
    paths = [path for block in model.anatomy.blocks for path in block.parts.linears]
    logs, weights = {}, {}
    for path in paths:
        weight = model.network.get_submodule(path).weight.detach()
        first = weight.unflatten(1, (-1, 16)).abs().amax(2) / 3
        logs[path] = torch.zeros_like(first, requires_grad=True)
        scale = (first * logs[path].exp()).repeat_interleave(16, 1)
        level = (weight / scale).round().clamp(-3, 3)
        # d(scale · level)/d log scale is scale · level - w inside, by the straight-through rule, and scale · level beyond
        weights[f"{path}.weight"] = scale * (level + (weight / scale - (weight / scale).detach()) * ((weight / scale).round().abs() <= 3))
    wanted = hidden(model.network, row)[-1]
    found = []
    last = model.anatomy.blocks[-1].module
    hook = last.register_forward_hook(lambda module, args, out: found.append((out if isinstance(out, torch.Tensor) else out[0])[0]))
    torch.func.functional_call(model.network, weights, kwargs={"input_ids": torch.tensor([row]), "use_cache": False})
    hook.remove()
    p, q = wanted.double().softmax(1), found[0].double().softmax(1)
    loss = (found[0].double() - wanted).square().mean() + (p * (p / q).log()).sum(1).mean()
    loss.backward()
    for path in paths:
        ratio = made.network.get_submodule(path).weight_scale.log() - (model.network.get_submodule(path).weight.detach().unflatten(1, (-1, 16)).abs().amax(2) / 3).log()
        slope = logs[path].grad
        clear = slope.abs() > 1e-2 * slope.abs().max()
        torch.testing.assert_close(ratio[clear], -0.01 * slope[clear].sign(), rtol=5e-2, atol=0)  # a small slope is dulled by Adam's epsilon


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_what_it_learns_is_nearer_to_the_full_precision_model(name):
    model = texts.reader(name).frozen_now()
    states = [hidden(model.network, row)[-1] for row in ROWS]

    def error(made):
        return sum(float(cbq.apart(hidden(made.network, row)[-1], wanted)) for row, wanted in zip(ROWS, states, strict=True))

    grid = {"bits": 3, "group": 16}
    nearest = error(RoundToNearest(**grid)(model))
    scales = error(CBQ(**grid, **GIVEN, epochs=6, rounding="nearest", scale_rate=1e-2, rounding_rate=1e-2)(model, texts.corpus(), seed=0))
    rounded = error(CBQ(**grid, **GIVEN, epochs=6, scale_rate=1e-2, rounding_rate=1e-2)(model, texts.corpus(), seed=0))
    assert rounded < scales < nearest


@pytest.mark.parametrize("symmetric", [True, False])
def test_it_is_saved_and_exported_on_its_grid(symmetric, tmp_path):
    model = texts.reader("llama")
    made = CBQ(bits=4, group=16, symmetric=symmetric, **GIVEN, epochs=2)(model, texts.corpus(), seed=1)
    assert {edit.module for edit in made.edits} == {f"model.layers.{path}" for path in linear_layers(model.network.model.layers)}
    for edit in made.edits:
        integers = edit.integers(made.network)
        assert integers.min() >= -8
        assert integers.max() <= 7
    probe = checkpoint.probe(made.network)
    made.save(tmp_path / "saved")
    assert torch.equal(checkpoint.outputs(Model.load(tmp_path / "saved").network, probe), checkpoint.outputs(made.network, probe))
    made.export(tmp_path / "packed")
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "packed", dtype=torch.float32)
    torch.testing.assert_close(checkpoint.outputs(plain, probe), checkpoint.outputs(made.network, probe), rtol=1e-3, atol=1e-3)


def test_wrong_settings_and_models_are_refused():
    wrong = [
        ({"bits": 1}, "bits"),
        ({"overlap": 2}, "window 2 and overlap 2"),
        ({"window": 0, "overlap": 0}, "at least 1 block"),
        ({"rounding": "up"}, "nearest, full, lora"),
        ({"rank": 0}, "rank"),
        ({"fine": -1.0}, "fine"),
        ({"tokens": 1}, "tokens"),
    ]
    for fields, words in wrong:
        with pytest.raises(ValueError, match=words):
            CBQ(**fields)
    with pytest.raises(InputError, match="causal"):
        CBQ(**GIVEN)(small("bert"), texts.corpus(), seed=0)
    with pytest.raises(InputError, match="experts"):
        CBQ(**GIVEN)(texts.reader("mixtral"), texts.corpus(), seed=0)
