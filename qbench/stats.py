"""Paired statistics: differences with their intervals, and ranks that show ties. Pure functions."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import ndtri


@dataclass(frozen=True)
class Interval:
    """An estimate and the ends of its confidence interval."""

    estimate: float
    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        return self.low > 0 or self.high < 0


def paired_difference(a: np.ndarray, b: np.ndarray, level: float = 0.95) -> Interval:
    """The mean of `a - b` over the same images, in their unit.

    For 0/1 outcomes this is the adjusted Wald interval of Bonett and Price (2012) for paired proportions: a discordant
    pair is added on either side, so that it keeps its level for small samples and has a width when all pairs agree.
    The estimate is the plain mean difference. Outcomes averaged over seeds, in [0, 1], are treated alike.

    Args:
        a: outcomes per image (n,), in [0, 1].
        b: outcomes of the same images (n,).
        level: of confidence.
    """
    if a.shape != b.shape or a.ndim != 1:
        raise ValueError(f"paired outcomes must have the same images: {a.shape} and {b.shape}")
    difference = a.astype(float) - b.astype(float)
    n = len(difference) + 2
    mean = difference.sum() / n
    variance = (np.square(difference).sum() + 2) / n - mean**2
    reach = float(ndtri((1 + level) / 2)) * math.sqrt(variance / n)
    return Interval(float(difference.mean()), max(-1.0, mean - reach), min(1.0, mean + reach))


def ranks(values: Sequence[float], beats: Callable[[int, int], bool]) -> list[str]:
    """Rank of each entry: one more than the number of significantly better ones; `2=` where a rank is shared.

    Args:
        values: the scores, higher is better.
        beats: whether the first entry is significantly better than the second.
    """
    n = len(values)
    worse_than = [sum(values[j] > values[i] and beats(j, i) for j in range(n) if j != i) for i in range(n)]
    return [f"{w + 1}=" if worse_than.count(w) > 1 else f"{w + 1}" for w in worse_than]
