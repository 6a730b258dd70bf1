"""One-dimensional k-means of many rows at once: Lloyd's algorithm, and where it starts.

Rows are sorted once; a cluster is then a run of neighbours, and every sum a difference of prefix sums.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from torch import Tensor

Start = Literal["optimal", "linear", "kmeans++"]

_POINTS = 4096  # into which a longer row is condensed to choose a start
_BUDGET = 1 << 22  # rows x points x clusters of that choice
_CHUNK = 1 << 24  # entries of the dynamic program in memory at a time


def kmeans(points: Tensor, k: int, start: Start = "optimal", seed: int = 0, iterations: int = 300) -> Tensor:
    """Levels (R, min(k, n)) of each row, ascending, with a locally least squared error; fewer distinct ones if need be.

    Args:
        points: (R, n).
        k: clusters.
        start: `optimal` is the global optimum (by dynamic programming) of the row condensed to 4,096 runs of sorted
            neighbours (fewer for many rows and clusters), and so of the row itself if it is that short; `linear` is
            even spacing from least to greatest (Deep Compression, arXiv 1510.00149); `kmeans++` draws points by their
            squared distance.
        seed: of `kmeans++`.
        iterations: of Lloyd's algorithm at most; an empty cluster keeps its level.
    """
    ordered = np.sort(points.detach().double().cpu().numpy(), axis=1)
    k = min(k, ordered.shape[1])
    if start == "linear":
        levels = np.ascontiguousarray(np.linspace(ordered[:, 0], ordered[:, -1], k, axis=1))
    else:
        points_kept = max(k, min(_POINTS, _BUDGET // (len(ordered) * k)))
        means, counts = condense(ordered, points_kept)
        levels = optimal(means, counts, k) if start == "optimal" else _plus_plus(means, counts, k, seed)
    return torch.from_numpy(lloyd(ordered, levels, iterations)).to(points)


def lloyd(ordered: np.ndarray, levels: np.ndarray, iterations: int = 300) -> np.ndarray:
    """Lloyd's algorithm on sorted rows (R, n) from levels (R, k) until nothing moves; the error never grows."""
    rows, n = ordered.shape
    sums = np.concatenate([np.zeros((rows, 1)), ordered.cumsum(1)], axis=1)
    tensor, previous = torch.from_numpy(ordered), None
    for _ in range(iterations):
        middles = torch.from_numpy((levels[:, 1:] + levels[:, :-1]) / 2)
        cuts = torch.searchsorted(tensor, middles, right=True).numpy()
        edges = np.concatenate([np.zeros((rows, 1), int), cuts, np.full((rows, 1), n)], axis=1)
        if previous is not None and np.array_equal(edges, previous):
            break
        previous = edges
        total, count = np.diff(np.take_along_axis(sums, edges, 1)), np.diff(edges)
        levels = np.where(count > 0, total / np.maximum(count, 1), levels)
    return levels


def condense(ordered: np.ndarray, points: int) -> tuple[np.ndarray, np.ndarray]:
    """Sorted rows (R, n) as means (R, m) of m <= points runs of about equal length, and those lengths (m,)."""
    edges = np.linspace(0, ordered.shape[1], min(points, ordered.shape[1]) + 1).astype(int)
    counts = np.diff(edges)
    return np.add.reduceat(ordered, edges[:-1], axis=1) / counts, counts


def optimal(points: np.ndarray, counts: np.ndarray, k: int) -> np.ndarray:
    """The levels (R, k) with the least squared error of sorted points (R, m) that occur `counts` (m,) times.

    Dynamic programming over prefixes; divide and conquer over the monotone split points makes it O(k m log m) a row.
    Where a row has fewer than k distinct points, levels repeat.
    """
    if points.shape[1] <= k:
        return points
    chunk = max(1, _CHUNK // (k * (points.shape[1] + 1)))
    parts = [_optimal(points[i : i + chunk], counts, k) for i in range(0, len(points), chunk)]
    return np.concatenate(parts)


def _optimal(points: np.ndarray, counts: np.ndarray, k: int) -> np.ndarray:
    rows, m = points.shape
    centred = points - points.mean(1, keepdims=True)  # for the digits of the differences below
    zero = np.zeros((rows, 1))
    mass = np.concatenate([[0.0], counts.cumsum()])
    first = np.concatenate([zero, (centred * counts).cumsum(1)], axis=1)
    second = np.concatenate([zero, (centred**2 * counts).cumsum(1)], axis=1)
    least = second - first**2 / np.maximum(mass, 1)  # one cluster holds the first i points
    splits = [np.zeros((rows, m + 1), np.int32)]
    for _ in range(k - 1):
        least, split = _another_cluster(least, mass, first, second)
        splits.append(split)
    edges = np.empty((rows, k + 1), int)
    edges[:, k] = m
    for j in range(k - 1, -1, -1):
        edges[:, j] = np.take_along_axis(splits[j], edges[:, j + 1 : j + 2], 1)[:, 0]
    whole = np.concatenate([zero, (points * counts).cumsum(1)], axis=1)
    total, count = np.diff(np.take_along_axis(whole, edges, 1)), np.diff(mass[edges])
    nearby = np.take_along_axis(points, np.minimum(edges[:, :-1], m - 1), 1)
    return np.sort(np.where(count > 0, total / np.maximum(count, 1), nearby), axis=1)


def _another_cluster(
    least: np.ndarray, mass: np.ndarray, first: np.ndarray, second: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """`min over s <= i of least[s] + error(s..i)` for every prefix i, and the first s that attains it: (R, m + 1) each.

    The best s grows with i, so prefixes are solved at every 2**t-th place, t falling, between their neighbours' s.
    """
    rows, size = least.shape
    split = np.zeros((rows, size), np.int32)
    best = np.zeros((rows, size))
    stride = 1 << (size - 1).bit_length()
    while stride := stride // 2:
        places = np.arange(stride, size, 2 * stride)
        above = places + stride
        low = split[:, places - stride]
        high = np.where(above < size, split[:, np.minimum(above, size - 1)], size)
        high = np.minimum(high, places)
        lengths = (high - low + 1).ravel()
        starts = np.concatenate([[0], lengths.cumsum()[:-1]])
        s = np.arange(lengths.sum()) + np.repeat(low.ravel() - starts, lengths)
        row = np.repeat(np.repeat(np.arange(rows), len(places)), lengths)
        i = np.repeat(np.tile(places, rows), lengths)
        weight = np.maximum(mass[i] - mass[s], 1)
        error = second[row, i] - second[row, s] - (first[row, i] - first[row, s]) ** 2 / weight
        value = least[row, s] + np.maximum(error, 0)
        smallest = np.minimum.reduceat(value, starts)
        hit = np.flatnonzero(value == np.repeat(smallest, lengths))[::-1]
        winner = np.empty(len(lengths), np.int32)
        winner[np.repeat(np.arange(len(lengths)), lengths)[hit]] = s[hit]  # the first hit is written last
        split[:, places], best[:, places] = winner.reshape(rows, -1), smallest.reshape(rows, -1)
    return best, split


def _plus_plus(points: np.ndarray, counts: np.ndarray, k: int, seed: int) -> np.ndarray:
    generator = np.random.default_rng(seed)
    rows = np.arange(len(points))
    mass = np.broadcast_to(counts, points.shape).astype(float)
    levels, distance = np.empty((len(points), k)), np.ones_like(points)
    for j in range(k):
        cumulated = (distance * mass).cumsum(1)
        drawn = generator.random((len(points), 1)) * cumulated[:, -1:]
        levels[:, j] = points[rows, np.minimum((cumulated <= drawn).sum(1), points.shape[1] - 1)]
        nearest = (points - levels[:, j : j + 1]) ** 2
        distance = nearest if j == 0 else np.minimum(distance, nearest)
    return np.sort(levels, axis=1)
