"""Input channels of a layer that come twice, each with half its weights."""

from __future__ import annotations

import heapq
from typing import Any

import torch
from torch import Tensor, nn

from qbench.quant import structure
from qbench.quant.calls import Args, with_first
from qbench.quant.layers import output_axis

_INDEX = "split_index"


def halvings(ranges: Tensor, count: int) -> tuple[list[int], float]:
    """Which of the channels to halve, one after the other, so that the largest range falls fastest.

    Args:
        ranges: largest magnitude of each channel (C,).
        count: how many copies are made.

    Returns:
        the position of the halved channel for each copy, where positions from C on are copies made before; and the
        largest range that is left.
    """
    heap = [(-value, position) for position, value in enumerate(ranges.tolist())]
    heapq.heapify(heap)
    chosen = []
    for copy in range(len(heap), len(heap) + count):
        value, position = heapq.heappop(heap)
        chosen.append(position)
        heapq.heappush(heap, (value / 2, position))
        heapq.heappush(heap, (value / 2, copy))
    return chosen, -heap[0][0]


@structure.operation("split_channels")
def _split(model: nn.Module, *, layer: str, channels: list[int], apart: float) -> None:
    """Halve the weights of each channel in turn, and append the other halves, `apart` more, with the same input."""
    target: Any = model.get_submodule(layer)
    axis = 1 - output_axis(target)
    weight = target.weight.detach().clone()
    index = list(range(weight.shape[axis]))
    for channel in channels:
        half = weight.narrow(axis, channel, 1) / 2
        weight.narrow(axis, channel, 1).copy_(half - apart / 2)
        weight = torch.cat([weight, half + apart / 2], axis)
        index.append(index[channel])
    target.weight = nn.Parameter(weight, requires_grad=target.weight.requires_grad)
    setattr(target, "in_features" if isinstance(target, nn.Linear) else "in_channels", len(index))
    target.register_buffer(_INDEX, torch.tensor(index, device=weight.device))
    target.register_forward_pre_hook(_gather, with_kwargs=True)


def _gather(layer: nn.Module, args: Args, kwargs: dict[str, Any]) -> tuple[Args, dict[str, Any]]:
    axis = -1 if isinstance(layer, nn.Linear) else 1
    return with_first(args, kwargs, lambda x: x.index_select(axis, layer.get_buffer(_INDEX)))


def is_split(layer: nn.Module) -> bool:
    """Whether the layer's input channels were split before."""
    return _INDEX in layer._buffers
