"""Rounding that later weights make up for, by the inverse Hessian of the layer's error (GPTQ)."""

from __future__ import annotations

import torch
from torch import Tensor

from qbench.errors import UserError
from qbench.quant.full_grids import Grids, Rounded

_BLOCK = 128  # columns whose mutual corrections are made one by one; all later ones by one matrix product


def conditioned(weight: Tensor, H: Tensor, damp: float) -> tuple[Tensor, Tensor]:
    """Make H positive definite: `damp` times its mean diagonal is added; columns without any input become 0 and apart.

    Args:
        weight: (groups, n, d).
        H: X~'X~ times any number, (groups, d, d).
        damp: at least 0.

    Returns:
        The weight, and H in float64.
    """
    H = H.double()
    diagonal = H.diagonal(dim1=1, dim2=2)
    dead = diagonal == 0
    extra = torch.where(dead, 1.0, damp * diagonal.mean(1, keepdim=True))
    return weight.masked_fill(dead[:, None], 0), H + extra.diag_embed()


def compensate(
    weight: Tensor, H: Tensor, grids: Grids, *, group_size: int | None = None, act_order: bool = False, damp: float
) -> Rounded:
    """Round one column after the other to its nearest code, and move all later ones so that they make up for the error.

    With U the upper Cholesky factor of H's inverse, column t leaves the error `e = (w_t - q_t) / U[t,t]`, and
    `e U[t,s]` is taken from each later column s. Source: arXiv:2210.17323.

    Args:
        weight: (groups, n, d) float weights of the n neurons of each group.
        H: X~'X~, (groups, d, d).
        grids: how the grid of a neuron, or of a group of its columns, is found.
        group_size: columns that share a grid, which is found when the first of them is reached, from the weights as
            they have been moved by then; None for all columns.
        act_order: take the columns by decreasing H[t,t]. Groups then still are of neighbours in the weight, and all
            grids are found before the first column is rounded.
        damp: part of the mean of H's diagonal that is added to it.

    Raises:
        UserError: H is singular, and `damp` too small to mend that.
    """
    weight, H = conditioned(weight, H, damp)
    d = weight.shape[2]
    size = min(group_size or d, d)
    starts = range(0, d, size)
    # One column of a weight is one row here, so that what the loop touches lies together.
    now = weight.mT.contiguous()
    scale, zero, codes = torch.empty_like(now), torch.empty_like(now), torch.empty_like(now)
    if act_order:
        for start in starts:
            _fit(grids, now, start, size, scale, zero)
        order = H.diagonal(dim1=1, dim2=2).argsort(dim=1, descending=True, stable=True)
        now, scale, zero = (value.take_along_dim(order[:, :, None], 1) for value in (now, scale, zero))
        H = H.take_along_dim(order[:, :, None], 1).take_along_dim(order[:, None], 2)
    U = inverse_factor(H).to(now)
    for start in starts:
        if not act_order:
            _fit(grids, now, start, size, scale, zero)
        for first in range(start, min(start + size, d), _BLOCK):
            last = min(first + _BLOCK, start + size, d)
            own = slice(first, last)
            codes[:, own], errors = _round_block(now[:, own], U[:, own, own], scale[:, own], zero[:, own], grids.bits)
            now[:, last:] -= U[:, own, last:].mT @ errors
    if act_order:
        back = order.argsort(1)[:, :, None]
        codes, scale, zero = (value.take_along_dim(back, 1) for value in (codes, scale, zero))
    return Rounded(codes.mT, scale[:, ::size].mT, zero[:, ::size].mT, grids, None if size == d else size)


def _fit(grids: Grids, now: Tensor, start: int, size: int, scale: Tensor, zero: Tensor) -> None:
    """Write the scale and zero of the columns from `start`."""
    grid = grids.fit(now[:, start : start + size].mT)
    scale[:, start : start + size], zero[:, start : start + size] = grid.scale.mT, grid.zero.mT


def _round_block(now: Tensor, U: Tensor, scale: Tensor, zero: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Codes and errors e of some columns, (groups, columns, n), which are moved in place."""
    codes, errors, top = torch.empty_like(now), torch.empty_like(now), 2**bits - 1
    inverse = 1 / U.diagonal(dim1=1, dim2=2)[:, :, None]
    for t in range(now.shape[1]):
        step, offset = scale[:, t], zero[:, t]
        code = (now[:, t] / step).round_().add_(offset).clamp_(0, top)
        codes[:, t] = code
        error = (now[:, t] - (code - offset) * step) * inverse[:, t]
        errors[:, t] = error
        now[:, t + 1 :].addcmul_(U[:, t, t + 1 :, None], error[:, None], value=-1)
    return codes, errors


def inverse_factor(H: Tensor) -> Tensor:
    """Upper triangular U with `U'U` the inverse of H, (groups, d, d).

    Raises:
        UserError: H is not positive definite.
    """
    # The inverse itself is not needed: H reversed is L L', so that H is V V' with V, L reversed, upper triangular.
    factor, failed = torch.linalg.cholesky_ex(H.flip(1, 2))
    if bool(failed.any()):
        raise UserError("damp is too small: the inputs of a layer are linearly dependent; use damp=0.01 or more")
    eye = torch.eye(H.shape[-1], dtype=H.dtype, device=H.device)
    return torch.linalg.solve_triangular(factor.flip(1, 2), eye.expand_as(H), upper=True)
