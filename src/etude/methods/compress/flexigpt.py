"""Drop blocks, and let others stand in for them with small corrections."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from etude.engine import batch
from etude.engine.budget import Budget
from etude.engine.feed import Packed
from etude.engine.score import block_changes, require_causal, sample_rows
from etude.engine.stream import require_dense
from etude.engine.train import train
from etude.methods._training import Training
from etude.methods.compress._shared import Shared, corrections, distance, fill, level
from etude.values.anatomy import weight_of
from etude.values.corpus import Corpus
from etude.values.errors import InputError
from etude.values.model import Model

STARTS, TRAINED = ("svd", "zero"), ("corrections", "all")


@dataclass(frozen=True)
class FlexiGPT(Training):
    """Replace the blocks that change the hidden states least by others' weights with low-rank corrections, and train the corrections.

    Blocks are ranked by block influence (one minus the cosine of what enters and what leaves them).  For each that goes, the block that stays whose weights, corrected by their best update
    of rank
    `rank`, come nearest to its own lends them; the corrections begin as that update, and a factor an output channel, from the ratio of the two weights' row norms, keeps the scale of the
    outputs.  Norms and biases stay the block's own.
    Source: Smith et al., "FlexiGPT: Pruning and Extending Large Language Models with Low-Rank Weight Sharing", 2025 (arXiv 2501.14713): block influence, the donor by the singular values of
    the difference, the adapters' start and the normalization of output features; 30 and 40 % of the blocks in its tables.
    Departures, where only summaries were to be had: distances are relative to each weight's norm and averaged over a block's layers; the normalization of output features is this factor,
    trained with the corrections, not a norm over features; at most as many corrections as `rank` says in every layer; the learning rate is LoRA's as in `adapt.lora`.
    `start: zero` begins with no correction, the paper's ablation.  With `budget` of one step next to nothing is trained.
    The result computes as much as before: it is smaller, not faster.  A weight that two blocks share is one parameter; only Étude loads the folder, and `export` has no plain checkpoint for
    it.
    Causal models without experts whose blocks are alike; raises InputError for others.
    Removes: the weights of whole blocks; it keeps their depth.
    Cost: the budget; a forward pass over the calibration text, and the singular values of every layer's difference from every donor's.
    """

    paper = "flexigpt"

    blocks: float = 0.3
    """Share of the blocks to replace, 0 < blocks < 1; rounded to whole blocks, at least one."""
    rank: int = 16
    """Of the corrections, at least 1."""
    start: str = "svd"
    """``svd``, or ``zero``: how corrections begin."""
    train: str = "corrections"
    """``corrections`` alone, or ``all``."""
    tokens: int = 32768
    """Calibration tokens for the blocks' influence."""
    learning_rate: float = 2e-3
    schedule: str = "linear"
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.blocks < 1:
            raise ValueError(f"blocks is a share of the blocks, more than 0 and less than 1, got {self.blocks}; for a third pass 0.33")
        if self.rank < 1:
            raise ValueError(f"rank is at least 1, got {self.rank}")
        if self.start not in STARTS:
            raise ValueError(f"start is {' or '.join(STARTS)}, got {self.start!r}")
        if self.train not in TRAINED:
            raise ValueError(f"train is {' or '.join(TRAINED)}, got {self.train!r}")

    def apply(self, model: Model, corpus: Corpus, budget: Budget, seed: int) -> Model:
        require_causal(model, "FlexiGPT")
        require_dense(model, "FlexiGPT")
        layers = _layers(model, self.rank)
        count = min(len(layers) - 1, max(1, round(self.blocks * len(layers))))
        if count < 1:
            raise InputError("FlexiGPT needs a block that stays and one that goes, and the model has one block")
        changes = block_changes(model, sample_rows(model, corpus, self.tokens, self.length))
        gone = sorted(np.argsort(changes, kind="stable")[:count].tolist())
        donors = {place: _donor(layers, place, [one for one in range(len(layers)) if one not in gone], self.rank) for place in gone}
        smaller = model.copy()
        self._replace(smaller, layers, donors)
        asked = {name: parameter.requires_grad for name, parameter in smaller.network.named_parameters()}
        if self.train == "corrections":
            smaller.network.requires_grad_(False)
            for parameter in corrections(smaller.network):
                parameter.requires_grad_(True)
        train(smaller, Packed(batch.Documents(smaller, corpus), self.length), self.recipe(), budget, seed)
        for name, parameter in smaller.network.named_parameters():
            parameter.requires_grad_(asked[name])
        return smaller

    def _replace(self, draft: Model, layers: list[dict[str, tuple[str, Tensor]]], donors: Mapping[int, int]) -> None:
        """Let blocks use their donors' weights."""
        for place, donor in donors.items():
            for name, (path, weight) in layers[place].items():
                draft.edit(Shared(path, layers[donor][name][0], self.rank, gain=True))
                module = draft.network.get_submodule(path)
                if self.start == "svd":
                    fill(module, weight, self.rank)
                level(module, weight)


def _layers(model: Model, rank: int) -> list[dict[str, tuple[str, Tensor]]]:
    """Of every block its linear layers by their path in the block: whole path and weight (outputs, inputs).  Raises InputError unless the blocks are alike."""
    found = [{path.removeprefix(f"{block.path}."): (path, weight_of(module).detach()) for path, module in model.anatomy.linears(block).items()} for block in model.anatomy.blocks]
    shapes = [{name: tuple(weight.shape) for name, (_, weight) in layers.items()} for layers in found]
    if not shapes[0] or any(one != shapes[0] for one in shapes):
        raise InputError(f"FlexiGPT lets one block use another's weights, and the blocks of this {model.base.model_type} have not the same layers")
    least = min(min(shape) for shape in shapes[0].values())
    if rank > least:
        raise InputError(f"rank is at most {least}, the smallest side of this model's layers, got {rank}")
    return found


def _donor(layers: list[dict[str, tuple[str, Tensor]]], place: int, stay: list[int], rank: int) -> int:
    """The block that stays from whose weights a correction of this rank comes nearest to a block's own."""
    apart = [np.mean([distance(weight, layers[one][name][1], rank) for name, (_, weight) in layers[place].items()]) for one in stay]
    return stay[int(np.argmin(apart))]
