"""Which layers read what a module writes, through operations that a factor on a channel passes.

Between the two there may be operations with f(a x) = a f(x) for a > 0 that keep channels apart: ReLU, pooling, padding,
views. A clipping (ReLU6) is noted, for whoever can scale its limit too. All is found by watching one forward pass.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from qbench.quant.adjacency import PRODUCTS, ambiguous, memory_of
from qbench.quant.channel_axes import CLIP, LEAKY, PAD, POOLS, axis_after, channel_axis
from qbench.quant.hooks import hooked
from qbench.quant.layers import named_weight_layers


@dataclass(frozen=True)
class Clip:
    """A clipping to [0, limit] on the way."""

    module: str
    """The module that does it and nothing else; empty if there is none, or it is called or named more than once."""
    axis: int
    """Of the channels, from the end."""
    limit: float


@dataclass(frozen=True)
class Link:
    """All that reads the output of `source` are `readers`, along each channel's own path."""

    source: str
    readers: tuple[str, ...]
    clips: tuple[Clip, ...]
    """On the way to any reader."""
    shiftable: bool
    """Whether an offset passes too, where values are positive: nothing but ReLU and clips is on the way."""


def links(model: nn.Module, example: Tensor, sources: dict[str, int | None] | None = None) -> list[Link]:
    """Every source whose channels may be scaled, if its readers' inputs are scaled back; in the order of execution.

    All are called once, under one name, share no parameters, and multiply by their weight as it is. Names of attributes
    play no part.

    Args:
        model: in evaluation mode.
        example: an input of the model, a batch of one.
        sources: names of modules, with the axis of their output that counts channels (negative from the end; None for
            that of the layer's kind); default: all convolutions and linear layers.
    """
    watch = _Watch(model, dict.fromkeys(named_weight_layers(model)) if sources is None else sources)
    with torch.no_grad(), watch.attached(), watch:
        output = model(example)
    # What still lives now is part of the output, or was kept by somebody: its values must not change.
    kept = {name for name, memory in watch.memory if not memory.expired()}
    del output
    return watch.links(kept)


@dataclass(frozen=True)
class _Flow:
    source: str
    clips: tuple[Clip, ...] = ()
    shiftable: bool = True


@dataclass
class _Reading:
    readers: list[str] = field(default_factory=list)
    clips: list[Clip] = field(default_factory=list)
    shiftable: bool = True


class _Watch(TorchDispatchMode):
    """`barred` modules must not be changed at all; the output of `spoiled` ones is read by what no factor passes."""

    def __init__(self, model: nn.Module, sources: dict[str, int | None]) -> None:
        super().__init__()
        self.modules = dict(model.named_modules())
        self.layers = named_weight_layers(model)
        self.sources = sources
        self.several = ambiguous(model)
        watched = sources.keys() | self.layers.keys()
        self.barred = {
            name
            for name in watched
            if self.modules[name] in self.several
            or self.modules[name]._forward_hooks
            or self.modules[name]._parameters.get("weight") is None
        }
        self.parameters = {
            memory_of(parameter): (name, leaf)
            for name in watched
            for leaf, parameter in self.modules[name].named_parameters(recurse=False)
        }
        self.spoiled: set[str] = set()
        self.memory: list[tuple[str, StorageWeakRef]] = []
        self._flows: dict[int, _Flow] = {}
        self._axes = WeakTensorKeyDictionary()
        self._found: dict[str, _Reading] = {}
        self._entered: dict[str, int] = {}
        self.calls: dict[str, int] = {}
        self._inside: list[str] = []

    def attached(self) -> AbstractContextManager[None]:
        """Follow the calls of all modules."""
        return hooked(
            handle
            for name, module in self.modules.items()
            for handle in (
                module.register_forward_pre_hook(self._entering(name)),
                module.register_forward_hook(self._leaving(name)),
            )
        )

    def links(self, kept: set[str]) -> list[Link]:
        found = []
        for source, reading in self._found.items():
            if source in self.spoiled | kept or not reading.readers or self.barred & {source, *reading.readers}:
                continue
            clips = tuple(clip if self._alone(clip.module) else replace(clip, module="") for clip in reading.clips)
            found.append(Link(source, tuple(reading.readers), clips, reading.shiftable))
        return found

    def _alone(self, module: str) -> bool:
        return self.calls.get(module) == 1 and self.modules[module] not in self.several

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        operation = func.overloadpacket.__name__
        layer = self._inside[-1] if self._inside and self._inside[-1] in self.layers else None
        tensors = [v for v in tree_leaves((args, kwargs)) if isinstance(v, Tensor) and v.layout == torch.strided]
        followed = []
        for tensor in tensors:
            where = memory_of(tensor)
            owner, leaf = self.parameters.get(where, (None, ""))
            computed = leaf == "weight" and owner in self.layers and operation not in PRODUCTS
            if owner is not None and (owner not in self._inside or computed):
                self.barred.add(owner)
            # What a layer does with its own input is no step on the way.
            if where in self._flows and (layer is None or self._entered.get(layer) != where):
                followed.append(tensor)
        if not followed:
            return func(*args, **kwargs)
        flows = [self._flows[memory_of(tensor)] for tensor in followed]
        axis = self._axes.get(tensors[0]) if len(tensors) == 1 and tensors[0] is args[0] else None
        result = func(*args, **kwargs)
        out = result[0] if isinstance(result, (tuple, list)) else result
        passed = None if axis is None else axis_after(operation, args, kwargs, axis, out)
        if passed is None:
            self.spoiled.update(flow.source for flow in flows)
            return result
        self._follow(out, passed, self._stepped(flows[0], operation, args, passed))
        return result

    def _stepped(self, flow: _Flow, operation: str, args: Any, axis: int) -> _Flow:
        if operation in CLIP:
            inner = self._inside[-1] if self._inside else ""
            module = inner if isinstance(self.modules[inner], nn.Hardtanh) else ""
            return _Flow(flow.source, (*flow.clips, Clip(module, axis - args[0].dim(), float(args[2]))), flow.shiftable)
        still = operation not in POOLS | LEAKY and not (operation == PAD and any(args[1]))
        return _Flow(flow.source, flow.clips, flow.shiftable and still)

    def _follow(self, tensor: Tensor, axis: int, flow: _Flow) -> None:
        self._flows[memory_of(tensor)] = flow
        self._axes[tensor] = axis
        # The weak reference keeps the address from being given to another tensor.
        self.memory.append((flow.source, StorageWeakRef(tensor.untyped_storage())))

    def _entering(self, name: str) -> Callable[..., None]:
        def enter(_: nn.Module, inputs: tuple[Any, ...]) -> None:
            self.calls[name] = self.calls.get(name, 0) + 1
            if self.calls[name] > 1:
                self.barred.add(name)
            self._inside.append(name)
            if name not in self.layers:
                return
            if not inputs or not isinstance(inputs[0], Tensor):
                self.barred.add(name)
                return
            flow = self._flows.get(memory_of(inputs[0]))
            axis = self._axes.get(inputs[0])
            if flow is None or axis != channel_axis(self.layers[name], inputs[0]):
                return
            self._entered[name] = memory_of(inputs[0])
            reading = self._found[flow.source]
            reading.readers.append(name)
            reading.clips += [clip for clip in flow.clips if clip not in reading.clips]
            reading.shiftable &= flow.shiftable

        return enter

    def _leaving(self, name: str) -> Callable[..., None]:
        def leave(_module: nn.Module, _inputs: Any, output: Any) -> None:
            self._inside.pop()
            if name in self.sources and isinstance(output, Tensor) and name not in self._found:
                own = self.sources[name]
                axis = channel_axis(self.layers[name], output) if own is None else own % output.dim()
                self._found[name] = _Reading()
                if axis < 0:
                    self.spoiled.add(name)
                else:
                    self._follow(output, axis, _Flow(name))

        return leave


def called(model: nn.Module, example: Tensor) -> set[str]:
    """The layers that are called with a tensor, each once, under one name, with parameters that nothing else reads."""
    watch = _Watch(model, dict.fromkeys(named_weight_layers(model)))
    with torch.no_grad(), watch.attached(), watch:
        model(example)
    return {name for name in watch.layers if name in watch.calls and name not in watch.barred}
