"""Sets of levels that are no uniform grid, and weights rounded to them."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from qbench.quant.encodings import Codebook, to_rows

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
    scale = levels_scale(rows.reshape(1, -1) if granularity == "tensor" else rows, levels)
    return Codebook.nearest(weight, levels, scale=scale, axis=axis)


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
