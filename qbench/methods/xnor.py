"""Binary weights and inputs."""

from __future__ import annotations

from torch import nn

from qbench.data import Data
from qbench.quant import structure
from qbench.quant.binary import BinaryInput, BinaryMeanInput
from qbench.quant.fakequant import LearnedInput
from qbench.quant.one_bit import EdgeBits, channel_axis_of, one_bit_layers, weight_of_bits
from qbench.quant.qat import train_quantized
from qbench.quant.rectifiers import drop_rectifiers
from qbench.quant.scale_map import can_map
from qbench.quant.schedule import Schedule
from qbench.registry import method


@method("xnor", track="qat", paper="arXiv:1603.05279")
def xnor(
    model: nn.Module,
    data: Data,
    *,
    scale_map: bool = True,
    edge_bits: EdgeBits = 8,
    skip: tuple[str, ...] = (),
    schedule: Schedule = Schedule(optimizer="adamw", lr=0.003),
) -> nn.Module:
    """Train the network with weights and inputs that are signs; both are scaled by mean magnitudes (XNOR-Net).

    ReLUs in front of binary layers go: their inputs come from batch norms then, as in the paper's blocks. Weights are
    those of `bwn`. The sign of an input passes the gradient on where its magnitude is at most 1.

    Args:
        model: the float model.
        data: with training images.
        scale_map: scale each output by the mean magnitude of the patch it comes from, computed at run time (the
            paper's K; for other layers than plain convolutions, by that of each position). False scales each input as
            a whole, by what the first batch says.
        edge_bits: of the first and the last layer; None makes them binary as well, 32 leaves them in float.
        skip: names, or first parts of names, of layers left in float.
        schedule: of the training.

    Raises:
        Unsupported: the input of a layer is never negative; or channels are counted by different axes.
    """
    example = data.example
    layers = one_bit_layers(model.eval(), example, edge_bits, skip)
    drop_rectifiers(model, example, layers)
    axis = channel_axis_of(model, example, layers)
    for name in layers:
        if scale_map and can_map(model.get_submodule(name)):
            structure.apply(model, "scale_map", layer=name)

    def inputs(bits: int) -> nn.Module:
        if bits > 1:
            return LearnedInput(bits)
        return BinaryMeanInput(axis) if scale_map else BinaryInput("clip")

    return train_quantized(
        model,
        data,
        schedule,
        weight_of_bits,
        inputs,
        name="xnor",
        bits=1,
        activation_bits=1,
        edge_bits=edge_bits,
        skip=skip,
    )
