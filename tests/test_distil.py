"""Distillation against the whole logits and hidden states, padding, widths that differ, and that a student learns."""

from __future__ import annotations

import numpy as np
import pytest
import texts
import torch

from etude.engine import batch, distil, losses
from etude.engine.budget import Budget
from etude.engine.distil import Lesson, block_pairs, taught
from etude.engine.feed import Packed, Row
from etude.engine.train import Recipe, train
from etude.values.checkpoint import digest_state
from etude.values.errors import InputError

DISTANCES = {
    "squared": lambda a, b: (a - b).pow(2).mean(),
    "relative": lambda a, b: (a - b).pow(2).sum() / b.pow(2).sum(),
    "cosine": lambda a, b: (1 - (a * b).sum(1) / a.norm(dim=1) / b.norm(dim=1)).mean(),
}
RECIPE = Recipe(learning_rate=1e-2, batch_tokens=64, length=16, precision="float32")


def packed(model, count=6):
    feed = Packed(batch.Documents(model, texts.corpus()), 16)
    feed.begin(0)
    return feed.collate(feed.take(count, 0.0))


def padded():
    ids = np.arange(10, 26)
    rows = [Row(ids, np.append(ids[1:], -100)), Row(ids[:7] + 60, np.append(ids[1:7] + 60, -100))]
    return Packed.collate(None, rows)


def reference(lesson, student, teacher, pairs, part):
    """The loss by transformers' own logits and hidden states, and its gradients."""
    student.network.zero_grad()
    given = {"input_ids": part.ids, "position_ids": part.positions, "attention_mask": part.mask, "use_cache": False}
    given = {name: value for name, value in given.items() if value is not None}
    seen = {}
    handles = []
    for model, who, paths in ((student, 0, [a for a, _ in pairs]), (teacher, 1, [b for _, b in pairs])):
        for path in paths:
            handles.append(model.network.get_submodule(path).register_forward_hook(lambda m, i, o, key=(who, path): seen.__setitem__(key, o if torch.is_tensor(o) else o[0])))
    said = student.network(**given).logits
    with torch.no_grad():
        told = teacher.network(**given).logits
    for handle in handles:
        handle.remove()
    counted = part.labels != -100
    said, told, labels = said[counted].double(), told[counted].double(), part.labels[counted]
    truth = -said.log_softmax(1)[torch.arange(len(labels)), labels].sum()
    p, q = (told / lesson.temperature).softmax(1), (said / lesson.temperature).softmax(1)
    total = lesson.truth * truth + lesson.divergence * lesson.temperature**2 * (p * (p / q).log()).sum()
    if lesson.states:
        apart = []
        for mine, theirs in pairs:
            a, b = seen[0, mine].double(), seen[1, theirs].double()
            if part.mask is not None:
                a, b = a[part.mask], b[part.mask]
            a, b = a.flatten(0, -2), b.flatten(0, -2)
            apart.append(DISTANCES[lesson.distance](a, b))
        total = total + lesson.states * len(labels) * sum(apart) / len(apart)
    total.backward()
    return total.item(), {name: parameter.grad.clone() for name, parameter in student.network.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize(
    ("name", "lesson"),
    [
        ("llama", Lesson(truth=0.3, divergence=0.7, temperature=2.0)),
        ("qwen2", Lesson(truth=0.0, divergence=1.0, states=0.5)),
        ("gpt2", Lesson(truth=1.0, divergence=0.0, states=2.0, distance="squared")),
        ("gemma2", Lesson(truth=0.2, divergence=0.5, temperature=0.5, states=1.0, distance="cosine")),
    ],
)
@pytest.mark.parametrize("held", [257 * 7, 1 << 22])
@pytest.mark.parametrize("rows", ["packed", "padded"])
def test_the_loss_and_its_gradients_are_those_of_whole_logits(name, lesson, held, rows, monkeypatch):
    monkeypatch.setattr(losses, "CHUNK_ELEMENTS", held)
    student, teacher = texts.reader(name), texts.reader(name, blocks=2)
    before = digest_state(teacher.network)
    part = packed(student) if rows == "packed" else padded()
    pairs = block_pairs(teacher, teacher)[:1]
    expected, slopes = reference(lesson, student, teacher, pairs, part)
    student.network.zero_grad()
    with losses.headless(student.network), taught(student, teacher, lesson, pairs) as loss:
        found = loss(student.network, part)
    found.total.backward()
    assert found.total.item() == pytest.approx(expected, rel=1e-5)
    for key, parameter in student.network.named_parameters():
        if key in slopes:
            torch.testing.assert_close(parameter.grad, slopes[key].float(), rtol=2e-3, atol=2e-4)
    assert digest_state(teacher.network) == before
    assert all(parameter.grad is None for parameter in teacher.network.parameters())


def test_blocks_of_other_width_are_mapped_while_a_student_learns():
    teacher, narrow = texts.reader("llama"), texts.reader("llama", width=16)
    pairs = block_pairs(narrow, teacher, [0, 2, 2])
    keys = set(narrow.network.state_dict())
    with taught(narrow, teacher, Lesson(states=1.0), pairs) as loss:
        assert len(getattr(narrow.network, distil.MAPS)) == 3
        feed = Packed(batch.Documents(narrow, texts.corpus()), 16)
        train(narrow, feed, RECIPE, Budget(3, "steps"), 0, loss)
    assert set(narrow.network.state_dict()) == keys
    assert {"cross_entropy", "kl", "states"} <= narrow.history[0].keys()


def test_pairs_spread_a_students_blocks_over_its_teachers():
    teacher, student = texts.reader("llama"), texts.reader("llama")
    student.anatomy.drop([0])
    assert [theirs for _, theirs in block_pairs(student, teacher)] == ["model.layers.0", "model.layers.2"]
    assert [theirs for _, theirs in block_pairs(student, teacher, [1, 2])] == ["model.layers.1", "model.layers.2"]


def test_a_student_comes_nearer_to_its_teacher():
    teacher, student = texts.reader("llama"), texts.reader("llama")
    with torch.no_grad():
        for parameter in student.network.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    with taught(student, teacher, Lesson()) as loss:
        train(student, Packed(batch.Documents(student, texts.corpus()), 16), RECIPE, Budget(30, "steps"), 0, loss)
    history = student.history
    assert history[-1]["kl"] < 0.5 * history[0]["kl"]


def test_a_teacher_of_other_tokens_is_refused():
    import architectures

    with pytest.raises(InputError, match="teacher"), taught(texts.reader("llama"), architectures.small("bert"), Lesson()):
        pass


@pytest.mark.parametrize("wrong", [{"temperature": 0.0}, {"divergence": 0.0}, {"truth": -1.0}, {"distance": "far"}])
def test_wrong_lessons_are_refused(wrong):
    with pytest.raises(ValueError, match=r"temperature|lesson|distance"):
        Lesson(**wrong)
