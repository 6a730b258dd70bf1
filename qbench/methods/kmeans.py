"""Codebooks by k-means."""

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import nn

from qbench.data import Data
from qbench.quant import clustering
from qbench.quant.encodings import Codebook, to_rows
from qbench.quant.layers import encode, output_axis, select_layers, weight_of
from qbench.quant.pruning import with_zero, zeros_of
from qbench.registry import method

Width = Annotated[int, Field(ge=1, le=8)]


@method("kmeans", paper="arXiv:1510.00149")
def kmeans(
    model: nn.Module,
    data: Data,
    *,
    bits: Width = 4,
    granularity: Literal["network", "layer", "channel"] = "layer",
    start: Literal["optimal", "linear", "kmeans++"] = "optimal",
    layer_bits: dict[str, Width | Literal[32]] | None = None,
    edge_bits: Width | Literal[32] | None = None,
    skip: tuple[str, ...] = (),
) -> nn.Module:
    """Cluster the weights into 2**bits levels (k-means), and store the index of each weight's level.

    Lloyd's algorithm from a start near, and for up to 4,096 weights at, the global optimum, which dynamic programming
    finds. A channel's codebook costs more than the floats it replaces where the channel has few weights (depthwise
    convolutions): the size says so. In pruned layers the level nearest to 0 is 0.

    Args:
        model: changed in place.
        data: its seed draws the start `kmeans++`.
        bits: width of the codes.
        granularity: what shares a codebook of 2**bits float32 levels.
        start: `optimal`, or `linear` as in Deep Compression, or `kmeans++`.
        layer_bits: bits of the layers whose name equals or begins with a key; 32 leaves them in float.
        edge_bits: bits of the first and the last layer; 32 leaves them in float.
        skip: names, or first parts of names, of layers left in float.
    """
    chosen = list(select_layers(model, bits, edge_bits, skip, layer_bits))
    pooled: dict[int, torch.Tensor] = {}
    if granularity == "network":
        for width in {width for _, _, width in chosen}:
            weights = torch.cat([weight_of(layer).flatten() for _, layer, w in chosen if w == width])
            pooled[width] = clustering.kmeans(weights[None], 2**width, start, data.seed)
    for _, layer, width in chosen:
        weight, axis = weight_of(layer), output_axis(layer)
        if granularity == "network":
            levels = pooled[width]
        else:
            rows = to_rows(weight, axis)
            points = rows if granularity == "channel" else rows.reshape(1, -1)
            levels = clustering.kmeans(points, 2**width, start, data.seed)
        if zeros_of(layer) is not None:
            levels = with_zero(levels)
        encode(layer, Codebook.nearest(weight, levels, axis=axis))
    return model
