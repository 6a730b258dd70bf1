"""NormalFloat in 4 bits."""

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from qbench.data import Data
from qbench.errors import Unsupported
from qbench.quant.encodings import Affine, Codebook, Scaled
from qbench.quant.layers import encode, output_axis, select_layers, weight_of
from qbench.quant.levels import nf4_levels
from qbench.quant.minifloat import blocked
from qbench.registry import method

_SCALES = 256  # that share a range


@method("nf4", paper="arXiv:2305.14314")
def nf4(
    model: nn.Module,
    data: Data,
    *,
    block_size: Annotated[int, Field(ge=1)] = 64,
    double_quantization: bool = True,
    edge_bits: Literal[4, 32] | None = None,
    skip: tuple[str, ...] = (),
) -> nn.Module:
    """Round every weight to one of 16 quantiles of a normal distribution, times the largest magnitude of its block.

    Blocks are consecutive inputs of one output channel (bitsandbytes runs on into the next channel); the last one of a
    channel may be shorter. Each weight's code is chosen for the scale as it is stored.

    Args:
        model: changed in place.
        data: not used.
        block_size: weights that share a scale.
        double_quantization: store scales in 8 bits, 256 of them sharing a float32 range, in place of float32.
        edge_bits: 32 leaves the first and the last layer in float.
        skip: names, or first parts of names, of layers left in float.

    Raises:
        Unsupported: `head_bits` sets another width.
    """
    for name, layer, width in select_layers(model, 4, edge_bits, skip):
        if width != 4:
            raise Unsupported(f"{name} is to have {width} bits, and nf4 has 4")
        weight, axis = weight_of(layer), output_axis(layer)
        levels = nf4_levels().to(weight.device)
        scale = blocked(weight, block_size, axis).abs().amax(2)
        stored = _eight_bits(scale) if double_quantization else None
        final = scale if stored is None else stored.decode().reshape(scale.shape)
        code = Codebook.nearest(weight, levels, scale=final, axis=axis, group_size=block_size)
        if stored is None:
            encode(layer, code)
        else:
            unscaled = Codebook(code.codes, code.levels, axis)
            encode(layer, Scaled(unscaled, stored, (scale.shape[0], scale.shape[1]), axis, block_size))
    return model


def _eight_bits(scale: Tensor) -> Affine:
    """All scales as one row of 8-bit codes, from the least to the greatest of each 256."""
    flat = scale.reshape(1, -1)
    short = -flat.shape[1] % _SCALES
    parts = torch.cat([flat, flat[:, -1:].expand(-1, short)], dim=1).reshape(-1, _SCALES)
    low, high = parts.amin(1), parts.amax(1)
    # Where all are equal, code 0 of a step of that size stands for it.
    step = torch.where(high > low, (high - low) / 255, high)
    step = torch.where(step > 0, step, 1)[None]
    return Affine.nearest(flat, step, bits=8, zero_point=-low / step, group_size=_SCALES)
