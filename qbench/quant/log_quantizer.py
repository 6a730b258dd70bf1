"""A logarithmic quantizer, for what softmax returns."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor

from qbench.quant.quantizer import Quantizer


class LogQuantizer(Quantizer):
    """Powers of two, or of the square root of two, times a scale; what is smaller than all of them becomes 0.

    Code q stands for `scale * 2**(-q / per_octave)`. With one code an octave it is log2 (FQ-ViT, arXiv:2111.13824),
    with two it is log-sqrt2 (RepQ-ViT, arXiv:2212.08254). As in both, 0 comes on top of the 2**bits codes.
    """

    kind: ClassVar[str] = "log"
    scale: Tensor

    def __init__(self, bits: int = 8, per_octave: int = 1, scale: float = 1.0) -> None:
        """
        Args:
            bits: width of the codes.
            per_octave: codes from one power of two to the next: 1 or 2.
            scale: the largest value, in units of the activation.
        """
        super().__init__(bits)
        self.per_octave = per_octave
        self.register_buffer("scale", torch.tensor(float(scale)))

    @property
    def levels(self) -> int:
        """All codes, and 0."""
        return super().levels + 1

    def config(self) -> dict[str, Any]:
        return {**super().config(), "per_octave": self.per_octave}

    def forward(self, x: Tensor) -> Tensor:
        codes = (-(x / self.scale).log2() * self.per_octave).round()
        small = codes >= 2**self.bits
        codes = codes.clamp(0, 2**self.bits - 1)
        values = torch.exp2(-(codes / self.per_octave).ceil())
        if self.per_octave == 2:
            values = values * ((codes % 2) * (math.sqrt(2) - 1) + 1)
        return (values * self.scale).masked_fill(small, 0)
