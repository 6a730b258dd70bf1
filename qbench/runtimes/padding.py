"""Padding that depends on the input's size, made constant for the size that a network is compiled for."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import Conv2dSame, get_same_padding
from torch import Tensor, nn

from qbench.quant.hooks import hooked


def fix_padding(module: nn.Module, example: Tensor) -> None:
    """Make the SAME padding of timm's convolutions constant, so that it becomes part of the convolution.

    Otherwise it is computed from the input's shape, and a padded input with a zero point is not integer any more.
    """
    for name, pad in same_padding(module, example).items():
        layer: Any = module.get_submodule(name)
        layer.padding = (0, 0)
        layer.forward = _padded(layer, pad)


def same_padding(module: nn.Module, example: Tensor) -> dict[str, list[int]]:
    """What the SAME padding of timm's convolutions is for images of that size, in the order of `F.pad`, by layer.

    Layers that are called for inputs of several sizes are left out.
    """
    sizes: dict[str, set[tuple[int, ...]]] = {}
    layers = {name: layer for name, layer in module.named_modules() if isinstance(layer, Conv2dSame)}

    def see(name: str) -> Any:
        return lambda _, inputs: sizes.setdefault(name, set()).add(tuple(inputs[0].shape[-2:]))

    if layers:
        with torch.no_grad(), hooked(layer.register_forward_pre_hook(see(name)) for name, layer in layers.items()):
            module(example)
    return {name: _pads(layers[name], *seen) for name, seen in sizes.items() if len(seen) == 1}


def _pads(layer: Conv2dSame, size: tuple[int, ...]) -> list[int]:
    axes = zip(size, layer.kernel_size, layer.stride, layer.dilation, strict=True)
    total = [get_same_padding(*axis) for axis in axes]
    return [side for n in reversed(total) for side in (n // 2, n - n // 2)]


def _padded(layer: nn.Conv2d, pad: list[int]) -> Any:
    return lambda x: layer._conv_forward(F.pad(x, pad), layer.weight, layer.bias)
