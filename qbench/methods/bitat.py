"""Binary weights in the basis of their inputs, layer after layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from qbench.data import Data
from qbench.errors import Unsupported
from qbench.quant.binary import BinaryInput
from qbench.quant.calls import Args, first_of, watch_calls
from qbench.quant.fakequant import LearnedInput, LearnedWeight, weight_quantizer
from qbench.quant.free_weights import free_weight
from qbench.quant.gram import Sampling, grams
from qbench.quant.layers import TRANSPOSED, select_layers
from qbench.quant.one_bit import EdgeBits
from qbench.quant.qat import train_quantized
from qbench.quant.rectifiers import drop_rectifiers
from qbench.quant.rotated_binary import RotatedBinaryWeight
from qbench.quant.schedule import Schedule, Share
from qbench.quant.training import Step, evaluating
from qbench.registry import method

_KEPT_BITS = 8
_IMAGES = 64
_ROWS = 16384
_LAST = 0.75  # of the training, when the last layer begins


@method("bitat", track="qat", paper="arXiv:2207.01394", in_the_manner_of=True)
def bitat(
    model: nn.Module,
    data: Data,
    *,
    activation_bits: Annotated[int, Field(ge=1, le=8)] | None = 4,
    share: Share = 0.05,
    groups: Annotated[int, Field(ge=1)] = 8,
    block_size: Annotated[int, Field(ge=1)] = 16,
    edge_bits: EdgeBits = 8,
    skip: tuple[str, ...] = (),
    schedule: Schedule = Schedule(optimizer="adamw", lr=0.001, distillation=0.5),
) -> nn.Module:
    """Binarize weights in the principal axes of their inputs, one layer after the other while the network is trained.

    In the manner of BiTAT, of which no code and few details are known. In the order of execution, and so that each sees
    what the quantized layers in front of it make, layers get a basis: the eigenvectors of the correlation of their
    inputs, block by block of columns. The axes that matter most are kept at 8 bits, the others become signs. Until its
    turn comes a layer trains in float, afterwards straight through. The matrices are stored with the weights: for N
    output channels they cost `32 block / N` bits a weight.

    Args:
        model: the float model.
        data: with training images, and the float network.
        activation_bits: of the inputs of the same layers, with learned steps; 1 takes signs, and ReLUs in front of
            binary layers go; None leaves them in float.
        share: of the axes that are kept at 8 bits, rounded up in each block.
        groups: of the other axes, each with a scale for each output channel.
        block_size: columns that are rotated together at most, but all positions of a kernel are in one block.
        edge_bits: of the first and the last layer; None makes them binary as well, 32 leaves them in float.
        skip: names, or first parts of names, of layers left in float.
        schedule: of the training, with distillation.

    Raises:
        Unsupported: a layer is a transposed convolution; moving averages are asked for; distillation is asked for, and
            there is no float network; signs are asked for, and an input is never
            negative.
    """
    if schedule.ema is not None:
        raise Unsupported("moving averages would mix weights in different bases: leave ema out")
    model.eval()
    chosen = {name: layer for name, layer, bits in select_layers(model, 1, edge_bits, skip) if bits == 1}
    refused = [name for name, layer in chosen.items() if isinstance(layer, TRANSPOSED)]
    if refused:
        raise Unsupported(f"{refused[0]} is a transposed convolution: leave it in float with skip=[{refused[0]}]")
    waiting = _executed(model, data.example, chosen)
    if activation_bits == 1:
        drop_rectifiers(model, data.example, waiting)

    def quantizer(weight: Tensor, bits: int, axis: int) -> nn.Module:
        if bits > 1:
            return LearnedWeight(weight, bits, "channel", axis)
        return RotatedBinaryWeight(weight, block_size=block_size, share=share, kept_bits=_KEPT_BITS, groups=groups)

    def begin(step: Step) -> None:
        while waiting and 1 - len(waiting) / len(chosen) <= step.done / _LAST:
            _rotate(step.model, waiting.pop(0), data)

    return train_quantized(
        model,
        data,
        schedule,
        quantizer,
        lambda bits: BinaryInput("clip") if bits == 1 else LearnedInput(bits),
        name="bitat",
        bits=1,
        activation_bits=activation_bits,
        edge_bits=edge_bits,
        skip=skip,
        on_step=begin,
    )


def _executed(model: nn.Module, example: Tensor, layers: Mapping[str, nn.Module]) -> list[str]:
    """Their names in the order of execution, those at the end that are not called."""
    called: dict[str, None] = {}
    watch_calls(model, example, layers, lambda name, _args, _kwargs: called.setdefault(name))
    return [*called, *(name for name in layers if name not in called)]


def _rotate(model: nn.Module, name: str, data: Data) -> None:
    """Let the layer begin with the basis of the inputs that it has now."""
    layer = model.get_submodule(name)
    quantizer = weight_quantizer(layer)
    assert isinstance(quantizer, RotatedBinaryWeight)
    inputs: list[Tensor] = []

    def see(_name: str, args: Args, kwargs: dict[str, Any]) -> None:
        inputs.append(first_of(args, kwargs).clone())

    with evaluating(model):
        for images in data.calibration.first(min(_IMAGES, data.calibration.images)):
            watch_calls(model, images, {name: layer}, see)
        weight = free_weight(layer)
        gram = torch.eye(weight[0].numel(), device=weight.device)
        if inputs:
            sums = grams(layer, inputs, sampling=Sampling(rows=_ROWS, seed=data.seed), for_errors=False)
            # One basis for all groups of a convolution.
            gram = sums.H.sum(0) / sums.rows
        quantizer.rotate(weight, gram)
