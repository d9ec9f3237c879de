"""Change a layer's weights column by column, and let the columns to come make up for it: what SparseGPT, GPTQ and their heirs share."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from etude.engine.stream import through_blocks
from etude.values.anatomy import weight_of
from etude.values.errors import InputError
from etude.values.model import Model

STRIPS = 4
"""Into how many strips of columns the second moments are computed; of the square only what lies on and above the diagonal."""
COLUMNS = 32
"""Columns after which those to come are brought up to date by one product."""

Fix = Callable[[int, Tensor], Tensor]
"""Of a column by its place in the run and its weights as they stand now, (outputs,), those that it shall keep."""
Plan = Callable[[int, Tensor, Tensor], Fix]
"""Of a run of columns: its first column, its weights as they stand now, (columns, outputs), a view that is kept up to date, and the root of each one's entry of the inverse, (columns,)."""


def second_moments(tokens: Tensor) -> Tensor:
    """Sums over the tokens of the products of any two channels, (channels, channels); only the upper triangle is, and what lies below it in a strip."""
    channels = tokens.shape[1]
    found = tokens.new_zeros(channels, channels)
    for begin, end in _strips(channels):
        torch.mm(tokens[:, begin:end].T, tokens[:, begin:], out=found[begin:end, begin:])
    return found


def groups(model: Model, rows: Sequence[np.ndarray]) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
    """Of one group of layers that read the same after another: its weights, views (outputs, inputs), and the second moments of what it reads, (inputs, inputs).

    Weights of channels that are never read become zero, as nothing is known of them.  Cost: one pass over the rows.
    """
    for block, sums in through_blocks(model, rows, second_moments):
        weights = {path: weight_of(module).detach() for path, module in model.anatomy.linears(block).items()}
        upper = next(iter(sums.values()))
        moments = upper.triu() + upper.triu(1).T
        for weight in weights.values():
            weight[:, moments.diagonal() == 0] = 0
        yield weights, moments


def inverse_factor(moments: Tensor, damp: float, where: str) -> Tensor:
    """The upper triangular U with Uᵀ U = H⁻¹, so that row j of U, over its diagonal entry, says how the columns after j make up for an error at j.

    H: the moments with `damp` times their mean diagonal added on the diagonal; channels that are never read count as one.
    Raises InputError if it cannot be inverted.
    """
    matrix = moments.clone()
    diagonal = matrix.diagonal()
    diagonal[diagonal == 0] = 1
    diagonal += damp * diagonal.mean()
    try:
        return torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(matrix)), upper=True)
    except torch.linalg.LinAlgError as error:
        raise InputError(f"what {where} reads cannot be inverted: {str(error).splitlines()[0]}", remedy="Set a larger `damp`, or give more calibration tokens.") from error


def sweep(weight: Tensor, factor: Tensor, plan: Plan, every: int) -> Tensor:
    """Fix the columns in turn, each error spread over the columns to come (Frantar and Alistarh, 2023, algorithm 1; Frantar et al., 2023, algorithm 1).

    weight: (outputs, inputs); factor: of `inverse_factor`; plan: asked at every `every`-th column what becomes of the columns from there to the next.
    Gives the new weight.  Cost: outputs · inputs² multiplications.
    """
    live = weight.float().T.contiguous()
    count, diagonal = len(live), factor.diagonal()
    for first in range(0, count, every):
        last = min(first + every, count)
        fix = plan(first, live[first:last], diagonal[first:last])
        for begin in range(first, last, COLUMNS):
            end = min(begin + COLUMNS, last)
            errors = live.new_empty(end - begin, live.shape[1])
            for place in range(begin, end):
                column = live[place]
                kept = fix(place - first, column)
                error = torch.sub(column, kept, out=errors[place - begin]).div_(diagonal[place])
                column.copy_(kept)
                live[place + 1 : end].addr_(factor[place, place + 1 : end], error, alpha=-1)
            live[end:].addmm_(factor[begin:end, end:].T, errors, alpha=-1)
    return live.T.to(weight.dtype)


def _strips(channels: int) -> list[tuple[int, int]]:
    edges = [channels * place // STRIPS for place in range(STRIPS + 1)]
    return list(itertools.pairwise(edges))
