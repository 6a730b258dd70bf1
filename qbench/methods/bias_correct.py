"""Bias correction, by calibration images or by the statistics of batch norms."""

from collections.abc import Iterable, Iterator
from typing import Literal

import torch
from torch import Tensor, nn

from qbench.data import Data
from qbench.errors import Unsupported
from qbench.quant.biases import shift_bias
from qbench.quant.channels import scale_inputs
from qbench.quant.expected_inputs import expected_inputs
from qbench.quant.layers import TRANSPOSED, encodings, select_layers, weight_of
from qbench.quant.sweep import sweep
from qbench.registry import method


@method("bias_correct", paper="arXiv:1906.04721")
def bias_correct(
    model: nn.Module,
    data: Data,
    *,
    source: Literal["calibration", "batch_norm"] = "calibration",
    skip: tuple[str, ...] = (),
) -> nn.Module:
    """Shift each bias so that the layer's mean output is what it is in the float network.

    With calibration images it is done layer by layer in the order of execution, so that a layer also makes up for the
    shift that those before it have left. With the statistics of batch norms it takes no data: a layer whose input is
    what one batch norm writes, behind a ReLU, ReLU6 or nothing, gets the mean of its weight's error times its input,
    taken for a clipped normal; the others keep their biases, and are recorded as `bias_kept`. Layers without a bias get
    one.

    Args:
        model: quantized; changed in place.
        data: its calibration images (of batch norms: the first, to follow through the network), and its float network.
        source: of the mean inputs.
        skip: names, or first parts of names, of layers that keep their bias.

    Raises:
        Unsupported: there is no float network to compare with, it has other layers, a bias is quantized, or no layer's
            input comes from one batch norm.
    """
    if data.reference is None:
        raise Unsupported("bias correction compares with the float network, and there is none")
    model.eval()
    quantized = {name.removesuffix(".bias") for name in encodings(model) if name.endswith(".bias")}
    layers = [name for name, _, _ in select_layers(model, 16, skip=skip)]
    shifts: dict[str, float] = {}
    for name, shift in (_empirical if source == "calibration" else _analytic)(model, data, data.reference, layers):
        if name in quantized:
            raise Unsupported(f"the bias of {name} is quantized: correct biases before that")
        shift_bias(model, name, shift)
        shifts[name] = float(shift.abs().mean())
    data.record("bias_shift", shifts)
    data.record("bias_kept", [name for name in layers if name not in shifts])
    return model


def _empirical(model: nn.Module, data: Data, reference: nn.Module, layers: list[str]) -> Iterator[tuple[str, Tensor]]:
    """By the mean outputs of each layer, to be corrected before the next is asked for."""
    for stop in sweep(model, data.calibration, reference=reference, layers=layers):
        yield (
            stop.name,
            channel_mean(stop.reference_layer, stop.reference_inputs) - channel_mean(stop.layer, stop.inputs),
        )
        data.progress((stop.index + 1) / stop.total)


def _analytic(model: nn.Module, data: Data, reference: nn.Module, layers: list[str]) -> Iterator[tuple[str, Tensor]]:
    """By the mean inputs that batch norms tell of."""
    means = expected_inputs(reference, data.example)
    known = [name for name in layers if name in means and not isinstance(model.get_submodule(name), TRANSPOSED)]
    if not known:
        raise Unsupported(
            "no layer's input comes from one batch norm by way of ReLU or ReLU6 alone; use source=calibration"
        )
    for name in known:
        layer, twin = model.get_submodule(name), reference.get_submodule(name)
        error = weight_of(layer).double() - weight_of(twin).double()
        mean = means[name].to(error.device)
        yield name, -scale_inputs(layer, error, mean).flatten(1).sum(1)


def channel_mean(layer: nn.Module, inputs: Iterable[Tensor]) -> Tensor:
    """The layer's output (N,) in the mean over all images and positions, in float64."""
    total, count = torch.zeros((), dtype=torch.float64), 0
    for x in inputs:
        with torch.no_grad():
            # Its hooks are left out: the input has passed the layer's input quantizer already.
            output = layer.forward(x)
        channels = output.movedim(-1 if isinstance(layer, nn.Linear) else 1, 0).flatten(1)
        total = total.to(output.device) + channels.sum(1, dtype=torch.float64)
        count += channels.shape[1]
    return total / count
