"""Scaled floats of 4, 6 and 8 bits."""

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from qbench.data import Data
from qbench.quant.encodings import to_rows
from qbench.quant.layers import encode, output_axis, select_layers, weight_of
from qbench.quant.levels import levels_scale
from qbench.quant.minifloat import FORMATS, USUAL, FormatName, blocked, rounded
from qbench.registry import method


@method("minifloat", paper="arXiv:2209.05433")
def minifloat(
    model: nn.Module,
    data: Data,
    *,
    format: FormatName = "fp8_e4m3",
    granularity: Literal["tensor", "channel", "group"] = "channel",
    group_size: Annotated[int, Field(ge=1)] = 128,
    calibration: Literal["minmax", "mse"] = "minmax",
    edge_bits: Literal[4, 6, 8, 32] | None = None,
    skip: tuple[str, ...] = (),
) -> nn.Module:
    """Round every weight to the nearest float of 4, 6 or 8 bits, times a float32 scale.

    Ties go to even, what is too large becomes the largest number, and there are subnormal numbers.

    Args:
        model: changed in place.
        data: not used.
        format: bits, and how many of them are exponent (e) and mantissa (m).
        granularity: what shares a scale: a tensor, an output channel, or a group of its columns.
        group_size: columns in a group.
        calibration: the largest weight becomes the format's largest number, or the least squared error.
        edge_bits: bits of the first and the last layer (8: e4m3, 6: e2m3, 4: e2m1); 32 leaves them in float.
        skip: names, or first parts of names, of layers left in float.
    """
    size = group_size if granularity == "group" else None
    for _, layer, width in select_layers(model, FORMATS[format].bits, edge_bits, skip):
        form = FORMATS[format if width == FORMATS[format].bits else USUAL[width]]
        weight, axis = weight_of(layer), output_axis(layer)
        points, grid = _points(weight, axis, granularity, size)
        if calibration == "mse":
            scale = levels_scale(points, form.levels().to(points))
        else:
            scale = points.abs().amax(1) / form.largest
        scale = torch.where(scale > 0, scale, 1).reshape(grid)
        encode(layer, form.store(rounded(weight, form, scale, axis, size), axis, scale, size))
    return model


def _points(weight: Tensor, axis: int, granularity: str, size: int | None) -> tuple[Tensor, tuple[int, int]]:
    """The weights of each scale (S, n), zeros at the end of ragged groups, and the shape (R, G) of the scales."""
    if granularity == "tensor":
        return weight.reshape(1, -1), (1, 1)
    rows = blocked(weight, size or to_rows(weight, axis).shape[1], axis)
    return rows.flatten(0, 1), (rows.shape[0], rows.shape[1])
