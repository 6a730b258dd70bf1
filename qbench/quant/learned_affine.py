"""Codes that are learned, straight through the rounding: a weight that moves freely behind its grid, and its steps."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from qbench.quant.encodings import Affine, expand_groups, from_rows, to_rows


class LearnedAffine(nn.Module):
    """A parametrization of a weight: `scale * (clip(round(w / scale) + zero, low, high) - zero)`.

    It begins with an encoding of the weight, whose zero points stay. Weights pass gradients straight through inside the
    range; steps get those of LSQ (arXiv:1902.08153), and are learned as logarithms, so that they stay positive.
    """

    low: Tensor
    high: Tensor

    def __init__(self, start: Affine) -> None:
        """
        Args:
            start: with whole zero points.
        """
        super().__init__()
        self.start = start
        self.columns = start.codes.numel() // max(1, start.codes.shape[start.axis])
        self.log_scale = nn.Parameter(start.scale.detach().log())
        zero = torch.zeros_like(start.scale) if start.zero_point is None else start.zero_point.to(start.scale)
        zero = expand_groups(zero, self.columns, start.group_size)
        self.register_buffer("low", start.low - zero)
        self.register_buffer("high", start.high - zero)

    @staticmethod
    def accepts(encoding: object) -> bool:
        """Whether it can begin with that encoding: uniform codes with whole zero points."""
        if not isinstance(encoding, Affine):
            return False
        zero = encoding.zero_point
        return zero is None or bool((zero == zero.round()).all())

    def _scale(self) -> Tensor:
        return expand_groups(self.log_scale.exp(), self.columns, self.start.group_size)

    def forward(self, weight: Tensor) -> Tensor:
        scale = self._scale()
        steps = torch.clamp(to_rows(weight, self.start.axis) / scale, self.low, self.high)
        whole = steps + (steps.round() - steps).detach()
        return from_rows(whole * scale, weight.shape, self.start.axis)

    def encoding(self, quantized: Tensor) -> Affine:
        """The codes of a weight that came out of here, with the learned steps."""
        scale = self._scale().detach()
        steps = torch.clamp((to_rows(quantized, self.start.axis) / scale).round(), self.low, self.high)
        codes = (steps - self.low + self.start.low).to(torch.int32)
        shaped = from_rows(codes, quantized.shape, self.start.axis)
        return replace(self.start, codes=shaped, scale=self.log_scale.detach().exp())
