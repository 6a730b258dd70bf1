"""Where the range of a uniform grid ends, for weights and for activations: one name for each calibration.

`minmax` is the extremes, `ema` their moving average over batches, `percentile` cuts a share off; `mse` has the least
squared error, `mse24` the least error to the power of 2.4 (LAPQ, BRECQ, GPTQ). `aciq_laplace` and `aciq_gauss` clip
where a distribution of that shape would be best clipped, `kl_tensorrt`, `kl_masked` and `kl_cfws` where the divergence
from the quantized histogram is least.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from torch import Tensor

from qbench.quant.encodings import to_rows
from qbench.quant.grids import fit
from qbench.quant.thresholds import Distribution, Divergence, aciq_range, kl_bins, percentile_range

WeightCalibration = Literal["minmax", "percentile", "mse", "mse24", "aciq_laplace", "aciq_gauss"]
Calibration = Literal[WeightCalibration, "ema", "kl_tensorrt", "kl_masked", "kl_cfws"]
Granularity = Literal["tensor", "channel", "group"]

_NORMS = {"mse": 2.0, "mse24": 2.4}
_MOMENTUM = 0.9  # of the moving average of extremes


def search_weight(
    weight: Tensor,
    *,
    bits: int,
    granularity: Granularity = "channel",
    group_size: int | None = None,
    symmetric: bool = True,
    calibration: WeightCalibration = "minmax",
    percentile: float = 99.99,
    power_of_two: bool = False,
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
        power_of_two: move each scale to the power of two near it with the least squared error.
        axis: of the output channels.
    """
    rows = to_rows(weight.detach().float(), axis)
    n, d = rows.shape
    size = group_size if granularity == "group" and group_size else d
    groups = -(-d // size)
    if granularity == "tensor":
        points = rows.reshape(1, -1)
    else:
        # Points that repeat 0 change no error: 0 is on every grid. Only statistics must not see them.
        points = torch.nn.functional.pad(rows, (0, groups * size - d)).reshape(n * groups, size)
    if calibration == "percentile":
        low, high = percentile_range(_real(points, rows, groups, torch.nan), percentile, symmetric=symmetric)
    elif calibration in ("aciq_laplace", "aciq_gauss"):
        mass = _real(torch.ones_like(points), rows, groups, 0.0)
        low, high = aciq_range(points, mass, bits=bits, symmetric=symmetric, distribution=_distribution(calibration))
    else:
        low, high = points.amin(1), points.amax(1)
    norm = _NORMS.get(calibration)
    scale, zero = fit(points, low, high, bits=bits, symmetric=symmetric, norm=norm, power_of_two=power_of_two)
    shape = (1, 1) if granularity == "tensor" else (n, groups)
    return scale.reshape(shape), None if zero is None else zero.reshape(shape)


def _real(points: Tensor, rows: Tensor, groups: int, otherwise: float) -> Tensor:
    """The points (R, size), but `otherwise` where a ragged last group of `rows` (N, d) was padded."""
    n, d = rows.shape
    if points.numel() == rows.numel():
        return points
    filled = points.reshape(n, -1).clone()
    filled[:, d:] = otherwise
    return filled.reshape(n * groups, -1)


def _distribution(calibration: str) -> Distribution:
    return "laplace" if calibration == "aciq_laplace" else "gauss"


def least_error_grid(x: Tensor, *, bits: int, symmetric: bool) -> tuple[float, int]:
    """Scale and zero point of the activation quantizer with the least squared error on one batch.

    Args:
        x: any shape.
        bits: width of the codes.
        symmetric: signed codes about 0.
    """
    seen = Histogram()
    seen.observe(x)
    return seen.grid(bits=bits, symmetric=symmetric, calibration="mse")


class Histogram:
    """The distribution of a stream of activations: bins on [-reach, reach], 0 on an edge, reach doubling as needed."""

    def __init__(self, bins: int = 8192) -> None:
        self.bins = bins
        self.reach = 0.0
        self.low, self.high = 0.0, 0.0
        self.average: tuple[float, float] | None = None
        self.counts = torch.zeros(bins, dtype=torch.float64)

    def observe(self, x: Tensor) -> None:
        """Count the numbers of one batch, of any shape."""
        values = x.detach().float().flatten()
        low, high = (float(v) for v in values.aminmax())
        self.low, self.high = min(self.low, low), max(self.high, high)
        before = self.average or (low, high)
        self.average = (
            _MOMENTUM * before[0] + (1 - _MOMENTUM) * low,
            _MOMENTUM * before[1] + (1 - _MOMENTUM) * high,
        )
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

    def dump(self) -> np.ndarray:
        """All that was observed as one vector, float64, for `load`."""
        low, high = self.average or (np.nan, np.nan)
        return np.concatenate([[self.reach, self.low, self.high, low, high], self.counts.numpy()])

    @classmethod
    def load(cls, vector: np.ndarray) -> Histogram:
        """The histogram that was dumped, bit for bit."""
        made = cls(len(vector) - 5)
        made.reach, made.low, made.high, low, high = vector[:5].tolist()
        made.average = None if np.isnan(low) else (low, high)
        made.counts = torch.from_numpy(vector[5:].copy())
        return made

    @property
    def seen(self) -> bool:
        """Anything has been observed."""
        return bool(self.counts.any())

    @property
    def centers(self) -> Tensor:
        """(bins,) the middle of each bin."""
        return (torch.arange(self.bins, dtype=torch.float64) + 0.5) * self._width - self.reach

    @property
    def _width(self) -> float:
        return 2 * self.reach / self.bins

    def range(
        self, calibration: Calibration, percentile: float, *, bits: int = 8, symmetric: bool = False
    ) -> tuple[float, float]:
        """Where the calibration clips; [low, high] includes 0. The error is not looked at."""
        low, high = self.low, self.high
        if not self.seen:
            return low, high
        if calibration == "ema" and self.average:
            low, high = self.average
        elif calibration == "percentile":
            low, high = self._percentiles(percentile / 100)
        elif calibration in ("aciq_laplace", "aciq_gauss"):
            low, high = self._aciq(_distribution(calibration), bits, symmetric)
        elif calibration in ("kl_tensorrt", "kl_masked", "kl_cfws"):
            clip = self._kl(calibration, bits - 1 if symmetric or low < 0 < high else bits)
            low, high = -clip, clip
        return min(0.0, max(low, self.low)), max(0.0, min(high, self.high))

    def _percentiles(self, cut: float) -> tuple[float, float]:
        share = self.counts.cumsum(0) / self.counts.sum()
        first = int(torch.searchsorted(share, 1 - cut, right=True))
        last = int(torch.searchsorted(share, cut))
        return first * self._width - self.reach, (last + 1) * self._width - self.reach

    def _aciq(self, distribution: Distribution, bits: int, symmetric: bool) -> tuple[float, float]:
        points = self.centers
        if self.low == 0:
            points[self.bins // 2] = 0  # the bin of the zeros of a ReLU
        points = points.clamp(self.low, self.high)
        low, high = aciq_range(
            points[None], self.counts[None], bits=bits, symmetric=symmetric, distribution=distribution
        )
        return float(low), float(high)

    def _kl(self, form: Divergence, bits: int) -> float:
        half = self.bins // 2
        magnitudes = (self.counts[half:] + self.counts[:half].flip(0)).numpy()
        return (kl_bins(magnitudes, 2**bits, form) + 0.5) * self._width

    def grid(
        self,
        *,
        bits: int,
        symmetric: bool = False,
        calibration: Calibration = "minmax",
        percentile: float = 99.99,
        power_of_two: bool = False,
    ) -> tuple[float, int]:
        """Scale and zero point of an activation quantizer; the zero point is 0 if symmetric or nothing is negative.

        Args:
            bits: width of the codes.
            symmetric: signed codes about 0.
            calibration: how the range is chosen.
            percentile: cut off at either end, in percent.
            power_of_two: move the scale to the power of two near it with the least squared error.
        """
        ends = self.range(calibration, percentile, bits=bits, symmetric=symmetric)
        low, high = (torch.tensor([v], dtype=torch.float64) for v in ends)
        used = self.counts > 0
        points, mass = self.centers[None, used], self.counts[None, used]
        norm = _NORMS.get(calibration)
        scale, zero = fit(
            points, low, high, bits=bits, symmetric=symmetric, norm=norm, power_of_two=power_of_two, mass=mass
        )
        return float(scale), 0 if zero is None else int(zero)
