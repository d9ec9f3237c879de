"""Delete heads and channels by a simple rule: the baselines of every width-pruning paper."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from etude.engine.score import require_causal, sample_rows
from etude.engine.stream import moments, require_dense
from etude.method import Method
from etude.methods.compress._units import Site, cut, sites, threshold
from etude.values.anatomy import weight_of
from etude.values.corpus import Corpus
from etude.values.errors import InputError
from etude.values.model import Model

RULES = ("random", "magnitude", "wanda")


@dataclass(frozen=True)
class DropUnits(Method):
    """Width pruning by a simple rule: the same share of heads and of channels in every block, worst first, without compensation.

    An input channel of an output projection scores a random number, its weight column's mean magnitude, or (``wanda``) that magnitude times the
    channel's euclidean norm over the calibration tokens, which is Wanda carried over to structures as An et al. ("FLAP", 2023, section 4) do for
    their baseline Wanda-sp; a head scores the mean of its channels.  Heads that share keys and values go together.
    The share is the one with which `ratio` of the blocks' parameters go, so that rules are compared at equal size.
    Removes: heads and feed-forward channels.
    Cost: for ``wanda`` one forward pass over the calibration text, otherwise nothing.
    """

    ratio: float = 0.2
    """Share of the blocks' parameters to delete, 0 < ratio < 1, met as nearly as whole heads and channels allow."""
    choose: str = "magnitude"
    """``random``, ``magnitude`` or ``wanda``."""
    tokens: int = 32768
    """Calibration tokens that ``wanda`` reads, at least 2."""
    length: int = 512
    """Longest row of calibration tokens, at least 3."""

    def __post_init__(self) -> None:
        if not 0 < self.ratio < 1:
            raise ValueError(f"ratio is a share of the blocks' parameters, more than 0 and less than 1, got {self.ratio}; for a fifth pass 0.2")
        if self.choose not in RULES:
            raise ValueError(f"choose is one of {', '.join(RULES)}, got {self.choose!r}")
        if self.tokens < 2 or self.length < 3:
            raise ValueError(f"tokens is at least 2 and length at least 3, got {self.tokens} and {self.length}")

    def draws_random(self) -> bool:
        return self.choose == "random"

    def apply(self, model: Model, seed: int, calibration: Corpus | None = None) -> Model:
        require_dense(model, "drop_units")
        places = sites(model, "drop_units")
        random = np.random.default_rng(seed)
        if self.choose == "random":
            scores = [random.random(len(site.units)) for site in places]
        else:
            norms = self._norms(model, places, calibration)
            scores = [site.mean(_magnitudes(model, site) * norms[site.output]) for site in places]
        pruned = model.copy()
        cut(pruned, places, threshold(model, places, [_share(score) for score in scores], self.ratio))
        return pruned

    def _norms(self, model: Model, places: list[Site], calibration: Corpus | None) -> dict[str, np.ndarray | float]:
        """By output projection the root mean square of every input channel over the calibration tokens; one for ``magnitude``."""
        if self.choose == "magnitude":
            return {site.output: 1.0 for site in places}
        require_causal(model, "drop_units by wanda")
        if calibration is None:
            raise InputError("choosing units by wanda needs calibration text", remedy="Add `calibration:` to the step's inputs.")
        found = moments(model, sample_rows(model, calibration, self.tokens, self.length), [site.output for site in places])
        return {path: (variance + mean.square()).sqrt().cpu().numpy() for path, (mean, variance) in found.items()}


def _magnitudes(model: Model, site: Site) -> np.ndarray:
    """Mean magnitude of every weight column of a site's output projection, (input channels,)."""
    return weight_of(model.network.get_submodule(site.output)).detach().double().abs().mean(0).cpu().numpy()


def _share(scores: np.ndarray) -> np.ndarray:
    """Scores as the share of the units that score at most as much: one threshold over these takes the same share everywhere."""
    return (np.argsort(np.argsort(scores, kind="stable")) + 1) / len(scores)
