"""Fully connected ReLU networks, and their fixed-point form as QEBVerif defines it (arXiv:2212.02781)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qbench.errors import Unsupported

PIXELS = 255
"""Inputs are whole numbers v from 0 to 255; the float network sees v / 255, the fixed-point one v / 256."""


@dataclass(frozen=True)
class Layer:
    """A linear layer in float64; all but the last of a network are followed by a ReLU."""

    weight: Tensor
    """(n, d)"""
    bias: Tensor
    """(n,)"""


def layers_of(model: nn.Module) -> list[Layer]:
    """The layers of a sequence of linear layers with ReLU between them, perhaps behind a flattening.

    Raises:
        Unsupported: the model is something else.
    """
    modules = [m for m in _in_order(model) if not isinstance(m, nn.Flatten | nn.Identity | nn.Dropout)]
    wanted = [nn.ReLU if i % 2 else nn.Linear for i in range(len(modules))]
    if len(modules) % 2 == 0 or not all(isinstance(m, kind) for m, kind in zip(modules, wanted, strict=True)):
        kinds = ", ".join(type(m).__name__ for m in modules)
        raise Unsupported(f"verification is for nn.Sequential of linear layers with ReLU between them, not for {kinds}")
    return [layer_of(module) for module in modules[::2]]


def _in_order(model: nn.Module) -> Iterator[nn.Module]:
    if isinstance(model, nn.Sequential):
        for part in model:
            yield from _in_order(part)
    else:
        yield model


def layer_of(linear: nn.Module) -> Layer:
    """A linear layer in float64."""
    weight, bias = linear.weight, linear.bias
    assert isinstance(weight, Tensor)
    own = bias.detach().double() if isinstance(bias, Tensor) else weight.new_zeros(len(weight), dtype=torch.float64)
    return Layer(weight.detach().double(), own)


def answer(layers: Sequence[Layer], pixels: Tensor) -> Tensor:
    """Outputs (..., n) of the float network for pixels (..., d)."""
    x = pixels / PIXELS
    for layer in layers[:-1]:
        x = (x @ layer.weight.T + layer.bias).relu()
    return x @ layers[-1].weight.T + layers[-1].bias


@dataclass(frozen=True)
class FixedPoint:
    """Weights have one bit in front of the point and biases two, with their signs; hidden activations two, without.

    Rounding is half away from zero. The last layer's answers are not rounded.
    """

    bits: int

    @property
    def fraction(self) -> int:
        """Bits behind the point of biases and activations; weights have one more."""
        return self.bits - 2

    @property
    def top(self) -> float:
        """The largest activation."""
        return float((2**self.bits - 1) / 2**self.fraction)

    @property
    def half(self) -> float:
        """What rounding changes an activation by at most."""
        return 0.5 / 2**self.fraction

    def quantize(self, layers: Sequence[Layer]) -> list[Layer]:
        """The layers with rounded weights and biases; what is beyond the range becomes its end."""
        return [
            Layer(self._signed(layer.weight, self.bits - 1), self._signed(layer.bias, self.fraction))
            for layer in layers
        ]

    def _signed(self, values: Tensor, fraction: int) -> Tensor:
        end = 2 ** (self.bits - 1)
        return away(values * 2**fraction).clamp(-end, end - 1) / 2**fraction

    def round(self, x: Tensor) -> Tensor:
        """To the grid of activations, with the gradient of the identity."""
        rounded = away(x * 2**self.fraction) / 2**self.fraction
        return rounded.detach() + (x - x.detach())

    def activate(self, x: Tensor) -> Tensor:
        """The activation of a hidden layer."""
        return self.round(x).clamp(0, self.top)

    def answer(self, quantized: Sequence[Layer], pixels: Tensor) -> Tensor:
        """Outputs (..., n) of the fixed-point network for pixels (..., d)."""
        x = pixels / (PIXELS + 1)
        for layer in quantized[:-1]:
            x = self.activate(x @ layer.weight.T + layer.bias)
        return x @ quantized[-1].weight.T + quantized[-1].bias


def away(x: Tensor) -> Tensor:
    """Rounded to whole numbers, halves away from zero."""
    return x.sign() * (x.abs() + 0.5).floor()
