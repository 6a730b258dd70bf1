"""Mean and deviation of each channel behind a batch norm, remembered by the layer that the norm is folded into."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

_ATTRIBUTE = "qbench_norm_statistics"


@dataclass(frozen=True)
class Normal:
    """Mean and standard deviation of each channel (N,), float64."""

    mean: Tensor
    std: Tensor

    def clipped_mean(self, low: Tensor, high: Tensor) -> Tensor:
        """The mean of each channel when its values are clipped to [low, high]; either may be infinite.

        For `low` 0 it is the clipped normal of arXiv:1906.04721, appendix C.
        """
        std = self.std.clamp(min=1e-12)
        below, above = ((end - self.mean) / std for end in (low, high))
        inside = torch.special.ndtr(above) - torch.special.ndtr(below)
        ends = _times(low, torch.special.ndtr(below)) + _times(high, torch.special.ndtr(-above))
        return ends + self.mean * inside + std * (_density(below) - _density(above))


def _density(z: Tensor) -> Tensor:
    return (-z.square() / 2).exp() / (2 * torch.pi) ** 0.5


def _times(end: Tensor, share: Tensor) -> Tensor:
    return torch.where(share > 0, end, 0.0) * share


def affine(weight: Tensor | None, bias: Tensor | None, channels: int) -> Normal:
    """What a batch norm writes, if its running statistics are those of its input."""
    ones = torch.ones(channels, dtype=torch.float64)
    std = ones if weight is None else weight.detach().double().abs().cpu()
    return Normal(0 * ones if bias is None else bias.detach().double().cpu(), std)


def remember(layer: nn.Module, normal: Normal) -> None:
    """Note what the layer's output is; for structure steps, which know."""
    layer.__dict__[_ATTRIBUTE] = normal


def recall(layer: nn.Module) -> Normal | None:
    """What the layer's output is, if a batch norm was folded into it."""
    return layer.__dict__.get(_ATTRIBUTE)


def rewrite(layer: nn.Module, factor: Tensor | float = 1.0, shift: Tensor | float = 0.0) -> None:
    """The layer's output has been multiplied by a positive factor and shifted, each for all channels or for each."""
    normal = recall(layer)
    if normal is not None:
        factor, shift = (torch.as_tensor(v, dtype=torch.float64, device="cpu") for v in (factor, shift))
        remember(layer, Normal(normal.mean * factor + shift, normal.std * factor))
