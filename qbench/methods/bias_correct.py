"""Empirical bias correction."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from qbench.data import Data
from qbench.errors import Unsupported
from qbench.quant.biases import shift_bias
from qbench.quant.layers import encodings, select_layers
from qbench.quant.sweep import sweep
from qbench.registry import method


@method("bias_correct", paper="arXiv:1906.04721")
def bias_correct(
    model: nn.Module,
    data: Data,
    *,
    skip: tuple[str, ...] = (),
) -> nn.Module:
    """Shift each bias so that the layer's mean output is what it is in the float network.

    Layer by layer in the order of execution, so that a layer also makes up for the shift that those before it have
    left. Layers without a bias get one. This is the empirical form of the correction, with calibration images in place
    of batch-norm statistics.

    Args:
        model: quantized; changed in place.
        data: its calibration images, and its float network.
        skip: names, or first parts of names, of layers that keep their bias.

    Raises:
        Unsupported: there is no float network to compare with, it has other layers, or a bias is quantized.
    """
    if data.reference is None:
        raise Unsupported("bias correction compares with the float network, and there is none")
    model.eval()
    quantized = {name.removesuffix(".bias") for name in encodings(model) if name.endswith(".bias")}
    shifts: dict[str, float] = {}
    layers = [name for name, _, _ in select_layers(model, 16, skip=skip)]
    for stop in sweep(model, data.calibration, reference=data.reference, layers=layers):
        if stop.name in quantized:
            raise Unsupported(f"the bias of {stop.name} is quantized: correct biases before that")
        shift = channel_mean(stop.reference_layer, stop.reference_inputs) - channel_mean(stop.layer, stop.inputs)
        shift_bias(model, stop.name, shift)
        shifts[stop.name] = float(shift.abs().mean())
        data.progress((stop.index + 1) / stop.total)
    data.record("bias_shift", shifts)
    return model


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
