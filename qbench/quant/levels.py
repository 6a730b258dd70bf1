"""Sets of levels that are no uniform grid, and weights rounded to them."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

from qbench.quant.clustering import lloyd
from qbench.quant.encodings import Codebook, from_rows, to_rows

# The exponents of each term's nonzero values; a level takes one value, or 0, of every term.
_APOT_TERMS = {
    1: [[0]],
    2: [[1, 2, 3]],
    3: [[1, 2, 4], [3]],
    4: [[1, 3, 5], [2, 4, 6]],
    5: [[1, 3, 6], [2, 4, 7], [5]],
    6: [[1, 4, 7], [2, 5, 8], [3, 6, 9]],
}


def pot_levels(bits: int) -> Tensor:
    """The 2**bits powers-of-two magnitudes 0, 2**-(2**bits - 2), ..., 1/2, 1, ascending (float32).

    Args:
        bits: of the magnitude, 1 to 5.
    """
    exponents = torch.arange(2**bits - 2, -1, -1, dtype=torch.float64)
    return torch.cat([torch.zeros(1, dtype=torch.float64), 2**-exponents]).float()


def apot_levels(bits: int) -> Tensor:
    """The 2**bits sums of powers of two of Li et al. (arXiv 1909.13144), the largest 1, ascending (float32).

    Args:
        bits: of the magnitude, 1 to 6.
    """
    sums = torch.zeros(1, dtype=torch.float64)
    for exponents in _APOT_TERMS[bits]:
        term = torch.cat([torch.zeros(1, dtype=torch.float64), 2 ** -torch.tensor(exponents, dtype=torch.float64)])
        sums = (sums[:, None] + term).flatten()
    return (sums / sums.max()).sort().values.float()


def mirrored(magnitudes: Tensor) -> Tensor:
    """Signed levels from magnitudes that begin with 0: 2 K - 1 of them, ascending."""
    return torch.cat([-magnitudes.flip(0)[:-1], magnitudes])


def nf4_levels() -> Tensor:
    """The 16 levels of NormalFloat, ascending (float32): quantiles of a normal distribution from -1 to 1, with a 0.

    Eight of them are positive and seven negative (QLoRA, arXiv 2305.14314).
    """
    outermost = 0.9677083
    upper, lower = (torch.linspace(0.5, outermost, n, dtype=torch.float64)[1:] for n in (9, 8))
    levels = torch.cat(
        [-torch.special.ndtri(lower).flip(0), torch.zeros(1, dtype=torch.float64), torch.special.ndtri(upper)]
    )
    return (levels / levels.abs().max()).float()


@lru_cache
def _gaussian(bits: int) -> tuple[float, ...]:
    count = 2**bits
    root = math.sqrt(2)
    # The density of many optimal levels is the cube root of the distribution's.
    places = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    levels = torch.special.ndtri(places) * math.sqrt(3)
    ends = torch.tensor([math.inf], dtype=torch.float64)
    for _ in range(2000):
        edges = torch.cat([-ends, (levels[1:] + levels[:-1]) / 2, ends])
        density = torch.exp(-edges.square() / 2) / math.sqrt(2 * math.pi)
        moved = -density.diff() / (torch.erf(edges / root) / 2).diff()
        done = bool((moved - levels).abs().max() < 1e-12)
        levels = moved
        if done:
            break
    return tuple(levels.tolist())


def gaussian_levels(bits: int) -> Tensor:
    """The 2**bits levels with the least squared error of a standard normal distribution (Lloyd, Max), ascending.

    Args:
        bits: 1 to 8.
    """
    return torch.tensor(_gaussian(bits))


def empirical_levels(rows: Tensor, bits: int) -> Tensor:
    """Levels (2**bits,) of least squared error, found by Lloyd's algorithm from `gaussian_levels`, for all rows alike.

    Args:
        rows: (R, n); each is divided by its root mean square, so that the levels are to be scaled row by row. Rows of
            zeros do not count.
        bits: 1 to 8.
    """
    power = rows.double().square().mean(1).sqrt()
    alive = power > 0
    if not alive.any():
        return gaussian_levels(bits).to(rows)
    points = (rows[alive] / power[alive, None]).flatten().sort().values
    start = gaussian_levels(bits).double()[None].numpy()
    return torch.from_numpy(lloyd(points[None].cpu().numpy(), start)[0]).to(rows)


def quantile_levels(rows: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Levels (R, K) and the bounds between them (R, K - 1) of K = min(count, n) bins of equal mass in each row.

    A level is the mean of its bin. Equal points on both sides of a bound go to the lower bin.

    Args:
        rows: (R, n).
        count: of levels.
    """
    ordered = rows.sort(dim=1).values
    n = ordered.shape[1]
    edges = torch.linspace(0, n, min(count, n) + 1, device=rows.device).long()
    sums = torch.nn.functional.pad(ordered.double().cumsum(1), (1, 0))[:, edges].diff(dim=1)
    levels = (sums / edges.diff()).to(rows)
    bounds = (ordered[:, edges[1:-1] - 1] + ordered[:, edges[1:-1]]) / 2
    return levels, bounds


def nearest_logarithm(weight: Tensor, bits: int, granularity: Literal["tensor", "channel"], axis: int = 0) -> Codebook:
    """Each weight's sign and rounded logarithm to the base 2, below a power of two that is shared (LogQuant).

    Of the shared powers at, one, and two below the largest magnitude rounded up, the one with the least squared error.

    Args:
        weight: any shape.
        bits: width of the codes: a sign, and 2**(bits - 1) - 1 exponents or 0.
        granularity: what shares the largest power.
        axis: output-channel axis of the weight.
    """
    rows = to_rows(weight, axis)
    own = rows.reshape(1, -1) if granularity == "tensor" else rows
    count = 2 ** (bits - 1) - 1
    levels = mirrored(pot_levels(bits - 1)).to(rows)
    highest = own.abs().amax(1, keepdim=True).clamp(min=1e-30).log2().ceil()
    best, codes, scale = torch.full_like(highest, torch.inf), own, highest
    for below in range(3):
        power = torch.exp2(highest - below)
        exponents = (own.abs().double() / power).log2().round()
        found = count + own.sign() * (count + exponents).clamp(0, count)
        error = (levels[found.long()] * power - own).square().sum(1, keepdim=True)
        better = error < best
        best, scale = torch.where(better, error, best), torch.where(better, power, scale)
        codes = torch.where(better, found, codes)
    whole = from_rows(codes.reshape(rows.shape).to(torch.int32), weight.shape, axis)
    return Codebook(whole, levels.reshape(1, 1, -1), axis, scale=scale)


def nearest_scaled(
    weight: Tensor, levels: Tensor, granularity: Literal["tensor", "channel"], axis: int = 0
) -> Codebook:
    """Each weight as its nearest level times a scale, which has the least squared error of those searched.

    Args:
        weight: any shape.
        levels: (K,) ascending, shared by all channels.
        granularity: what shares a scale.
        axis: output-channel axis of the weight.
    """
    rows = to_rows(weight, axis)
    levels = levels.to(weight.device)
    own = rows.reshape(1, -1) if granularity == "tensor" else rows
    scale = levels_scale(own, levels)
    code = Codebook.nearest(weight, levels, scale=scale, axis=axis)
    # Not every set of levels has a 0: a dead channel gets the scale 0.
    return replace(code, scale=torch.where((own == 0).all(1), 0.0, scale)[:, None])


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
