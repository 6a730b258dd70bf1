"""Whether a runtime's integer kernels lose large sums: CPUs without VNNI add two products of 8 bits in 16 bits."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from qbench.quant.activations import StaticQuantizer, quantize_input
from qbench.quant.encodings import Affine
from qbench.quant.layers import encode
from qbench.runtimes.base import Runtime

_CHANNELS = 64
_LOST = 0.01  # of the sum: far more than rounding, far less than what saturation takes


def saturates(engine: Runtime, threads: int) -> bool:
    """Run a convolution of the largest codes, whose exact result is known.

    Args:
        engine: that has integer kernels.
        threads: that it may use.

    Raises:
        Unsupported: the runtime runs no layer on integers.
    """
    layer = nn.Conv2d(_CHANNELS, _CHANNELS, 3, bias=False).eval()
    encode(layer, Affine(torch.full(layer.weight.shape, 127), torch.full((_CHANNELS, 1), 1 / 127), -127, 127))
    quantize_input(layer, StaticQuantizer(8, False, 1 / 255))
    image = torch.ones(1, _CHANNELS, 8, 8)
    (found,) = engine.compile(nn.Sequential(layer).eval(), image, threads=threads).run(image.numpy())
    exact = _CHANNELS * layer.weight[0, 0].numel()
    return bool(np.abs(found - exact).max() > _LOST * exact)
