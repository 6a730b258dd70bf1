"""OBQ: rounding in the order of least harm, with the inverse Hessian."""

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from qbench.data import Data
from qbench.errors import Unsupported
from qbench.quant.brain_surgeon import surgeon
from qbench.quant.encodings import Encoding
from qbench.quant.full_grids import Calibration, Grids
from qbench.quant.hessian import round_layers
from qbench.registry import EdgeBits, LayerBits, method

_WIDEST = 1536


@method("obq", paper="arXiv:2208.11580")
def obq(
    model: nn.Module,
    data: Data,
    *,
    bits: Annotated[int, Field(ge=2, le=16)] = 4,
    symmetric: bool = True,
    calibration: Calibration = "minmax",
    damp: Annotated[float, Field(ge=0)] = 0.01,
    images: Annotated[int, Field(ge=1)] | None = None,
    oversample: Annotated[int, Field(ge=1)] | None = 32,
    layer_bits: LayerBits = None,
    edge_bits: EdgeBits = None,
    skip: tuple[str, ...] = (),
) -> nn.Module:
    """Round, in each row of a weight, the one that does least harm, move the others to make up for it, and so on.

    Like `gptq`, but every row has an order of its own, for a time that grows with the cube of a row's length; longer
    rows than 1536 are refused. One scale an output channel.

    Args:
        model: changed in place.
        data: its calibration images, and its float network.
        bits: width of the codes; symmetric grids have 2**bits levels, too: one more below 0 than above it.
        symmetric: without zero points.
        calibration: how far the grid reaches: to the extremes, or to the least error to the power of 2.4.
        damp: part of the mean of the Hessian's diagonal that is added to it.
        images: use the first so many calibration images; default all.
        oversample: use about so many input patches for each weight of a neuron (and at least 16384 in all), spread
            evenly over the images; null uses every patch.
        layer_bits: bits of the layers whose name equals or begins with a key; 32 leaves them in float.
        edge_bits: bits of the first and the last layer; 32 leaves them in float.
        skip: names, or first parts of names, of layers left in float.

    Raises:
        Unsupported: a layer whose output is not its weight times its input patches, such as transposed convolutions,
            or with more than 1536 weights for an output.
        UserError: the inputs of a layer are linearly dependent, and `damp` is too small to mend that.
    """

    def rounding(weight: Tensor, H: Tensor, width: int, shape: torch.Size) -> Encoding:
        if weight.shape[2] > _WIDEST:
            raise Unsupported(f"{weight.shape[2]} weights for an output are too many (at most {_WIDEST}); use gptq")
        return surgeon(weight, H, Grids(width, symmetric, calibration), damp=damp).encoding(shape)

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
