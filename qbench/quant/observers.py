"""Where the range of a uniform grid ends: min-max, percentile, or the least squared error, of weights and activations.

Every search works on rows of points (R, n), all rows at once; a row is a tensor, a channel or a group of a weight, or
the bins of a histogram of activations with their counts. Ranges always include 0. A row of zeros gets the scale 1.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from qbench.quant.encodings import code_range, to_rows

Calibration = Literal["minmax", "mse", "percentile"]
Granularity = Literal["tensor", "channel", "group"]

_SHRINK = [1 - 0.01 * i for i in range(80)]  # the grid of LAPQ and BRECQ
_EXACT_TOP = 7  # up to 4 bits the breakpoints are few enough to visit all of them
_CHUNK = 1 << 24  # breakpoints in memory at a time


def search_weight(
    weight: Tensor,
    *,
    bits: int,
    granularity: Granularity = "channel",
    group_size: int | None = None,
    symmetric: bool = True,
    calibration: Calibration = "minmax",
    percentile: float = 99.99,
    axis: int = 0,
) -> tuple[Tensor, Tensor | None]:
    """Scale (R, G) and zero point (R, G; None if symmetric) of a weight, as `Affine.nearest` takes them.

    Args:
        weight: any shape; rows are indices of `axis`.
        bits: width of the codes.
        granularity: what shares a scale: the tensor (R = G = 1), a channel (G = 1), or `group_size` columns of one.
        group_size: of `group`; the last group of a row may be ragged.
        symmetric: codes are symmetric about 0.
        calibration: how the range is chosen.
        percentile: share of a row's weights that the range holds, in percent.
        axis: of the output channels.
    """
    rows = to_rows(weight.detach().float(), axis)
    n, d = rows.shape
    size = group_size if granularity == "group" and group_size else d
    groups = -(-d // size)
    if granularity == "tensor":
        points = rows.reshape(1, -1)
    else:
        # Points that repeat 0 change no range, and no error: 0 is on every grid. Only percentiles see them as NaN.
        fill = float("nan") if calibration == "percentile" else 0.0
        points = torch.nn.functional.pad(rows, (0, groups * size - d), value=fill).reshape(n * groups, size)
    if calibration == "percentile":
        low, high = percentile_range(points, percentile, symmetric=symmetric)
    else:
        low, high = points.amin(1), points.amax(1)
    scale, zero = fit(points, low, high, bits=bits, symmetric=symmetric, mse=calibration == "mse")
    shape = (1, 1) if granularity == "tensor" else (n, groups)
    return scale.reshape(shape), None if zero is None else zero.reshape(shape)


def percentile_range(points: Tensor, percentile: float, *, symmetric: bool) -> tuple[Tensor, Tensor]:
    """The range (R,), (R,) that holds that share of each row, in percent; NaN are not counted.

    Symmetric ranges hold it of the magnitudes; others cut the same share off either tail.
    """
    ordered = (points.abs() if symmetric else points).sort(dim=1).values
    count = (~ordered.isnan()).sum(1, keepdim=True)
    last = ((count * (percentile / 100)).ceil().long() - 1).clamp(min=0)
    high = ordered.gather(1, last).squeeze(1)
    low = -high if symmetric else ordered.gather(1, count - 1 - last).squeeze(1)
    return low, high


def fit(
    points: Tensor,
    low: Tensor,
    high: Tensor,
    *,
    bits: int,
    symmetric: bool,
    mse: bool = False,
    mass: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Scale (R,) and zero point (R,) or None of the grid over [low, high], or of the best one inside it.

    Args:
        points: (R, n); only looked at to minimise the squared error.
        low: (R,) least value of the range.
        high: (R,) greatest value of the range.
        bits: width of the codes; one symmetric bit has the codes -1 and 0.
        symmetric: zero point 0 and narrow codes, -(2**(b-1) - 1) to 2**(b-1) - 1.
        mse: shrink the range to where the squared error is least. Symmetric grids of up to 4 bits get the exact
            minimum (`exact_step`) where memory allows; others the best of 80 shrunk ranges, then of each end.
        mass: (R, n) how often each point occurs; None means once.
    """
    low, high = low.clamp(max=0), high.clamp(min=0)
    if not mse:
        return _grid(low, high, bits, symmetric)
    top = code_range(bits, symmetric=True)[1]
    if symmetric and mass is None and 1 <= top <= _EXACT_TOP and points.shape[1] * top <= _CHUNK:
        return exact_step(points, top), None
    ends = ("both",) if symmetric else ("both", "high", "low")
    for moved in ends:
        low, high = _shrink(points, mass, low, high, bits, symmetric, moved)
    return _grid(low, high, bits, symmetric)


def _grid(low: Tensor, high: Tensor, bits: int, symmetric: bool) -> tuple[Tensor, Tensor | None]:
    least, greatest = code_range(bits, symmetric=symmetric)
    span = torch.maximum(-low, high) if symmetric else high - low
    scale = span / (greatest or 1)
    # Below this the reciprocal overflows: such rows are dead.
    scale = torch.where(scale > 1e-30, scale, torch.ones_like(scale))
    return scale, None if symmetric else (-low / scale).round().clamp(least, greatest)


def _shrink(
    points: Tensor, mass: Tensor | None, low: Tensor, high: Tensor, bits: int, symmetric: bool, moved: str
) -> tuple[Tensor, Tensor]:
    least, greatest = code_range(bits, symmetric=symmetric)
    best = torch.full_like(low, torch.inf)
    best_low, best_high = low, high
    for factor in _SHRINK:
        new_low = low * factor if moved != "high" else low
        new_high = high * factor if moved != "low" else high
        scale, zero = _grid(new_low, new_high, bits, symmetric)
        step, offset = scale[:, None], 0 if zero is None else zero[:, None]
        error = ((points / step).round_().add_(offset).clamp_(least, greatest).sub_(offset).mul_(step) - points) ** 2
        total = (error if mass is None else error * mass).sum(1)
        better = total < best
        best = torch.where(better, total, best)
        best_low, best_high = torch.where(better, new_low, best_low), torch.where(better, new_high, best_high)
    return best_low, best_high


def exact_step(points: Tensor, top: int) -> Tensor:
    """The step (R,) with the least squared error of `step * clip(round(x / step), -top, top)`; 1 for rows of zeros.

    The error is piecewise quadratic in the step; all its breakpoints |x| / (j - 1/2), j = 1..top, are visited in
    descending order. O(n top log(n top)) a row (arXiv 2210.03671, where an alternating search may stop short).

    Args:
        points: (R, n).
        top: largest code.
    """
    chunk = max(1, _CHUNK // (points.shape[1] * top))
    return torch.cat([_exact_step(part, top) for part in points.split(chunk)])


def _exact_step(points: Tensor, top: int) -> Tensor:
    size = points.abs().double()
    half = torch.arange(1, top + 1, device=points.device, dtype=torch.float64) - 0.5
    breaks, order = (size[:, :, None] / half).flatten(1).sort(dim=1, descending=True)
    # Passing breakpoint (i, j) raises code i from j - 1 to j. a: sum of |x| code, b: sum of code**2.
    a = size.gather(1, order // top).cumsum(1)
    b = (2 * half)[order % top].cumsum(1)
    lower = torch.cat([breaks[:, 1:], torch.zeros_like(breaks[:, :1])], dim=1)
    step = torch.minimum(torch.maximum(a / b, lower), breaks)
    error = (step * b - 2 * a) * step
    best = step.gather(1, error.argmin(1, keepdim=True)).squeeze(1)
    return torch.where(best > 1e-30, best, torch.ones_like(best)).to(points.dtype)


def levels_scale(points: Tensor, levels: Tensor, steps: int = 40) -> Tensor:
    """The scale (R,) with which scaled `levels` come nearest to each row in squared error; 1 for rows of zeros.

    Of `steps` scales from 0.1 to 1.5 times the row's largest magnitude over the largest level, each improved by the
    least-squares scale of the codes it gives, the best.

    Args:
        points: (R, n).
        levels: (K,) ascending.
        steps: scales tried.
    """
    middles = (levels[1:] + levels[:-1]) / 2
    largest = points.abs().amax(1) / levels.abs().amax()
    best, found = torch.full_like(largest, -1), torch.ones_like(largest)
    for factor in torch.linspace(0.1, 1.5, steps).tolist():
        scale = (largest * factor).clamp(min=1e-30)
        chosen = levels[torch.bucketize(points / scale[:, None], middles)]
        dot, norm = (points * chosen).sum(1), chosen.square().sum(1)
        gain = dot.square() / norm.clamp(min=1e-30)  # squared error = |points|^2 - gain
        better = (gain > best) & (dot > 0)
        best, found = torch.where(better, gain, best), torch.where(better, dot / norm, found)
    return found


class Histogram:
    """The distribution of a stream of activations: bins on [-reach, reach], 0 on an edge, reach doubling as needed."""

    def __init__(self, bins: int = 8192) -> None:
        self.bins = bins
        self.reach = 0.0
        self.low, self.high = 0.0, 0.0
        self.counts = torch.zeros(bins, dtype=torch.float64)

    def observe(self, x: Tensor) -> None:
        """Count the numbers of one batch, of any shape."""
        values = x.detach().float().flatten()
        low, high = (float(v) for v in values.aminmax())
        self.low, self.high = min(self.low, low), max(self.high, high)
        top = max(-low, high)
        if not top < float("inf"):
            raise ValueError("the activations are not finite")
        if self.reach == 0:
            self.reach = top
        while self.reach < top:
            self._double()
        if self.reach == 0:
            self.counts[self.bins // 2] += values.numel()
        else:
            self.counts += torch.histc(values, self.bins, -self.reach, self.reach).double().cpu()

    def _double(self) -> None:
        quarter = self.bins // 4
        merged = self.counts.reshape(-1, 2).sum(1)
        self.counts = torch.zeros_like(self.counts)
        self.counts[quarter:-quarter] = merged
        self.reach *= 2

    @property
    def seen(self) -> bool:
        """Anything has been observed."""
        return bool(self.counts.any())

    @property
    def centers(self) -> Tensor:
        """(bins,) the middle of each bin."""
        return (torch.arange(self.bins, dtype=torch.float64) + 0.5) * (2 * self.reach / self.bins) - self.reach

    def range(self, calibration: Calibration, percentile: float) -> tuple[float, float]:
        """The least and greatest value, or the percentiles; [low, high] includes 0."""
        if calibration != "percentile" or not self.seen:
            return self.low, self.high
        share = self.counts.cumsum(0) / self.counts.sum()
        width, cut = 2 * self.reach / self.bins, percentile / 100
        first = int(torch.searchsorted(share, 1 - cut, right=True))
        last = int(torch.searchsorted(share, cut))
        low, high = first * width - self.reach, (last + 1) * width - self.reach
        return min(0.0, max(low, self.low)), max(0.0, min(high, self.high))

    def grid(
        self, *, bits: int, symmetric: bool = False, calibration: Calibration = "minmax", percentile: float = 99.99
    ) -> tuple[float, int]:
        """Scale and zero point of an activation quantizer; the zero point is 0 if symmetric or nothing is negative.

        Args:
            bits: width of the codes.
            symmetric: signed codes about 0.
            calibration: how the range is chosen.
            percentile: cut off at either end, in percent.
        """
        low, high = (torch.tensor([v], dtype=torch.float64) for v in self.range(calibration, percentile))
        used = self.counts > 0
        points, mass = self.centers[None, used], self.counts[None, used]
        scale, zero = fit(points, low, high, bits=bits, symmetric=symmetric, mse=calibration == "mse", mass=mass)
        return float(scale), 0 if zero is None else int(zero)
