"""Block floating point: MX formats and NVFP4."""

from typing import Literal

from torch import nn

from qbench.data import Data
from qbench.quant.layers import encode, output_axis, select_layers, weight_of
from qbench.quant.minifloat import FORMATS, USUAL, FormatName, microscaled, nvfp4
from qbench.registry import method

BlockFormat = Literal["mxfp8_e4m3", "mxfp8_e5m2", "mxfp6_e3m2", "mxfp6_e2m3", "mxfp4_e2m1", "nvfp4"]

_ELEMENTS: dict[BlockFormat, FormatName] = {
    "mxfp8_e4m3": "fp8_e4m3",
    "mxfp8_e5m2": "fp8_e5m2",
    "mxfp6_e3m2": "fp6_e3m2",
    "mxfp6_e2m3": "fp6_e2m3",
    "mxfp4_e2m1": "fp4_e2m1",
    "nvfp4": "fp4_e2m1",
}


@method("mx", paper="arXiv:2310.10537")
def mx(
    model: nn.Module,
    data: Data,
    *,
    format: BlockFormat = "mxfp4_e2m1",
    edge_bits: Literal[4, 6, 8, 32] | None = None,
    skip: tuple[str, ...] = (),
) -> nn.Module:
    """Round every weight to a small float with a scale for each block of consecutive inputs.

    MX formats share a power of two, stored in 8 bits, among 32 weights of an output channel; NVFP4 an 8-bit float among
    16, with one float32 scale a layer. The last block of a channel may be shorter, and costs as many bits of scale.

    Args:
        model: changed in place.
        data: not used.
        format: of elements and blocks.
        edge_bits: bits of the first and the last layer (8: mxfp8_e4m3, 6: mxfp6_e2m3, 4: mxfp4_e2m1); 32 leaves them
            in float.
        skip: names, or first parts of names, of layers left in float.
    """
    usual = FORMATS[_ELEMENTS[format]]
    for _, layer, width in select_layers(model, usual.bits, edge_bits, skip):
        weight, axis = weight_of(layer), output_axis(layer)
        form = usual if width == usual.bits else FORMATS[USUAL[width]]
        blocks = nvfp4(weight, axis) if format == "nvfp4" and form is usual else microscaled(weight, form, axis)
        encode(layer, blocks)
    return model
