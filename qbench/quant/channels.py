"""A layer's weight by output channel and by input channel: factors and ranges."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from qbench.errors import UserError
from qbench.quant.layers import TRANSPOSED, encodings


def scale_outputs(layer: nn.Module, weight: Tensor, factor: Tensor) -> Tensor:
    """The weight with each output channel times its factor (N,)."""
    if isinstance(layer, TRANSPOSED):
        # (C, N / groups, *kernel): the rows of one group of inputs make one group of outputs.
        grouped = weight.unflatten(0, (layer.groups, -1))
        return (grouped * factor.reshape(layer.groups, 1, -1, *[1] * (weight.dim() - 2))).flatten(0, 1)
    return weight * factor.reshape(-1, *[1] * (weight.dim() - 1))


def scale_inputs(layer: nn.Module, weight: Tensor, factor: Tensor) -> Tensor:
    """The weight with each input channel times its factor (C,)."""
    if isinstance(layer, TRANSPOSED):
        return weight * factor.reshape(-1, *[1] * (weight.dim() - 1))
    groups = _groups(layer)
    grouped = weight.unflatten(0, (groups, -1))
    return (grouped * factor.reshape(groups, 1, -1, *[1] * (weight.dim() - 2))).flatten(0, 1)


def output_ranges(layer: nn.Module, weight: Tensor) -> Tensor:
    """The largest magnitude in each output channel (N,)."""
    if isinstance(layer, TRANSPOSED):
        return weight.abs().unflatten(0, (layer.groups, -1)).flatten(3).amax((1, 3)).flatten()
    return weight.abs().flatten(1).amax(1)


def input_ranges(layer: nn.Module, weight: Tensor) -> Tensor:
    """The largest magnitude that each input channel is multiplied by (C,)."""
    if isinstance(layer, TRANSPOSED):
        return weight.abs().flatten(1).amax(1)
    return weight.abs().unflatten(0, (_groups(layer), -1)).unsqueeze(-1).flatten(3).amax((1, 3)).flatten()


def channel_rows(layer: nn.Module, x: Tensor) -> Tensor:
    """An input or output of the layer as (channels, all images and positions)."""
    return x.movedim(-1 if isinstance(layer, nn.Linear) else 1, 0).flatten(1)


def refuse_quantized(layers: Mapping[str, nn.Module], step: str) -> None:
    """
    Raises:
        UserError: one of the layers is quantized, so its weight must not be changed any more.
    """
    for name, layer in layers.items():
        if encodings(layer):
            raise UserError(f"{name} is quantized already, so it cannot be changed by {step}; put {step} first")


def _groups(layer: nn.Module) -> int:
    groups: Any = getattr(layer, "groups", 1)
    return int(groups)
