"""Cluster the units of feed-forward layers, and let one unit stand for each cluster."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from etude.engine.progress import report
from etude.engine.stream import require_dense
from etude.method import Method
from etude.methods.compress._clusters import clusters, sizes
from etude.values.anatomy import Block, weight_of
from etude.values.errors import InputError
from etude.values.model import Model
from etude.values.trace import FeedForward

RULES = ("fusion", "magnitude", "sketch", "random")


@dataclass(frozen=True)
class MLPFusion(Method):
    """Narrow feed-forward layers without data: k-means over their units, one unit a cluster, counted as often as the cluster has members.

    Source: Wei et al., "NTK-approximating MLP Fusion for Efficient Language Model Fine-tuning", 2023 (arXiv 2307.08941), the details by the authors' code.  A layer is a sum of
    units; a unit is one vector, its weights in every input projection, its biases there, and its outgoing weights.  A centroid becomes a unit, and its
    outgoing weights are multiplied by the cluster's size, since so many units are replaced by it.  The paper keeps the sizes in a diagonal factor of
    their own, behind the activation, so that Adam's steps fit the whole layer's; a plain checkpoint has no place for it, and here the sizes are multiplied
    into the outgoing weights: the same function, another gradient.  `compress.mlp_fusion_tuning` fuses and trains with the sizes apart, as the paper does.
    Units of gated layers, which the paper does not have, have two incoming vectors.  No experts, which its later version fuses one by one.

    Rivals, for comparison: ``magnitude`` keeps the units with the largest product of the norms of incoming and outgoing weights; ``random`` keeps some;
    ``sketch`` mixes all units by a Gaussian matrix S with S Sᵀ the identity on average, the paper's sketching baseline without its variant that keeps the largest units.
    Raises InputError if there is no feed-forward layer to narrow, or if it has experts.
    Removes: feed-forward channels.
    Cost: k-means over each layer, `restarts` times units · clusters · weights of a unit a round; nothing is read.
    """

    paper = "mlp-fusion"

    width: float = 0.25
    """Share of a layer's units that are left, 0 < width < 1; a quarter is the paper's 768 of 3072."""
    spared: float = 1 / 3
    """Share of each stack's blocks, from the first, that stay as they are, 0 <= spared < 1; the paper's code leaves 4 of 12."""
    choose: str = "fusion"
    """``fusion``, ``magnitude``, ``sketch`` or ``random``."""
    restarts: int = 30
    """Runs of k-means, of which the best counts; 30 in the paper's code."""

    def __post_init__(self) -> None:
        if not 0 < self.width < 1:
            raise ValueError(f"width is the share of the units that are left, more than 0 and less than 1, got {self.width}; for a quarter pass 0.25")
        if not 0 <= self.spared < 1:
            raise ValueError(f"spared is a share of the blocks, at least 0 and less than 1, got {self.spared}; to narrow all pass 0")
        if self.choose not in RULES:
            raise ValueError(f"choose is one of {', '.join(RULES)}, got {self.choose!r}")
        if self.restarts < 1:
            raise ValueError(f"restarts is at least 1, got {self.restarts}")

    def draws_random(self) -> bool:
        return self.choose != "magnitude"

    def apply(self, model: Model, seed: int) -> Model:
        fused = model.copy()
        for path, counts in self.narrow(fused, seed).items():
            weight = weight_of(fused.network.get_submodule(path)).detach()
            weight.mul_(counts)
        return fused

    def narrow(self, draft: Model, seed: int) -> dict[str, Tensor]:
        """Narrow the layers of a draft, in place; by which numbers the inputs of each one's output projection are then to be multiplied, (units left,) by its path.

        Raises InputError as the method does, before anything is changed.
        """
        require_dense(draft, "MLP fusion")
        layers = self._layers(draft)
        random = torch.Generator().manual_seed(seed)
        left, counts = {}, {}
        for place, (index, layer) in enumerate(layers.items()):
            units = torch.cat(parts(draft, layer), 1).float()
            mixing, counts[layer.output] = self._mixing(units, parts(draft, layer)[-1].shape[1], random)
            left[index] = mixing @ units
            report("fusing", place + 1, len(layers))
        draft.anatomy.drop_channels({index: range(len(left[index]), layer.channels) for index, layer in layers.items()})
        for index, layer in self._layers(draft).items():
            views = parts(draft, layer)
            for view, values in zip(views, left[index].split([view.shape[1] for view in views], 1), strict=True):
                view.copy_(values)
        return counts

    def _layers(self, model: Model) -> dict[int, FeedForward]:
        """Layers to narrow, by block."""

        def chosen(block: Block) -> bool:
            return block.place >= round(self.spared * model.anatomy.stacks[block.stack])

        found = {block.index: block.feed_forward for block in model.anatomy.blocks if block.feed_forward is not None and chosen(block)}
        if not found:
            raise InputError(f"MLP fusion found no feed-forward layers to narrow in this {model.base.model_type}")
        return found

    def _mixing(self, units: Tensor, written: int, random: torch.Generator) -> tuple[Tensor, Tensor]:
        """What the units left are made of, (units left, units), and how often each of them counts.

        units: (units, weights of a unit), of which the last `written` are outgoing.
        """
        every = len(units)
        count = min(every - 1, max(1, round(self.width * every)))
        if self.choose == "sketch":
            mixing = torch.randn(count, every, generator=random).to(units) / count**0.5
        elif self.choose == "fusion":
            labels = clusters(units, count, self.restarts, random)
            members = torch.nn.functional.one_hot(labels, count).T.to(units)
            return members / members.sum(1, keepdim=True), sizes(labels, count).to(units)
        else:
            scores = units[:, :-written].norm(dim=1) * units[:, -written:].norm(dim=1) if self.choose == "magnitude" else torch.rand(every, generator=random)
            kept = scores.topk(count).indices.sort().values
            mixing = torch.nn.functional.one_hot(kept, every).to(units)
        return mixing, units.new_ones(count)


def parts(model: Model, layer: FeedForward) -> list[Tensor]:
    """A layer's units as views (units, weights) without gradient: rows and biases of its input projections, the output projection's columns last."""
    found = []
    for path, offsets in layer.inputs.items():
        module = model.network.get_submodule(path)
        for offset in offsets:
            rows = slice(offset, offset + layer.channels)
            found.append(weight_of(module).detach()[rows])
            if getattr(module, "bias", None) is not None:
                found.append(module.bias.detach()[rows, None])  # type: ignore[operator, union-attr, index]
    return [*found, weight_of(model.network.get_submodule(layer.output)).detach().T]
