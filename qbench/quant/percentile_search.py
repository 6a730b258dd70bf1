"""Asymmetric grids that end at a percentile: of three, the one with the least squared error (RepQ-ViT)."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

PERCENTILES = (0.999, 0.9999, 0.99999)


def percentile_grids(points: Tensor, bits: int, *, around_zero: bool = True) -> tuple[Tensor, Tensor]:
    """Scale (R,) and zero point (R,), an integer, of each row's grid from its percentile 1 - p to p.

    Args:
        points: (R, n). A row of equal numbers gets a grid that holds them.
        bits: width of the codes, 0 to 2**bits - 1.
        around_zero: stretch each range to hold 0, so that the zero point is a code; else it can be any integer.
    """
    top = 2**bits - 1
    best = torch.full_like(points[:, 0], torch.inf)
    scale, zero = torch.ones_like(best), torch.zeros_like(best)
    for low, high in zip(*_ends(points), strict=True):
        if around_zero:
            low, high = low.clamp(max=0), high.clamp(min=0)
        # A step as wide as the only number that there is.
        constant = torch.where(low == 0, 1.0, low.abs())
        step = torch.where(high > low, (high - low) / top, constant)
        offset = (-low / step).round()
        codes = ((points / step[:, None]).round() + offset[:, None]).clamp(0, top) - offset[:, None]
        error = (codes * step[:, None] - points).square().mean(1)
        better = error < best
        best = torch.where(better, error, best)
        scale, zero = torch.where(better, step, scale), torch.where(better, offset, zero)
    return scale, zero


def percentile_top(points: Tensor, quantize: Callable[[Tensor, float], Tensor]) -> float:
    """The percentile p of all numbers with the least squared error of `quantize(points, top)`."""
    tops = [float(high) for high in _ends(points.reshape(1, -1))[1]]
    errors = [float((quantize(points, top) - points).square().mean()) for top in tops]
    return tops[errors.index(min(errors))]


def _ends(points: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """(R,) each: the percentiles 1 - p and p."""
    cuts = [1 - p for p in PERCENTILES] + list(PERCENTILES)
    found = torch.from_numpy(np.quantile(points.detach().cpu().numpy(), cuts, axis=1)).to(points)
    return list(found[: len(PERCENTILES)]), list(found[len(PERCENTILES) :])
