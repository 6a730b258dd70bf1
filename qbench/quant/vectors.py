"""k-means of vectors whose errors are measured by a metric of their own."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_CHUNK = 1 << 23  # entries of the table of costs in memory at a time


@dataclass(frozen=True)
class Clusters:
    """Centroids (K, g), the index (B, n) of each vector's centroid, and the objective after each assignment."""

    centroids: Tensor
    codes: Tensor
    objectives: tuple[float, ...]


def cluster(vectors: Tensor, metric: Tensor, k: int, iterations: int = 25, seed: int = 0) -> Clusters:
    """Centroids with a locally least sum of (v - c)' M (v - c) over all vectors v, M being that of v's block.

    Lloyd's algorithm from vectors drawn at random: each centroid is the solution of the normal equations of its
    vectors; one without vectors moves to the vector with the largest cost. The objective never grows.

    Args:
        vectors: (B, n, g), n vectors in each of B blocks.
        metric: (B, g, g), symmetric and positive definite.
        k: centroids, at most B * n.
        iterations: at most.
        seed: of the start.
    """
    vectors, metric = vectors.double(), metric.double()
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randperm(vectors.shape[0] * vectors.shape[1], generator=generator)[:k]
    centroids = vectors.flatten(0, 1)[drawn.to(vectors.device)]
    objectives: list[float] = []
    previous: Tensor | None = None
    while True:
        codes, costs = _assign(vectors, metric, centroids)
        objectives.append(float(costs.sum()))
        if len(objectives) > iterations or (previous is not None and torch.equal(codes, previous)):
            return Clusters(centroids, codes, tuple(objectives))
        previous = codes
        centroids = _solve(vectors, metric, _fill(codes, costs, k), centroids)


def _assign(vectors: Tensor, metric: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
    """Index and cost (B, n) of the cheapest centroid."""
    step = max(1, _CHUNK // (vectors.shape[1] * len(centroids)))
    codes, costs = [], []
    for v, m in zip(vectors.split(step), metric.split(step), strict=True):
        own = torch.einsum("bij,ki,kj->bk", m, centroids, centroids)
        turned = v @ m
        best = (own[:, None] - 2 * turned @ centroids.T).min(-1)
        codes.append(best.indices)
        costs.append((best.values + (turned * v).sum(-1)).clamp(min=0))
    return torch.cat(codes), torch.cat(costs)


def _fill(codes: Tensor, costs: Tensor, k: int) -> Tensor:
    """Give each centroid without vectors the vector that costs most."""
    empty = torch.bincount(codes.flatten(), minlength=k) == 0
    worst = costs.flatten().topk(int(empty.sum()))
    moved = worst.indices[worst.values > 0]
    filled = codes.flatten().clone()
    filled[moved] = empty.nonzero()[: len(moved), 0]
    return filled.view_as(codes)


def _solve(vectors: Tensor, metric: Tensor, codes: Tensor, centroids: Tensor) -> Tensor:
    """Each centroid that is best for its vectors; one without vectors stays."""
    blocks, (k, g) = len(vectors), centroids.shape
    counts = torch.zeros(blocks, k, dtype=vectors.dtype, device=vectors.device)
    counts.scatter_add_(1, codes, torch.ones_like(codes, dtype=vectors.dtype))
    left = torch.einsum("bk,bij->kij", counts, metric)
    turned = (vectors @ metric).flatten(0, 1)
    # Sums in a fixed order, which index_add_ does not have on a GPU.
    order = codes.flatten().argsort(stable=True)
    lengths = torch.bincount(codes.flatten(), minlength=k)
    right = torch.segment_reduce(turned[order], "sum", lengths=lengths, initial=0)
    empty = counts.sum(0) == 0
    left[empty] = torch.eye(g, dtype=left.dtype, device=left.device)
    right[empty] = centroids[empty]
    return torch.linalg.solve(left, right)
