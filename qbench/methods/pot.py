"""Powers of two."""

from typing import Annotated, Literal

from pydantic import Field
from torch import nn

from qbench.data import Data
from qbench.quant.layers import encode, output_axis, select_layers, weight_of
from qbench.quant.levels import mirrored, nearest_scaled, pot_levels
from qbench.registry import method


@method("pot", paper="arXiv:1702.03044", in_the_manner_of=True)
def pot(
    model: nn.Module,
    data: Data,
    *,
    bits: Annotated[int, Field(ge=2, le=6)] = 4,
    granularity: Literal["tensor", "channel"] = "channel",
    layer_bits: dict[str, Annotated[int, Field(ge=2, le=6)] | Literal[32]] | None = None,
    edge_bits: Annotated[int, Field(ge=2, le=6)] | Literal[32] | None = None,
    skip: tuple[str, ...] = (),
) -> nn.Module:
    """Round every weight to a signed power of two (or 0) times a scale.

    A weight is 0 or a scale times +-2**-k, k = 0 .. 2**(bits-1) - 2: a product is a shift. 2**bits - 1 levels.
    The scale is searched for the least squared error.

    Args:
        model: changed in place.
        data: not used.
        bits: width of the codes, sign included.
        granularity: what shares a scale.
        layer_bits: bits of the layers whose name equals or begins with a key; 32 leaves them in float.
        edge_bits: bits of the first and the last layer; 32 leaves them in float.
        skip: names, or first parts of names, of layers left in float.
    """
    for _, layer, width in select_layers(model, bits, edge_bits, skip, layer_bits):
        levels = mirrored(pot_levels(width - 1))
        encode(layer, nearest_scaled(weight_of(layer), levels, granularity, output_axis(layer)))
    return model
