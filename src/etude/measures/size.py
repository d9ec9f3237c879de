"""How large a model is."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from etude.engine.cost import flops_per_token
from etude.method import MEASUREMENTS, Method
from etude.values.measurement import Measurement
from etude.values.model import Model


@dataclass(frozen=True)
class Size(Method):
    """Parameters, bytes of the weights, and floating-point operations a token; all are counted, none is estimated.

    Tied parameters count once.  Operations are those of a forward pass over `length` tokens, divided by them.
    """

    length: int = 64
    """Tokens of the counted forward pass; attention makes longer ones dearer."""

    def apply(self, model: Model) -> MEASUREMENTS:
        network = model.network
        weights = sum(parameter.numel() * parameter.element_size() for parameter in network.parameters())
        counted = (("size", model.parameters, "parameters"), ("bytes", weights, "bytes"), ("flops_per_token", flops_per_token(network, self.length), "FLOPs/token"))
        return tuple(Measurement(name, np.array([value]), unit=unit, exact=True) for name, value, unit in counted)
