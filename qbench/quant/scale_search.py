"""Scales of the two factors of a product, searched in turn for the least weighted error of the product (PTQ4ViT)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Point = Tensor
"""A number (), or one for each output channel (C,)."""


@dataclass
class Factor:
    """One factor of a product, and the family of its quantizations."""

    quantized: Callable[[Point], Tensor]
    """The factor, quantized with that parameter."""
    grid: Tensor
    """(candidates,) what the parameter can be."""
    point: Point
    """What it is."""


def search(
    factors: tuple[Factor, Factor],
    product: Callable[[Tensor, Tensor], Tensor],
    target: Tensor,
    importance: Tensor,
    *,
    rounds: int,
    channels: int,
) -> float:
    """Set the points of both factors, the first one first, in turn, until neither changes or `rounds` are over.

    Args:
        factors: changed in place.
        product: of the two quantized factors.
        target: what the float product is.
        importance: of the squared error of each of its numbers.
        rounds: at most so many times.
        channels: axis of the product that counts output channels, for factors with a point for each.

    Returns:
        the weighted squared error in the end.
    """

    def error(left: Tensor, right: Tensor, like: Point) -> Tensor:
        each = (product(left, right) - target).square_().mul_(importance)
        return each.movedim(channels, 0).flatten(1).sum(1) if like.dim() else each.sum()

    first, second = factors
    for _ in range(rounds):
        before = [factor.point for factor in factors]
        fixed = second.quantized(second.point)
        first.point = _best(first, lambda point: error(first.quantized(point), fixed, point))  # noqa: B023
        held = first.quantized(first.point)
        second.point = _best(second, lambda point: error(held, second.quantized(point), point))  # noqa: B023
        if all(torch.equal(factor.point, old) for factor, old in zip(factors, before, strict=True)):
            break
    return float(error(first.quantized(first.point), second.quantized(second.point), torch.zeros(())))


def _best(factor: Factor, error: Callable[[Point], Tensor]) -> Point:
    errors = torch.stack([error(candidate.expand_as(factor.point)) for candidate in factor.grid])
    return factor.grid[errors.argmin(0)]
