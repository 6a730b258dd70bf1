"""Whether a runtime's integer kernels lose large sums: CPUs without VNNI add two products of 8 bits in 16 bits."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from qbench.quant.activations import StaticQuantizer, quantize_input
from qbench.quant.encodings import Affine
from qbench.quant.layers import encode
from qbench.runtimes.base import Runtime

_CHANNELS, _SIDE = 64, 4
_LOST = 0.01  # of the sum: far more than rounding, far less than what saturation takes


def saturates(engine: Runtime, threads: int) -> bool:
    """Run a convolution and a linear layer behind it with the largest codes, whose exact results are known.

    Both, because a runtime may have integer kernels for one of them only.

    Args:
        engine: that has integer kernels.
        threads: that it may use.

    Raises:
        Unsupported: the runtime runs neither on integers.
    """
    pixels = _CHANNELS * _SIDE**2
    layers = [_largest(nn.Conv2d(_CHANNELS, _CHANNELS, 1, bias=False), 1.0), nn.Flatten()]
    layers.append(_largest(nn.Linear(pixels, _CHANNELS, bias=False), _CHANNELS))
    image = torch.ones(1, _CHANNELS, _SIDE, _SIDE)
    (found,) = engine.compile(nn.Sequential(*layers).eval(), image, threads=threads).run(image.numpy())
    exact = _CHANNELS * pixels
    return bool(np.abs(found - exact).max() > _LOST * exact)


def _largest(layer: nn.Conv2d | nn.Linear, reach: float) -> nn.Module:
    """All weights 1, by the code 127, and inputs up to `reach`, by the code 255."""
    encode(layer, Affine(torch.full(layer.weight.shape, 127), torch.full((len(layer.weight), 1), 1 / 127), -127, 127))
    quantize_input(layer, StaticQuantizer(8, False, reach / 255))
    return layer
