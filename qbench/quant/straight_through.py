"""Gradients for functions whose own is zero almost everywhere."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor


def straight_through(x: Tensor, value: Tensor, slope: Tensor | None = None) -> Tensor:
    """`value` as it is; the gradient goes to `value`, and times `slope` to x.

    Args:
        x: what the value was computed from, by steps.
        value: of x's shape.
        slope: dvalue/dx that is taken for the steps, broadcastable to x; None is 1.
    """
    return cast(Tensor, _StraightThrough.apply(x, value, slope))


def slower(x: Tensor, gain: float) -> Tensor:
    """x as it is, with its gradient times `gain`."""
    return straight_through(x, x.detach(), x.new_tensor(gain))


def sign(x: Tensor) -> Tensor:
    """1 where x >= 0, else -1."""
    return torch.where(x >= 0, 1.0, -1.0).to(x.dtype)


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, _x: Tensor, value: Tensor, slope: Tensor | None) -> Tensor:
        ctx.save_for_backward(slope)
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,), (slope,) = grads, ctx.saved_tensors
        own = None if not ctx.needs_input_grad[0] else grad if slope is None else grad * slope
        return own, grad if ctx.needs_input_grad[1] else None, None
