"""ERNIE-Tiny: attention maps and distances by hand, the loss of every stage against its terms spelt out, which teacher and text each stage has, and the student's shape."""

from __future__ import annotations

import dataclasses
import math

import pytest
import texts
import torch
import transformers as t
from test_cloze import masked, records

from etude.engine import cloze
from etude.engine.budget import Budget
from etude.engine.eager import eager
from etude.engine.feed import Batch, Cut
from etude.methods.compress import _latent
from etude.methods.compress.ernie_tiny import STAGES, ErnieTiny, Teaching, split
from etude.values import checkpoint
from etude.values.errors import InputError
from etude.values.model import Model

METHOD = ErnieTiny(blocks=2, learning_rate=3e-3, batch_tokens=64, length=16, precision="float32")
IDS = torch.tensor([[5, 9, 200, 31, 77, 2], [8, 8, 40, 3, 0, 0]])
MASK = torch.tensor([[True] * 6, [True] * 4 + [False] * 2])


def teachers(name: str = "modernbert") -> tuple[Model, Model]:
    """A model, and another that reads the same tokens."""
    one, other = masked(name), masked(name)
    with torch.no_grad():
        for parameter in other.network.parameters():
            parameter.mul_(1.3)
    return one, other


def maps_by_hand(network: t.BertForMaskedLM) -> list[torch.Tensor]:
    """Attention maps of a small BERT from its queries and keys."""
    seen: dict[str, torch.Tensor] = {}
    hooks = [module.register_forward_hook(lambda module, given, made, path=path: seen.update({path: made})) for path, module in network.named_modules() if path.endswith(("query", "key"))]
    with torch.no_grad():
        network(input_ids=IDS, attention_mask=MASK.long())
    for hook in hooks:
        hook.remove()
    found = []
    for block in range(3):
        q, k = (seen[f"bert.encoder.layer.{block}.attention.self.{kind}"].view(2, 6, 4, 8).transpose(1, 2) for kind in ("query", "key"))
        scores = torch.einsum("rhid,rhjd->rhij", q, k) / math.sqrt(8)
        found.append(scores.masked_fill(~MASK[:, None, None], -torch.inf).softmax(-1))
    return found


def test_maps_are_those_of_queries_and_keys_and_their_distance_is_kl():
    model, other = teachers("bert")
    before = model.network.config._attn_implementation
    with torch.no_grad(), eager(model.network), eager(other.network):
        mine, theirs = (_latent.look(one.network, Batch(IDS, IDS, mask=MASK)) for one in (model, other))
    assert model.network.config._attn_implementation == before
    by_hand, known = maps_by_hand(model.network), maps_by_hand(other.network)
    for found, expected in zip(mine.attentions, by_hand, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    total, count = 0.0, 0
    for row in range(2):
        for place in range(int(MASK[row].sum())):
            for head in range(4):
                p, q = known[1][row, head, place, MASK[row]], by_hand[1][row, head, place, MASK[row]]
                total, count = total + float((p * (p / q).log()).sum()), count + 1
    assert float(_latent.attentions_apart(mine.attentions[1], theirs.attentions[1], MASK)) == pytest.approx(total / count, rel=1e-3)
    a, b = mine.states[1][MASK], theirs.states[1][MASK]
    assert float(_latent.states_apart(mine.states[1], theirs.states[1], MASK)) == pytest.approx(float((a - b).square().sum() / b.square().sum()), rel=1e-4)
    assert float(_latent.attentions_apart(mine.attentions[0][:, :2], mine.attentions[0], None)) > 0  # fewer heads: their means


def choice_scores(logits: torch.Tensor, asked: list[cloze.Question]) -> list[torch.Tensor]:
    """Mean logit of each choice's tokens at their masks, a question at a time."""
    return [torch.stack([torch.stack([logits[row, one.places[at], token] for at, token in enumerate(choice)]).mean() for choice in one.choices]) for row, one in enumerate(asked)]


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("name", ["bert", "modernbert"])
def test_the_loss_of_a_stage_is_the_sum_of_its_terms(name, stage):
    model, other = teachers(name)
    method = dataclasses.replace(METHOD, states=0.7, maps=1.9, divergence=0.6, truth=0.4, temperature=2.0)
    asked = cloze.questions(model, records(3))
    longest = max(len(one.ids) for one in asked)
    ids = torch.zeros(3, longest, dtype=torch.long)
    mask = torch.zeros(3, longest, dtype=torch.bool)
    for row, one in enumerate(asked):
        ids[row, : len(one.ids)], mask[row, : len(one.ids)] = torch.from_numpy(one.ids), True
    student = method._student(model, 0)
    with Teaching(method, student, other, stage, asked) as teaching, eager(student.network), torch.no_grad():
        lost = teaching.loss(student.network, Batch(ids, ids, mask=mask, tags=[0, 1, 2]))
    assert lost.counted == 3

    with torch.no_grad(), eager(student.network), eager(other.network):
        given = {"input_ids": ids, "attention_mask": mask.long(), "output_hidden_states": True, "output_attentions": True}
        s, its = student.network(**given), other.network(**given)
    pairs = [(0, 0), (1, 2)]  # of two blocks the first for the first of three, the last for the last
    terms = 0.0
    for mine, theirs in pairs:
        a, b = s.hidden_states[mine + 1][mask], its.hidden_states[theirs + 1][mask]
        terms += 0.7 * (a - b).square().mean() / b.square().mean() / 2
        p, q = its.attentions[theirs], s.attentions[mine]
        kl = torch.where(p > 0, p * (p.clamp(min=1e-30) / q.clamp(min=1e-30)).log(), 0.0).sum(-1).mean(1)
        terms += 1.9 * kl[mask].mean() / 2
    if stage == "task_specific":
        scores, known = (choice_scores(said.logits, asked) for said in (s, its))
        for row, one in enumerate(asked):
            terms += 0.4 * -scores[row].log_softmax(0)[one.right] / 3
            p = (known[row] / 2).softmax(0)
            terms += 0.6 * 4 * (p * (p.log() - (scores[row] / 2).log_softmax(0))).sum() / 3
    assert float(lost.total) / 3 == pytest.approx(float(terms), rel=1e-3)
    assert set(lost.parts) == {"states", "maps", *(("cross_entropy", "kl") if stage == "task_specific" else ())}


def test_which_teacher_and_which_text(monkeypatch):
    model, other = teachers()
    seen = []
    loss = Teaching.loss

    def look(self: Teaching, network, part):
        weights = next(self.known.parameters())
        seen.append((self.stage, bool(weights.equal(next(other.network.parameters()))), part.tags[0] is None))
        return loss(self, network, part)

    monkeypatch.setattr(Teaching, "loss", look)
    before = model.digest, other.digest
    made = METHOD(model, other, texts.corpus(), records(), Budget(4, "steps"), 0)
    assert (model.digest, other.digest) == before
    assert seen == [("general", False, True), ("general_enhanced", True, True), ("task_adaptive", True, False), ("task_specific", True, False)]
    assert [sorted(set(row) & {"states", "kl"}) for row in made.history] == [["states"]] * 3 + [["kl", "states"]]


def test_the_student_learns_what_the_teacher_makes():
    model, other = teachers()
    made = dataclasses.replace(METHOD, stages=("general_enhanced",), initial="random")(model, other, texts.corpus(), records(), Budget(61, "steps"), 0)
    first, last = made.history[0], made.history[-1]
    assert last["states"] < 0.5 * first["states"]
    assert not any(_latent.MAPS in name for name, _ in made.network.named_modules())


@pytest.mark.parametrize("name", ["bert", "roberta", "modernbert"])
def test_fewer_blocks_and_plain_transformers_loads_them(name, tmp_path):
    model, other = teachers(name)
    made = dataclasses.replace(METHOD, stages=("general", "task_specific"))(model, other, texts.corpus(), records(), Budget(2, "steps"), 0)
    assert len(made.anatomy.blocks) == 2
    assert made.network.config._attn_implementation == model.network.config._attn_implementation
    made.export(tmp_path)
    loaded = t.AutoModelForMaskedLM.from_pretrained(tmp_path, dtype=torch.float32)
    probe = checkpoint.probe(made.network)
    torch.testing.assert_close(checkpoint.outputs(loaded, probe), checkpoint.outputs(made.network, probe), rtol=1e-4, atol=1e-5)


def test_blocks_are_kept_from_first_to_last_and_random_ones_are_drawn_by_the_seed():
    model = masked("modernbert")
    kept = METHOD._student(model, 0)
    for place, old in enumerate((0, 2)):
        assert kept.anatomy.blocks[place].module.mlp.Wi.weight.equal(model.anatomy.blocks[old].module.mlp.Wi.weight)
    drawn = [dataclasses.replace(METHOD, initial="random")._student(model, seed).digest for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert _latent.spread(2, 6) == [2, 5]
    assert _latent.spread(3, 4) == [0, 1, 3]


def test_a_narrower_student_carries_linear_maps_while_it_learns():
    model, other = teachers("bert")
    student = masked("bert", blocks=1, width=16)
    before = student.digest
    made = METHOD(model, other, texts.corpus(), records(), Budget(4, "steps"), 0, student)
    assert student.digest == before != made.digest
    assert made.network.get_input_embeddings().weight.shape[1] == 16
    assert len(made.anatomy.blocks) == 1
    assert set(made.network.state_dict()) == set(student.network.state_dict())


def test_plain_fine_tuning_needs_no_teacher():
    model, other = teachers()
    plain = dataclasses.replace(METHOD, stages=("task_specific",), states=0.0, maps=0.0, divergence=0.0)
    digests = [plain(model, one, texts.corpus(), records(), Budget(2, "steps"), 0).digest for one in (model, other)]
    assert digests[0] == digests[1]


def test_a_killed_run_goes_on_to_the_same_bits(stopped):
    model, other = teachers()
    method = dataclasses.replace(METHOD, stages=("general", "task_specific"))

    def run():
        return method(model, other, texts.corpus(), records(), Budget(8, "steps"), 0)

    whole = run()
    assert stopped(Cut, 2, run).digest == whole.digest


def test_budgets_are_split_whole():
    assert [part.amount for part in split(Budget(10, "steps"), (1.0, 1.0, 1.0, 1.0))] == [3, 2, 3, 2]
    assert [part.amount for part in split(Budget(2, "steps"), (1.0, 1.0, 1.0, 1.0))] == [1, 1, 1, 1]
    assert [part.amount for part in split(Budget(100, "tokens"), (3.0, 1.0))] == [75, 25]


def test_what_cannot_be_distilled_is_refused():
    model, other = teachers()
    with pytest.raises(InputError, match="and this is a causal one"):
        METHOD(texts.reader("llama"), other, texts.corpus(), records(), Budget(1, "steps"), 0)
    with pytest.raises(InputError, match="cannot be made of 3"):
        dataclasses.replace(METHOD, blocks=4)(model, other, texts.corpus(), records(), Budget(1, "steps"), 0)
    other.tokenizer.add_tokens(["zebra"])
    with pytest.raises(InputError, match="another tokenizer"):
        METHOD(model, other, texts.corpus(), records(), Budget(1, "steps"), 0)
    for wrong in (
        {"blocks": 0},
        {"initial": "best"},
        {"stages": ()},
        {"stages": ("task_specific", "general")},
        {"shares": (1.0,)},
        {"states": -1.0},
        {"states": 0.0, "maps": 0.0},
        {"temperature": 0.0},
    ):
        with pytest.raises(ValueError, match=r"blocks|initial|stages|shares|weights|states"):
            ErnieTiny(**wrong)
