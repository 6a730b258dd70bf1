"""GPTQ: rounding column by column, with the inverse Hessian."""

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from qbench.data import Data
from qbench.quant.encodings import Encoding
from qbench.quant.full_grids import Calibration, Grids
from qbench.quant.hessian import round_layers
from qbench.quant.second_order import compensate
from qbench.registry import EdgeBits, LayerBits, method


@method("gptq", paper="arXiv:2210.17323")
def gptq(
    model: nn.Module,
    data: Data,
    *,
    bits: Annotated[int, Field(ge=2, le=16)] = 4,
    granularity: Literal["channel", "group"] = "channel",
    group_size: Annotated[int, Field(ge=1)] = 128,
    symmetric: bool = True,
    calibration: Calibration = "minmax",
    act_order: bool = False,
    damp: Annotated[float, Field(ge=0)] = 0.01,
    images: Annotated[int, Field(ge=1)] | None = None,
    oversample: Annotated[int, Field(ge=1)] | None = 32,
    layer_bits: LayerBits = None,
    edge_bits: EdgeBits = None,
    skip: tuple[str, ...] = (),
) -> nn.Module:
    """Round the weights of a layer one input after the other, each time moving the rest to make up for the error.

    The Hessian is that of the layer's squared error, for its inputs in the network quantized so far. The weights of
    inputs that are 0 for all calibration images become 0.

    Args:
        model: changed in place.
        data: its calibration images, and its float network.
        bits: width of the codes; symmetric grids have 2**bits levels, too: one more below 0 than above it.
        granularity: what shares a scale: an output channel, or a group of its columns. A group's scale is found when
            its first column is reached, from the weights as they have been moved by then.
        group_size: columns in a group.
        symmetric: without zero points.
        calibration: how far the grid reaches: to the extremes, or to the least error to the power of 2.4.
        act_order: take the inputs by decreasing energy instead of in their order; the scales of groups are then all
            found beforehand.
        damp: part of the mean of the Hessian's diagonal that is added to it.
        images: use the first so many calibration images; default all.
        oversample: use about so many input patches for each weight of a neuron (and at least 16384 in all), spread
            evenly over the images; null uses every patch.
        layer_bits: bits of the layers whose name equals or begins with a key; 32 leaves them in float.
        edge_bits: bits of the first and the last layer; 32 leaves them in float.
        skip: names, or first parts of names, of layers left in float.

    Raises:
        Unsupported: a layer whose output is not its weight times its input patches, such as transposed convolutions.
        UserError: the inputs of a layer are linearly dependent, and `damp` is too small to mend that.
    """
    size = group_size if granularity == "group" else None

    def rounding(weight: Tensor, H: Tensor, width: int, shape: torch.Size) -> Encoding:
        grids = Grids(width, symmetric, calibration)
        return compensate(weight, H, grids, group_size=size, act_order=act_order, damp=damp).encoding(shape)

    return round_layers(
        model,
        data,
        rounding,
        bits=bits,
        images=images,
        oversample=oversample,
        layer_bits=layer_bits,
        edge_bits=edge_bits,
        skip=skip,
    )
