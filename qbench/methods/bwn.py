"""Binary weights."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field
from torch import nn

from qbench.data import Data
from qbench.quant.fakequant import LearnedInput
from qbench.quant.one_bit import EdgeBits, weight_of_bits
from qbench.quant.qat import train_quantized
from qbench.quant.schedule import Schedule
from qbench.registry import method


@method("bwn", track="qat", paper="arXiv:1603.05279")
def bwn(
    model: nn.Module,
    data: Data,
    *,
    activation_bits: Annotated[int, Field(ge=2, le=8)] | None = None,
    edge_bits: EdgeBits = 8,
    skip: tuple[str, ...] = (),
    schedule: Schedule = Schedule(optimizer="adamw", lr=0.001),
) -> nn.Module:
    """Train the network with weights that are signs, times the mean magnitude of their output channel (BWN).

    Args:
        model: the float model.
        data: with training images.
        activation_bits: of the inputs of the same layers, with learned steps; None leaves them in float, as the paper.
        edge_bits: of the first and the last layer; None makes them binary as well, 32 leaves them in float.
        skip: names, or first parts of names, of layers left in float.
        schedule: of the training.

    Raises:
        Unsupported: distillation is asked for, and there is no float network or its outputs are not logits.
    """
    return train_quantized(
        model,
        data,
        schedule,
        weight_of_bits,
        LearnedInput,
        name="bwn",
        bits=1,
        activation_bits=activation_bits,
        edge_bits=edge_bits,
        skip=skip,
    )
