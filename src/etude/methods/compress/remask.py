"""Put the zeros of a pruned model back after something filled them."""

from __future__ import annotations

from dataclasses import dataclass

from etude.method import Method
from etude.methods.compress._masks import matrices
from etude.values.errors import InputError
from etude.values.model import Model


@dataclass(frozen=True)
class Remask(Method):
    """Zero every weight of the blocks' linear layers that is zero in another model of the same shape.

    What a sparse model needs after a tuning that knows nothing of its zeros, such as LoRA merged into the weights; the usual rival of methods that keep them all along.
    Raises InputError if the two models' blocks are not of one shape.
    Removes: single weights, which become zero.
    Cost: a pass over the weights.
    """

    def apply(self, model: Model, sparse: Model) -> Model:
        masked, like = model.copy(), matrices(sparse)
        own = matrices(masked)
        shapes = [{path: tuple(matrix.shape) for path, matrix in found.items()} for found in (own, like)]
        if shapes[0] != shapes[1]:
            odd = next(path for path in [*own, *like] if shapes[0].get(path) != shapes[1].get(path))
            raise InputError(f"the models differ at {odd}: {shapes[0].get(odd, 'missing')} and {shapes[1].get(odd, 'missing')}", remedy="Give the sparse model from which this one was tuned.")
        for path, matrix in own.items():
            matrix.detach().masked_fill_(like[path] == 0, 0)
        return masked
