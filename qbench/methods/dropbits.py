"""DropBits: CPQ with bits of the weights that are dropped at random, and learned bit widths."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from qbench.data import Data
from qbench.quant.cpq import CpqInput
from qbench.quant.dropbits import DropBitsWeight
from qbench.quant.penalties import penalised
from qbench.quant.qat import train_quantized
from qbench.quant.schedule import Schedule, Share
from qbench.quant.training import Step
from qbench.registry import method

LowBits = Annotated[int, Field(ge=2, le=8)]


@method("dropbits", track="qat", paper="arXiv:2109.02100", in_the_manner_of=True)
def dropbits(
    model: nn.Module,
    data: Data,
    *,
    bits: LowBits = 4,
    activation_bits: LowBits | None = 4,
    penalty: Annotated[float, Field(ge=0)] = 0.0,
    fix: Share = 0.5,
    edge_bits: LowBits | Literal[32] | None = 8,
    skip: tuple[str, ...] = (),
    schedule: Schedule = Schedule(lr=1e-3),
) -> nn.Module:
    """Train like CPQ, and drop the upper bits of weights at random, with probabilities that are learned (DropBits).

    With a penalty on bits each layer finds a width of its own.

    Args:
        model: the float model.
        data: with training images.
        bits: of the weights at most; one bit always stays.
        activation_bits: of the inputs of the same layers; None leaves them in float.
        penalty: times the expected number of bits that are not dropped, summed over layers, is added to the loss.
        fix: share of the training after which each bit is either there or not.
        edge_bits: of the first and the last layer, weights and inputs alike; None means like all others, 32 float.
        skip: names, or first parts of names, of layers left in float.
        schedule: of the training; with higher rates gradients, which are biased, can take the network apart.
    """

    def quantizer(weight: Tensor, width: int, axis: int) -> DropBitsWeight:
        return DropBitsWeight(weight, width, axis)

    def cost(net: nn.Module) -> Tensor:
        return penalty * sum((own.cost() for own in _dropping(net)), torch.zeros(()))

    def after(step: Step) -> None:
        if step.done >= fix:
            for own in _dropping(step.model):
                own.fix()

    return train_quantized(
        model,
        data,
        schedule,
        quantizer,
        CpqInput,
        name="dropbits",
        bits=bits,
        activation_bits=activation_bits,
        edge_bits=edge_bits,
        skip=skip,
        objective=penalised(data, cost) if penalty else None,
        on_step=after,
    )


def _dropping(model: nn.Module) -> list[DropBitsWeight]:
    return [module for module in model.modules() if isinstance(module, DropBitsWeight)]
