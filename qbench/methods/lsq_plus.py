"""LSQ+: learned steps, learned offsets of inputs, and a better start."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor, nn

from qbench.data import Data
from qbench.quant.fakequant import Granularity, LearnedWeight
from qbench.quant.lsq_plus import OffsetInput, three_deviations
from qbench.quant.qat import train_quantized
from qbench.quant.schedule import Schedule
from qbench.registry import method

LowBits = Annotated[int, Field(ge=2, le=8)]


@method("lsq_plus", track="qat", paper="arXiv:2004.09576")
def lsq_plus(
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
    """Train with learned step sizes, and learned offsets of the inputs (LSQ+).

    An offset is rounded to a multiple of its step, in training as in the end: it becomes a zero point.

    Args:
        model: the float model.
        data: with training images.
        bits: of the weights, whose codes are signed.
        activation_bits: of the inputs of the same layers, with a zero point; None leaves them in float.
        granularity: one step per weight tensor or per output channel.
        edge_bits: of the first and the last layer, weights and inputs alike; None means like all others, 32 float.
        skip: names, or first parts of names, of layers left in float.
        schedule: of the training.
    """

    def quantizer(weight: Tensor, width: int, axis: int) -> LearnedWeight:
        return LearnedWeight(weight, width, granularity, axis, start=three_deviations)

    return train_quantized(
        model,
        data,
        schedule,
        quantizer,
        OffsetInput,
        name="lsq_plus",
        bits=bits,
        activation_bits=activation_bits,
        edge_bits=edge_bits,
        skip=skip,
    )
