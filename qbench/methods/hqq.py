"""HQQ: half-quadratic quantization."""

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from qbench.data import Data
from qbench.quant.encodings import Affine, to_rows
from qbench.quant.layers import encode, output_axis, select_layers, weight_of
from qbench.registry import EdgeBits, LayerBits, method

_BETA, _KAPPA = 10.0, 1.01
_STEEPEST = 2e4  # codes for a unit of the weight, at most: groups of one value stay finite


@method("hqq")
def hqq(
    model: nn.Module,
    data: Data,
    *,
    bits: Annotated[int, Field(ge=2, le=16)] = 4,
    group_size: Annotated[int, Field(ge=1)] = 64,
    p: Annotated[float, Field(gt=0, le=1)] = 0.7,
    iterations: Annotated[int, Field(ge=0)] = 20,
    layer_bits: LayerBits = None,
    edge_bits: EdgeBits = None,
    skip: tuple[str, ...] = (),
) -> nn.Module:
    """Round to a min-max grid in groups, with the zero points that make the error sparse; without any data.

    Zero points are float32 numbers, one a group, as are the scales: the size counts both. Source: Badri and Shaji,
    "Half-Quadratic Quantization of Large Machine Learning Models" (2023).

    Args:
        model: changed in place.
        data: not used.
        bits: width of the codes.
        group_size: columns in a group.
        p: of the norm that makes errors sparse.
        iterations: at most; a layer stops when its mean absolute error no longer falls, and keeps the best.
        layer_bits: bits of the layers whose name equals or begins with a key; 32 leaves them in float.
        edge_bits: bits of the first and the last layer; 32 leaves them in float.
        skip: names, or first parts of names, of layers left in float.
    """
    for _, layer, width in select_layers(model, bits, edge_bits, skip, layer_bits):
        weight, axis = weight_of(layer), output_axis(layer)
        size = min(group_size, to_rows(weight, axis).shape[1])
        scale, zero = half_quadratic(to_rows(weight, axis), width, size, p=p, iterations=iterations)
        top = 2**width - 1
        encode(layer, Affine.nearest(weight, scale, low=0, high=top, zero_point=zero, axis=axis, group_size=size))
    return model


def half_quadratic(
    rows: Tensor, bits: int, group_size: int, *, p: float = 0.7, iterations: int = 20
) -> tuple[Tensor, Tensor]:
    """Scale and zero point, (N, G) each, of every group of columns.

    The zero point z and a sparse error e are found in turns: e is the generalized soft threshold of the rounding error
    w - w^, and z the mean of `code - (w - e) / scale`. What is kept is the iteration with the least mean absolute
    error over all groups.

    Args:
        rows: (N, d).
        bits: width of the codes.
        group_size: columns in a group; the last group may be ragged.
        p: of the norm of e, in (0, 1].
        iterations: at most.
    """
    n, d = rows.shape
    groups = -(-d // group_size)
    # Repeating a value changes no range; in means, what is beyond the row has no weight.
    beyond = rows[:, -1:].expand(-1, groups * group_size - d)
    points = torch.cat([rows, beyond], 1).reshape(n, groups, group_size)
    share = (torch.arange(groups * group_size, device=rows.device) < d).to(rows).reshape(1, groups, group_size)
    share /= share.sum(2, keepdim=True)
    low, high = points.amin(2, keepdim=True), points.amax(2, keepdim=True)
    top = 2**bits - 1
    steepness = (top / (high - low)).clamp(max=_STEEPEST)
    zero = -low * steepness
    best, least, beta = zero, float("inf"), _BETA
    for _ in range(iterations):
        codes = (points * steepness + zero).round_().clamp_(0, top)
        error = points - (codes - zero) / steepness
        size = error.abs()
        mean = float((size * share).sum(2).mean())
        if not mean < least:
            break
        best, least = zero, mean
        sparse = error.sign() * (size - size.pow(p - 1) / beta).relu_()
        zero = ((codes - (points - sparse) * steepness) * share).sum(2, keepdim=True)
        beta *= _KAPPA
    return 1 / steepness[..., 0], best[..., 0]
