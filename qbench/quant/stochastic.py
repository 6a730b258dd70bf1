"""Stochastic path following (SPFQ): each value goes to a neighbouring level by chance, without bias."""

from __future__ import annotations

import torch
from torch import Tensor

from qbench.errors import Unsupported
from qbench.quant import alphabet as alphabets
from qbench.quant.path_following import follow_path

_WIDEST = 15  # bits of a code, without its sign, that an unbounded alphabet may take


def stochastic_path(
    aligned: Tensor, H: Tensor, step: Tensor, uniforms: Tensor, bits: int | None
) -> tuple[Tensor, Tensor]:
    """Follow the path of weights w~ in their own inputs; a value between two levels goes down where `u < 1 - fraction`.

    With w~ of `align`, this is phase II of arXiv:2309.10975, and with one pass of it the method of order 1 as well.

    Args:
        aligned: w~, (groups, n, d).
        H: X~'X~, (groups, d, d); the path is followed in its precision.
        step: distance of levels, () or (groups * n, 1), above 0.
        uniforms: (groups, n, d), from 0 to 1: of each weight.
        bits: codes from -2**(bits-1) to 2**(bits-1); None does not bound them.

    Returns:
        Codes, int64, and the values that were rounded in units of the weights: (groups, n, d) each.

    Raises:
        Unsupported: unbounded codes need more than 16 bits.
    """
    groups, n, _ = aligned.shape
    scale = step.to(H).expand(groups * n, 1).reshape(groups, n, 1)
    top = 1 << _WIDEST if bits is None else 1 << (bits - 1)
    whole = alphabets.uniform(torch.ones((), dtype=H.dtype, device=H.device), top.bit_length())
    path = follow_path(aligned.to(H) / scale, H, H, whole, dither=uniforms.to(H) - 0.5)
    codes = path.indices - top
    if bits is None and bool((codes.abs() == top).any()):
        raise Unsupported("the unbounded alphabet needs codes of more than 16 bits here; use alphabet=midtread")
    return codes, path.values * scale
