"""The mean of what layers are called with, by the statistics of batch norms and no data."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

from qbench.quant.adjacency import memory_of
from qbench.quant.channel_axes import CLIP, LEAKY, RELU, axis_after, channel_axis
from qbench.quant.channel_clip import ChannelClip
from qbench.quant.hooks import hooked
from qbench.quant.layers import named_weight_layers
from qbench.quant.norm_statistics import Normal, affine, recall

_NORMS = {"native_batch_norm", "cudnn_batch_norm", "miopen_batch_norm", "_native_batch_norm_legit_no_training"}
_CLAMP = {"clamp", "clamp_"}
_MEANS = {"avg_pool2d", "_adaptive_avg_pool2d", "mean"}
_EXTREMES = {"max_pool2d_with_indices", "adaptive_max_pool2d"}


@dataclass(frozen=True)
class _Flow:
    """What a batch norm wrote, clipped to [low, high], then perhaps averaged over positions."""

    axis: int
    """Of the channels."""
    normal: Normal
    low: Tensor
    high: Tensor
    averaged: bool = False

    def clipped(self, low: Tensor, high: Tensor) -> _Flow | None:
        """Clipped again; None behind an average, whose distribution is not known."""
        if self.averaged:
            return None
        return replace(self, low=self.low.clamp(low, high), high=self.high.clamp(low, high))

    @property
    def mean(self) -> Tensor:
        return self.normal.clipped_mean(self.low, self.high)


def expected_inputs(model: nn.Module, example: Tensor) -> dict[str, Tensor]:
    """The mean (C,), in float64, of each channel of the inputs of convolutions and linear layers.

    A layer is among them if it is called once, and its input is what one batch norm writes, folded or not, taken to be
    normal with the mean `bias` and the deviation `weight`, behind nothing but clippings (ReLU, ReLU6), averages over
    positions, zero padding and views. Zeros of a padding are not counted. All is found by watching one forward pass.

    Args:
        model: the float network, in evaluation mode.
        example: an input of the model, a batch of one; its values play no part.
    """
    watch = _Watch(model)
    with torch.no_grad(), watch.attached(), watch:
        model(example)
    return {name: mean for name, mean in watch.found.items() if mean is not None}


class _Watch(TorchDispatchMode):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.layers = named_weight_layers(model)
        self.clips = [module for module in model.modules() if isinstance(module, ChannelClip)]
        self.found: dict[str, Tensor | None] = {}
        self._flows = WeakTensorKeyDictionary()

    def attached(self) -> AbstractContextManager[None]:
        """Follow the calls of layers."""
        handles = [clip.register_forward_hook(self._clipped) for clip in self.clips]
        for name, layer in self.layers.items():
            handles.append(layer.register_forward_pre_hook(self._entering(name)))
            handles.append(layer.register_forward_hook(self._left))
        return hooked(handles)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        x = args[0] if args and isinstance(args[0], Tensor) else None
        flow = None if x is None else self._flows.get(x)
        result = func(*args, **kwargs)
        if x is not None and func._schema.is_mutable:
            self._forget(x)
        out = result[0] if isinstance(result, (tuple, list)) else result
        operation = func.overloadpacket.__name__
        if operation in _NORMS:
            self._follow(out, _flow(affine(args[1], args[2], out.shape[1]), axis=1))
        elif flow is not None:
            self._follow(out, _after(flow, operation, args, kwargs, out))
        return result

    def _follow(self, tensor: Tensor, flow: _Flow | None) -> None:
        if flow is not None:
            self._flows[tensor] = flow

    def _forget(self, changed: Tensor) -> None:
        memory = memory_of(changed)
        for tensor in [tensor for tensor in self._flows if memory_of(tensor) == memory]:
            del self._flows[tensor]

    def _entering(self, name: str) -> Callable[..., None]:
        def enter(layer: nn.Module, inputs: tuple[Any, ...]) -> None:
            flow = self._flows.get(inputs[0]) if inputs and isinstance(inputs[0], Tensor) else None
            if flow is None or name in self.found or flow.axis != channel_axis(layer, inputs[0]):
                self.found[name] = None
            else:
                self.found[name] = flow.mean

        return enter

    def _left(self, layer: nn.Module, _inputs: Any, output: Any) -> None:
        normal = recall(layer)
        if normal is not None and isinstance(output, Tensor):
            self._follow(output, _flow(normal, channel_axis(layer, output)))

    def _clipped(self, clip: ChannelClip, inputs: tuple[Any, ...], output: Tensor) -> None:
        flow = self._flows.get(inputs[0])
        limit = clip.limit.double().cpu().flatten()
        self._follow(output, None if flow is None else flow.clipped(torch.zeros_like(limit), limit))


def _flow(normal: Normal, axis: int) -> _Flow:
    everything = torch.full_like(normal.mean, torch.inf)
    return _Flow(axis, normal, -everything, everything)


def _after(flow: _Flow, operation: str, args: Any, kwargs: Any, out: Tensor) -> _Flow | None:
    """What comes out of an operation; None where it is not known."""
    if operation in RELU | CLIP | _CLAMP:
        low, high = _ends(operation, args)
        if isinstance(low, Tensor) or isinstance(high, Tensor):
            return None
        return flow.clipped(*(torch.full_like(flow.normal.mean, end) for end in (low, high)))
    axis = None if operation in LEAKY | _EXTREMES else axis_after(operation, args, kwargs, flow.axis, out)
    return None if axis is None else replace(flow, axis=axis, averaged=flow.averaged or operation in _MEANS)


def _ends(operation: str, args: Any) -> tuple[Any, Any]:
    """What is clipped to; arguments that are defaults do not come here."""
    if operation in RELU:
        return 0.0, torch.inf
    usual = (-1.0, 1.0) if operation in CLIP else (-torch.inf, torch.inf)
    low, high = [*args[1:], None, None][:2]
    return usual[0] if low is None else low, usual[1] if high is None else high
