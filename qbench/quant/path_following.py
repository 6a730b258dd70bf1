"""Path following from Gram matrices: all neurons and groups of a layer at once."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from qbench.quant.alphabet import Alphabet

_BLOCK = 64  # columns whose mutual corrections are made one by one; all later ones by one matrix product


class Path(NamedTuple):
    """The weights that were chosen, and what was asked for in their places: (groups, n, d) each."""

    indices: Tensor
    """int64, into the alphabet's levels."""
    values: Tensor
    """What was rounded to those levels."""


def follow_path(
    weight: Tensor,
    H: Tensor,
    G: Tensor,
    alphabet: Alphabet,
    *,
    act_order: bool = False,
    dither: Tensor | None = None,
) -> Path:
    """Choose the weights one column after the other, each the best answer to the error so far.

    Column t takes the level nearest to `(sum_{s<=t} G[t,s] w_s - sum_{s<t} H[t,s] q_s) / H[t,t]`, which is the level
    that makes the error `X w - X~ q` of the first t columns smallest; 0 stands for the quotient where H[t,t] is 0.
    Source: arXiv:2201.11113 (GPFQ), in Gram form.

    Args:
        weight: (groups, n, d) float weights of the n neurons of each group.
        H: X~'X~, (groups, d, d).
        G: X~'X, (groups, d, d); unless `act_order`, only what is on and below the diagonal is read.
        alphabet: levels of the layer, or of each of its groups * n neurons.
        act_order: take the columns by decreasing H[t,t] instead of from left to right.
        dither: (groups, n, d), added to each value before it is rounded; drawn evenly from half a step below to half a
            step above 0, it makes rounding to an equally spaced alphabet stochastic and without bias.
    """
    weight = weight.to(H)
    if act_order:
        order = _by_energy(H)
        noise = None if dither is None else _columns(dither, order)
        path = follow_path(_columns(weight, order), _both(H, order), _both(G, order), alphabet, dither=noise)
        return Path(*(_columns(part, order.argsort(1)) for part in path))
    _, n, d = weight.shape
    levels, thresholds = _shaped(alphabet.levels.to(H), n), _shaped(alphabet.thresholds.to(H), n)
    norms = H.diagonal(dim1=1, dim2=2)
    inverse = torch.where(norms > 0, 1 / norms, 0.0)
    # One column of a weight is one row here, so that what the loop touches lies together.
    wanted = weight.mT.contiguous()
    chosen = torch.empty_like(wanted)
    values = torch.empty_like(wanted)
    indices = torch.empty_like(wanted, dtype=torch.int64)
    noise = None if dither is None else dither.to(wanted).mT.contiguous()
    for first in range(0, d, _BLOCK):
        last = min(first + _BLOCK, d)
        own, before = slice(first, last), slice(0, first)
        block = G[:, own, :last].tril(first) @ wanted[:, :last] - H[:, own, before] @ chosen[:, before]
        block *= inverse[:, own, None]
        within = H[:, own, own] * inverse[:, own, None]
        picked = []
        for t, (now, effect) in enumerate(zip(block.unbind(1), within.split(1, 2), strict=True), 1):
            rounded = now if noise is None else now + noise[:, first + t - 1]
            index = torch.searchsorted(thresholds, rounded[..., None].contiguous(), right=True)
            value = _pick(levels, index).mT
            picked.append((index, value))
            block[:, t:].addcmul_(effect[:, t:], value, value=-1)
        indices[:, own] = torch.cat([index.mT for index, _ in picked], 1)
        chosen[:, own] = torch.cat([value for _, value in picked], 1)
        values[:, own] = block  # later columns alone were corrected since each was rounded
    return Path(indices.mT, values.mT)


def align(weight: Tensor, H: Tensor, G: Tensor, order: int = 1, *, act_order: bool = False) -> Tensor:
    """Float weights w~ for the inputs X~ that answer like the weights w for the inputs X.

    The first pass is the path without rounding; each further one goes through the columns again and makes the error
    smallest in one weight after the other. A pass is one triangular system. Source: arXiv:2309.10975, phase I.

    Args:
        weight: (groups, n, d).
        H: X~'X~, (groups, d, d).
        G: X~'X, all of it unless `order` is 1.
        order: passes.
        act_order: take the columns by decreasing H[t,t] instead of from left to right.

    Returns:
        (groups, n, d) in the precision of H; 0 where H[t,t] is 0.
    """
    weight = weight.to(H)
    if act_order:
        by = _by_energy(H)
        return _columns(align(_columns(weight, by), _both(H, by), _both(G, by), order), by.argsort(1))
    lower = H.tril()
    diagonal = lower.diagonal(dim1=1, dim2=2)
    diagonal += diagonal == 0
    aligned = torch.linalg.solve_triangular(lower, G.tril() @ weight.mT, upper=False)
    for _ in range(order - 1):
        aligned = torch.linalg.solve_triangular(lower, G @ weight.mT - H.triu(1) @ aligned, upper=False)
    return aligned.mT


def squared_error(weight: Tensor, quantized: Tensor, H: Tensor, G: Tensor, F: Tensor) -> tuple[Tensor, Tensor]:
    """`||X w - X~ q||^2` and `||X w||^2` summed over neurons, per group: (..., groups) and (groups,).

    Args:
        weight: (groups, n, d).
        quantized: (..., groups, n, d), one or more weights to take the error of.
        H: X~'X~, (groups, d, d).
        G: X~'X.
        F: X'X.
    """
    w, q = weight.to(H), quantized.to(H)
    energy = (w @ F * w).sum((-2, -1))
    error = energy + ((q @ H - 2 * (w @ G.mT)) * q).sum((-2, -1))
    return error.clamp(min=0), energy


def _by_energy(H: Tensor) -> Tensor:
    """(groups, d): the columns by decreasing H[t,t]."""
    return H.diagonal(dim1=1, dim2=2).argsort(dim=1, descending=True, stable=True)


def _columns(weight: Tensor, order: Tensor) -> Tensor:
    """(groups, n, d) with the columns of each group in an order (groups, d)."""
    return weight.gather(2, order[:, None].expand_as(weight))


def _both(square: Tensor, order: Tensor) -> Tensor:
    """(groups, d, d) with rows and columns in that order."""
    return square.gather(1, order[..., None].expand_as(square)).gather(2, order[:, None].expand_as(square))


def _shaped(values: Tensor, n: int) -> Tensor:
    """(K,) stays, (groups * n, K) becomes (groups, n, K)."""
    return (values if values.dim() == 1 else values.reshape(-1, n, values.shape[-1])).contiguous()


def _pick(levels: Tensor, index: Tensor) -> Tensor:
    return levels[index] if levels.dim() == 1 else levels.gather(-1, index)
