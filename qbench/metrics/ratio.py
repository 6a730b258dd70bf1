"""Ratios of paired samples, and quantiles that samples are enough for."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.stats import binom


def paired_ratio(
    quantized: Sequence[float], reference: Sequence[float], level: float = 0.95
) -> tuple[float, float, float]:
    """Median of the ratios of each round, with its confidence interval.

    The interval is between two order statistics (the sign test's), so it holds for any distribution; with fewer than
    six rounds it is the whole range, and covers less than 95 %.

    Args:
        quantized: one value a round.
        reference: the other value of the same rounds.
        level: of the interval.

    Returns:
        median, low, high.

    Raises:
        ValueError: the numbers of rounds differ, or there are none.
    """
    if len(quantized) != len(reference) or not quantized:
        raise ValueError(f"paired samples are needed, not {len(quantized)} and {len(reference)}")
    ratios = np.sort(np.asarray(quantized, dtype=float) / np.asarray(reference, dtype=float))
    n = len(ratios)
    tails = binom.cdf(np.arange(n), n, 0.5)
    outside = max(0, int((tails <= (1 - level) / 2).sum()) - 1)
    return float(np.median(ratios)), float(ratios[outside]), float(ratios[n - 1 - outside])


def quantile(samples: Sequence[float], share: float, level: float = 0.95) -> float | None:
    """The sample below which that share of all samples lies; None where there are too few to say.

    Enough are so many that the largest is beyond the quantile with the given confidence: 29 for 90 %, 299 for 99 %.
    """
    n = len(samples)
    if share**n > 1 - level:
        return None
    return float(np.quantile(np.asarray(samples, dtype=float), share, method="inverted_cdf"))
