"""Operations against torch's own counter, bytes and seconds against hand computation, and what a plan makes of them."""

from __future__ import annotations

import dataclasses
import json

import architectures
import numpy as np
import pytest
import scipy.stats
import texts
import torch
from torch.utils.flop_counter import FlopCounterMode

import etude.engine.calibrate
from etude.engine.roofline import COMPUTE, MEMORY, Heads, Layout, Linear, Machine, Pass, between, layout, operators, predict
from etude.measures import roofline as measure
from etude.measures.roofline import Roofline, rank_products
from etude.study import foretell
from etude.study.estimate import estimate
from etude.study.foretell import described, read_layout
from etude.study.plan import build
from etude.study.recipe import Study
from etude.study.store import Store
from etude.values import checkpoint
from etude.values.errors import InputError
from etude.values.model import Model

FLAT = Machine(rates=((1.0, 100.0),), bandwidths=((1.0, 10.0),), streams=((1.0, 10.0),))
PRODUCTS = ("linear", "scores", "values", "head")
HAND = Layout(6, (Linear("q", 6, 6), Linear("up", 6, 10, True)), (Heads("b", 3, 1, 2),), (("norm", 6, 6),), (("b", 10, True),), Linear("head", 6, 20), 6 * 6 + 6 * 10 + 10 + 6 + 20 * 6)
"""One block of three query heads and one of keys and values, with a gated feed-forward layer, head tied to the embeddings."""


def counted(network, **given) -> tuple[int, object]:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        output = network(**given)
    return counter.get_total_flops(), output


def products(found: Layout, one: Pass) -> float:
    return sum(operator.operations for operator in operators(found, one) if operator.kind in PRODUCTS)


def eager(model: Model) -> Model:
    """With attention in products that torch's counter sees; it has no formula for the fused one of processors."""
    model.network.set_attn_implementation("eager")
    return model


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3", "gpt_neox", "opt", "phi3", "mistral"])
def test_operations_are_those_that_torch_counts(name):
    """Grouped-query attention in llama, qwen3, phi3 and mistral; fused projections in gpt2, gpt_neox and phi3."""
    model = eager(architectures.small(name))
    before = checkpoint.digest_state(model.network)
    found = layout(model)
    ids = torch.full((3, 9), 10)
    prefill, output = counted(model.network, input_ids=ids, use_cache=True)
    assert products(found, Pass(3, 9, logits=9)) == prefill
    last, _ = counted(model.network, input_ids=ids, logits_to_keep=1)
    assert products(found, Pass(3, 9)) == last < prefill
    decode, _ = counted(model.network, input_ids=ids[:, :1], past_key_values=output.past_key_values)
    assert products(found, Pass(3, 1, context=9)) == decode
    assert checkpoint.digest_state(model.network) == before


def test_operations_of_an_encoder_are_those_that_torch_counts():
    model = eager(architectures.small("bert"))
    found, _ = counted(model.network, input_ids=torch.full((2, 7), 10))
    assert products(layout(model), Pass(2, 7, logits=7)) == found


def test_operations_follow_cuts():
    """Blocks of unequal width, which no config can say."""
    model = eager(architectures.small("llama"))
    model.anatomy.drop_heads({0: [0, 1]})
    model.anatomy.drop_channels({1: range(5)})
    found, _ = counted(model.network, input_ids=torch.full((2, 7), 10))
    assert products(layout(model), Pass(2, 7, logits=7)) == found


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3", "gpt_neox", "opt", "phi3", "mistral"])
def test_weights_that_are_read_are_all_there_are(name):
    """Every parameter is read once, but of embeddings only the rows of the tokens."""
    model = architectures.small(name)
    found = layout(model)
    read = sum(operator.weights for operator in operators(found, Pass(1, 5, weight_bytes=2)) if operator.kind in ("linear", "norm", "head"))
    tables = {id(module.weight): module.weight.numel() for module in model.network.modules() if isinstance(module, torch.nn.Embedding)}
    tables.pop(id(model.network.get_output_embeddings().weight), None)  # tied: the head reads it
    assert read == 2 * (model.parameters - sum(tables.values()))


def test_bytes_and_operations_by_hand():
    """Batch 2, 3 new tokens after 4; 4-bit weights, activations of 2 bytes, a cache of 1 byte a number."""
    one = Pass(2, 3, 4, weight_bytes=0.5, activation_bytes=2, cache_bytes=1, fused=False, appended=True, logits=3)
    by = {(operator.kind, operator.name): operator for operator in operators(HAND, one)}
    tokens, scores = 2 * 3, 2 * 3 * 3 * 7  # rows · heads · queries · keys
    assert dataclasses.astuple(by["linear", "up"])[2:6] == (2 * tokens * 60, 0.5 * 70, tokens * 16 * 2, 0)
    assert dataclasses.astuple(by["scores", "b.scores"])[2:] == (2 * scores * 2, 0, (tokens * 6 + scores) * 2, 2 * 7 * 2 * 1, 6)
    assert dataclasses.astuple(by["values", "b.values"])[2:] == dataclasses.astuple(by["scores", "b.scores"])[2:]
    assert dataclasses.astuple(by["softmax", "b.softmax"])[2:6] == (5 * scores, 0, 2 * scores * 2, 0)
    assert dataclasses.astuple(by["cache", "b.cache"])[2:6] == (0, 0, 2 * tokens * 2 * 2, 2 * tokens * 2 + 2 * 2 * (2 * 4 * 2))
    assert dataclasses.astuple(by["norm", "norm"])[2:6] == (7 * tokens * 6, 6 * 0.5, 2 * tokens * 6 * 2, 0)
    assert dataclasses.astuple(by["activation", "b"])[2:6] == (2 * tokens * 10, 0, 3 * tokens * 10 * 2, 0)
    assert dataclasses.astuple(by["head", "head"])[2:6] == (2 * tokens * 120, 60, tokens * 26 * 2, 0)
    assert by["linear", "up"].intensity == 720 / (35 + 192)
    assert sum(operator.kind == "add" for operator in by.values()) == 2
    fused = {operator.kind: operator for operator in operators(HAND, dataclasses.replace(one, fused=True, appended=False, logits=1))}
    assert fused["scores"].activations == tokens * 6 * 2
    assert fused["cache"].cache == 2 * tokens * 2
    assert fused["head"].operations == 2 * 2 * 120
    assert "softmax" not in fused


def test_time_is_the_longer_of_arithmetic_and_traffic():
    found = predict(HAND, Pass(2, 3, 4), dataclasses.replace(FLAT, overhead=5.0, start=7.0))
    ops = list(operators(HAND, Pass(2, 3, 4)))
    assert found.seconds == pytest.approx(sum(max(one.operations / 100, one.bytes / 10) for one in ops) + 5 * len(ops) + 7)
    for part in found.timed:
        assert part.attained == pytest.approx(min(100, part.operator.intensity * 10))
        assert part.bound == (COMPUTE if part.operator.intensity >= 10 else MEMORY)
    bound = sum(one.bytes / 10 for one in ops if one.intensity < 10)
    assert found.memory_bound == pytest.approx(bound / sum(max(one.operations / 100, one.bytes / 10) for one in ops))
    assert found.operations == sum(one.operations for one in ops)
    assert found.peak_bytes == 4 * HAND.parameters + 4 * 2 * 2 * 2 * 7 + max(one.activations for one in ops)
    with pytest.raises(InputError, match="at least one token"):
        predict(HAND, Pass(1, 0), FLAT)


def test_a_larger_batch_is_less_bound_by_memory():
    """The weights are read once for all rows: each does half an operation a byte, and the machine ten."""
    wide = Layout(64, (Linear("a", 64, 64),), (), (), (), Linear("head", 64, 64), 2 * 64 * 64)
    shares = [predict(wide, Pass(batch, 1), dataclasses.replace(FLAT, streams=((1.0, 1e9),))).memory_bound for batch in (1, 16, 64)]
    assert shares[0] == 1.0
    rows = 64 * 64 * 4 / 10  # of the embeddings, which no batch shares
    assert shares == pytest.approx([1, 1, rows / (rows + 2 * 2 * 64 * 64 * 64 / 100)])


def test_rates_are_interpolated_between_logarithms():
    pairs = ((10.0, 1.0), (1000.0, 100.0))
    assert [between(pairs, size) for size in (1, 10, 1000, 1e6)] == pytest.approx([1, 1, 100, 100])
    assert between(pairs, 100) == pytest.approx(10)
    assert between(((5.0, 3.0),), 1e9) == 3


@pytest.mark.parametrize("name", ["mamba", "mixtral", "t5"])
def test_other_blocks_are_refused(name):
    with pytest.raises(InputError, match="roofline knows blocks of self-attention"):
        layout(architectures.small(name))


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3", "gpt_neox", "opt", "phi3", "mistral", "bert"])
def test_a_checkpoint_is_read_without_its_weights(name, tmp_path):
    """From config and header: the same products as from the modules, but those that stand outside of blocks."""
    model = architectures.small(name)
    model.save(tmp_path / "saved", verify=False)
    model = Model.load(tmp_path / "saved")
    header, network = read_layout(tmp_path / "saved"), layout(model)
    assert header.parameters == model.parameters
    outside = sum(linear.inputs * linear.outputs for linear in network.linears if ".0." not in linear.path and ".1." not in linear.path and ".2." not in linear.path)
    assert products(header, Pass(2, 5, 3)) == products(network, Pass(2, 5, 3)) - 2 * 2 * 5 * outside
    assert sorted(one[1:] for one in header.norms) == sorted(one[1:] for one in network.norms)
    assert [one[1:] for one in header.activations] == [one[1:] for one in network.activations]
    assert [dataclasses.astuple(one)[1:] for one in header.attentions] == [dataclasses.astuple(one)[1:] for one in network.attentions]


@pytest.mark.parametrize("name", ["mixtral", "t5", "mamba"])
def test_a_checkpoint_of_other_blocks_says_nothing(name, tmp_path):
    architectures.small(name).save(tmp_path / "saved", verify=False)
    assert read_layout(tmp_path / "saved") is None
    (tmp_path / "saved" / "config.json").write_text("no JSON")
    assert read_layout(tmp_path / "saved") is None


def test_the_machine_is_measured_once():
    machine = etude.engine.calibrate.calibrate()
    assert etude.engine.calibrate.calibrate() is machine
    for pairs in (machine.rates, machine.bandwidths, machine.streams):
        assert [size for size, _ in pairs] == sorted(size for size, _ in pairs)
        assert all(1e6 < value < 1e15 for _, value in pairs)
    assert 0 <= machine.overhead < 0.1
    assert machine.resident > 1e8
    assert Machine.from_data(json.loads(json.dumps(machine.as_data()))) == machine


# The measure.


def test_rank_products_have_the_rank_correlation_as_their_mean():
    draw = np.random.default_rng(0)
    one, other = draw.normal(size=30), draw.integers(0, 6, 30)  # with ties
    assert rank_products(one, other).mean() == pytest.approx(scipy.stats.spearmanr(one, other).statistic)
    assert rank_products(one, np.exp(one)) == pytest.approx(np.ones(30))
    assert rank_products(one, np.ones(30)).tolist() == [0] * 30


@pytest.fixture
def clock(monkeypatch):
    """A clock that a network's passes advance: by 1 second for a token of a prompt, and by 10 + 5 · rows for a step."""
    state = {"now": 0.0, "read": []}
    monkeypatch.setattr(measure, "_now", lambda device: state["now"])
    monkeypatch.setattr(measure, "calibrate", lambda device: FLAT)

    def watch(model):
        forward = model.network.forward
        model.anatomy.blocks  # noqa: B018  (traced before, by a pass that does not count)

        def timed(*arguments, input_ids, **named):
            rows, length = input_ids.shape
            state["read"].append((rows, length))
            state["now"] += rows * length if length > 1 else 10 + 5 * rows
            return forward(*arguments, input_ids=input_ids, **named)

        model.network.forward = timed
        return model

    state["watch"] = watch
    return state


def test_the_grid_is_timed_and_predicted(clock):
    models = [clock["watch"](texts.reader(name)) for name in ("llama", "gpt2")]
    before = [checkpoint.digest_state(model.network) for model in models]
    found = Roofline(prompt=8, prompts=2, batch=4, new=2, rounds=1)(models, seed=0)
    assert [checkpoint.digest_state(model.network) for model in models] == before
    assert len(found) == 2 * 13
    first = {part.name: part for part in found[:13]}
    assert first["measured"].item_names == tuple(f"{phase}, batch {rows}, length {length}" for phase in ("prefill", "decode") for rows in (1, 2, 4) for length in (4, 8))
    assert first["measured"].items.tolist() == [4, 8, 8, 16, 16, 32, 15, 15, 20, 20, 30, 30]
    own = layout(models[0])
    passes = [Pass(rows, length, appended=True) for rows in (1, 2, 4) for length in (4, 8)] + [Pass(rows, 1, length + 1, appended=True) for rows in (1, 2, 4) for length in (4, 8)]
    predicted = [predict(own, one, FLAT) for one in passes]
    assert first["predicted"].items.tolist() == [one.seconds for one in predicted]
    assert first["rank_correlation"].value == pytest.approx(scipy.stats.spearmanr(first["predicted"].items, first["measured"].items).statistic)
    flops = np.array([one.operations for one in predicted])
    assert first["rank_by_flops"].value == pytest.approx(scipy.stats.spearmanr(flops, first["measured"].items).statistic)
    assert first["log_error_flops"].items == pytest.approx(abs(np.log(flops / 100 / first["measured"].items)))
    assert first["first_memory_bound"].items.tolist() == [one.memory_bound for one in predicted[6:8]]
    assert first["last_memory_bound"].items.tolist() == [one.memory_bound for one in predicted[10:12]]
    assert first["first_growth"].items == pytest.approx(np.full(2, np.log2(2) / 2))  # from 15 to 30 in two doublings
    second = {part.name: part for part in found[13:]}
    both = [np.concatenate([first[name].items, second[name].items]) for name in ("predicted", "measured")]
    assert first["all_rank_correlation"].value == second["all_rank_correlation"].value == pytest.approx(scipy.stats.spearmanr(*both).statistic)
    sizes = np.repeat([model.parameters for model in models], 12)
    assert first["all_rank_by_parameters"].value == pytest.approx(scipy.stats.spearmanr(sizes, both[1]).statistic)
    assert len(clock["read"]) == 2 * 2 * 6 * 3  # a warm-up and a round; models; points; a prompt and two steps


def test_the_seed_draws_the_order_and_nothing_else(clock):
    model, orders = clock["watch"](texts.reader("llama")), []
    for seed in (0, 0, 1):
        clock["read"].clear()
        parts = Roofline(prompt=8, prompts=2, batch=4, new=1, rounds=1)([model], seed=seed)
        orders.append((list(clock["read"]), [part.items.tolist() for part in parts]))
    assert orders[0] == orders[1]
    assert orders[0][0] != orders[2][0]
    assert orders[0][1] == orders[2][1]


def test_wrong_grids_and_models_are_refused():
    for name, value, message in (("prompt", 0, "at least 1"), ("rounds", 0, "at least 1"), ("prompts", 9, "cannot be halved 8 times"), ("batch", 12, "power of two"), ("batch", 1, "power of two")):
        with pytest.raises(ValueError, match=message):
            Roofline(**{name: value})
    with pytest.raises(InputError, match="reads 64 tokens, and a prompt of 128"):
        Roofline()([texts.reader("gpt2")], seed=0)
    with pytest.raises(InputError, match="causal"):
        Roofline()([texts.reader("bert")], seed=0)


# The plan.

MACHINE = Machine(rates=((1.0, 1e9),), bandwidths=((1.0, 1e9),), streams=((1.0, 1e9),), overhead=1e-5, start=1e-3, resident=1000)


@pytest.fixture
def measured(monkeypatch):
    """Calibrations that were asked for."""
    asked = []
    monkeypatch.setattr(etude.engine.calibrate, "calibrate", lambda: asked.append(1) or MACHINE)
    return asked


def test_what_never_ran_is_estimated_and_the_machine_measured_once_a_store(workplace, etude, measured):
    plan, store = build(Study.read("study.yaml")), Store.open("store")
    rows = {(row["name"], row["seed"]): row for row in estimate(plan, store)}
    own = read_layout(workplace / "base")
    one = predict(own, Pass(4096 // 64, 64, logits=64), MACHINE)
    step = 256 / 4096 * 3 * one.seconds + 10 * 4 * own.parameters / 1e9
    trained = rows["trained[last]", 0]
    assert (trained["source"], trained["seconds"]) == ("estimate", pytest.approx(3 * step))
    kept = sum(part.operator.activations / 2 for part in one.timed if part.operator.kind != "head")
    assert trained["peak_bytes"] == pytest.approx(1000 + 5 * 4 * own.parameters + kept + foretell.LOGITS)
    assert rows["perplexity of base", None]["source"] == "estimate"
    assert rows["pruned[last]", None]["source"] is None
    assert rows["pruned[last]", None]["seconds"] is None
    (kept_at,) = (workplace / "store").glob("machine-*.json")
    assert Machine.from_data(json.loads(kept_at.read_text())) == MACHINE
    estimate(plan, store)
    assert measured == [1]
    ended = etude("plan", "study.yaml", "--store", "store")
    assert ended.code == 0
    assert "~" in next(line for line in ended.out.splitlines() if line.startswith("trained[last]"))
    assert "by estimate for" in ended.out
    assert measured == [1]


def test_a_record_comes_before_an_estimate(workplace, etude, measured):
    assert etude("run", "study.yaml", "--store", "store", "--only", "trained").code == 0
    plan, store = build(Study.read("study.yaml")), Store.open("store")
    rows = {(row["name"], row["seed"]): row for row in estimate(plan, store)}
    assert rows["trained[last]", 0]["source"] == "record"
    assert rows["trained[last]", 0]["peak_bytes"] > 1e8
    ended = etude("plan", "study.yaml", "--store", "store", "--set", "trained.budget=4 steps")
    assert "~" not in next(line for line in ended.out.splitlines() if line.startswith("trained[last]"))


def test_perplexity_is_estimated_from_a_sample_of_the_text(workplace, measured):
    """Twelve documents, each of more than ten tokens."""
    plan, store = build(Study.read("study.yaml", ["measure.perplexity.tokens=10"])), Store.open("store")
    row = next(row for row in estimate(plan, store) if row["name"] == "perplexity of base")
    own = read_layout(workplace / "base")
    one = predict(own, Pass(4096 // 11, 11, logits=11), MACHINE)  # ten tokens and the start token
    passes = 12 * 11 / (4096 // 11 * 11)
    known = passes * one.seconds + 4 * 4 * 300 * 12 * 11 / 1e9
    assert known < row["seconds"] < known + 1  # the encoding was timed
    assert row["peak_bytes"] == pytest.approx(1000 + one.peak_bytes + foretell.LOGITS)


def test_throughput_and_memory_are_estimated(tiny, measured, tmp_path):
    study = {
        "study": "speed",
        "given": {"base": {"model": str(tiny / "base")}},
        "measure": {"throughput": {"of": ["base"], "rounds": 4, "prompt": 32, "new": 8}, "memory": {"of": ["base"], "length": 16, "batch": 2, "rounds": 1}, "size": {"of": ["base"]}},
    }
    rows = {row["method"]: row for row in estimate(build(Study.of(**study)), Store.open(tmp_path))}
    own = read_layout(tiny / "base")
    prefill, step = predict(own, Pass(1, 32, logits=32, appended=True), MACHINE), predict(own, Pass(1, 1, 36, appended=True), MACHINE)
    assert rows["throughput"]["seconds"] == pytest.approx(5 * (prefill.seconds + 8 * step.seconds))
    assert rows["memory"]["seconds"] == pytest.approx(2 * predict(own, Pass(2, 16, logits=16), MACHINE).seconds)
    assert rows["size"]["source"] is None


def test_a_fresh_model_is_known_from_the_dimensions_that_make_it(tiny, tmp_path):
    from etude.methods.pretrain.initialize import Initialize
    from etude.values.corpus import Corpus

    method = Initialize(vocabulary=300, hidden_size=32, blocks=3, heads=4, intermediate_size=48)
    made = method(Corpus.read(tiny / "text.jsonl"), seed=0)
    found = described(method)
    assert found.parameters == made.parameters
    assert products(found, Pass(2, 5, 3)) == products(layout(made), Pass(2, 5, 3))
    assert [part.bytes for part in sorted(operators(found, Pass(1, 4)), key=lambda part: (part.kind, part.bytes))] == [
        part.bytes for part in sorted(operators(layout(made), Pass(1, 4)), key=lambda part: (part.kind, part.bytes))
    ]
    assert described(Initialize(kind="seq2seq")) is None
