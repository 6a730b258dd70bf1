"""APoT: training with sums of powers of two."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor, nn

from qbench.data import Data
from qbench.quant.fakequant import LearnedInput, LearnedWeight
from qbench.quant.learned_levels import LevelsInput, LevelsWeight
from qbench.quant.qat import train_quantized
from qbench.quant.schedule import Schedule
from qbench.registry import method

FewBits = Annotated[int, Field(ge=2, le=6)]
Edge = Annotated[int, Field(ge=2, le=8)]
_MOST = 6


@method("apot_qat", track="qat", paper="arXiv:1909.13144", in_the_manner_of=True)
def apot_qat(
    model: nn.Module,
    data: Data,
    *,
    bits: FewBits = 4,
    activation_bits: FewBits | None = 4,
    edge_bits: Edge | Literal[32] | None = 8,
    skip: tuple[str, ...] = (),
    schedule: Schedule = Schedule(),
) -> nn.Module:
    """Train with weights and inputs that are sums of a few powers of two times a learned scale (APoT).

    Weights are normalised, layer by layer, and multiplied with the deviation that the layer began with; batch norms
    cancel that factor. Edges of 7 or 8 bits are on uniform grids with learned steps.

    Args:
        model: the float model.
        data: with training images.
        bits: of the weights, sign included; 2**bits - 1 levels.
        activation_bits: of the inputs of the same layers; None leaves them in float.
        edge_bits: of the first and the last layer, weights and inputs alike; None means like all others, 32 float.
        skip: names, or first parts of names, of layers left in float.
        schedule: of the training.
    """

    def quantizer(weight: Tensor, width: int, axis: int) -> nn.Module:
        return LevelsWeight(weight, width, axis) if width <= _MOST else LearnedWeight(weight, width, "tensor", axis)

    def input_quantizer(width: int) -> nn.Module:
        return LevelsInput(width) if width <= _MOST else LearnedInput(width)

    return train_quantized(
        model,
        data,
        schedule,
        quantizer,
        input_quantizer,
        name="apot_qat",
        bits=bits,
        activation_bits=activation_bits,
        edge_bits=edge_bits,
        skip=skip,
    )
