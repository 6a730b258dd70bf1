"""LSQ+: inputs have a learned offset besides a learned step, and steps begin with what is there (arXiv:2004.09576)."""

from __future__ import annotations

import math
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from qbench.quant.activations import StaticQuantizer
from qbench.quant.fakequant import FirstBatchInput
from qbench.quant.observers import least_error_grid


class OffsetStep(torch.autograd.Function):
    """`round(clip((x - offset) / scale, 0, high)) * scale + offset`, where the offset is a multiple of the scale.

    Gradients pass to x inside the range; the scale gets `round(u) - u` inside, u = (x - offset) / scale, and the bound
    outside; the offset gets 0 inside and 1 outside. Those of scale and offset are multiplied by `gain`.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, offset: Tensor, high: int, gain: float) -> Tensor:
        """x of any shape; scale and offset ()."""
        zero = zero_point(scale, offset, high)
        y = (x * scale.reciprocal()).round_().clamp_(-zero, high - zero).mul_(scale)
        ctx.save_for_backward(x, y, scale, zero)
        ctx.high, ctx.gain = high, gain
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        x, y, scale, zero = ctx.saved_tensors
        steps = x / scale
        inside = (steps >= -zero) & (steps <= ctx.high - zero)
        own = grad * inside
        outside = grad.sum() - own.sum()
        # Outside y / scale + zero is the bound, inside the steps are taken off instead of the zero point.
        scale_grad = (grad * (y / scale)).sum() - (own * steps).sum() + zero * outside
        return own, scale_grad * ctx.gain, outside * ctx.gain, None, None


def zero_point(scale: Tensor, offset: Tensor, high: int) -> Tensor:
    """The code of 0, (): the offset in steps, rounded; among the codes, so that 0 has one."""
    return (-offset / scale).round().clamp(0, high)


class OffsetInput(FirstBatchInput):
    """LSQ+ on a layer's input: step and offset begin with the least squared error on the first batch."""

    symmetric: ClassVar[bool] = False

    def __init__(self, bits: int) -> None:
        super().__init__(bits)
        self.scale = nn.Parameter(torch.ones(()))
        self.offset = nn.Parameter(torch.zeros(()))

    def begin(self, x: Tensor) -> None:
        scale, zero = least_error_grid(x, bits=self.bits, symmetric=False)
        self.scale.fill_(scale)
        self.offset.fill_(-zero * scale)
        self.gain = 1 / math.sqrt(x[0].numel() * self.high)

    def quantized(self, x: Tensor) -> Tensor:
        return cast(Tensor, OffsetStep.apply(x, self.scale, self.offset, self.high, self.gain))

    def deployed(self) -> StaticQuantizer:
        """The fixed quantizer with the learned step, and the offset as its zero point."""
        zero = zero_point(self.scale.detach(), self.offset.detach(), self.high)
        return StaticQuantizer(self.bits, False, self.scale.item(), int(zero))


def three_deviations(rows: Tensor, high: int) -> Tensor:
    """max(|mean - 3 deviations|, |mean + 3 deviations|) / 2**(bits - 1), as LSQ+ begins.

    Args:
        rows: (R, n), each of which shares a step.
        high: largest code, 2**(bits - 1) - 1.
    """
    mean, deviation = rows.mean(1), rows.std(1, correction=0)
    return torch.maximum((mean - 3 * deviation).abs(), (mean + 3 * deviation).abs()) / (high + 1)
