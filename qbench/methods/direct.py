"""Direct quantization: the levels of weights are learned, and signs in place of weights."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from qbench.data import Data
from qbench.quant.direct import DirectInput, DirectWeight
from qbench.quant.fakequant import Granularity
from qbench.quant.penalties import penalised
from qbench.quant.qat import train_quantized
from qbench.quant.schedule import Schedule
from qbench.quant.training import Step
from qbench.registry import method

AnyBits = Annotated[int, Field(ge=1, le=8)]


@method("direct", track="qat", paper="arXiv:2012.13762", in_the_manner_of=True)
def direct(
    model: nn.Module,
    data: Data,
    *,
    bits: AnyBits = 4,
    activation_bits: AnyBits | None = 4,
    granularity: Granularity = "tensor",
    binarise: Annotated[float, Field(ge=0)] = 1e-6,
    edge_bits: AnyBits | Literal[32] | None = 8,
    skip: tuple[str, ...] = (),
    schedule: Schedule = Schedule(optimizer="adamw", lr=1e-3),
) -> nn.Module:
    """Train learned levels and the signs that choose among them, in place of float weights that are rounded.

    A weight is the sum of `bits` numbers times signs. Levels of inputs follow the least sum of errors, each divided by
    the variance of its channel.

    Args:
        model: the float model.
        data: with training images.
        bits: of the weights.
        activation_bits: of the inputs of the same layers; None leaves them in float.
        granularity: levels per weight tensor or per output channel.
        binarise: times the sum of 1 - |latent| over all latents, and times the share of the training that is done, is
            added to the loss: signs stop to change.
        edge_bits: of the first and the last layer, weights and inputs alike; None means like all others, 32 float.
        skip: names, or first parts of names, of layers left in float.
        schedule: of the training; gradients of latents are too small for `sgd`.
    """

    done = 0.0

    def quantizer(weight: Tensor, width: int, axis: int) -> DirectWeight:
        return DirectWeight(weight, width, granularity, axis)

    def undecided(net: nn.Module) -> Tensor:
        latents = (module.latents for module in net.modules() if isinstance(module, DirectWeight))
        return binarise * done * sum(((1 - own.abs()).sum() for own in latents), torch.zeros(()))

    def after(step: Step) -> None:
        nonlocal done
        done = step.done

    return train_quantized(
        model,
        data,
        schedule,
        quantizer,
        DirectInput,
        name="direct",
        bits=bits,
        activation_bits=activation_bits,
        edge_bits=edge_bits,
        skip=skip,
        objective=penalised(data, undecided) if binarise else None,
        on_step=after,
    )
