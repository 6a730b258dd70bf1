"""Levels that are sums of a few numbers, one for each bit, fitted to points (LQ-Nets, arXiv:1807.10029)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from qbench.quant.segments import sums_by
from qbench.quant.step_search import best_step

Digits = Literal["signs", "bits"]
"""What each number is multiplied with: -1 or 1, or 0 or 1."""

_STIFFNESS = 1e-9


def digits(bits: int, kind: Digits, like: Tensor) -> Tensor:
    """(2**bits, bits): the factors of each code, whose first bit is the lowest."""
    codes = torch.arange(2**bits, device=like.device)[:, None]
    chosen = (codes >> torch.arange(bits, device=like.device)) & 1
    return (chosen if kind == "bits" else 2 * chosen - 1).to(like)


def summed(basis: Tensor, factors: Tensor) -> Tensor:
    """`sum_i basis[:, i] * factors[i]`, added up from the first to the last.

    Args:
        basis: (R, bits).
        factors: (bits, R or 1, ...), of any further axes.
    """
    parts = basis.T.reshape(*basis.T.shape, *[1] * (factors.dim() - 2)) * factors
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


def levels_of(basis: Tensor, kind: Digits) -> Tensor:
    """The 2**bits levels (R, 2**bits) of a basis (R, bits), by their codes."""
    return summed(basis, digits(basis.shape[1], kind, basis).T[:, None])


def nearest_codes(points: Tensor, levels: Tensor) -> Tensor:
    """The index (R, n) of the level (R, K), in any order, that is nearest to each point (R, n)."""
    ordered, order = levels.sort(dim=1)
    middles = (ordered[:, 1:] + ordered[:, :-1]) / 2
    return order.gather(1, torch.searchsorted(middles, points.contiguous()))


def refit(points: Tensor, basis: Tensor, kind: Digits, mass: Tensor | None = None) -> Tensor:
    """The basis (R, bits) of least squared error for the codes that are nearest with this one; no error grows.

    Args:
        points: (R, n).
        basis: (R, bits).
        kind: of the factors.
        mass: (R, n) weights of the points' squared errors; None means 1.
    """
    factors = digits(basis.shape[1], kind, basis).double()
    codes = nearest_codes(points, levels_of(basis, kind))
    weights = torch.ones_like(points, dtype=torch.float64) if mass is None else mass.double()
    counts = sums_by(codes, weights, len(factors))
    # A bit that all points have alike leaves its number free: it stays where it is.
    stiffness = _STIFFNESS * counts.sum(1, keepdim=True).clamp(min=torch.finfo(counts.dtype).tiny)
    gram = torch.einsum("rc,ci,cj->rij", counts, factors, factors) + torch.diag_embed(stiffness.expand(basis.shape))
    wanted = sums_by(codes, weights * points, len(factors)) @ factors + stiffness * basis
    return torch.linalg.solve(gram, wanted).to(basis)


def fit_basis(points: Tensor, bits: int, kind: Digits, *, mass: Tensor | None = None, turns: int = 20) -> Tensor:
    """A basis (R, bits) for each row of points (R, n), by taking turns with the codes from equal distances on.

    Args:
        points: (R, n).
        bits: how many numbers, and so 2**bits levels.
        kind: of the factors; levels of signs lie symmetrically about 0, those of bits are 0 and up.
        mass: (R, n) weights of the points' squared errors; None means 1.
        turns: how often codes and basis are improved.
    """
    if kind == "bits":
        step = best_step(points, 0, 2**bits - 1, mass)
    elif bits == 1:
        step = points.abs().mean(1)
    else:
        step = best_step(points, -(2 ** (bits - 1)), 2 ** (bits - 1) - 1, mass) / 2
    basis = step[:, None] * 2.0 ** torch.arange(bits, device=points.device)
    for _ in range(turns):
        basis = refit(points, basis, kind, mass)
    return basis
