"""A small encoder–decoder that Étude trained on the standard library, shipped in the package."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from etude.method import Method
from etude.values.model import Model

FOLDER = Path(__file__).parent / "data" / "testbed-seq2seq"


@dataclass(frozen=True)
class TestbedSeq2Seq(Method):
    """A T5 of three million parameters and 4096 tokens, trained on `etude:stdlib`'s train split to restore what is hidden.

    The study that made it and the record of its making lie beside its weights, in ``worlds/data/testbed-seq2seq``.
    """

    def apply(self) -> Model:
        return Model.load(FOLDER)
