"""PACT: inputs are clipped where it is learned to be best (arXiv:1805.06085); and SAWB's weights (arXiv:1807.06964)."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from qbench.quant.activations import StaticQuantizer
from qbench.quant.dorefa import EvenWeight
from qbench.quant.fakequant import FirstBatchInput
from qbench.quant.observers import least_error_grid
from qbench.quant.straight_through import straight_through

COEFFICIENTS = {2: (3.12, 2.064), 3: (7.509, 6.892), 4: (12.68, 12.80), 5: (17.74, 18.64), 8: (31.76, 35.04)}
"""Of SAWB, by bits: the largest level is the first times the root mean square less the second times the mean size."""


class ClippedInput(FirstBatchInput):
    """A layer's input, clipped at a limit alpha, and rounded to codes that end there.

    Gradients pass below the limit; the limit gets those of what is above (and, negative, of what is below -alpha).
    """

    kept_positive: ClassVar[tuple[str, ...]] = ("limit",)

    def __init__(self, bits: int, limit: float | None = None) -> None:
        """
        Args:
            bits: width of the codes.
            limit: where alpha begins; None is where the squared error of the first batch is least.
        """
        super().__init__(bits)
        self.first = limit
        self.limit = nn.Parameter(torch.ones(()))

    @property
    def scale(self) -> Tensor:
        """The distance of two levels."""
        return self.limit.detach() / self.high

    def begin(self, x: Tensor) -> None:
        least = least_error_grid(x, bits=self.bits, symmetric=self.signed)[0] * self.high
        self.limit.fill_(least if self.first is None else self.first)

    def quantized(self, x: Tensor) -> Tensor:
        clipped = x.minimum(self.limit).maximum(self.limit * (self.low / self.high))
        scale = self.scale
        return straight_through(clipped, (x.detach() * scale.reciprocal()).round_().clamp_(self.low, self.high) * scale)

    def deployed(self) -> StaticQuantizer:
        """The fixed quantizer that ends at the limit."""
        return StaticQuantizer(self.bits, self.signed, self.scale.item())


def sawb_top(weight: Tensor, bits: int) -> Tensor:
    """The largest level (), at most the largest weight; that, where the moments give no positive number."""
    root, size = COEFFICIENTS[bits]
    largest = weight.abs().amax()
    top = (root * weight.square().mean().sqrt() - size * weight.abs().mean()).minimum(largest)
    return torch.where(top > 0, top, largest)


class SawbWeight(EvenWeight):
    """2**bits levels whose largest follows from the first two moments of the weights: `COEFFICIENTS`."""

    def __init__(self, weight: Tensor, bits: int, axis: int = 0) -> None:
        """
        Args:
            weight: what is to be quantized.
            bits: width of the codes, one of `COEFFICIENTS`.
            axis: output-channel axis of the weight.
        """
        super().__init__(bits, axis, sawb_top(weight.detach(), bits))
        self.bits = bits

    @torch.no_grad()
    def update(self, weight: Tensor) -> None:
        """Take the moments of the weight as it is now."""
        self.set_top(sawb_top(weight, self.bits))

    def forward(self, weight: Tensor) -> Tensor:
        return self.rounded((weight / (self.scale * (self.steps / 2))).clamp(-1, 1))
