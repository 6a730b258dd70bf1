"""Levels that are optimal for a distribution."""

from typing import Annotated, Literal

from pydantic import Field
from torch import nn

from qbench.data import Data
from qbench.quant.encodings import to_rows
from qbench.quant.layers import encode, output_axis, select_layers, weight_of
from qbench.quant.levels import empirical_levels, gaussian_levels, nearest_scaled
from qbench.registry import method

Width = Annotated[int, Field(ge=1, le=8)]


@method("lloyd_max", paper="doi:10.1109/TIT.1982.1056489")
def lloyd_max(
    model: nn.Module,
    data: Data,
    *,
    bits: Width = 4,
    distribution: Literal["gauss", "empirical"] = "gauss",
    granularity: Literal["tensor", "channel"] = "channel",
    layer_bits: dict[str, Width | Literal[32]] | None = None,
    edge_bits: Width | Literal[32] | None = None,
    skip: tuple[str, ...] = (),
) -> nn.Module:
    """Round every weight to the nearest of levels that are optimal for the weights' distribution, times a scale.

    Levels are shared by the channels of a layer; the scales are searched for the least squared error.

    Args:
        model: changed in place.
        data: not used.
        bits: width of the codes.
        distribution: `gauss` has the levels of a normal distribution; `empirical` those of the layer's own weights,
            each channel (or the tensor) divided by its root mean square.
        granularity: what shares a scale.
        layer_bits: bits of the layers whose name equals or begins with a key; 32 leaves them in float.
        edge_bits: bits of the first and the last layer; 32 leaves them in float.
        skip: names, or first parts of names, of layers left in float.
    """
    for _, layer, width in select_layers(model, bits, edge_bits, skip, layer_bits):
        weight, axis = weight_of(layer), output_axis(layer)
        rows = to_rows(weight, axis)
        own = rows.reshape(1, -1) if granularity == "tensor" else rows
        levels = gaussian_levels(width) if distribution == "gauss" else empirical_levels(own, width)
        encode(layer, nearest_scaled(weight, levels, granularity, axis))
    return model
