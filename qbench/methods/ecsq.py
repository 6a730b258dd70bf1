"""Entropy-constrained scalar quantization."""

from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from qbench.data import Data
from qbench.quant import entropy_constrained
from qbench.quant.coding.entropy import entropy_bits
from qbench.quant.encodings import Codebook
from qbench.quant.layers import encode, output_axis, select_layers, weight_of
from qbench.quant.pruning import with_zero, zeros_of
from qbench.registry import method

Width = Annotated[int, Field(ge=1, le=8)]


@method("ecsq", paper="arXiv:2108.12704")
def ecsq(
    model: nn.Module,
    data: Data,
    *,
    bits: Width = 4,
    layer_bits: dict[str, Width | Literal[32]] | None = None,
    edge_bits: Width | Literal[32] | None = None,
    skip: tuple[str, ...] = (),
) -> nn.Module:
    """Cluster each layer's weights so that squared error and the entropy of the codes together are least.

    A weight takes the level l with the least (w - level)**2 - t log2 p, where p is the share of weights that l has: its
    bits when `compress` follows. The tradeoff t is the smallest that leaves at most 2**bits levels.

    Args:
        model: changed in place.
        data: takes the levels, the entropy (bits a weight) and the tradeoff of each layer, as `ecsq`.
        bits: width of the codes when they are not compressed.
        layer_bits: bits of the layers whose name equals or begins with a key; 32 leaves them in float.
        edge_bits: bits of the first and the last layer; 32 leaves them in float.
        skip: names, or first parts of names, of layers left in float.
    """
    found: dict[str, Any] = {}
    for name, layer, width in select_layers(model, bits, edge_bits, skip, layer_bits):
        weight = weight_of(layer)
        points = weight.cpu().double().numpy()
        partition = entropy_constrained.fit(points.ravel(), 2**width)
        codes = torch.from_numpy(partition.assign(points).astype(np.int32))
        levels = torch.from_numpy(partition.levels).float()
        zeros = zeros_of(layer)
        if zeros is not None:
            levels = with_zero(levels)
            codes[zeros.cpu()] = int(levels.abs().argmin())
        encode(layer, _codebook(codes, levels, weight, output_axis(layer)))
        entropy = entropy_bits(np.bincount(codes.flatten().numpy())) / codes.numel()
        found[name] = {"levels": len(levels), "entropy": entropy, "tradeoff": partition.tradeoff}
    data.record("ecsq", found)
    return model


def _codebook(codes: Tensor, levels: Tensor, like: Tensor, axis: int) -> Codebook:
    return Codebook(codes.to(like.device), levels.to(like.device)[None, None], axis)
