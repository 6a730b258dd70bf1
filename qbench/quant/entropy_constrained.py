"""Entropy-constrained scalar quantization: levels that weigh squared error against the bits of their codes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

_ITERATIONS = 50
_STILL = 1e-5  # of the objective: less is no progress
_HALVINGS = 6  # of a factor of 8


@dataclass(frozen=True)
class Partition:
    """Ascending levels (k,) and the cuts (k - 1,) between them; a point on a cut belongs to the lower level."""

    levels: np.ndarray
    cuts: np.ndarray
    tradeoff: float
    """Squared error that a bit is worth."""
    objectives: tuple[float, ...]
    """Mean of squared error + tradeoff * bits, after each iteration."""

    def assign(self, points: np.ndarray) -> np.ndarray:
        """The index of each point's level."""
        return np.searchsorted(self.cuts, points)


def fit(points: np.ndarray, most: int) -> Partition:
    """The partition with at most `most` levels at the smallest tradeoff that leaves no more (arXiv 2108.12704).

    Starts from 3 * most equally populated clusters; those that attract no points any more are dropped. The tradeoff is
    found by bisection. Clusters that remain equally populated at any price are too many forever: then Lloyd's algorithm
    with `most` clusters decides.

    Args:
        points: (n,), n > 0.
        most: levels.
    """
    ordered = np.sort(points.astype(np.float64))
    variance = float(ordered.var())
    best = descend(ordered, 3 * most, 0.0)
    if len(best.levels) <= most or variance == 0:
        return best
    low, high = 1e-5 * variance, 1e-5 * variance
    while len(best.levels) > most:
        if high > 1e6 * variance:
            return descend(ordered, most, 0.0)
        low, high = high, high * 8
        best = descend(ordered, 3 * most, high)
    for _ in range(_HALVINGS):
        middle = (low * high) ** 0.5
        found = descend(ordered, 3 * most, middle)
        if len(found.levels) > most:
            low = middle
        else:
            high, best = middle, found
    return best


def descend(ordered: np.ndarray, start: int, tradeoff: float) -> Partition:
    """Alternate between assigning points and moving levels until the objective stands still; it never grows.

    Args:
        ordered: (n,) ascending, float64.
        start: equally populated clusters to begin with.
        tradeoff: squared error that a bit is worth; 0 is Lloyd's algorithm.
    """
    n = len(ordered)
    first = np.concatenate([[0.0], ordered.cumsum()])
    second = np.concatenate([[0.0], (ordered**2).cumsum()])
    edges = np.unique(np.linspace(0, n, min(start, n) + 1).astype(int))
    mass = np.diff(edges).astype(np.float64)
    levels = np.diff(first[edges]) / mass
    objectives: list[float] = []
    while True:
        levels, cuts = _cuts(levels, mass / n, tradeoff)
        edges = np.concatenate([[0], np.searchsorted(ordered, cuts, side="right"), [n]])
        taken = np.diff(edges) > 0
        # A level without points is dropped, and so is the cut below it (above it, if it is the lowest).
        keep = np.flatnonzero(taken)
        cuts, edges = cuts[keep[1:] - 1], np.append(edges[:-1][taken], n)
        mass = np.diff(edges).astype(np.float64)
        sums = np.diff(first[edges])
        levels = sums / mass
        error = float((np.diff(second[edges]) - sums**2 / mass).sum()) / n
        bits = float((mass * np.log2(n / mass)).sum()) / n
        objectives.append(error + tradeoff * bits)
        settled = len(objectives) > 1 and objectives[-2] - objectives[-1] <= _STILL * objectives[-2]
        if settled or len(objectives) == _ITERATIONS:
            return Partition(levels, cuts, tradeoff, tuple(objectives))


def _cuts(levels: np.ndarray, share: np.ndarray, tradeoff: float) -> tuple[np.ndarray, np.ndarray]:
    """The levels that are best for some value, and the values between which they are.

    What a value pays with a level is linear in the value but for its square, so the best form a lower envelope of
    lines; a level is not on it if its cuts with its neighbours are in the wrong order.
    """
    levels, same = np.unique(levels, return_inverse=True)
    price = -tradeoff * np.log2(np.bincount(same, weights=share))
    while True:
        gap = np.diff(levels)
        cuts = (levels[:-1] + levels[1:]) / 2 + np.diff(price) / (2 * gap)
        wrong = cuts[:-1] - cuts[1:]
        if not len(wrong) or wrong.max() < 0:
            return levels, cuts
        worst = int(wrong.argmax()) + 1
        levels, price = np.delete(levels, worst), np.delete(price, worst)
