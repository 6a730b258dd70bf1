"""Greedy path following (GPFQ) from Gram matrices: all neurons and groups of a layer at once."""

from __future__ import annotations

import torch
from torch import Tensor

from qbench.quant.alphabet import Alphabet

_BLOCK = 64  # columns whose mutual corrections are made one by one; all later ones by one matrix product


def follow_path(weight: Tensor, H: Tensor, G: Tensor, alphabet: Alphabet, *, act_order: bool = False) -> Tensor:
    """Choose the weights one column after the other, each the best answer to the error so far.

    Column t takes the level nearest to `(sum_{s<=t} G[t,s] w_s - sum_{s<t} H[t,s] q_s) / H[t,t]`, which is the level
    that makes the error `X w - X~ q` of the first t columns smallest; 0 stands for the quotient where H[t,t] is 0.
    Source: arXiv:2201.11113, in Gram form.

    Args:
        weight: (groups, n, d) float weights of the n neurons of each group.
        H: X~'X~, (groups, d, d).
        G: X~'X, (groups, d, d); unless `act_order`, only what is on and below the diagonal is read.
        alphabet: levels of the layer, or of each of its groups * n neurons.
        act_order: take the columns by decreasing H[t,t] instead of from left to right.

    Returns:
        (groups, n, d) int64 indices into the alphabet's levels.
    """
    weight = weight.to(H)
    if act_order:
        order = H.diagonal(dim1=1, dim2=2).argsort(dim=1, descending=True, stable=True)
        indices = follow_path(_columns(weight, order), _both(H, order), _both(G, order), alphabet)
        return _columns(indices, order.argsort(1))
    _, n, d = weight.shape
    levels, thresholds = _shaped(alphabet.levels.to(H), n), _shaped(alphabet.thresholds.to(H), n)
    norms = H.diagonal(dim1=1, dim2=2)
    inverse = torch.where(norms > 0, 1 / norms, 0.0)
    # One column of a weight is one row here, so that what the loop touches lies together.
    wanted = weight.mT.contiguous()
    chosen = torch.empty_like(wanted)
    indices = torch.empty_like(wanted, dtype=torch.int64)
    for first in range(0, d, _BLOCK):
        last = min(first + _BLOCK, d)
        own, before = slice(first, last), slice(0, first)
        block = G[:, own, :last].tril(first) @ wanted[:, :last] - H[:, own, before] @ chosen[:, before]
        block *= inverse[:, own, None]
        within = H[:, own, own] * inverse[:, own, None]
        picked = []
        for t, (now, effect) in enumerate(zip(block.unbind(1), within.split(1, 2), strict=True), 1):
            index = torch.searchsorted(thresholds, now[..., None].contiguous(), right=True)
            value = _pick(levels, index).mT
            picked.append((index, value))
            block[:, t:].addcmul_(effect[:, t:], value, value=-1)
        indices[:, own] = torch.cat([index.mT for index, _ in picked], 1)
        chosen[:, own] = torch.cat([value for _, value in picked], 1)
    return indices.mT


def squared_error(weight: Tensor, quantized: Tensor, H: Tensor, G: Tensor, F: Tensor) -> tuple[Tensor, Tensor]:
    """`||X w - X~ q||^2` and `||X w||^2` summed over neurons, per group: (groups,) each.

    Args:
        weight: (groups, n, d).
        quantized: (groups, n, d).
        H: X~'X~, (groups, d, d).
        G: X~'X.
        F: X'X.
    """
    w, q = weight.to(H), quantized.to(H)
    energy = (w @ F * w).sum((1, 2))
    error = energy - 2 * (q @ G * w).sum((1, 2)) + (q @ H * q).sum((1, 2))
    return error.clamp(min=0), energy


def _shaped(values: Tensor, n: int) -> Tensor:
    """(K,) stays, (groups * n, K) becomes (groups, n, K)."""
    return (values if values.dim() == 1 else values.reshape(-1, n, values.shape[-1])).contiguous()


def _pick(levels: Tensor, index: Tensor) -> Tensor:
    return levels[index] if levels.dim() == 1 else levels.gather(-1, index)


def _columns(weight: Tensor, order: Tensor) -> Tensor:
    return weight.gather(2, order[:, None].expand_as(weight))


def _both(square: Tensor, order: Tensor) -> Tensor:
    return square.gather(1, order[..., None].expand_as(square)).gather(2, order[:, None].expand_as(square))
