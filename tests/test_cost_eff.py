"""COST-EFF and early exits: what an exit says by hand, gradients in balance, operations counted by hand, thresholds by brute force, importance by autograd, and what is cut."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import texts
import torch
from test_cloze import masked, records
from torch import nn

from etude.engine import cloze, exits
from etude.engine.budget import Budget
from etude.engine.classify import Labelled
from etude.engine.feed import Batch
from etude.measures.cloze import Cloze
from etude.measures.early_exit import EarlyExit, entropies, leaving
from etude.methods.compress import _slender
from etude.methods.compress.cost_eff import CostEff, Lesson, Shape, right, sum_over
from etude.values import checkpoint
from etude.values.errors import InputError
from etude.values.model import Model

METHOD = CostEff(width=0.5, stream=0.75, rounds=2, records=6, learning_rate=3e-3, batch_tokens=64, length=16, precision="float32")


def with_exits(name: str = "modernbert") -> Model:
    """A model whose exits are all unlike."""
    draft = masked(name).copy()
    exits.attach(draft)
    torch.manual_seed(3)
    with torch.no_grad():
        for head in exits.heads(draft.network).values():
            for parameter in head.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
    return draft


@pytest.mark.parametrize("name", ["bert", "modernbert", "distilbert"])
def test_an_exit_reads_its_block_and_says_the_models_words(name, tmp_path):
    model = with_exits(name)
    asked = cloze.questions(model, records())
    logs = exits.answers(model, asked)
    assert logs.shape == (3, 6, 3)
    decoder = model.network.get_output_embeddings()
    for block, head in exits.heads(model.network).items():
        for place, one in enumerate(asked):
            seen: list[torch.Tensor] = []
            module = model.network.get_submodule(exits.block_paths(model)[block])
            hook = module.register_forward_hook(lambda module, given, made, seen=seen: seen.append(made if isinstance(made, torch.Tensor) else made[0]))
            with torch.no_grad():
                model.network(input_ids=torch.from_numpy(one.ids)[None])
                read = seen[0][0, one.places]
                made = head.after(nn.functional.gelu(head.before(read) @ head.dense.weight.T + head.dense.bias))
                logits = made @ decoder.weight.T + (0 if decoder.bias is None else decoder.bias)
            hook.remove()
            scores = torch.stack([torch.stack([logits[at, token] for at, token in enumerate(choice)]).mean() for choice in one.choices])
            np.testing.assert_allclose(logs[block, place], scores.log_softmax(0), rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(logs[2], cloze.answers(model, asked), atol=1e-6)
    model.save(tmp_path / "saved")
    np.testing.assert_allclose(exits.answers(Model.load(tmp_path / "saved"), asked), logs, atol=1e-6)
    with pytest.raises(InputError, match="Exits"):
        model.export(tmp_path / "out")


def test_a_block_gets_the_mean_of_its_exits_gradients():
    """Blocks that hand on what they get, and exits whose slopes are 1, 5 and 9: the first block gets 5, the second 7, the third 9."""
    network, states = nn.Module(), torch.zeros(1, 1, 1, requires_grad=True)
    network.blocks = nn.ModuleList([nn.Identity() for _ in range(3)])
    slopes: list[float] = []
    with exits.watched(network, [f"blocks.{place}" for place in range(3)], balanced=True) as seen:
        made = states
        for block in network.blocks:
            given = made.view_as(made)
            given.register_hook(lambda slope: slopes.append(float(slope)))
            made = block(given)
        (1 * seen[0] + 5 * seen[1] + 9 * made).sum().backward()
    assert slopes == pytest.approx([9, 7, 5])


def test_operations_are_those_of_the_matrices():
    """One row of so many tokens: two for every weight and token, four for every pair of tokens and channel of the attention, and the exits at three masks."""
    model = with_exits()
    asked = cloze.questions(model, records(1))
    length = len(asked[0].ids)
    block = 2 * length * (32 * 96 + 32 * 32 + 32 * 96 + 48 * 32) + 4 * length**2 * 32
    head = 2 * 32 * (32 * 3 + 6)
    assert exits.costs(model, asked)[:, 0].tolist() == [block + head, 2 * (block + head), 3 * (block + head)]
    assert exits.costs(masked("modernbert"), asked)[:, 0].tolist() == [3 * block + head]


def test_thresholds_by_brute_force():
    random = np.random.default_rng(0)
    for _ in range(20):
        unsure, spent = random.random((3, 7)).round(1), np.cumsum(random.random((4, 7)), 0)
        share = random.uniform(0.3, 3)
        best = None
        for threshold in sorted({0.0, np.inf, *unsure.flatten().tolist()}, reverse=True):
            taken = [next((place for place in range(3) if unsure[place, one] < threshold), 3) for one in range(7)]
            if best is None or np.mean([spent[place, one] for one, place in enumerate(taken)]) <= share:
                best = taken
        assert leaving(unsure, spent, share).tolist() == best
    logs = np.log(np.array([[0.5, 0.25, 0.25, 1.0]]))
    logs[0, 3] = -np.inf
    assert entropies(logs)[0] == pytest.approx(1.5 * np.log(2))


def test_the_measure_spends_what_it_may():
    model, plain = with_exits(), masked("modernbert")
    before = model.digest, plain.digest
    found = {part.name: part.value for part in EarlyExit(shares=(0.5, 1.0))(model, records(9), plain)}
    assert (model.digest, plain.digest) == before
    assert found["flops_50"] <= 0.5
    assert found["flops_100"] <= 1.0 < found["flops"]  # the exits on the way
    alone = {part.name: part.value for part in EarlyExit()(plain, records(9))}
    assert alone["flops"] == alone["flops_25"] == alone["flops_50"] == pytest.approx(1.0)
    assert alone["accuracy"] == alone["accuracy_25"] == Cloze()(plain, records(9))[0].value


def question_batch(model: Model, count: int = 6) -> tuple[list[cloze.Question], Batch]:
    asked = cloze.questions(model, records(count))
    feed = Labelled([one.ids for one in asked], np.arange(count))
    feed.begin(0)
    return asked, feed.collate(feed.take(count, 0.0))


def test_salience_is_the_sum_of_absolute_gradients_times_weights():
    model = with_exits()
    asked, part = question_batch(model)
    halves = [dataclasses.replace(part, ids=part.ids[at], mask=None if part.mask is None else part.mask[at], tags=part.tags[at]) for at in (slice(0, 3), slice(3, 6))]
    guide = with_exits()
    with torch.no_grad():
        guide.network.get_input_embeddings().weight.mul_(1.2)
    with Lesson(METHOD, model, guide, asked) as lesson:
        found = _slender.salience(model.network, halves, lesson.important)
        sums: dict[str, torch.Tensor] = {}
        for half in halves:
            lesson.important(model.network, half).backward()
            for name, parameter in model.network.named_parameters():
                sums[name] = sums.get(name, 0) + parameter.grad.abs()
                parameter.grad = None
    for name, parameter in model.network.named_parameters():
        torch.testing.assert_close(found[name], sums[name] * parameter.detach().abs())
    assert found["decoder.weight"] is found["model.embeddings.tok_embeddings.weight"]
    site = _slender.sites(model, "")[0]
    head = found["model.layers.0.attn.Wo.weight"][:, 8:16].sum()
    assert _slender.unit_scores(model, found, site)[1] == pytest.approx(float(head), rel=1e-5)
    site = _slender.sites(model, "")[1]
    gate = found["model.layers.0.mlp.Wi.weight"]
    assert _slender.unit_scores(model, found, site)[5] == pytest.approx(float(gate[5].sum() + gate[53].sum() + found["model.layers.0.mlp.Wo.weight"][:, 5].sum()), rel=1e-5)
    by_hand = sum(
        float(one.select(dim, 7).sum())
        for name, one in found.items()
        if name != "decoder.weight"
        for dim, size in enumerate(one.shape)
        if size == 32 and not (name.endswith("attn.Wo.weight") and dim == 1)
    )
    assert _slender.stream_scores(model, found)[7] == pytest.approx(by_hand, rel=1e-5)


def test_the_losses_are_their_terms():
    model, guide = with_exits(), with_exits()
    with torch.no_grad():
        for parameter in guide.network.parameters():
            parameter.mul_(1.1)
    asked, part = question_batch(model)
    some = [asked[index] for index in part.tags]
    mine, theirs = (exits.answers(one, some) for one in (model, guide))
    answer = np.array([one.right for one in some])
    with Lesson(METHOD, model, guide, asked) as lesson, torch.no_grad():
        first, second = lesson.first(model.network, part), lesson.second(model.network, part)
    truth = -mine[:, np.arange(6), answer].sum()
    last = (np.exp(theirs[-1]) * (theirs[-1] - mine)).sum()
    assert float(first.total) == pytest.approx((truth + last) / 2, rel=1e-3)
    assert float(second.parts["kl"]) == pytest.approx((np.exp(theirs) * (theirs - mine)).sum(), rel=1e-3)
    assert first.counted == second.counted == 6
    assert right(some, torch.zeros(1)).tolist() == answer.tolist()
    assert float(sum_over([torch.ones(2), torch.ones(3)], lambda one: one.sum())) == 5


@pytest.mark.parametrize("name", ["bert", "roberta", "modernbert"])
def test_a_slender_model_with_exits_is_saved_and_loaded(name, tmp_path):
    model = masked(name)
    before = model.digest
    made = METHOD(model, records(), Budget(8, "steps"), 0)
    assert model.digest == before
    assert made.network.get_input_embeddings().weight.shape[1] == 24
    for block in made.anatomy.blocks:
        assert (block.attention.heads, block.feed_forward.channels) == (2, 24)
    assert sorted(exits.heads(made.network)) == [0, 1]
    made.save(tmp_path)
    again, asked = Model.load(tmp_path), cloze.questions(made, records())
    assert checkpoint.digest_state(again.network) == checkpoint.digest_state(made.network)
    np.testing.assert_allclose(exits.answers(again, asked), exits.answers(made, asked), atol=1e-5)


def test_what_is_cut_is_of_least_salience_and_what_stays_is_unchanged():
    model = with_exits()
    asked, part = question_batch(model)
    draft = model.copy()
    with Lesson(METHOD, draft, model, asked) as lesson:
        found = _slender.salience(draft.network, [part], lesson.important)
    units = [_slender.unit_scores(draft, found, site) for site in _slender.sites(draft, "")]
    stream = _slender.stream_scores(draft, found)
    goal = Shape.of(draft).after(1.0, 0.5, 0.75)
    assert goal == Shape(dict.fromkeys(range(3), 2), dict.fromkeys(range(3), 24), 24)
    kept = _slender.narrow(draft, found, goal.heads, goal.channels, goal.stream)
    assert kept == sorted(np.argsort(-stream, kind="stable")[:24].tolist())
    channels = sorted(np.argsort(-units[1], kind="stable")[:24].tolist())
    old, new = model.network.model.layers[0].mlp, draft.network.model.layers[0].mlp
    torch.testing.assert_close(new.Wo.weight, old.Wo.weight[kept][:, channels])
    torch.testing.assert_close(new.Wi.weight, old.Wi.weight[[*channels, *(48 + one for one in channels)]][:, kept])
    heads = sorted(np.argsort(-units[0], kind="stable")[:2].tolist())
    torch.testing.assert_close(draft.network.model.layers[0].attn.Wo.weight, model.network.model.layers[0].attn.Wo.weight[kept][:, [8 * head + i for head in heads for i in range(8)]])
    torch.testing.assert_close(draft.network.head.dense.weight, model.network.head.dense.weight[kept][:, kept])
    torch.testing.assert_close(draft.network.exits["1"].dense.weight, model.network.exits["1"].dense.weight[kept][:, kept])
    assert draft.network.decoder.weight is draft.network.get_input_embeddings().weight


def test_width_alone_and_exits_alone(tmp_path):
    model = masked("modernbert")
    narrow = dataclasses.replace(METHOD, exits=False)(model, records(), Budget(6, "steps"), 0)
    assert not exits.heads(narrow.network)
    assert len(exits.answers(narrow, cloze.questions(model, records()))) == 1
    both = dataclasses.replace(METHOD, width=1.0, stream=1.0)(narrow, records(), Budget(2, "steps"), 0, model)
    assert sorted(exits.heads(both.network)) == [0, 1]
    assert both.network.get_input_embeddings().weight.shape[1] == 24
    both.save(tmp_path)
    assert checkpoint.digest_state(Model.load(tmp_path).network) == checkpoint.digest_state(both.network)
    again = METHOD(both, records(), Budget(6, "steps"), 0)  # narrower still, exits and all
    again.save(tmp_path / "again")
    assert checkpoint.digest_state(Model.load(tmp_path / "again").network) == checkpoint.digest_state(again.network)


def test_exits_learn():
    tuned = dataclasses.replace(METHOD, width=1.0, stream=1.0, learning_rate=1e-2)(masked("modernbert"), records(12), Budget(60, "steps"), 0)
    logs = exits.answers(tuned, cloze.questions(tuned, records(9)))
    assert (logs.argmax(2) == np.arange(9) % 3).mean(1).min() == 1.0
    found = {part.name: part.value for part in EarlyExit(shares=(0.4,))(tuned, records(9))}
    assert found["accuracy_40"] == 1.0
    assert found["flops_40"] <= 0.4


def test_the_budget_is_what_the_phases_spend():
    plan = METHOD.plan(Budget(100, "steps"))
    assert [part.amount for part in plan] == [25, 15, 15, 45]
    alone = dataclasses.replace(METHOD, exits=False).plan(Budget(100, "tokens"))
    assert alone[0] is None
    assert [part.amount for part in alone[1:]] == pytest.approx([20, 20, 60])
    assert [part.amount for part in dataclasses.replace(METHOD, width=1.0, stream=1.0).plan(Budget(9, "steps"))] == [9]


def test_a_killed_run_goes_on_to_the_same_bits(stopped):
    model = masked("modernbert").frozen_now()

    def run():
        return METHOD(model, records(), Budget(6, "steps"), 0)

    whole = run()
    assert stopped(Labelled, 3, run).digest == whole.digest


def test_what_cannot_be_narrowed_is_refused():
    with pytest.raises(InputError, match="and this is a causal one"):
        METHOD(texts.reader("llama"), records(), Budget(1, "steps"), 0)
    with pytest.raises(InputError, match="as wide as"):
        METHOD(masked("electra"), records(), Budget(1, "steps"), 0)
    draft = with_exits().copy()
    draft.anatomy.drop([2])
    with pytest.raises(InputError, match="exit behind block 1"):
        exits.answers(draft, cloze.questions(draft, records()))
    for wrong in ({"width": 0}, {"stream": 2.0}, {"rounds": 0}, {"assistant": 1.0}, {"states": -1.0}, {"width": 1.0, "stream": 1.0, "exits": False}):
        with pytest.raises(ValueError, match=r"width|stream|rounds|assistant|states"):
            CostEff(**wrong)
    with pytest.raises(ValueError, match="shares"):
        EarlyExit(shares=(0.0,))
