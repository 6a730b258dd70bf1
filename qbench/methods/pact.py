"""PACT: inputs are clipped where it is learned to be best."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from qbench.data import Data
from qbench.errors import UserError
from qbench.quant.activations import input_quantizers
from qbench.quant.dorefa import TanhWeight
from qbench.quant.pact import COEFFICIENTS, ClippedInput, SawbWeight
from qbench.quant.penalties import penalised
from qbench.quant.qat import train_quantized
from qbench.quant.schedule import Schedule
from qbench.registry import method

LowBits = Annotated[int, Field(ge=2, le=8)]


@method("pact", track="qat", paper="arXiv:1805.06085")
def pact(
    model: nn.Module,
    data: Data,
    *,
    bits: LowBits = 4,
    activation_bits: LowBits | None = 4,
    weights: Literal["dorefa", "sawb"] = "dorefa",
    limit: Annotated[float, Field(gt=0)] | None = None,
    limit_decay: Annotated[float, Field(ge=0)] = 2e-4,
    edge_bits: LowBits | Literal[32] | None = 8,
    skip: tuple[str, ...] = (),
    schedule: Schedule = Schedule(),
) -> nn.Module:
    """Train with inputs that are clipped at a learned limit, and with the weights of DoReFa or SAWB (PACT).

    Args:
        model: the float model.
        data: with training images.
        bits: of the weights; `sawb` has 2, 3, 4, 5 and 8.
        activation_bits: of the inputs of the same layers; None leaves them in float.
        weights: `dorefa` rounds them through a tangent; `sawb` (arXiv:1807.06964) clips them where the first two
            moments say.
        limit: where the clipping of inputs begins, 6 to 10 in the paper, which trains from random weights; None is
            where the squared error of the first batch is least.
        limit_decay: half of it times the sum of the squared limits is added to the loss.
        edge_bits: of the first and the last layer, weights and inputs alike; None means like all others, 32 float.
        skip: names, or first parts of names, of layers left in float.
        schedule: of the training.
    """

    def quantizer(weight: Tensor, width: int, axis: int) -> nn.Module:
        if weights == "dorefa":
            return TanhWeight(weight, width, axis)
        if width not in COEFFICIENTS:
            raise UserError(f"pact: weights=sawb has no coefficients for {width} bits, only for {sorted(COEFFICIENTS)}")
        return SawbWeight(weight, width, axis)

    def decay(net: nn.Module) -> Tensor:
        limits = [own.limit.square() for own in input_quantizers(net).values() if isinstance(own, ClippedInput)]
        return limit_decay / 2 * sum(limits, torch.zeros(()))

    return train_quantized(
        model,
        data,
        schedule,
        quantizer,
        lambda width: ClippedInput(width, limit),
        name="pact",
        bits=bits,
        activation_bits=activation_bits,
        edge_bits=edge_bits,
        skip=skip,
        objective=penalised(data, decay) if activation_bits and limit_decay else None,
    )
