"""STE: quantization-aware training with steps that follow the ranges of weights and inputs."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor, nn

from qbench.data import Data
from qbench.quant.fakequant import Granularity
from qbench.quant.qat import train_quantized
from qbench.quant.range_input import RangeInput
from qbench.quant.recomputed import RecomputedWeight
from qbench.quant.schedule import Schedule
from qbench.registry import method

LowBits = Annotated[int, Field(ge=2, le=8)]


@method("ste", track="qat", paper="arXiv:1712.05877")
def ste(
    model: nn.Module,
    data: Data,
    *,
    bits: LowBits = 4,
    activation_bits: LowBits | None = 4,
    granularity: Granularity = "tensor",
    edge_bits: LowBits | Literal[32] | None = 8,
    skip: tuple[str, ...] = (),
    schedule: Schedule = Schedule(),
) -> nn.Module:
    """Train with rounded weights and inputs and straight-through gradients; nothing of the grids is learned.

    The largest weight sets the step of the weights, moving averages of the extremes that of the inputs.

    Args:
        model: the float model.
        data: with training images.
        bits: of the weights, whose codes are symmetric about 0.
        activation_bits: of the inputs of the same layers, with a zero point; None leaves them in float.
        granularity: one step per weight tensor or per output channel.
        edge_bits: of the first and the last layer, weights and inputs alike; None means like all others, 32 float.
        skip: names, or first parts of names, of layers left in float.
        schedule: of the training.
    """

    def quantizer(weight: Tensor, width: int, axis: int) -> RecomputedWeight:
        return RecomputedWeight(weight, width, granularity, axis)

    return train_quantized(
        model,
        data,
        schedule,
        quantizer,
        RangeInput,
        name="ste",
        bits=bits,
        activation_bits=activation_bits,
        edge_bits=edge_bits,
        skip=skip,
    )
