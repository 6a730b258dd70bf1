"""Weights and inputs on given levels, whose common scale is learned (APoT, arXiv:1909.13144)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from qbench.quant.encodings import Codebook
from qbench.quant.fakequant import FirstBatchInput
from qbench.quant.level_quantizer import LevelQuantizer, nearest_level
from qbench.quant.levels import apot_levels, levels_scale, mirrored
from qbench.quant.straight_through import slower, straight_through

_CLIP = 3.0
_SAMPLE = 1 << 14  # numbers of an input that its first scale is fitted to


def projected(x: Tensor, scale: Tensor, levels: Tensor, *, clips: bool = True) -> Tensor:
    """The nearest level times the scale, which gets `level - x / scale`, and outside the first or last level.

    Args:
        x: any shape.
        scale: ().
        levels: (K,) ascending.
        clips: gradients pass between the first and the last level only; else everywhere.
    """
    shares = x.detach() / scale
    within = shares.clamp(levels[0], levels[-1])
    value = straight_through(within, nearest_level(shares.detach(), levels)) * scale
    return straight_through(x, value, (within == shares).detach() if clips else None)


class LevelsWeight(nn.Module):
    """Additive powers of two for the weight less its mean, divided by its deviation and times its first deviation.

    Two bits pass gradients beyond the levels as well. As LSQ does it, the gradient of the scale is divided by the root
    of how many it is summed from.
    """

    levels: Tensor
    unit: Tensor

    def __init__(self, weight: Tensor, bits: int, axis: int = 0) -> None:
        """
        Args:
            weight: the scale begins with 3 deviations of it.
            bits: width of the codes, sign included, 2 to 7.
            axis: output-channel axis of the weight.
        """
        super().__init__()
        self.axis, self.clips = axis, bits > 2
        self.register_buffer("levels", mirrored(apot_levels(bits - 1)).to(weight.device))
        self.register_buffer("unit", _deviation(weight))
        self.scale = nn.Parameter(_CLIP * self.unit)
        self.gain = 1 / math.sqrt(weight.numel())

    def forward(self, weight: Tensor) -> Tensor:
        free = weight.detach()
        normalised = (weight - free.mean()) * (self.unit / _deviation(free))
        return projected(normalised, slower(self.scale, self.gain), self.levels, clips=self.clips)

    def encoding(self, quantized: Tensor) -> Codebook:
        return Codebook.nearest(quantized, self.levels, scale=self.scale.item(), axis=self.axis)


def _deviation(weight: Tensor) -> Tensor:
    deviation = weight.detach().std(correction=0)
    return torch.where(deviation > 0, deviation, 1.0)


class LevelsInput(FirstBatchInput):
    """Additive powers of two for a layer's input; their scale begins with the least squared error."""

    levels: Tensor

    def __init__(self, bits: int) -> None:
        """
        Args:
            bits: width of the codes, sign included, 2 to 6.
        """
        super().__init__(bits)
        self.register_buffer("levels", apot_levels(bits))
        self.scale = nn.Parameter(torch.ones(()))

    def begin(self, x: Tensor) -> None:
        if self.signed:
            self.levels = mirrored(apot_levels(self.bits - 1)).to(self.levels)
        every = -(-x.numel() // _SAMPLE)
        self.scale.copy_(levels_scale(x.float().flatten()[None, ::every], self.levels)[0])
        self.gain = 1 / math.sqrt(x[0].numel())

    def quantized(self, x: Tensor) -> Tensor:
        return projected(x, slower(self.scale, self.gain), self.levels)

    def deployed(self) -> LevelQuantizer:
        return LevelQuantizer(self.bits, len(self.levels), self.levels, self.scale.item())
