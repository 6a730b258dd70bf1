"""Rounding in the order of least harm, all others making up for each error (Optimal Brain Quantizer)."""

from __future__ import annotations

import torch
from torch import Tensor

from qbench.quant.full_grids import Grid, Grids, Rounded
from qbench.quant.second_order import conditioned, inverse_factor

_BLOCK = 32  # weights of a row that are rounded before its inverse Hessian is brought up to date
_CHUNK = 1 << 22  # numbers in the inverse Hessians that are held at a time


def surgeon(weight: Tensor, H: Tensor, grids: Grids, *, damp: float) -> Rounded:
    """Round, in each row, the weight whose rounding costs least, move the others to make up for it, and so on.

    Rounding weight j costs `(w_j - q_j)^2 / I_jj` with I the inverse of H over the weights not rounded yet; each other
    weight i then moves by `-I_ij (w_j - q_j) / I_jj`. A weight that has moved beyond the grid by more than half a step
    is rounded at once, unless the weight whose turn it is is 0. All rows of all groups go on together, in O(d^3) each.
    Source: arXiv:2208.11580.

    Args:
        weight: (groups, n, d) float weights of the n neurons of each group.
        H: X~'X~, (groups, d, d).
        grids: how the grid of a neuron is found.
        damp: part of the mean of H's diagonal that is added to it.

    Raises:
        UserError: H is singular, and `damp` too small to mend that.
    """
    weight, H = conditioned(weight, H, damp)
    groups, n, d = weight.shape
    grid = grids.fit(weight)
    U = inverse_factor(H)
    inverse = U.mT @ U
    rows = weight.flatten(0, 1).double()
    scale, zero = (value.flatten(0, 1).double() for value in (grid.scale, grid.zero))
    group = torch.arange(groups, device=rows.device).repeat_interleave(n)
    step = max(1, _CHUNK // d**2)
    parts = [slice(first, first + step) for first in range(0, len(rows), step)]
    codes = [_round_rows(rows[own], inverse[group[own]], Grid(scale[own], zero[own], grids.bits)) for own in parts]
    return Rounded(torch.cat(codes).reshape(groups, n, d), grid.scale, grid.zero, grids)


def _round_rows(rows: Tensor, inverse: Tensor, grid: Grid) -> Tensor:
    """Codes of rows (R, d), each with an inverse Hessian (R, d, d) of its own."""
    codes = torch.empty_like(rows)
    left = torch.arange(rows.shape[1], device=rows.device).expand_as(rows)
    while left.shape[1]:
        count = min(_BLOCK, left.shape[1])
        rows, removed, chosen = _round_some(rows, inverse, grid, count)
        picked = left.gather(1, chosen)
        codes.scatter_(1, picked, grid.codes(rows.gather(1, chosen)))
        stay = torch.ones_like(left, dtype=torch.bool).scatter_(1, chosen, False)
        keep = stay.nonzero()[:, 1].reshape(len(left), -1)
        rows, left = rows.gather(1, keep), left.gather(1, keep)
        inverse = inverse.take_along_dim(keep[:, :, None], 1).take_along_dim(keep[:, None], 2)
        removed = removed.take_along_dim(keep[:, None], 2)
        inverse = torch.baddbmm(inverse, removed.mT, removed, alpha=-1)
    return codes


def _round_some(rows: Tensor, inverse: Tensor, grid: Grid, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Round `count` weights of each row.

    Returns:
        The rows (R, m), where those weights stay as they were when their turn came; what is to be taken from the
        inverse Hessians, as factors (R, count, m); which weights they are, (R, count).
    """
    every = torch.arange(len(rows), device=rows.device)
    now, final = rows.clone(), rows.clone()
    done = torch.zeros_like(now, dtype=torch.bool)
    diagonal = inverse.diagonal(dim1=1, dim2=2).clone()
    removed = inverse.new_zeros(len(rows), count, rows.shape[1])
    chosen = torch.empty(len(rows), count, dtype=torch.int64, device=rows.device)
    for k in range(count):
        error = now - grid.decode(grid.codes(now))
        squared = error.square().masked_fill_(done, 0)
        j = (squared / diagonal).masked_fill_(done, torch.inf).argmin(1)
        beyond = (squared > 0.25 * grid.scale.square()).any(1) & (now[every, j] != 0)
        j = torch.where(beyond, squared.argmax(1), j)
        earlier = removed[:, :k]
        column = inverse[every, j] - (earlier[every, :, j][:, None] @ earlier)[:, 0]
        pivot = column[every, j]
        final[every, j] = now[every, j]
        now = now - column * (error[every, j] / pivot)[:, None]
        removed[:, k] = column / pivot.sqrt()[:, None]
        diagonal -= removed[:, k].square()
        done[every, j] = True
        chosen[:, k] = j
    return torch.where(done, final, now), removed, chosen
