"""Quantizers of two levels that training goes through: a weight, and a layer's input."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from qbench.quant.binary_quantizer import BinaryMeanQuantizer, BinaryQuantizer
from qbench.quant.encodings import Codebook, to_rows
from qbench.quant.straight_through import sign, straight_through

Gradient = Literal["clip", "approx"]
"""Of the sign on [-1, 1], 0 elsewhere: `clip` is 1 (arXiv:1602.02830), `approx` is 2 - 2|x| (arXiv:1808.00278)."""


def slope(x: Tensor, gradient: Gradient) -> Tensor:
    """What is taken for the derivative of the sign of x."""
    return (2 - 2 * x.abs()).clamp(min=0) if gradient == "approx" else (x.abs() <= 1).to(x.dtype)


class BinaryWeight(nn.Module):
    """The sign of each weight times the mean magnitude of its output channel (arXiv:1603.05279)."""

    def __init__(self, axis: int = 0) -> None:
        """
        Args:
            axis: of the output channels.
        """
        super().__init__()
        self.axis = axis

    def forward(self, weight: Tensor) -> Tensor:
        others = [axis for axis in range(weight.dim()) if axis != self.axis]
        scale = weight.abs().mean(others, keepdim=True)
        return straight_through(weight, sign(weight) * scale, scale.detach() * slope(weight.detach(), "clip"))

    def encoding(self, quantized: Tensor) -> Codebook:
        return binary_codes(quantized, self.axis)


def binary_codes(quantized: Tensor, axis: int = 0) -> Codebook:
    """The encoding of a tensor that has one magnitude in each output channel."""
    scale = to_rows(quantized, axis)[:, :1].abs()
    levels = torch.tensor([[[-1.0, 1.0]]], device=quantized.device)
    return Codebook((quantized >= 0).to(torch.int32), levels, axis, scale=scale)


class BinaryInput(nn.Module):
    """The sign of a layer's input, less a shift, times the mean magnitude of the first batch.

    The scale is not learned: whatever it is, a batch norm behind the layer takes it back.
    """

    scale: Tensor

    def __init__(self, gradient: Gradient, *, shifts: bool = False) -> None:
        """
        Args:
            gradient: of the sign.
            shifts: learn a shift for each channel, counted by axis 1, from 0 on (ReActNet's RSign, arXiv:2003.03488).
        """
        super().__init__()
        self.gradient = gradient
        self.shift = nn.Parameter(torch.zeros(())) if shifts else None
        self.register_buffer("scale", torch.ones(()))
        self.used = False

    def forward(self, x: Tensor) -> Tensor:
        if not self.used:
            self._start(x.detach())
        centred = x if self.shift is None else x - self.shift
        free = centred.detach()
        return straight_through(centred, sign(free) * self.scale, slope(free, self.gradient) * self.scale)

    @torch.no_grad()
    def _start(self, x: Tensor) -> None:
        if self.shift is not None:
            self.shift = nn.Parameter(x.new_zeros(x.shape[1], *[1] * (x.dim() - 2)))
        self.scale.copy_(x.abs().mean())
        self.used = True

    def get_extra_state(self) -> bool:
        return self.used

    def set_extra_state(self, state: bool) -> None:
        self.used = state

    def deployed(self) -> BinaryQuantizer:
        """The fixed quantizer with the learned shift."""
        shift = torch.zeros(()) if self.shift is None else self.shift.detach()
        fixed = BinaryQuantizer(shift.shape).to(self.scale.device)
        fixed.shift.copy_(shift)
        fixed.scale.copy_(self.scale)
        return fixed


class BinaryMeanInput(nn.Module):
    """The sign of a layer's input times its mean magnitude over the channels, position by position, held constant."""

    def __init__(self, axis: int) -> None:
        """
        Args:
            axis: of the channels.
        """
        super().__init__()
        self.axis = axis

    def forward(self, x: Tensor) -> Tensor:
        free = x.detach()
        scale = free.abs().mean(self.axis, keepdim=True)
        return straight_through(x, sign(free) * scale, scale * slope(free, "clip"))

    def deployed(self) -> BinaryMeanQuantizer:
        return BinaryMeanQuantizer(self.axis)
