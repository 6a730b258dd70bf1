"""Intervals of tensors, and what affine maps make of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qbench.quant.folding import NORMS, scale_and_shift


@dataclass(frozen=True)
class Interval:
    """Every number from low to high, element by element."""

    low: Tensor
    high: Tensor

    @property
    def size(self) -> Tensor:
        """The largest magnitude."""
        return torch.maximum(self.low.abs(), self.high.abs())

    def times(self, weight: Tensor) -> Interval:
        """`weight @ x` for all x in the interval."""
        up, down = weight.clamp(min=0), weight.clamp(max=0)
        return Interval(up @ self.low + down @ self.high, up @ self.high + down @ self.low)

    def plus(self, other: Interval | Tensor) -> Interval:
        """Sums of a number from each."""
        low, high = (other.low, other.high) if isinstance(other, Interval) else (other, other)
        return Interval(self.low + low, self.high + high)

    def minus(self, other: Interval) -> Interval:
        """Differences of a number from each."""
        return Interval(self.low - other.high, self.high - other.low)

    def widened(self, by: Tensor | float) -> Interval:
        """Both ends moved outwards."""
        return Interval(self.low - by, self.high + by)

    def clamp(self, low: float, high: float) -> Interval:
        """What a clamping makes of it."""
        return Interval(self.low.clamp(low, high), self.high.clamp(low, high))

    def intersect(self, other: Interval) -> Interval:
        """What is in both."""
        return Interval(torch.maximum(self.low, other.low), torch.minimum(self.high, other.high))

    def map(self, increasing: Callable[[Tensor], Tensor]) -> Interval:
        """What a non-decreasing function makes of it."""
        return Interval(increasing(self.low), increasing(self.high))


@dataclass(frozen=True)
class Affine:
    """A layer or batch norm as `x -> A x + b`."""

    function: Callable[[Tensor, Tensor, Tensor | None], Tensor]
    """Of x, the weight and the bias."""
    weight: Tensor
    bias: Tensor
    sizes: Tensor
    """Of all that is added: the bias's magnitudes, at least."""
    terms: int
    """Roundings on the way to one number of the outcome."""

    @staticmethod
    def of(module: nn.Module, dtype: torch.dtype) -> Affine:
        """What the module does, computed in that precision."""
        if isinstance(module, NORMS):
            return _norm(module, dtype)
        weight = module.weight
        assert isinstance(weight, Tensor)
        own = module.bias if isinstance(module.bias, Tensor) else weight.new_zeros(len(weight))
        weight, bias = weight.to(dtype), own.to(dtype)
        function: Any = F.linear if isinstance(module, nn.Linear) else module._conv_forward
        return Affine(function, weight, bias, bias.abs(), weight[0].numel() + 2)

    def minus(self, other: Affine) -> Affine:
        """The map of the differences, for another of the same shape."""
        return Affine(self.function, self.weight - other.weight, self.bias - other.bias, self.sizes, self.terms)

    def __call__(self, x: Interval, *, offset: bool = True) -> Interval:
        """What it makes of an interval; without `offset` only `A x`."""
        centre, radius = (x.low + x.high) / 2, (x.high - x.low) / 2
        middle = self.function(centre, self.weight, self.bias if offset else None)
        return Interval(middle, middle).widened(self.function(radius, self.weight.abs(), None))

    def rounding(self, x: Interval, unit: float) -> Tensor:
        """What an outcome may be off by if every operation is rounded by that share, in any order of the sums."""
        share = self.terms * unit / (1 - self.terms * unit)
        return share * self.function(x.size, self.weight.abs(), self.sizes)


def _norm(norm: nn.Module, dtype: torch.dtype) -> Affine:
    scale, shift = (value.to(dtype) for value in scale_and_shift(norm))
    mean = norm.running_mean
    assert isinstance(mean, Tensor)

    def function(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        shape = (-1, *[1] * (x.dim() - 2))
        scaled = x * weight.view(shape)
        return scaled if bias is None else scaled + bias.view(shape)

    return Affine(function, scale, shift, shift.abs() + 2 * (mean.to(dtype) * scale).abs(), 8)
