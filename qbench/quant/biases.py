"""Biases that layers do not have yet."""

import torch
from torch import Tensor, nn

from qbench.quant import structure
from qbench.quant.layers import output_axis


@structure.operation("add_bias")
def _add_bias(model: nn.Module, *, layer: str) -> None:
    module = model.get_submodule(layer)
    weight = module.weight
    assert isinstance(weight, Tensor)
    groups = module.groups if output_axis(module) == 1 else 1
    assert isinstance(groups, int)
    channels = weight.shape[output_axis(module)] * groups
    module.bias = nn.Parameter(torch.zeros(channels, dtype=weight.dtype, device=weight.device))


def shift_bias(model: nn.Module, name: str, shift: Tensor) -> None:
    """Add `shift` (N,) to the bias of a layer, which gets one if it has none."""
    layer = model.get_submodule(name)
    if layer.bias is None:
        structure.apply(model, "add_bias", layer=name)
    assert isinstance(layer.bias, Tensor)
    with torch.no_grad():
        layer.bias += shift.to(layer.bias)
