"""SquareHead: its loss and its steps against autograd by hand, what is pruned when, and zeros that stay."""

from __future__ import annotations

import dataclasses
import itertools

import architectures
import pytest
import texts
import torch
from torch import nn

from etude.engine import batch
from etude.engine.budget import Budget
from etude.engine.feed import Packed
from etude.methods.compress import squarehead
from etude.methods.compress._masks import matrices
from etude.methods.compress.magnitude import Magnitude
from etude.methods.compress.squarehead import Pruning, SquareHead
from etude.values import checkpoint
from etude.values.errors import InputError
from etude.values.model import Model

METHOD = SquareHead(sparsity=0.7, learning_rate=3e-3, batch_tokens=64, length=16, precision="float32", schedule="constant", warmup=0.0)
LOSSES = {"cross-entropy": {"states": 0.0}, "logits": {"states": 0.0, "divergence": 0.7, "temperature": 2.0}, "squarehead": {"states": 1.3}, "all": {"truth": 0.5, "divergence": 0.7, "states": 1.3}}


def still(name: str, scale: float = 1.0) -> Model:
    """A model without dropout, its matrices multiplied."""
    model = texts.reader(name)
    with torch.no_grad():
        for one in model.network.modules():
            if isinstance(one, nn.Dropout):
                one.p = 0.0
        for one in matrices(model).values():
            one.mul_(scale)
    return model


def watched(network: nn.Module, paths: list[str], ids: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Logits (tokens, vocabulary), and what each block writes."""
    seen: list[torch.Tensor] = []
    hooks = [network.get_submodule(path).register_forward_hook(lambda module, given, made: seen.append(made if isinstance(made, torch.Tensor) else made[0])) for path in paths]
    logits = network(input_ids=ids, position_ids=positions, use_cache=False).logits
    for hook in hooks:
        hook.remove()
    return logits.flatten(0, 1), seen


@pytest.mark.parametrize("weights", LOSSES)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_step_is_adamw_on_the_surviving_weights(name, weights):
    """Three steps of one row by hand, after pruning at once: the terms spelt out, the gradient of what survives clipped at 1, torch's AdamW, the zeros put back."""
    method = dataclasses.replace(METHOD, rounds=1, batch_tokens=16, **LOSSES[weights])
    model, teacher = still(name), still(name, 1.2)
    before = model.digest, teacher.digest
    trained = method(model, texts.corpus(), Budget(3, "steps"), 5, teacher)
    assert (model.digest, teacher.digest) == before

    student = Magnitude(sparsity=0.7)(model).copy()
    network, paths = student.network.train(), [block.path for block in student.anatomy.blocks]
    kept = {one: (one.detach() != 0) for one in matrices(student).values()}
    start = {key: tensor.clone() for key, tensor in network.state_dict().items()}
    plain = [one for one in network.parameters() if one.ndim < 2]
    optimizer = torch.optim.AdamW([*(one for one in network.parameters() if one.ndim > 1), *plain], lr=3e-3, betas=(0.9, 0.95), weight_decay=0.0)
    feed = Packed(batch.Documents(student, texts.corpus()), 16)
    feed.begin(5)
    for _ in range(3):
        part = feed.collate(feed.take(1, 0.0))
        positions = torch.arange(16)[None] if part.positions is None else part.positions
        logits, mine = watched(network, paths, part.ids, positions)
        with torch.no_grad():
            known, theirs = watched(teacher.network, paths, part.ids, positions)
        at = part.labels.flatten() != -100
        t, terms = method.temperature, torch.nn.functional.cross_entropy(logits, part.labels.flatten()) * method.truth
        p, q = (known[at] / t).softmax(1), (logits[at] / t).log_softmax(1)
        terms = terms + method.divergence * t**2 * (p * (p.log() - q)).sum(1).mean()
        for one, other in zip(mine, theirs, strict=True):
            terms = terms + method.states * (one - other).square().sum() / other.square().sum()
        terms.backward()
        for one, stays in kept.items():
            one.grad *= stays
        torch.nn.utils.clip_grad_norm_(list(network.parameters()), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    for key, by_hand in network.state_dict().items():
        found = trained.network.state_dict()[key]
        assert (by_hand - found).abs().mean() <= 0.02 * (by_hand - start[key]).abs().mean() + 1e-8, key


def test_when_how_much_is_pruned():
    """Four rounds in the first half: after 0, 12.5, 25 and 37.5 % of the budget; 0.8 · (1 - (3/4)³), (1 - (2/4)³), (1 - (1/4)³), 1."""
    pruning = Pruning(texts.reader("llama"), 0.8, 4, 0.5)
    assert [pruning.due(at) for at in (0.0, 0.1, 0.125, 0.2, 0.25, 0.374, 0.375, 0.49, 0.5, 0.99)] == [1, 1, 2, 2, 3, 3, 4, 4, 4, 4]
    assert [Pruning(texts.reader("llama"), 0.8, 3, 0.0).due(at) for at in (0.0, 0.5)] == [3, 3]
    shares = []
    look = pruning.before(lambda network, batch: shares.append([float((one == 0).float().mean()) for one in pruning.matrices.values()]))
    for progress in (0.0, 0.1, 0.125, 0.3, 0.4, 0.9):
        look(None, batch_at(progress))
    expected = [0.8 * (1 - 27 / 64), 0.8 * (1 - 27 / 64), 0.8 * (1 - 1 / 8), 0.8 * (1 - 1 / 64), 0.8, 0.8]
    for found, share in zip(shares, expected, strict=True):
        sizes = [one.numel() for one in pruning.matrices.values()]
        assert [round(one * size) for one, size in zip(found, sizes, strict=True)] == [round(share * size) for size in sizes]


def batch_at(progress: float):
    one = torch.zeros(1, 1, dtype=torch.long)
    return squarehead.Batch(one, one, progress=progress)


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_zeros_only_grow_and_never_fill(name, monkeypatch, tmp_path):
    """Over eight steps with three rounds, AdamW's memory notwithstanding: what was pruned stays exactly zero, and the share at the end is exact, in each expert too."""
    model, snapshots, before_step = still(name), [], Pruning.before_step

    def look(self: Pruning, step) -> None:
        snapshots.append({path: matrix.detach().clone() for path, matrix in self.matrices.items()})
        before_step(self, step)

    monkeypatch.setattr(Pruning, "before_step", look)
    before = model.digest
    trained = dataclasses.replace(METHOD, rounds=3, ramp=0.7, learning_rate=2e-2)(model.frozen_now(), texts.corpus(), Budget(8, "steps"), 0)
    assert model.digest == before
    snapshots.append({path: matrix.detach() for path, matrix in matrices(trained).items()})
    for earlier, later in itertools.pairwise(snapshots):
        for path, matrix in earlier.items():
            assert not (later[path][matrix == 0]).any()
            assert (later[path] != matrix)[later[path] != 0].float().mean() > 0.5
    for one in snapshots[-1].values():
        for weight in one if one.ndim > 2 else [one]:
            assert int((weight == 0).sum()) == round(0.7 * weight.numel())
    counts = [sum(int((matrix == 0).sum()) for matrix in one.values()) for one in snapshots]
    assert len(set(counts)) == 3
    trained.save(tmp_path)
    assert Model.load(tmp_path).plain
    assert checkpoint.digest_state(Model.load(tmp_path).network) == checkpoint.digest_state(trained.network)


def test_zeros_that_are_brought_along_stay_and_suffice():
    sparse = Magnitude(pattern="2:4")(texts.reader("llama"))
    trained = dataclasses.replace(METHOD, sparsity=0.5)(sparse, texts.corpus(), Budget(3, "steps"), 0, texts.reader("llama"))
    for path, matrix in matrices(trained).items():
        assert (matrix == 0).equal(matrices(sparse)[path] == 0)
    further = dataclasses.replace(METHOD, sparsity=0.6)(sparse, texts.corpus(), Budget(3, "steps"), 0, texts.reader("llama"))
    for path, matrix in matrices(further).items():
        assert int((matrix == 0).sum()) == round(0.6 * matrix.numel())
        assert not matrix[matrices(sparse)[path] == 0].any()


def test_the_model_as_it_comes_is_its_own_teacher():
    model = texts.reader("llama")
    digests = [METHOD(model, texts.corpus(), Budget(2, "steps"), 0, teacher).digest for teacher in (None, model, still("llama", 1.2))]
    assert digests[0] == digests[1] != digests[2]


def test_the_history_shows_the_terms():
    row = METHOD(texts.reader("llama"), texts.corpus(), Budget(1, "steps"), 0).history[0]
    assert row["loss"] == pytest.approx(row["cross_entropy"] + architectures.BLOCKS * row["states"], rel=1e-3)


def test_a_killed_run_goes_on_to_the_same_bits(stopped):
    model, method = texts.reader("llama").frozen_now(), dataclasses.replace(METHOD, rounds=3, ramp=0.8)
    whole = method(model, texts.corpus(), Budget(5, "steps"), 0)
    assert stopped(Packed, 3, lambda: method(model, texts.corpus(), Budget(5, "steps"), 0)).digest == whole.digest


def test_another_tokenizer_and_another_kind_are_refused():
    with pytest.raises(InputError, match="teacher"):
        METHOD(texts.reader("llama"), texts.corpus(), Budget(1, "steps"), 0, texts.reader("bert"))
    with pytest.raises(InputError, match="causal"):
        METHOD(texts.reader("bert"), texts.corpus(), Budget(1, "steps"), 0)


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"sparsity": 0.0}, "sparsity"),
        ({"rounds": 0}, "rounds"),
        ({"ramp": 1.5}, "ramp"),
        ({"states": -1.0}, "weights of a lesson"),
        ({"temperature": 0.0}, "temperature"),
        ({"optimizer": "muon"}, "adamw"),
    ],
)
def test_hyperparameters_out_of_range(fields, match):
    with pytest.raises(ValueError, match=match):
        SquareHead(**fields)
