"""Bins of equal mass."""

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import nn

from qbench.data import Data
from qbench.quant.encodings import Codebook, from_rows, to_rows
from qbench.quant.layers import encode, output_axis, select_layers, weight_of
from qbench.quant.levels import quantile_levels
from qbench.registry import method

Width = Annotated[int, Field(ge=1, le=8)]


@method("quantile", paper="arXiv:1804.10969", in_the_manner_of=True)
def quantile(
    model: nn.Module,
    data: Data,
    *,
    bits: Width = 4,
    granularity: Literal["layer", "channel"] = "layer",
    layer_bits: dict[str, Width | Literal[32]] | None = None,
    edge_bits: Width | Literal[32] | None = None,
    skip: tuple[str, ...] = (),
) -> nn.Module:
    """Cut the sorted weights into 2**bits bins of equally many, and store each as the mean of its bin.

    All codes are equally frequent, but for weights that are equal: no coder can make them smaller.

    Args:
        model: changed in place.
        data: not used.
        bits: width of the codes.
        granularity: what shares a codebook of 2**bits float32 levels.
        layer_bits: bits of the layers whose name equals or begins with a key; 32 leaves them in float.
        edge_bits: bits of the first and the last layer; 32 leaves them in float.
        skip: names, or first parts of names, of layers left in float.
    """
    for _, layer, width in select_layers(model, bits, edge_bits, skip, layer_bits):
        weight, axis = weight_of(layer), output_axis(layer)
        rows = to_rows(weight, axis)
        points = rows if granularity == "channel" else rows.reshape(1, -1)
        levels, bounds = quantile_levels(points, 2**width)
        codes = torch.searchsorted(bounds, points.contiguous()).to(torch.int32).reshape(rows.shape)
        encode(layer, Codebook(from_rows(codes, weight.shape, axis), levels[:, None], axis))
    return model
