"""Where to clip a distribution before a uniform grid is laid over it: percentiles, ACIQ, Kullback-Leibler."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Literal

import numpy as np
import torch
from scipy.optimize import brentq
from scipy.special import lambertw
from torch import Tensor

Distribution = Literal["laplace", "gauss"]
Divergence = Literal["kl_tensorrt", "kl_masked", "kl_cfws"]

_SMOOTH = 1e-4  # the count that the reference puts where the quantized histogram is empty
_CANDIDATES = 512


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


@lru_cache
def aciq_factor(bits: int, distribution: Distribution) -> float:
    """The clip of 2**bits levels over [-clip, clip] with the least expected squared error (ACIQ, arXiv 1810.05723).

    In units of the mean magnitude (`laplace`) or of the standard deviation (`gauss`). It minimises the noise of
    clipping plus `clip**2 / (3 * 4**bits)`.
    """
    if distribution == "laplace":
        return float(lambertw(3 * 4**bits).real)

    def slope(a: float) -> float:
        density, tail = math.exp(-a * a / 2) / math.sqrt(2 * math.pi), math.erfc(a / math.sqrt(2)) / 2
        return a / (3 * 4**bits) - 2 * (density - a * tail)

    return float(brentq(slope, 1e-6, 20))


def aciq_range(
    points: Tensor, mass: Tensor, *, bits: int, symmetric: bool, distribution: Distribution
) -> tuple[Tensor, Tensor]:
    """The range (R,), (R,) that ACIQ clips each row to; never wider than the row.

    A row without both signs, on a grid that is not symmetric, is taken for one half of a distribution about 0 whose
    other half became zeros (a ReLU): zeros are not counted, and the half gets all the levels.

    Args:
        points: (R, n).
        mass: (R, n) how often each point occurs.
        bits: width of the codes.
        symmetric: the grid is, and the distribution is taken to be symmetric about 0.
        distribution: assumed.
    """
    occurs = mass > 0
    low = torch.where(occurs, points, 0).amin(1).clamp(max=0)
    high = torch.where(occurs, points, 0).amax(1).clamp(min=0)
    half = torch.zeros_like(low, dtype=torch.bool) if symmetric else (low == 0) | (high == 0)
    counted = torch.where(half[:, None] & (points == 0), 0, mass).to(points.dtype)
    total = counted.sum(1).clamp(min=torch.finfo(points.dtype).tiny)
    center = torch.zeros_like(low) if symmetric else torch.where(half, 0, (points * counted).sum(1) / total)
    apart = (points - center[:, None]).abs()
    spread = (apart * counted).sum(1) / total if distribution == "laplace" else _root(apart, counted, total)
    factors = torch.where(half, aciq_factor(bits + 1, distribution), aciq_factor(bits, distribution))
    clip = spread * factors.to(points.dtype)
    return torch.maximum(low, center - clip).clamp(max=0), torch.minimum(high, center + clip).clamp(min=0)


def _root(apart: Tensor, counted: Tensor, total: Tensor) -> Tensor:
    # Relative to the largest, for the squares of float32 weights neither overflow nor vanish.
    largest = apart.amax(1).clamp(min=torch.finfo(apart.dtype).tiny)
    return largest * ((apart / largest[:, None]).square() * counted).sum(1).div(total).sqrt()


def divergence(p: np.ndarray, q: np.ndarray, form: Divergence) -> float:
    """How far the counts q (n,) are from the reference counts p (n,).

    Args:
        p: reference.
        q: the same histogram after quantization.
        form: `kl_tensorrt` is `sum P log(P / Q)` of the normalised counts where p is not 0, with a floor under Q;
            `kl_masked` the same where neither is 0, which may be negative; `kl_cfws` is what the code of CFWS (arXiv
            2312.10588) computes: its normalisation stands inside the logarithm the other way round.
    """
    total_p, total_q = p.sum(), q.sum()
    used = p > 0 if form == "kl_tensorrt" else (p > 0) & (q > 0)
    ratio = p[used] / np.maximum(q[used], _SMOOTH)
    scale = total_p / total_q if form == "kl_cfws" else total_q / total_p
    return float((p[used] * np.log(ratio * scale)).sum() / total_p)


def kl_bins(magnitudes: np.ndarray, groups: int, form: Divergence) -> int:
    """How many of the first bins of a histogram of magnitudes (n,) a range of `groups` levels should hold.

    As in TensorRT: the bins beyond the range are added to its last one in the reference, and left out of the quantized
    histogram, in which the bins of a group share their sum evenly where the reference is not empty. Bin 0 does not
    count: it holds the zeros of a ReLU. Candidates end at a bin that is not empty and hold at least as many of these as
    levels (a histogram of one bin diverges from nothing); 512 of them are tried. With no more occupied bins than levels
    nothing is clipped.
    """
    counts = magnitudes.astype(float)
    counts[0] = 0
    occupied = np.flatnonzero(counts)
    if len(occupied) <= groups:
        return len(counts)
    ends = occupied[groups - 1 :] + 1
    ends = ends[np.unique(np.linspace(0, len(ends) - 1, _CANDIDATES).astype(int))]
    apart = [_apart(counts, int(end), groups, form) for end in ends]
    return int(ends[int(np.argmin(apart))])


def _apart(counts: np.ndarray, end: int, groups: int, form: Divergence) -> float:
    inside = counts[:end]
    occupied = inside > 0
    starts = np.arange(groups) * end // groups
    sums, used = np.add.reduceat(inside, starts), np.add.reduceat(occupied, starts, dtype=int)
    shared = np.repeat(sums / np.maximum(used, 1), np.diff(starts, append=end))
    reference = inside.copy()
    reference[-1] += counts[end:].sum()
    return divergence(reference, shared * occupied, form)
