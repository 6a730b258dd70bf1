"""Where the channels of a tensor are, behind operations that keep them apart and take 0 to 0."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

RELU = {"relu", "relu_"}
CLIP = {"hardtanh", "hardtanh_"}
LEAKY = {"leaky_relu", "leaky_relu_"}
PAD = "constant_pad_nd"
POOLS = {"avg_pool2d", "max_pool2d_with_indices", "_adaptive_avg_pool2d", "adaptive_max_pool2d"}
VIEWS = {"view", "_unsafe_view"}
COPIES = {"clone", "detach", "alias"}


def axis_after(operation: str, args: Any, kwargs: Any, axis: int, out: Tensor) -> int | None:
    """Where the channels are behind an operation that a factor on a channel passes through; None for all others."""
    x = args[0]
    if operation in RELU | LEAKY | COPIES or (operation in CLIP and len(args) > 1 and args[1] == 0):
        return axis
    if operation in VIEWS:
        return _axis_of_view(x.shape, out.shape, axis)
    if operation == PAD:
        value = args[2] if len(args) > 2 else kwargs.get("value", 0)
        behind = 2 * (x.dim() - 1 - axis)
        return axis if value == 0 and not any(args[1][behind : behind + 2]) else None
    if operation in POOLS:
        return axis if axis == x.dim() - 3 else None
    if operation == "roll":
        return axis if len(args) > 2 and axis not in {d % x.dim() for d in args[2]} else None
    if operation == "permute":
        return [d % x.dim() for d in args[1]].index(axis)
    if operation in ("transpose", "t"):
        a, b = (0, 1) if operation == "t" else (args[1] % x.dim(), args[2] % x.dim())
        return {a: b, b: a}.get(axis, axis)
    if operation in ("select", "slice", "mean") and len(args) > 1:
        dims = {d % x.dim() for d in ([args[1]] if isinstance(args[1], int) else args[1])}
        keeps = operation == "slice" or (operation == "mean" and len(args) > 2 and args[2])
        return None if axis in dims else axis if keeps else axis - sum(d < axis for d in dims)
    return None


def _axis_of_view(old: torch.Size, new: torch.Size, axis: int) -> int | None:
    """The axis of the new shape that has the same channels: as many of them, with as much in front and behind."""
    front, behind = math.prod(old[:axis]), math.prod(old[axis + 1 :])
    found = [
        i
        for i, size in enumerate(new)
        if size == old[axis] and math.prod(new[:i]) == front and math.prod(new[i + 1 :]) == behind
    ]
    return found[0] if found else None


def channel_axis(layer: nn.Module, tensor: Tensor) -> int:
    """Of a layer's input or output; -1, which is no axis of any, for a convolution of a single image."""
    if isinstance(layer, nn.Linear):
        return tensor.dim() - 1
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return 1 if tensor.dim() == weight.dim() else -1
