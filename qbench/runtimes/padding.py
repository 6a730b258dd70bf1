"""Padding that depends on the input's size, made constant for the size that a network is compiled for."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import Conv2dSame, get_same_padding
from torch import Tensor, nn


def fix_padding(module: nn.Module, example: Tensor) -> None:
    """Make the SAME padding of timm's convolutions constant, so that it becomes part of the convolution.

    Otherwise it is computed from the input's shape, and a padded input with a zero point is not integer any more.
    """
    sizes: dict[Conv2dSame, set[tuple[int, ...]]] = {}

    def see(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        assert isinstance(layer, Conv2dSame)
        sizes.setdefault(layer, set()).add(tuple(inputs[0].shape[-2:]))

    hooks = [m.register_forward_pre_hook(see) for m in module.modules() if isinstance(m, Conv2dSame)]
    if not hooks:
        return
    with torch.no_grad():
        module(example)
    for hook in hooks:
        hook.remove()
    for layer, seen in sizes.items():
        if len(seen) > 1:
            continue
        (size,) = seen
        total = [
            get_same_padding(n, k, s, d)
            for n, k, s, d in zip(size, layer.kernel_size, layer.stride, layer.dilation, strict=True)
        ]
        pad = [side for n in reversed(total) for side in (n // 2, n - n // 2)]
        layer.padding = (0, 0)
        layer.forward = _padded(layer, pad)  # type: ignore[method-assign]


def _padded(layer: nn.Conv2d, pad: list[int]) -> Any:
    return lambda x: layer._conv_forward(F.pad(x, pad), layer.weight, layer.bias)
