"""LSQ: quantization-aware training with learned step sizes."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor, nn

from qbench.data import Data
from qbench.quant.fakequant import Granularity, LearnedInput, LearnedWeight
from qbench.quant.qat import train_quantized
from qbench.quant.schedule import Schedule
from qbench.registry import method

LowBits = Annotated[int, Field(ge=2, le=8)]


@method("lsq", track="qat", paper="arXiv:1902.08153")
def lsq(
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
    """Train the network with quantized weights and inputs whose step sizes are learned with it (LSQ).

    Args:
        model: the float model.
        data: with training images.
        bits: of the weights, whose codes are signed.
        activation_bits: of the inputs of the same layers, signed where the first batch has negative values; None
            leaves them in float.
        granularity: one step per weight tensor or per output channel.
        edge_bits: of the first and the last layer, weights and inputs alike; None means like all others, 32 float.
        skip: names, or first parts of names, of layers left in float.
        schedule: of the training; SGD and a cosine as in the paper.

    Raises:
        Unsupported: distillation is asked for, and there is no float network or its outputs are not logits.
    """

    def learned(weight: Tensor, width: int, axis: int) -> LearnedWeight:
        return LearnedWeight(weight, width, granularity, axis)

    return train_quantized(
        model,
        data,
        schedule,
        learned,
        LearnedInput,
        name="lsq",
        bits=bits,
        activation_bits=activation_bits,
        edge_bits=edge_bits,
        skip=skip,
    )
