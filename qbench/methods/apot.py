"""Additive powers of two."""

from typing import Annotated, Literal

from pydantic import Field
from torch import nn

from qbench.data import Data
from qbench.errors import Unsupported
from qbench.quant.layers import encode, output_axis, select_layers, weight_of
from qbench.quant.levels import apot_levels, mirrored, nearest_scaled
from qbench.registry import method


@method("apot", paper="arXiv:1909.13144", in_the_manner_of=True)
def apot(
    model: nn.Module,
    data: Data,
    *,
    bits: Annotated[int, Field(ge=2, le=7)] = 4,
    granularity: Literal["tensor", "channel"] = "channel",
    layer_bits: dict[str, Annotated[int, Field(ge=2, le=7)] | Literal[32]] | None = None,
    edge_bits: Annotated[int, Field(ge=2, le=7)] | Literal[32] | None = None,
    skip: tuple[str, ...] = (),
) -> nn.Module:
    """Round every weight to a sum of a few powers of two times a scale (APoT).

    After training (the paper trains the scale and the weights). 2**bits - 1 levels; two bits are ternary.
    The scale is searched for the least squared error.

    Args:
        model: changed in place.
        data: not used.
        bits: width of the codes, sign included.
        granularity: what shares a scale.
        layer_bits: bits of the layers whose name equals or begins with a key; 32 leaves them in float.
        edge_bits: bits of the first and the last layer; 32 leaves them in float.
        skip: names, or first parts of names, of layers left in float.

    Raises:
        Unsupported: `head_bits` sets more than 7 bits.
    """
    for name, layer, width in select_layers(model, bits, edge_bits, skip, layer_bits):
        if width > 7:
            raise Unsupported(f"{name} is to have {width} bits, and apot has 7 at most")
        levels = mirrored(apot_levels(width - 1))
        encode(layer, nearest_scaled(weight_of(layer), levels, granularity, output_axis(layer)))
    return model
