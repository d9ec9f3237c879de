"""Ranks for the layers of a model under a budget of parameters, and a small network that learns how good they are."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from etude.values.lazy import lazy

torch = lazy("torch")

Ranks = tuple[int, ...]
HIDDEN, EPOCHS, RATE = 32, 300, 1e-2
"""Channels of each of the predictor's three hidden layers, steps of its training on all samples at once, and Adam's learning rate."""


@dataclass(frozen=True)
class Allocations:
    """Ranks (layers,), each of `choices`, whose updates have at most `budget` parameters, and to none of which the next choice can be given."""

    choices: Ranks
    """In rising order."""
    costs: Ranks
    """Parameters of an update of rank one, by layer."""
    budget: int

    def parameters(self, ranks: Ranks) -> int:
        return sum(rank * cost for rank, cost in zip(ranks, self.costs, strict=True))

    def draw(self, random: np.random.Generator) -> Ranks:
        """Choices drawn for every layer alike, then lowered step by step where chance says until they fit, then raised until nothing fits any more.

        The lowest choice everywhere is taken to fit.
        """
        places = random.integers(len(self.choices), size=len(self.costs))
        while self.parameters(self.at(places)) > self.budget:
            places[random.choice(np.flatnonzero(places))] -= 1
        while True:
            room = self.budget - self.parameters(self.at(places))
            free = [layer for layer, place in enumerate(places) if place + 1 < len(self.choices) and (self.choices[place + 1] - self.choices[place]) * self.costs[layer] <= room]
            if not free:
                return self.at(places)
            places[random.choice(free)] += 1

    def several(self, count: int, random: np.random.Generator, but: Sequence[Ranks] = ()) -> list[Ranks]:
        """Different ones, none of them among `but`; fewer than `count` where chance finds no more in as many draws and ten."""
        found = dict.fromkeys(self.draw(random) for _ in range(count + 10))
        return [ranks for ranks in found if ranks not in but][:count]

    def at(self, places: np.ndarray) -> Ranks:
        return tuple(self.choices[place] for place in places)


def predicted(tried: Sequence[Ranks], losses: Sequence[float], asked: Sequence[Ranks], seed: int) -> np.ndarray:
    """Losses that a multilayer perceptron, fitted on the tried ranks and their losses, expects of those asked, (asked,).

    Three hidden layers, trained on the squared error of standardised losses.  Draws nothing from torch's own stream.
    """
    high = max(map(max, (*tried, *asked)))
    known, wanted = (torch.tensor(ranks, dtype=torch.float32) / high for ranks in (tried, asked))
    targets = torch.tensor(losses, dtype=torch.float32)
    mean, spread = targets.mean(), targets.std(correction=0).clamp(min=1e-12)
    sizes = [known.shape[1], HIDDEN, HIDDEN, HIDDEN]
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(seed)
        layers = [part for before, after in itertools.pairwise(sizes) for part in (torch.nn.Linear(before, after), torch.nn.ReLU())]
        network = torch.nn.Sequential(*layers, torch.nn.Linear(HIDDEN, 1))
        optimizer = torch.optim.Adam(network.parameters(), RATE)
        for _ in range(EPOCHS):
            optimizer.zero_grad()
            torch.nn.functional.mse_loss(network(known)[:, 0], (targets - mean) / spread).backward()
            optimizer.step()
    with torch.no_grad():
        found: np.ndarray = (network(wanted)[:, 0] * spread + mean).numpy()
    return found
