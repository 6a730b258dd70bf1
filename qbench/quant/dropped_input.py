"""Input quantizers while a block is reconstructed: steps that are learned, numbers that are let through by chance."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qbench.quant.activations import StaticQuantizer
from qbench.quant.fakequant import LearnedInput


class DroppedInput(LearnedInput):
    """An input quantizer with a learned step, that lets a part of its input through as it is.

    Args:
        start: range and step to begin with; the zero point is kept.
        keep: the probability of each number to be quantized.
        generator: of the choice.
    """

    def __init__(self, start: StaticQuantizer, keep: float, generator: torch.Generator) -> None:
        super().__init__(start.bits)
        self.start, self.keep, self.generator = start, keep, generator
        zero = int(start.zero_point)
        self.low, self.high, self.used = start.low - zero, start.high - zero, True
        self.scale = nn.Parameter(start.scale.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        return mixed(super().forward(x), x, self.keep, self.generator)

    def deployed(self) -> StaticQuantizer:
        start = self.start
        return StaticQuantizer(start.bits, start.symmetric, self.scale.item(), int(start.zero_point))


class StraightThrough(nn.Module):
    """Any other quantizer, with the gradient of the identity."""

    def __init__(self, quantizer: nn.Module) -> None:
        super().__init__()
        self.quantizer = quantizer

    def forward(self, x: Tensor) -> Tensor:
        quantized: Tensor = self.quantizer(x.detach())
        return x + (quantized - x.detach())


def mixed(quantized: Tensor, x: Tensor, keep: float, generator: torch.Generator) -> Tensor:
    """Each number of `quantized` with probability `keep`, else that of `x`."""
    if keep >= 1:
        return quantized
    chance = torch.rand(x.shape, generator=generator, device=generator.device).to(x.device)
    return torch.where(chance < keep, quantized, x)
