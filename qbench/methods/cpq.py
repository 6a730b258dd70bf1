"""CPQ: weights and inputs are drawn to the points of their grids."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor, nn

from qbench.data import Data
from qbench.quant.cpq import CpqInput, CpqWeight
from qbench.quant.qat import train_quantized
from qbench.quant.schedule import Schedule
from qbench.registry import method

LowBits = Annotated[int, Field(ge=2, le=8)]


@method("cpq", track="qat", paper="arXiv:2109.02100", in_the_manner_of=True)
def cpq(
    model: nn.Module,
    data: Data,
    *,
    bits: LowBits = 4,
    activation_bits: LowBits | None = 4,
    edge_bits: LowBits | Literal[32] | None = 8,
    skip: tuple[str, ...] = (),
    schedule: Schedule = Schedule(lr=1e-3),
) -> nn.Module:
    """Train with gradients that draw weights and inputs to the points of grids whose steps are learned (CPQ).

    The gradient of a rounded weight is that of the probability of its grid point (multi-class straight-through
    estimator), and so are those of all steps; gradients of inputs pass straight through, unlike in the paper.

    Args:
        model: the float model.
        data: with training images.
        bits: of the weights, whose codes are signed.
        activation_bits: of the inputs of the same layers; None leaves them in float.
        edge_bits: of the first and the last layer, weights and inputs alike; None means like all others, 32 float.
        skip: names, or first parts of names, of layers left in float.
        schedule: of the training; with higher rates gradients, which are biased, can take the network apart.
    """

    def quantizer(weight: Tensor, width: int, axis: int) -> CpqWeight:
        return CpqWeight(weight, width, axis)

    return train_quantized(
        model,
        data,
        schedule,
        quantizer,
        CpqInput,
        name="cpq",
        bits=bits,
        activation_bits=activation_bits,
        edge_bits=edge_bits,
        skip=skip,
    )
