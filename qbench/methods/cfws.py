"""Coarse and fine weight splitting."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from qbench.data import Data
from qbench.quant.encodings import Affine, Sum, from_rows, to_rows
from qbench.quant.layers import encode, output_axis, select_layers, weight_of
from qbench.registry import EdgeBits, method


@method("cfws", paper="arXiv:2312.10588")
def cfws(
    model: nn.Module,
    data: Data,
    *,
    bits: Annotated[int, Field(ge=2, le=16)] = 8,
    granularity: Literal["tensor", "channel"] = "channel",
    center: bool = True,
    edge_bits: EdgeBits = None,
    skip: tuple[str, ...] = (),
) -> nn.Module:
    """Write the heavy centre of re-parameterised kernels as a coarse and a fine part, on a grid each.

    The centre tap is rounded to a grid that reaches its largest value; what rounding leaves goes back to its place
    among the other taps, which get a grid of their own. Layers whose kernels have no centre beside other taps are
    rounded to one symmetric grid per output channel. The coarse part is stored with the kernel's shape: twice the bits
    of one grid, where a branch of its own would need the centre only.

    Args:
        model: changed in place; `reparameterize` goes first where it has blocks to merge.
        data: not used.
        bits: width of the codes of either part.
        granularity: what shares a coarse step: a tensor or an output channel. The fine grid is one per channel.
        center: split the centre tap only; otherwise all weights, in all layers.
        edge_bits: bits of the first and the last layer; 32 leaves them in float.
        skip: names, or first parts of names, of layers left in float.
    """
    split: list[str] = []
    for name, layer, width in select_layers(model, bits, edge_bits, skip):
        weight, axis = weight_of(layer), output_axis(layer)
        kernel = weight.shape[2:]
        if center and (kernel.numel() < 2 or any(size % 2 == 0 for size in kernel)):
            encode(layer, Affine.nearest(weight, _step(weight, width, axis), bits=width, axis=axis))
            continue
        coarse, fine, step = coarse_and_fine(weight, width, granularity, center=center, axis=axis)
        parts = (
            Affine.nearest(coarse, step, bits=width, axis=axis),
            Affine.nearest(fine, _step(fine, width, axis), bits=width, axis=axis),
        )
        encode(layer, Sum(parts))
        split.append(name)
    data.record("cfws", {"split": split})
    return model


def coarse_and_fine(
    weight: Tensor, bits: int = 8, granularity: str = "channel", *, center: bool = True, axis: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Coarse part, fine part and the step of the coarse one: (1,) or (N,), 1 where there is nothing to round.

    Args:
        weight: of a layer; it is the sum of the two parts.
        bits: of the coarse part: its codes reach 2**(bits - 1) - 1.
        granularity: whether a step belongs to the `tensor` or to a `channel`.
        center: only the centre tap has a coarse part.
        axis: of the output channels.
    """
    rows = to_rows(weight, axis)
    inside = torch.zeros(weight.shape[2:], dtype=torch.bool, device=weight.device)
    inside[tuple(size // 2 for size in inside.shape) if center else ...] = True
    coarse = rows * inside.flatten().repeat(rows.shape[1] // inside.numel())
    top = coarse.abs().amax(1, keepdim=True) if granularity == "channel" else coarse.abs().amax().reshape(1, 1)
    step = torch.where(top > 0, top / (2 ** (bits - 1) - 1), 1.0)
    coarse = step * (coarse / step + 0.5).floor()
    return from_rows(coarse, weight.shape, axis), from_rows(rows - coarse, weight.shape, axis), step.flatten()


def _step(weight: Tensor, bits: int, axis: int) -> Tensor:
    return to_rows(weight, axis).abs().amax(1) / (2 ** (bits - 1) - 1)
