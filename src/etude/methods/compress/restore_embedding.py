"""Write the tuned rows of a model with a part of the vocabulary back into the model that has all of it."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING

from etude.engine.vocabulary import named_ids
from etude.method import Method
from etude.values import checkpoint
from etude.values.errors import InputError
from etude.values.model import Model

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class RestoreEmbedding(Method):
    """Undo `compress.dynamic_embedding_pruning` after training: the tuned model, with the full vocabulary and its tokenizer.

    Every tensor is the tuned model's; of those that the vocabulary counts, (tokens, width) or (tokens,), the tuned model's rows stand at the places that their tokens
    have in the full model, and all other rows are the full model's.  Tokens are known by their names.
    Source: Williams and Aletras, "Frustratingly Simple Memory Efficiency for Pre-trained Language Models via Dynamic Embedding Pruning", 2023 (arXiv 2309.08708), section 4.
    Raises InputError if the tuned model has a token, a tensor or a shape that the full one has not.
    Removes: nothing; it gives the rows back that were cut.
    Cost: a copy of the weights.
    """

    paper = "dynamic-embedding-pruning"

    def apply(self, model: Model, tuned: Model) -> Model:
        if model.base.model_type != tuned.base.model_type:
            raise InputError(f"the tuned model is a {tuned.base.model_type}, and the full one a {model.base.model_type}", remedy="Give the model that was pruned.")
        places, sizes = rows(model, tuned), (checkpoint.embedding_rows(model.network), checkpoint.embedding_rows(tuned.network))
        base = copy.deepcopy(model.base)
        fresh = checkpoint.rebuild(base, tuned.edits, tuned.network.dtype)
        full, shapes = model.network.state_dict(), checkpoint.shapes(fresh)
        state = {}
        for name, tensor in tuned.network.state_dict().items():
            if shapes.get(name) == tuple(tensor.shape):
                state[name] = tensor
            elif name in full and shapes.get(name) == tuple(full[name].shape):
                state[name] = written(name, full[name], tensor, places, sizes)
            else:
                raise InputError(f"{name} has shape {tuple(tensor.shape)} in the tuned model, and {shapes.get(name, 'no place')} in the full one", remedy="Give the model that was pruned.")
        checkpoint.load_state(fresh, state)
        restored = Model(fresh.to(tuned.network.device).eval(), model.tokenizer, base=base, edits=tuned.edits, history=tuned.history)  # type: ignore[arg-type]
        if getattr(model.network, "generation_config", None) is not None:
            fresh.generation_config = copy.deepcopy(model.network.generation_config)
        return restored


def rows(model: Model, tuned: Model) -> dict[int, int]:
    """Row in the full model of each row in the tuned one: those of the same token, or, where no token has it, of the same field of the config."""
    ids, part = model.tokenizer.get_vocab(), tuned.tokenizer.get_vocab()
    unknown = [token for token in part if token not in ids]
    if unknown:
        raise InputError(f"the tuned model has {len(unknown)} tokens that the full one has not, {unknown[0]!r} the first", remedy="Give the model that was pruned.")
    fields, count = named_ids(model.base), checkpoint.embedding_rows(tuned.network)
    named = {new: old for name, several in named_ids(tuned.base).items() for new, old in zip(several, fields.get(name, ()), strict=False) if 0 <= new < count}
    return named | {new: ids[token] for token, new in part.items()}


def written(name: str, full: Tensor, part: Tensor, places: dict[int, int], sizes: tuple[int, int]) -> Tensor:
    """The full tensor with the part's rows at their places, along the one dimension that counts the vocabulary; sizes: of it in both."""
    import torch

    other = [dim for dim, (more, less) in enumerate(zip(full.shape, part.shape, strict=True)) if more != less]
    if len(other) != 1 or (full.shape[other[0]], part.shape[other[0]]) != sizes:
        raise InputError(f"{name} has shape {tuple(part.shape)} in the tuned model and {tuple(full.shape)} in the full one, and they differ in more than the vocabulary")
    new, old = (torch.tensor(list(some), device=part.device) for some in (places.keys(), places.values()))
    return full.to(part).index_copy(other[0], old, part.index_select(other[0], new))
