"""Convolutions of signs whose outputs are scaled by the mean magnitude of the patch that each came from."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qbench.quant import structure


class _ScaleMap:
    """XNOR-Net's convolution (arXiv:1603.05279): the input's magnitude, one for all channels, is averaged by itself.

    What comes in is sign times magnitude, as `BinaryMeanQuantizer` makes it; the signs alone are multiplied with the
    weight, and the output with the averages K.
    """

    convolve: ClassVar[Any]

    def forward(self: Any, x: Tensor) -> Tensor:
        magnitude = x[:, :1].detach().abs()
        signs = x / torch.where(magnitude > 0, magnitude, 1.0)
        kernel = x.new_full((1, 1, *self.kernel_size), 1 / math.prod(self.kernel_size))
        averages = self.convolve(magnitude, kernel, None, self.stride, self.padding, self.dilation)
        scaled = self._conv_forward(signs, self.weight, None) * averages
        return scaled if self.bias is None else scaled + self.bias.reshape(-1, *[1] * len(self.kernel_size))


class ScaleMapConv1d(_ScaleMap, nn.Conv1d):
    convolve = staticmethod(F.conv1d)


class ScaleMapConv2d(_ScaleMap, nn.Conv2d):
    convolve = staticmethod(F.conv2d)


class ScaleMapConv3d(_ScaleMap, nn.Conv3d):
    convolve = staticmethod(F.conv3d)


_TYPES: dict[type[nn.Module], type[nn.Module]] = {
    nn.Conv1d: ScaleMapConv1d,
    nn.Conv2d: ScaleMapConv2d,
    nn.Conv3d: ScaleMapConv3d,
}


def can_map(layer: nn.Module) -> bool:
    """Whether it is a plain convolution over more than one position, padded with zeros if at all."""
    plain = type(layer) in _TYPES and layer.padding_mode == "zeros"
    return plain and math.prod(layer.kernel_size) > 1  # type: ignore[arg-type]


@structure.operation("scale_map")
def _scale_map(model: nn.Module, *, layer: str) -> None:
    target = model.get_submodule(layer)
    # The layer stays what it is but for its forward: hooks, names and parameters are its own.
    target.__class__ = _TYPES[type(target)]
