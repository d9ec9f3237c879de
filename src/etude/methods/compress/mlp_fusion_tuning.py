"""Fuse the units of feed-forward layers, and train what is left as if no unit had gone."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from etude.engine import batch, losses
from etude.engine.budget import Budget
from etude.engine.corrupt import reading
from etude.engine.prompted import Prompted
from etude.engine.train import train
from etude.methods._training import Training
from etude.methods.compress.mlp_fusion import MLPFusion
from etude.values.corpus import Corpus
from etude.values.model import Model
from etude.values.trace import output_dim


@dataclass(frozen=True)
class MLPFusionTuning(Training):
    """Narrow feed-forward layers by `compress.mlp_fusion`, and fine-tune with the clusters' sizes as a fixed factor behind the activation.

    Source: Wei et al., "NTK-approximating MLP Fusion for Efficient Language Model Fine-tuning", 2023 (arXiv 2307.08941), the details by the authors' code: apart
    from the weights, the sizes make a step of Adam move the fused layer as far as it would move the whole one, where weights that have swallowed them
    move by a step of plain size.  At the end the sizes are multiplied into the outgoing weights: a narrower model of the same kind.
    Trains on the next token of texts, or on completions where the corpus has prompts; a masked model or an encoder–decoder restores what is hidden, as in `pretrain.denoise`.
    Schedule, warm-up and decay are the paper's script's; its learning rate, 1e-5 to 8e-5 for ten epochs of GLUE, would hardly move a model in the hundreds of steps
    that budgets here allow.  The paper's layer-wise tuning before the fine-tuning and its distillation are left out.
    Raises InputError as `compress.mlp_fusion` does.
    Removes: feed-forward channels.
    Cost: the fusion and the budget.
    """

    paper = "mlp-fusion"

    width: float = 0.25
    """Share of a layer's units that are left, 0 < width < 1; a quarter is the paper's 768 of 3072."""
    spared: float = 1 / 3
    """Share of each stack's blocks, from the first, that stay as they are, 0 <= spared < 1; the paper's code leaves 4 of 12."""
    restarts: int = 30
    """Runs of k-means, of which the best counts; 30 in the paper's code."""
    schedule: str = "linear"
    warmup: float = 0.06

    def __post_init__(self) -> None:
        super().__post_init__()
        self._fusion()

    def _fusion(self) -> MLPFusion:
        return MLPFusion(width=self.width, spared=self.spared, restarts=self.restarts)

    def apply(self, model: Model, corpus: Corpus, budget: Budget, seed: int) -> Model:
        tuned = model.copy()
        counts = self._fusion().narrow(tuned, seed)
        if tuned.kind == "causal" and {"prompt", "completion"} <= set(corpus.columns):
            feed, loss = Prompted(tuned, corpus, self.length), losses.next_token
        else:
            feed, loss = reading(tuned, batch.Documents(tuned, corpus), self.length)  # type: ignore[assignment]
        outputs = {path: tuned.network.get_submodule(path) for path in counts}
        for path, module in outputs.items():
            parametrize.register_parametrization(module, "weight", Times(counts[path], 1 - output_dim(module)), unsafe=True)
        train(tuned, feed, self.recipe(), budget, seed, loss)
        for module in outputs.values():
            parametrize.remove_parametrizations(module, "weight")
        return tuned


class Times(nn.Module):
    """A weight of which every input counts several times."""

    def __init__(self, counts: Tensor, dim: int):
        """counts: (inputs,); dim: the dimension of the weight that holds the inputs."""
        super().__init__()
        self.register_buffer("counts", counts if dim == 1 else counts[:, None], persistent=False)

    def forward(self, weight: Tensor) -> Tensor:
        return weight * torch.as_tensor(self.counts).to(weight)
