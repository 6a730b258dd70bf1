"""Round to nearest on a uniform grid."""

from typing import Annotated, Literal

from pydantic import Field
from torch import nn

from qbench.data import Data
from qbench.quant.encodings import Affine
from qbench.quant.layers import encode, output_axis, select_layers, weight_of
from qbench.quant.observers import WeightCalibration, search_weight
from qbench.registry import EdgeBits, LayerBits, method


@method("rtn")
def rtn(
    model: nn.Module,
    data: Data,
    *,
    bits: Annotated[int, Field(ge=2, le=16)] = 8,
    granularity: Literal["tensor", "channel", "group"] = "channel",
    group_size: Annotated[int, Field(ge=1)] = 128,
    symmetric: bool = True,
    calibration: WeightCalibration = "minmax",
    percentile: Annotated[float, Field(gt=50, le=100)] = 99.99,
    power_of_two: bool = False,
    layer_bits: LayerBits = None,
    edge_bits: EdgeBits = None,
    skip: tuple[str, ...] = (),
) -> nn.Module:
    """Round every weight to the nearest point of a uniform grid.

    Args:
        model: changed in place.
        data: not used.
        bits: width of the codes.
        granularity: what shares a scale: a tensor, an output channel, or a group of its columns.
        group_size: columns in a group.
        symmetric: codes from -(2**(bits-1) - 1) to 2**(bits-1) - 1 about 0; otherwise 0 to 2**bits - 1, zero point.
        calibration: how far the grid reaches: to the extremes, to a percentile, to the least squared error or error to
            the power of 2.4, or to where a Laplace or Gauss distribution is best clipped (ACIQ).
        percentile: of the weights that share a scale, in percent.
        power_of_two: every scale is the power of two, near the calibrated one, with the least squared error.
        layer_bits: bits of the layers whose name equals or begins with a key; 32 leaves them in float.
        edge_bits: bits of the first and the last layer; 32 leaves them in float.
        skip: names, or first parts of names, of layers left in float.
    """
    for _, layer, width in select_layers(model, bits, edge_bits, skip, layer_bits):
        weight, axis = weight_of(layer), output_axis(layer)
        scale, zero = search_weight(
            weight,
            bits=width,
            granularity=granularity,
            group_size=group_size,
            symmetric=symmetric,
            calibration=calibration,
            percentile=percentile,
            power_of_two=power_of_two,
            axis=axis,
        )
        grouped = group_size if granularity == "group" else None
        encode(layer, Affine.nearest(weight, scale, bits=width, zero_point=zero, axis=axis, group_size=grouped))
    return model
