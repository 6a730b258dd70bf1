"""An input quantizer whose range is watched, not learned."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from qbench.quant.activations import StaticQuantizer
from qbench.quant.fakequant import SMALLEST, FirstBatchInput
from qbench.quant.straight_through import straight_through

_MOMENTUM = 0.99


class RangeInput(FirstBatchInput):
    """All codes between moving averages of the least and the greatest value; gradients pass inside (arXiv:1712.05877).

    The averages move while training. The range always includes 0, which has a code.
    """

    symmetric: ClassVar[bool] = False
    limits: Tensor

    def __init__(self, bits: int) -> None:
        super().__init__(bits)
        self.register_buffer("limits", torch.zeros(2))

    def begin(self, x: Tensor) -> None:
        self.limits.copy_(torch.stack(x.aminmax()))

    def _grid(self) -> tuple[Tensor, Tensor]:
        """Scale and zero point, ()."""
        low, high = self.limits[0].clamp(max=0), self.limits[1].clamp(min=0)
        scale = (high - low) / self.high
        scale = torch.where(scale > SMALLEST, scale, 1.0)
        return scale, (-low / scale).round()

    def quantized(self, x: Tensor) -> Tensor:
        if self.training:
            self.limits.lerp_(torch.stack(x.detach().aminmax()), 1 - _MOMENTUM)
        scale, zero = self._grid()
        steps = x.detach() * scale.reciprocal()
        codes = steps.round().clamp_(-zero, self.high - zero)
        return straight_through(x, codes * scale, (steps >= -zero) & (steps <= self.high - zero))

    def deployed(self) -> StaticQuantizer:
        """The fixed quantizer for the range."""
        scale, zero = self._grid()
        return StaticQuantizer(self.bits, False, scale.item(), int(zero))
