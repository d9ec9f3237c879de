"""PASER: its divergence, its map, its factors, its concepts and its choice, each against something computed otherwise."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats
import texts
import torch

from etude.methods.compress._capabilities import Concepts, capabilities, concepts, diffusion
from etude.methods.compress._degradation import degradation, jensen_shannon
from etude.methods.compress.drop_blocks import DropBlocks
from etude.methods.compress.paser import PASER, evenly, selected, shared
from etude.values.checkpoint import digest_state
from etude.values.corpus import Corpus
from etude.values.errors import InputError

PAIRS = [("the river runs", " under the old bridge"), ("a bird", " sings"), ("", "the stone house falls quickly"), ("red and green", " blue tree, in the river")]


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_divergence_and_loss_are_those_of_single_passes(kind):
    original = texts.reader(kind)
    pruned = DropBlocks(blocks=0.5, choose="last")(original, seed=0)
    before = digest_state(original.network), digest_state(pruned.network)
    found = degradation(pruned, original, PAIRS)
    assert (digest_state(original.network), digest_state(pruned.network)) == before
    for place, (prompt, completion) in enumerate(PAIRS):
        start = original.tokenizer.bos_token_id if original.tokenizer.bos_token_id is not None else original.tokenizer.eos_token_id
        head = [start, *original.tokenizer(prompt, add_special_tokens=False)["input_ids"]]
        whole = [start, *original.tokenizer(prompt + completion, add_special_tokens=False)["input_ids"]]
        with torch.no_grad():
            p, q = (model.network(torch.tensor([whole])).logits[0, len(head) - 1 : -1].double().softmax(-1).numpy() for model in (pruned, original))
        expected = [(scipy.stats.entropy(a, (a + b) / 2) + scipy.stats.entropy(b, (a + b) / 2)) / 2 for a, b in zip(p, q, strict=True)]
        assert found.divergence[place] == pytest.approx(np.mean(expected), rel=1e-3, abs=1e-6)
        assert found.nats[place] == pytest.approx(-np.mean(np.log([row[token] for row, token in zip(p, whole[len(head) :], strict=True)])), rel=1e-4)
        assert found.tokens[place] == len(whole)


def test_divergence_is_between_none_and_ln_2():
    far = torch.tensor([[100.0, 0.0], [0.0, 0.0]])
    assert jensen_shannon(far, far.flip(1)).tolist() == pytest.approx([np.log(2), 0.0], abs=1e-6)


def test_the_map_is_the_eigenvectors_of_the_laplacian_and_the_factors_find_the_groups():
    random = np.random.default_rng(0)
    centres = random.normal(size=(3, 8)) * 6
    truth = np.repeat(np.arange(3), 12)
    points = centres[truth] + random.normal(size=(36, 8)) * 0.3
    found = diffusion(points, 3)
    apart = np.sqrt(np.square(points[:, None] - points[None]).sum(-1))
    affinity = np.exp(-(apart**2) / (2 * np.median(apart[np.triu_indices(36, 1)]) ** 2))
    laplacian = np.eye(36) - affinity / np.sqrt(np.outer(affinity.sum(1), affinity.sum(1)))
    values = np.sort(np.linalg.eigvalsh(laplacian))
    for place in range(3):
        assert np.allclose(laplacian @ found[:, place], values[place] * found[:, place], atol=1e-9)
    labels = capabilities(found, 3, random)
    assert len({(one, other) for one, other in zip(labels.tolist(), truth.tolist(), strict=True)}) == 3
    assert set(labels) == {0, 1, 2}


def test_key_phrases_are_ranked_by_degree_over_frequency():
    (found,) = concepts(["Sort these numbers, smallest first: deep neural networks and neural networks, 12"])
    # phrases: sort; numbers; smallest first; deep neural networks; neural networks.  degree / frequency: neural, networks 5/2; deep 3; smallest, first 2; sort, numbers 1
    assert found == {"deep neural networks", "neural networks"}


def test_a_conflict_is_two_known_concepts_that_never_stood_together():
    graph = Concepts()
    assert graph.take(frozenset("ab"))
    assert graph.take(frozenset("cd"))
    assert not graph.take(frozenset("ac"))
    assert graph.take(frozenset("abe"))
    assert not graph.take(frozenset("ec"))
    assert graph.take(frozenset("xy"))


def test_budgets_follow_the_means_and_the_worthiest_are_taken():
    assert shared(np.array([3.0, 1.0, 0.0]), 8).tolist() == [6, 2, 0]
    assert shared(np.array([1.0, 1.0, 1.0]), 8).sum() == 8
    assert shared(np.zeros(2), 3).sum() == 3
    labels, worth = np.array([0, 0, 0, 1, 1]), np.array([0.1, 0.9, 0.5, 0.2, 0.3])
    assert sorted(selected(labels, np.array([2, 1]), worth, None, 3)) == [1, 2, 4]
    found = [frozenset("ab"), frozenset("ab"), frozenset("ac"), frozenset("bc"), frozenset("de")]
    # cluster 0 wants two: 1 (ab), then 2 (ac; c is new) ; cluster 1 wants one: 4 (de)
    assert sorted(selected(labels, np.array([2, 1]), worth, found, 3)) == [1, 2, 4]
    assert sorted(selected(labels, np.array([0, 5]), worth, found, 3)) == [1, 3, 4]  # what a cluster has not comes from anywhere


def test_clusters_are_drawn_from_in_turn():
    labels = np.array([0] * 10 + [1] * 2 + [2] * 10)
    chosen = evenly(labels, 10, np.random.default_rng(0))
    assert len(set(chosen.tolist())) == 10
    assert np.bincount(labels[chosen]).tolist() == [4, 2, 4]


@pytest.mark.parametrize("choose", ["degradation", "perplexity", "kmeans"])
def test_a_share_of_the_pool_is_chosen_and_nothing_changes(choose):
    original = texts.reader("llama")
    pruned = DropBlocks(blocks=0.5, choose="last")(original, seed=0)
    pool = Corpus([{"prompt": f"{one} {place}", "completion": f" {two}", "kept": place} for place, (one, two) in enumerate([*PAIRS[:2], *PAIRS[3:]] * 4)])
    before = digest_state(original.network), digest_state(pruned.network), pool.digest
    chosen = PASER(share=0.25, clusters=3, choose=choose)(pruned, original, pool, texts.reader("bert"), seed=0)
    assert (digest_state(original.network), digest_state(pruned.network), pool.digest) == before
    assert len(chosen) == 3
    assert chosen.columns == pool.columns
    assert list(chosen.column("kept")) == sorted(chosen.column("kept"))
    if choose == "perplexity":
        nats = degradation(pruned, original, list(zip(pool.column("prompt"), pool.column("completion"), strict=True))).nats
        assert set(chosen.column("kept")) == set(np.argsort(-nats)[:3].tolist())


def test_mistakes_are_said():
    model = texts.reader("llama")
    for wrong in ({"share": 0.0}, {"share": 1.5}, {"clusters": 0}, {"choose": "best"}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            PASER(**wrong)
    with pytest.raises(InputError, match="masked"):
        PASER()(texts.reader("bert"), model, Corpus(["a b"]), texts.reader("bert"), seed=0)
    with pytest.raises(InputError, match="no completion"):
        PASER()(model, model, Corpus([{"prompt": "a", "completion": ""}]), texts.reader("bert"), seed=0)
