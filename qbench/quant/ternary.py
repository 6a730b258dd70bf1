"""Weight quantizers of three levels that training goes through."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qbench.quant.encodings import Affine, Codebook
from qbench.quant.straight_through import straight_through


class TernaryWeight(nn.Module):
    """TWN (arXiv:1605.04711): -a, 0 or a; 0 up to 0.7 times the mean magnitude, and a is the mean of those above it."""

    def forward(self, weight: Tensor) -> Tensor:
        free = weight.detach()
        above = free.abs() > 0.7 * free.abs().mean()
        scale = (free.abs() * above).sum() / above.sum().clamp(min=1)
        return straight_through(weight, free.sign() * above * scale)

    def encoding(self, quantized: Tensor) -> Affine:
        return Affine.nearest(quantized, quantized.abs().amax(), low=-1, high=1)


class TrainedTernaryWeight(nn.Module):
    """TTQ (arXiv:1612.01064): -n, 0 or p, both learned; 0 up to a share of the greatest magnitude of the tensor.

    A weight gets p, 1 or n times the gradient of its level.
    """

    def __init__(self, weight: Tensor, threshold: float) -> None:
        """
        Args:
            weight: the levels start with the means of its numbers beyond the threshold.
            threshold: share of the greatest magnitude.
        """
        super().__init__()
        self.threshold = threshold
        up, down = self._beyond(weight)
        self.positive = nn.Parameter((weight * up).sum() / up.sum().clamp(min=1))
        self.negative = nn.Parameter(-(weight * down).sum() / down.sum().clamp(min=1))

    def _beyond(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        limit = self.threshold * weight.abs().amax()
        return weight > limit, weight < -limit

    def forward(self, weight: Tensor) -> Tensor:
        up, down = self._beyond(weight.detach())
        slope = torch.where(up, self.positive, torch.where(down, self.negative, 1.0)).detach()
        return straight_through(weight, self.positive * up - self.negative * down, slope)

    def encoding(self, quantized: Tensor) -> Codebook:
        zero = torch.zeros_like(self.positive)
        return Codebook.nearest(quantized, torch.stack([-self.negative, zero, self.positive]).detach())
