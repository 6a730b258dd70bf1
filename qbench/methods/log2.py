"""Logarithms of the weights, rounded."""

from typing import Annotated, Literal

from pydantic import Field
from torch import nn

from qbench.data import Data
from qbench.quant.layers import encode, output_axis, select_layers, weight_of
from qbench.quant.levels import nearest_logarithm
from qbench.registry import method


@method("log2", paper="arXiv:1603.01025")
def log2(
    model: nn.Module,
    data: Data,
    *,
    bits: Annotated[int, Field(ge=2, le=6)] = 4,
    granularity: Literal["tensor", "channel"] = "tensor",
    layer_bits: dict[str, Annotated[int, Field(ge=2, le=6)] | Literal[32]] | None = None,
    edge_bits: Annotated[int, Field(ge=2, le=6)] | Literal[32] | None = None,
    skip: tuple[str, ...] = (),
) -> nn.Module:
    """Round the logarithm of every weight's magnitude to an integer (LogQuant).

    A weight becomes a signed power of two, or 0 where it is too small. It differs from `pot` in that the scale is a
    power of two itself, and in that weights between two powers go to the nearer one in the logarithm.

    Args:
        model: changed in place.
        data: not used.
        bits: width of the codes, sign included.
        granularity: what shares a largest power.
        layer_bits: bits of the layers whose name equals or begins with a key; 32 leaves them in float.
        edge_bits: bits of the first and the last layer; 32 leaves them in float.
        skip: names, or first parts of names, of layers left in float.
    """
    for _, layer, width in select_layers(model, bits, edge_bits, skip, layer_bits):
        encode(layer, nearest_logarithm(weight_of(layer), width, granularity, output_axis(layer)))
    return model
