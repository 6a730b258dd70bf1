"""Weights of three levels."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor, nn

from qbench.data import Data
from qbench.quant.fakequant import LearnedInput, LearnedWeight
from qbench.quant.qat import train_quantized
from qbench.quant.schedule import Schedule
from qbench.quant.ternary import TernaryWeight, TrainedTernaryWeight
from qbench.registry import method

_TERNARY = 2  # bits that three levels take
_THRESHOLD = 0.05


@method("ternary", track="qat", paper="arXiv:1605.04711")
def ternary(
    model: nn.Module,
    data: Data,
    *,
    kind: Literal["twn", "ttq"] = "twn",
    activation_bits: Annotated[int, Field(ge=2, le=8)] | None = None,
    edge_bits: Annotated[int, Field(ge=3, le=8)] | Literal[32] | None = 8,
    skip: tuple[str, ...] = (),
    schedule: Schedule = Schedule(optimizer="adamw", lr=0.001),
) -> nn.Module:
    """Train the network with weights of three levels, one of them 0, shared by a layer (TWN or TTQ).

    Args:
        model: the float model.
        data: with training images.
        kind: `twn` has levels -a, 0, a, where weights up to 0.7 times the mean magnitude are 0 and a is the mean
            magnitude of the others; `ttq` (arXiv:1612.01064) learns -n, 0 and p, where weights up to 0.05 times the
            greatest magnitude are 0.
        activation_bits: of the inputs of the same layers, with learned steps; None leaves them in float, as the papers.
        edge_bits: of the first and the last layer; None makes them ternary as well, 32 leaves them in float.
        skip: names, or first parts of names, of layers left in float.
        schedule: of the training.

    Raises:
        Unsupported: distillation is asked for, and there is no float network or its outputs are not logits.
    """

    def quantizer(weight: Tensor, bits: int, axis: int) -> nn.Module:
        if bits != _TERNARY:
            return LearnedWeight(weight, bits, "channel", axis)
        return TernaryWeight() if kind == "twn" else TrainedTernaryWeight(weight, _THRESHOLD)

    return train_quantized(
        model,
        data,
        schedule,
        quantizer,
        LearnedInput,
        name="ternary",
        bits=_TERNARY,
        activation_bits=activation_bits,
        edge_bits=edge_bits,
        skip=skip,
    )
