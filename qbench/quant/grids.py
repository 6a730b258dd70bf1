"""Uniform grids: over a range, with the least error of rounding, or with a scale that is a power of two.

Every search works on rows of points (R, n), all rows at once; a row is a tensor, a channel or a group of a weight, or
the bins of a histogram of activations with their counts. Ranges always include 0. A row of zeros gets the scale 1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qbench.quant.encodings import code_range

_SHRINK = [1 - 0.01 * i for i in range(80)]  # the grid of LAPQ and BRECQ
_EXACT_TOP = 7  # up to 4 bits the breakpoints are few enough to visit all of them
_CHUNK = 1 << 24  # breakpoints in memory at a time


def fit(
    points: Tensor,
    low: Tensor,
    high: Tensor,
    *,
    bits: int,
    symmetric: bool,
    norm: float | None = None,
    power_of_two: bool = False,
    mass: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Scale (R,) and zero point (R,) or None of the grid over [low, high], or of the best one inside it.

    Args:
        points: (R, n); only looked at to minimise an error.
        low: (R,) least value of the range.
        high: (R,) greatest value of the range.
        bits: width of the codes; one symmetric bit has the codes -1 and 0.
        symmetric: zero point 0 and narrow codes, -(2**(b-1) - 1) to 2**(b-1) - 1.
        norm: shrink the range to where the mean of the error to this power is least, to the best of 80 ranges. With 2,
            symmetric grids of up to 4 bits get the exact minimum (`exact_step`) where memory allows; of other ranges
            each end is then shrunk by itself.
        power_of_two: move each scale, and the range with it, to a power of two (`nearest_power`).
        mass: (R, n) how often each point occurs; None means once.
    """
    scale, zero = _fit(points, mass, low.clamp(max=0), high.clamp(min=0), bits, symmetric, norm)
    if power_of_two:
        scale = nearest_power(points, scale, zero, bits=bits, mass=mass)
    return scale, zero


def _fit(
    points: Tensor, mass: Tensor | None, low: Tensor, high: Tensor, bits: int, symmetric: bool, norm: float | None
) -> tuple[Tensor, Tensor | None]:
    if norm is None:
        return _grid(low, high, bits, symmetric)
    top = code_range(bits, symmetric=True)[1]
    exact = norm == 2 and symmetric and mass is None and 1 <= top <= _EXACT_TOP
    if exact and points.shape[1] * top <= _CHUNK:
        return exact_step(points, top), None
    ends = ("both",) if symmetric or norm != 2 else ("both", "high", "low")
    for moved in ends:
        low, high = _shrink(points, mass, low, high, bits, symmetric, moved, norm)
    return _grid(low, high, bits, symmetric)


def nearest_power(points: Tensor, scale: Tensor, zero: Tensor | None, *, bits: int, mass: Tensor | None) -> Tensor:
    """The power of two (R,) near each scale with the least squared error; the rounded logarithm may have a greater one.

    Two on either side are tried (arXiv 2210.03671). The zero point stays: both ends of the range move together.

    Args:
        points: (R, n).
        scale: (R,).
        zero: (R,) zero points, or None for symmetric grids.
        bits: width of the codes.
        mass: (R, n) how often each point occurs; None means once.
    """
    below = scale.log2().floor()
    tried = torch.stack([torch.exp2(below + shift) for shift in (-1, 0, 1, 2)])
    errors = torch.stack([_error(points, mass, power, zero, bits, 2.0) for power in tried])
    return tried.gather(0, errors.argmin(0, keepdim=True)).squeeze(0)


def _error(points: Tensor, mass: Tensor | None, scale: Tensor, zero: Tensor | None, bits: int, norm: float) -> Tensor:
    """(R,): the sum of the errors to the power of `norm`."""
    low, high = code_range(bits, symmetric=zero is None)
    step, offset = scale[:, None], 0 if zero is None else zero[:, None]
    error = (points / step).round_().add_(offset).clamp_(low, high).sub_(offset).mul_(step).sub_(points)
    error = error.square_() if norm == 2 else error.abs_().pow_(norm)
    return (error if mass is None else error.mul_(mass)).sum(1)


def _grid(low: Tensor, high: Tensor, bits: int, symmetric: bool) -> tuple[Tensor, Tensor | None]:
    least, greatest = code_range(bits, symmetric=symmetric)
    span = torch.maximum(-low, high) if symmetric else high - low
    scale = span / (greatest or 1)
    # Below this the reciprocal overflows: such rows are dead.
    scale = torch.where(scale > 1e-30, scale, torch.ones_like(scale))
    return scale, None if symmetric else (-low / scale).round().clamp(least, greatest)


def _shrink(
    points: Tensor,
    mass: Tensor | None,
    low: Tensor,
    high: Tensor,
    bits: int,
    symmetric: bool,
    moved: str,
    norm: float,
) -> tuple[Tensor, Tensor]:
    best = torch.full_like(low, torch.inf)
    best_low, best_high = low, high
    for factor in _SHRINK:
        new_low = low * factor if moved != "high" else low
        new_high = high * factor if moved != "low" else high
        scale, zero = _grid(new_low, new_high, bits, symmetric)
        total = _error(points, mass, scale, zero, bits, norm)
        better = total < best
        best = torch.where(better, total, best)
        best_low, best_high = torch.where(better, new_low, best_low), torch.where(better, new_high, best_high)
    return best_low, best_high


def exact_step(points: Tensor, top: int, *, bottom: int | None = None, mass: Tensor | None = None) -> Tensor:
    """The step (R,) with the least squared error of `step * clip(round(x / step), bottom, top)`; 1 for rows of zeros.

    The error is piecewise quadratic in the step; all its breakpoints |x| / (j - 1/2), j = 1, 2, ..., are visited in
    descending order. O(n top log(n top)) a row (arXiv 2210.03671, where an alternating search may stop short).

    Args:
        points: (R, n).
        top: largest code.
        bottom: smallest code; None is -top.
        mass: (R, n) how often each point occurs; None means once.
    """
    least = top if bottom is None else -bottom
    chunk = max(1, _CHUNK // (points.shape[1] * max(top, least)))
    masses = torch.ones_like(points) if mass is None else mass
    parts = zip(points.split(chunk), masses.split(chunk), strict=True)
    return torch.cat([_exact_step(*part, top, least) for part in parts])


def _exact_step(points: Tensor, mass: Tensor, top: int, least: int) -> Tensor:
    most = max(top, least)
    size, mass = points.abs().double(), mass.double()
    half = torch.arange(1, most + 1, device=points.device, dtype=torch.float64) - 0.5
    # No code beyond a point's own end of the range: such breakpoints lie at 0, where they are visited last.
    reached = half < torch.where(points < 0, least, top)[:, :, None]
    breaks, order = torch.where(reached, size[:, :, None] / half, 0.0).flatten(1).sort(dim=1, descending=True)
    # Passing breakpoint (i, j) raises code i from j - 1 to j. a: sum of |x| code, b: sum of code**2.
    a = (size * mass).gather(1, order // most).cumsum(1)
    b = ((2 * half)[order % most] * mass.gather(1, order // most)).cumsum(1)
    lower = torch.cat([breaks[:, 1:], torch.zeros_like(breaks[:, :1])], dim=1)
    step = torch.minimum(torch.maximum(a / b.clamp(min=torch.finfo(b.dtype).tiny), lower), breaks)
    error = (step * b - 2 * a) * step
    best = step.gather(1, error.argmin(1, keepdim=True)).squeeze(1)
    return torch.where(best > 1e-30, best, torch.ones_like(best)).to(points.dtype)
