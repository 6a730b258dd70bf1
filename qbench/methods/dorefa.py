"""DoReFa-Net: weights through a tangent, inputs on a fixed range, and gradients with few bits."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor, nn

from qbench.data import Data
from qbench.quant.dorefa import FixedInput, SignWeight, TanhWeight, rounded_gradients
from qbench.quant.layers import select_layers
from qbench.quant.qat import train_quantized
from qbench.quant.schedule import Schedule
from qbench.registry import method

AnyBits = Annotated[int, Field(ge=1, le=8)]


@method("dorefa", track="qat", paper="arXiv:1606.06160")
def dorefa(
    model: nn.Module,
    data: Data,
    *,
    bits: AnyBits = 4,
    activation_bits: AnyBits | None = 4,
    gradient_bits: Annotated[int, Field(ge=2, le=8)] | None = None,
    unit: bool = False,
    edge_bits: AnyBits | Literal[32] | None = 8,
    skip: tuple[str, ...] = (),
    schedule: Schedule = Schedule(),
) -> nn.Module:
    """Train with weights squashed by a tangent, inputs clipped at a fixed limit, gradients of few bits (DoReFa-Net).

    Levels of weights are symmetric about 0, which is none of them: no integer runtime takes them. One bit is the sign
    times the mean magnitude of the layer.

    Args:
        model: the float model.
        data: with training images.
        bits: of the weights.
        activation_bits: of the inputs of the same layers; None leaves them in float.
        gradient_bits: of the gradients of the layers' outputs, rounded with noise; None leaves them in float.
        unit: weights and inputs end at 1, as in the paper, which trains from random weights; by default where they do
            in the float network: a factor that batch norms cancel.
        edge_bits: of the first and the last layer, weights and inputs alike; None means like all others, 32 float.
        skip: names, or first parts of names, of layers left in float.
        schedule: of the training.
    """

    def quantizer(weight: Tensor, width: int, axis: int) -> nn.Module:
        return SignWeight(axis) if width == 1 else TanhWeight(weight, width, axis, unit)

    layers = [layer for _, layer, _ in select_layers(model, bits, edge_bits, skip, for_inputs=True)]

    with rounded_gradients(layers, gradient_bits) if gradient_bits else nullcontext():
        return train_quantized(
            model,
            data,
            schedule,
            quantizer,
            lambda width: FixedInput(width, unit),
            name="dorefa",
            bits=bits,
            activation_bits=activation_bits,
            edge_bits=edge_bits,
            skip=skip,
        )
