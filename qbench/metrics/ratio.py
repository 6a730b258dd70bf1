"""Ratio of paired samples."""

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
