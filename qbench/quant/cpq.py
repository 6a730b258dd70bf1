"""Cluster-promoting quantization: weights are drawn to the grid points (arXiv:2109.02100)."""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import Tensor, nn

from qbench.quant.fakequant import LearnedInput, LearnedWeight
from qbench.quant.straight_through import straight_through

_START = 1 / 3
"""Of the width of the noise, in steps."""


def promoted(x: Tensor, scale: Tensor, sigma: Tensor, low: int, high: int, gain: float = 1.0) -> Tensor:
    """The nearest grid point g = j scale; the gradient is that of its probability P, times g: the multi-class STE.

    P is the mass of a logistic distribution around x, of width sigma, in the cell [g - scale/2, g + scale/2]. Its
    derivative by x is 0 at the grid point, and odd around it; the scale learns through P and g, sigma through P.

    Args:
        x: any shape.
        scale: step, broadcastable to x.
        sigma: broadcastable to x.
        low: smallest j.
        high: largest j.
        gain: factor of the gradients of scale and sigma.
    """
    return cast(Tensor, _ClusterPromoting.apply(x, scale, sigma, low, high, gain))


class _ClusterPromoting(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, sigma: Tensor, low: int, high: int, gain: float) -> Tensor:
        codes = (x * scale.reciprocal()).round_().clamp_(low, high)
        ctx.save_for_backward(x, codes, scale, sigma)
        ctx.gain = gain
        return codes * scale

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        x, codes, scale, sigma = ctx.saved_tensors
        above, below = (((codes + side) * scale - x) / sigma for side in (0.5, -0.5))
        density_above, density_below = (_density(u) for u in (above, below))
        # Of P by -x / sigma, by scale / sigma, and by -sigma / sigma.
        by_x = density_above - density_below
        by_scale = codes * by_x + (density_above + density_below) / 2
        by_sigma = above * density_above - below * density_below
        level = grad * (codes * scale / sigma)
        scale_grad = (grad * codes + level * by_scale).sum_to_size(scale.shape) * ctx.gain
        sigma_grad = -(level * by_sigma).sum_to_size(sigma.shape) * ctx.gain
        x_grad = -level * by_x if ctx.needs_input_grad[0] else None
        return x_grad, scale_grad, sigma_grad, None, None, None


def _density(u: Tensor) -> Tensor:
    """Of the standard logistic distribution."""
    share = torch.sigmoid(u)
    return share * (1 - share)


class CpqWeight(LearnedWeight):
    """CPQ on a weight: signed codes over the full range, a step and a width of the noise that are learned.

    A code is a factor of the gradient of the step, which therefore is divided by the largest code and by the root of
    how many numbers it is summed from.
    """

    def __init__(self, weight: Tensor, bits: int, axis: int = 0) -> None:
        """
        Args:
            weight: its first step is that of LSQ, a third of which is the first width of the noise.
            bits: width of the codes, at least 2.
            axis: output-channel axis of the weight.
        """
        super().__init__(weight, bits, "tensor", axis)
        self.log_sigma = nn.Parameter((self.scale.detach() * _START).log())
        self.gain /= math.sqrt(self.high)

    def forward(self, weight: Tensor) -> Tensor:
        return promoted(weight, self.scale, self.log_sigma.exp(), self.low, self.high, self.gain)


class CpqInput(LearnedInput):
    """CPQ on a layer's input; gradients of step and noise are divided as those of a weight's.

    To the layers before, the gradient passes as it is, inside the range: one that is odd around each level has a mean
    of 0 over a cell, and tells them next to nothing.
    """

    def __init__(self, bits: int) -> None:
        super().__init__(bits)
        self.log_sigma = nn.Parameter(torch.zeros(()))

    def begin(self, x: Tensor) -> None:
        super().begin(x)
        self.log_sigma.copy_((self.scale * _START).log())
        self.gain /= math.sqrt(max(1, self.high))

    def quantized(self, x: Tensor) -> Tensor:
        value = promoted(x.detach(), self.scale, self.log_sigma.exp(), self.low, self.high, self.gain)
        inside = (value - x).detach().abs() <= self.scale / 2
        return straight_through(x, value, inside)
