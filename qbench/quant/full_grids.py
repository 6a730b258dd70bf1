"""The uniform grids of the second-order methods: all 2**bits codes, also where symmetric; min-max or least error."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from qbench.quant.encodings import Affine

Calibration = Literal["minmax", "mse24"]

_POWER = 2.4
_SHRINK = [1 - i / 100 for i in range(80)]


@dataclass(frozen=True)
class Grid:
    """`(code - zero) * scale`, codes 0 to 2**bits - 1; scale and zero have one entry per row of points, (..., n, 1)."""

    scale: Tensor
    zero: Tensor
    bits: int

    def codes(self, points: Tensor) -> Tensor:
        """The nearest code of each point, as floats of the points' shape."""
        return ((points / self.scale).round_() + self.zero).clamp_(0, 2**self.bits - 1)

    def decode(self, codes: Tensor) -> Tensor:
        """The values of codes."""
        return (codes - self.zero) * self.scale


@dataclass(frozen=True)
class Grids:
    """How the grid of a row, or of a group of a row, is found.

    Attributes:
        bits: width of the codes.
        symmetric: the zero is the code 2**(bits - 1), so that the grid has one step more below 0 than above it; largest
            weights above 0 then are half a step beyond it.
        calibration: the range ends at the extremes, or, `mse24`, at the one of 80 fractions of them that has the least
            sum of errors to the power of 2.4.
    """

    bits: int
    symmetric: bool
    calibration: Calibration

    def fit(self, points: Tensor) -> Grid:
        """The grid of each row of points (..., n, size); its range includes 0, and a row of zeros gets the scale 1.

        Source: the authors' code of OBC and GPTQ, but that a symmetric grid of a row without negative weights reaches
        as far above 0 as any.
        """
        low, high = points.amin(-1, keepdim=True).clamp(max=0), points.amax(-1, keepdim=True).clamp(min=0)
        if self.symmetric:
            high = torch.maximum(-low, high)
            low = -high
        best = self._over(low, high)
        if self.calibration == "minmax":
            return best
        least = torch.full_like(low, torch.inf)
        for share in _SHRINK:
            tried = self._over(low * share, high * share)
            error = (tried.decode(tried.codes(points)) - points).abs_().pow_(_POWER).sum(-1, keepdim=True)
            better = error < least
            least = torch.where(better, error, least)
            scale = torch.where(better, tried.scale, best.scale)
            best = Grid(scale, torch.where(better, tried.zero, best.zero), self.bits)
        return best

    def _over(self, low: Tensor, high: Tensor) -> Grid:
        scale = (high - low) / (2**self.bits - 1)
        # Below this the reciprocal overflows: such rows are dead.
        scale = torch.where(scale > 1e-30, scale, torch.ones_like(scale))
        zero = torch.full_like(scale, 2 ** (self.bits - 1)) if self.symmetric else (-low / scale).round()
        return Grid(scale, zero, self.bits)


@dataclass(frozen=True)
class Rounded:
    """What a layer's weight was rounded to.

    Attributes:
        codes: (groups, n, d) integers, as floats.
        scale: (groups, n, G), of each group of columns.
        zero: (groups, n, G).
        grids: of which they are.
        group_size: columns that share a scale; None for all.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor
    grids: Grids
    group_size: int | None = None

    def encoding(self, shape: torch.Size) -> Affine:
        """As the encoding of a weight of that shape."""
        codes, bits = self.codes.reshape(shape).to(torch.int32), self.grids.bits
        scale, zero = (value.flatten(0, 1).float() for value in (self.scale, self.zero))
        if not self.grids.symmetric:
            return Affine(codes, scale, 0, 2**bits - 1, zero, group_size=self.group_size)
        middle = 2 ** (bits - 1)
        return Affine(codes - middle, scale, -middle, middle - 1, group_size=self.group_size)
