"""Rounding that is learned: each weight goes up or down, decided by a continuous variable (AdaRound)."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

from qbench.quant.encodings import Affine, expand_groups, from_rows, to_rows
from qbench.quant.observers import search_weight

_STRETCH, _MARGIN = 1.2, 0.1  # a sigmoid stretched to [-0.1, 1.1], so that 0 and 1 are reached
_DECIDED = 20.0


def fitted_grid(
    weight: Tensor,
    bits: int,
    *,
    symmetric: bool,
    granularity: Literal["tensor", "channel"] = "channel",
    axis: int = 0,
) -> Affine:
    """The nearest codes on the grid with the least error sum |w - q|^2.4, as AdaRound and BRECQ choose it.

    Args:
        weight: any shape.
        bits: width of the codes.
        symmetric: narrow codes about 0; otherwise [0, 2**bits - 1] and a zero point.
        granularity: one scale per tensor or per output channel.
        axis: of the output channels.
    """
    scale, zero = search_weight(
        weight, bits=bits, granularity=granularity, symmetric=symmetric, calibration="mse24", axis=axis
    )
    return Affine.nearest(weight, scale, bits=bits, zero_point=zero, axis=axis)


class SoftRounding(nn.Module):
    """A parametrization of a weight: `scale * (clip(floor(w / scale) + zero + h(alpha), low, high) - zero)`.

    `h = clip(1.2 sigmoid(alpha) - 0.1, 0, 1)` starts as the fraction that rounding cuts off, so the weight starts as it
    is (clipped to the grid). In the end it rounds up where alpha >= 0. Source: arXiv:2004.10568.
    """

    floor: Tensor
    zero: Tensor
    scale: Tensor

    def __init__(self, weight: Tensor, grid: Affine) -> None:
        """
        Args:
            weight: what is to be rounded.
            grid: an encoding of it, whose scales and zero points are kept.
        """
        super().__init__()
        self.grid = grid
        rows = to_rows(weight.detach().float(), grid.axis)
        scale = expand_groups(grid.scale, rows.shape[1], grid.group_size)
        zero = torch.zeros_like(grid.scale) if grid.zero_point is None else grid.zero_point
        zero = expand_groups(zero, rows.shape[1], grid.group_size)
        floor = (rows / scale).floor()
        fraction = rows / scale - floor
        self.register_buffer("scale", scale)
        self.register_buffer("zero", zero)
        self.register_buffer("floor", floor + zero)
        self.alpha = nn.Parameter(-torch.log(_STRETCH / (fraction + _MARGIN) - 1))

    def share(self) -> Tensor:
        """h, (N, d): how far each weight is rounded up, in [0, 1]."""
        return (torch.sigmoid(self.alpha) * _STRETCH - _MARGIN).clamp(0, 1)

    def rows(self) -> Tensor:
        """The weight, softly rounded, as (N, d)."""
        return ((self.floor + self.share()).clamp(self.grid.low, self.grid.high) - self.zero) * self.scale

    def forward(self, weight: Tensor) -> Tensor:
        return from_rows(self.rows(), weight.shape, self.grid.axis).to(weight.dtype)

    def penalty(self, beta: float) -> Tensor:
        """`sum(1 - |2h - 1|^beta)`: 0 where everything is decided; a smaller beta presses also in the middle."""
        return (1 - (2 * self.share() - 1).abs().pow(beta)).sum()

    def decide(self) -> None:
        """Round for good, up where alpha >= 0; nothing is learned any more."""
        with torch.no_grad():
            self.alpha.copy_(torch.where(self.alpha >= 0, _DECIDED, -_DECIDED))

    def encoding(self, quantized: Tensor) -> Affine:
        """The decided codes, for a weight of the shape of `quantized`."""
        grid = self.grid
        codes = (self.floor + (self.alpha.detach() >= 0)).clamp(grid.low, grid.high).to(torch.int32)
        shaped = from_rows(codes, quantized.shape, grid.axis)
        return Affine(shaped, grid.scale, grid.low, grid.high, grid.zero_point, grid.axis, grid.group_size)


def temperature(step: int, steps: int, *, warmup: float = 0.2, start: float = 20, end: float = 2) -> float | None:
    """beta of the penalty: None in the warm-up, when there is no penalty, then falling linearly to `end`."""
    first = math.ceil(warmup * steps)
    if step < first:
        return None
    return end + (start - end) * (1 - (step - first) / max(1, steps - first))
