"""Which weights were pruned, and levels that keep them zero.

The places are kept with the layer. `qbench.quant.layers.encode` refuses an encoding that gives such a weight another
value, so that a later step either keeps the zeros or says that it cannot.
"""

from __future__ import annotations

from torch import Tensor, nn

_ATTRIBUTE = "qbench_zeros"


def set_zeros(layer: nn.Module, zeros: Tensor) -> None:
    """Remember the pruned weights: a boolean tensor of the weight's shape."""
    layer.__dict__[_ATTRIBUTE] = zeros


def zeros_of(layer: nn.Module) -> Tensor | None:
    """The pruned weights, as a boolean tensor of the weight's shape; None where nothing was pruned."""
    zeros: Tensor | None = layer.__dict__.get(_ATTRIBUTE)
    return zeros


def with_zero(levels: Tensor) -> Tensor:
    """Levels (..., K) of which the one nearest to zero is moved there."""
    return levels.scatter(-1, levels.abs().argmin(-1, keepdim=True), 0.0)
