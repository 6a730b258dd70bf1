"""Steps of least squared error for weights that move: found exactly, or from the step of before by taking turns."""

from __future__ import annotations

import torch
from torch import Tensor

from qbench.quant.grids import exact_step
from qbench.quant.segments import sums_by

_BREAKS = 1 << 16  # breakpoints of a row up to which all of them are visited
_BINS = 2000
_TURNS = 20
_AFTER_HISTOGRAM = 5
_SETTLED = 1e-6


def squared_error(rows: Tensor, step: Tensor, low: int, high: int) -> Tensor:
    """(R,): the sum of `(x - step * clip(round(x / step), low, high))**2` over each row.

    Args:
        rows: (R, n).
        step: (R,).
        low: smallest code.
        high: largest code.
    """
    scale = step[:, None]
    return ((rows / scale).round_().clamp_(low, high).mul_(scale).sub_(rows)).square_().sum(1)


def alternating_step(
    rows: Tensor, step: Tensor, low: int, high: int, turns: int = _TURNS, mass: Tensor | None = None
) -> Tensor:
    """Codes for the step, the step (R,) for the codes, and again, until it changes by less than a millionth.

    The squared error never grows; what is found is a local minimum (arXiv 2210.03671).

    Args:
        rows: (R, n).
        step: (R,) where to begin.
        low: smallest code.
        high: largest code.
        turns: at most so many.
        mass: (R, n) weights of the squared errors; None means 1.
    """
    for _ in range(turns):
        codes = (rows / step[:, None]).round_().clamp_(low, high)
        weighed = codes if mass is None else codes * mass
        dot, norm = (rows * weighed).sum(1), (codes * weighed).sum(1)
        found = torch.where(dot > 0, dot / norm, step)
        settled = bool(((found - step).abs() <= _SETTLED * step).all())
        step = found
        if settled:
            break
    return step


def best_step(rows: Tensor, low: int, high: int, mass: Tensor | None = None) -> Tensor:
    """The step (R,) of least squared error; 1 for rows of zeros.

    Long rows are searched as histograms of 2000 bins, from whose step on codes and step take turns.

    Args:
        rows: (R, n).
        low: smallest code.
        high: largest code.
        mass: (R, n) weights of the squared errors; None means 1.
    """
    if rows.shape[1] * max(high, -low) <= _BREAKS:
        return exact_step(rows, high, bottom=low, mass=mass)
    points, counts = _histogram(rows, torch.ones_like(rows) if mass is None else mass)
    start = exact_step(points, high, bottom=low, mass=counts).to(rows)
    return alternating_step(rows, start, low, high, _AFTER_HISTOGRAM, mass)


def _histogram(rows: Tensor, mass: Tensor) -> tuple[Tensor, Tensor]:
    """The means and the masses (R, bins) of what falls into equal parts of each row's range about 0."""
    reach = rows.abs().amax(1, keepdim=True)
    reach = torch.where(reach > 0, reach, 1.0)
    bins = ((rows / reach + 1) * (_BINS / 2)).long().clamp_(0, _BINS - 1)
    counts = sums_by(bins, mass, _BINS)
    return sums_by(bins, rows * mass, _BINS) / torch.where(counts > 0, counts, 1.0), counts
