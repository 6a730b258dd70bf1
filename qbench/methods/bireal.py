"""Binary weights and inputs, with real numbers that go around every convolution."""

from __future__ import annotations

from torch import nn

from qbench.data import Data
from qbench.quant.binary import BinaryInput
from qbench.quant.fakequant import LearnedInput
from qbench.quant.one_bit import EdgeBits, add_shortcuts, weight_of_bits
from qbench.quant.qat import train_quantized
from qbench.quant.rectifiers import drop_rectifiers
from qbench.quant.schedule import Schedule
from qbench.registry import method


@method("bireal", track="qat", paper="arXiv:1808.00278")
def bireal(
    model: nn.Module,
    data: Data,
    *,
    edge_bits: EdgeBits = 8,
    skip: tuple[str, ...] = (),
    schedule: Schedule = Schedule(optimizer="adamw", lr=0.003),
) -> nn.Module:
    """Train the network with weights and inputs that are signs, and a shortcut around every convolution (Bi-Real Net).

    The sign of an input has the gradient 2 - 2|x| on [-1, 1]. ReLUs in front of binary layers go. A shortcut leads from
    a convolution's input to the output of the batch norm behind it; where the shape changes, through the branch of the
    residual block, or over means of positions and repeated channels; where there are fewer channels behind, there is
    none. Layers in such branches have `edge_bits`, instead of being left in float as in the paper. Weights are those of
    `bwn`; the paper starts from a network trained with other activations, this from the one given.

    Args:
        model: the float model.
        data: with training images.
        edge_bits: of the first and the last layer; None makes them binary as well, 32 leaves them in float.
        skip: names, or first parts of names, of layers left in float.
        schedule: of the training.

    Raises:
        Unsupported: no shortcut can be added, or the input of a layer is never negative.
    """
    example = data.example
    layers, branches = add_shortcuts(model.eval(), example, edge_bits, skip)
    drop_rectifiers(model, example, layers)
    return train_quantized(
        model,
        data,
        schedule,
        weight_of_bits,
        lambda bits: BinaryInput("approx") if bits == 1 else LearnedInput(bits),
        name="bireal",
        bits=1,
        activation_bits=1,
        edge_bits=edge_bits,
        skip=skip,
        layer_bits=branches,
    )
