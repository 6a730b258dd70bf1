"""Binary weights and inputs, with thresholds that are learned."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from qbench.data import Data
from qbench.errors import Unsupported
from qbench.quant.binary import BinaryInput
from qbench.quant.distillation import divergence
from qbench.quant.fakequant import LearnedInput
from qbench.quant.one_bit import EdgeBits, add_shortcuts, channel_axis_of, weight_of_bits
from qbench.quant.qat import train_quantized
from qbench.quant.rectifiers import replace_rectifiers
from qbench.quant.schedule import Schedule
from qbench.registry import method


@method("reactnet", track="qat", paper="arXiv:2003.03488")
def reactnet(
    model: nn.Module,
    data: Data,
    *,
    edge_bits: EdgeBits = 8,
    skip: tuple[str, ...] = (),
    schedule: Schedule = Schedule(optimizer="adamw", lr=0.003),
) -> nn.Module:
    """Train a network of signs and shortcuts whose thresholds are learned, to predict what the float network does.

    To `bireal` ReActNet adds: each channel of an input has a learned threshold (RSign); a PReLU between learned shifts
    takes the place of each ReLU in front of a binary layer (RPReLU); and all that is minimised is the divergence of the
    predictions from the float network's, without labels. The paper's first stage, with binary inputs only, is left out.

    Args:
        model: the float model.
        data: with training images, and the float network.
        edge_bits: of the first and the last layer; None makes them binary as well, 32 leaves them in float.
        skip: names, or first parts of names, of layers left in float.
        schedule: of the training.

    Raises:
        Unsupported: there is no float network; no shortcut can be added; a ReLU is used
            for different numbers of channels; channels are counted by other axes than that of images.
    """
    teacher = data.reference
    if teacher is None:
        raise Unsupported("there is no float network whose predictions could be learned")
    example = data.example
    layers, branches = add_shortcuts(model.eval(), example, edge_bits, skip)
    replace_rectifiers(model, example, layers)
    channel_axis_of(model, example, layers)

    def objective(network: nn.Module, x: Tensor, _y: Any) -> Tensor:
        with torch.no_grad():
            wanted = teacher(x)
        return divergence(network(x), wanted, temperature=1.0)

    return train_quantized(
        model,
        data,
        schedule,
        weight_of_bits,
        lambda bits: BinaryInput("approx", shifts=True) if bits == 1 else LearnedInput(bits),
        name="reactnet",
        bits=1,
        activation_bits=1,
        edge_bits=edge_bits,
        skip=skip,
        layer_bits=branches,
        objective=objective,
    )
