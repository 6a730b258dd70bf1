"""MSQE: steps of least squared error, or learned ones, that are powers of two and do not oscillate."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from qbench.data import Data
from qbench.quant.fakequant import Granularity, LearnedInput, LearnedWeight
from qbench.quant.free_weights import free_weight, quantized_layers
from qbench.quant.layers import select_layers
from qbench.quant.penalties import kurtosis, penalised
from qbench.quant.powers import PowerWeight
from qbench.quant.qat import train_quantized
from qbench.quant.recomputed import MsqeWeight
from qbench.quant.schedule import Schedule, Share
from qbench.quant.step_search import best_step
from qbench.quant.training import Step
from qbench.registry import method

LowBits = Annotated[int, Field(ge=2, le=8)]


@method("msqe", track="qat", paper="arXiv:2210.03671", in_the_manner_of=True)
def msqe(
    model: nn.Module,
    data: Data,
    *,
    bits: LowBits = 4,
    activation_bits: LowBits | None = 4,
    estimator: Literal["exact", "alternating", "gradient"] = "exact",
    power_of_two: bool = True,
    granularity: Granularity = "tensor",
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9,
    hysteresis: Annotated[float, Field(ge=0, lt=1)] = 0.1,
    freeze: Share | None = 0.8,
    deviations: Annotated[float, Field(gt=0)] | None = None,
    flatten: Annotated[float, Field(ge=0)] = 0.0,
    edge_bits: LowBits | Literal[32] | None = 8,
    skip: tuple[str, ...] = (),
    schedule: Schedule = Schedule(),
) -> nn.Module:
    """Train with weights on symmetric grids whose steps, powers of two, have the least squared error (MSQE).

    Which remedies against outliers and oscillation the paper combines is not known; here each is an option. Put
    `fold_bn` in front, as the paper does. Inputs have the learned steps of LSQ.

    Args:
        model: the float model.
        data: with training images.
        bits: of the weights; codes are symmetric about 0.
        activation_bits: of the inputs of the same layers; None leaves them in float.
        estimator: of the steps, which are recomputed from the weights after every step of the training: `exact`, or
            `alternating` from those of before; or learned by `gradient`, as logarithms where they are powers of two.
        power_of_two: round steps to the power of two with the least error.
        granularity: one step per weight tensor or per output channel.
        momentum: share of the past in the moving average of recomputed steps.
        hysteresis: a power of two stays until the step is further than half an octave, and this, from it.
        freeze: share of the training after which steps stay; None never freezes them.
        deviations: weights are clipped to so many standard deviations of their layer, always.
        flatten: times the mean over layers of (kurtosis - 1.8)**2 is added to the loss: weights become uniform.
        edge_bits: of the first and the last layer, weights and inputs alike; None means like all others, 32 float.
        skip: names, or first parts of names, of layers left in float.
        schedule: of the training.
    """

    def quantizer(weight: Tensor, width: int, axis: int) -> nn.Module:
        if estimator != "gradient":
            return MsqeWeight(
                weight,
                width,
                granularity,
                axis,
                search=estimator,
                power_of_two=power_of_two,
                momentum=momentum,
                hysteresis=hysteresis,
            )
        if power_of_two:
            return PowerWeight(weight, width, granularity, axis, hysteresis=hysteresis)
        return LearnedWeight(weight, width, granularity, axis, narrow=True, start=_best)

    def after(step: Step) -> None:
        for layer, own in quantized_layers(step.model).values():
            if deviations is not None:
                clip(free_weight(layer), deviations)
            if freeze is not None and step.done >= freeze:
                own.requires_grad_(False)
                own.frozen = True  # type: ignore[assignment]

    if deviations is not None:
        for _, layer, _ in select_layers(model, bits, edge_bits, skip):
            clip(layer.get_parameter("weight"), deviations)
    return train_quantized(
        model,
        data,
        schedule,
        quantizer,
        LearnedInput,
        name="msqe",
        bits=bits,
        activation_bits=activation_bits,
        edge_bits=edge_bits,
        skip=skip,
        objective=penalised(data, lambda net: flatten * kurtosis(net)) if flatten else None,
        on_step=after,
    )


def _best(rows: Tensor, high: int) -> Tensor:
    return best_step(rows, -high, high)


@torch.no_grad()
def clip(weight: Tensor, deviations: float) -> None:
    """Clip a weight, in place, to so many standard deviations about 0."""
    reach = deviations * weight.std(correction=0)
    weight.clamp_(-reach, reach)
