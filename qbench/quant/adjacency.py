"""Which batch norms read a layer's output, and nothing else does: found by watching one forward pass."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from qbench.quant.folding import NORMS
from qbench.quant.hooks import hooked
from qbench.quant.layers import named_weight_layers

# What a layer may do with its weight: multiply by it. One that computes it (weight standardisation) cannot be scaled.
PRODUCTS = {"convolution", "t", "transpose", "permute", "mm", "addmm", "linear", "bmm", "mkldnn_linear_pointwise"}


def foldable(model: nn.Module, example: Tensor) -> list[tuple[str, str]]:
    """Pairs (layer, norm): in the forward pass of `example`, the norm is all that reads the layer's output.

    Both are called once, under one name, and share no parameters with other modules. Names of attributes play no part,
    so norms in front of a layer, or behind a sum, are told apart from those behind a layer.

    Args:
        model: in evaluation mode.
        example: an input of the model, a batch of one.
    """
    watch = _Watch(model)
    with torch.no_grad(), watch.attached(), watch:
        output = model(example)
    # What still lives now is part of the output, or was kept by somebody: its values must not change.
    kept = {name for name, memory in watch.memory.items() if not memory.expired()}
    del output
    pairs = [(layer, norm) for layer, norm in watch.fed.items() if layer not in watch.spoiled | kept]
    return [(layer, norm) for layer, norm in pairs if norm not in watch.spoiled]


def ambiguous(model: nn.Module) -> set[nn.Module]:
    """The modules that have several names, or share parameters with others: to change one is to change more."""
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(name)
    owners: dict[int, set[nn.Module]] = {}
    for module in names:
        for parameter in module._parameters.values():
            if parameter is not None:
                owners.setdefault(id(parameter), set()).add(module)
    sharing = {module for several in owners.values() if len(several) > 1 for module in several}
    return sharing | {module for module, called in names.items() if len(called) > 1}


class _Watch(TorchDispatchMode):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        several = ambiguous(model)
        self.layers = named_weight_layers(model)
        self.norms = {name: module for name, module in model.named_modules() if _is_norm(module)}
        self.spoiled = {
            name
            for name, module in (self.layers | self.norms).items()
            if module in several or (module in self.norms.values() and _hooked(module))
        } | {name for name, module in self.layers.items() if module._forward_hooks}
        self.weights = {
            memory_of(parameter): name
            for name, module in self.layers.items()
            for parameter in module.parameters(recurse=False)
        }
        self.fed: dict[str, str] = {}
        self.memory: dict[str, StorageWeakRef] = {}
        self._outputs: dict[int, str] = {}
        self._calls: set[str] = set()
        self._inside: list[str] = []

    def attached(self) -> AbstractContextManager[None]:
        """Follow the calls of layers and norms."""
        return hooked(
            handle
            for name, module in (self.layers | self.norms).items()
            for handle in (
                module.register_forward_pre_hook(self._entering(name)),
                module.register_forward_hook(self._leaving(name)),
            )
        )

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for value in tree_leaves((args, kwargs)):
            if isinstance(value, Tensor) and value.layout == torch.strided:
                self._read(memory_of(value), func.overloadpacket.__name__)
        return func(*args, **kwargs)

    def _read(self, key: int, operation: str) -> None:
        layer = self._outputs.get(key)
        if layer is not None and self.fed.get(layer) not in self._inside:
            self.spoiled.add(layer)
        owner = self.weights.get(key)
        if owner is not None and (owner not in self._inside or operation not in PRODUCTS):
            self.spoiled.add(owner)

    def _entering(self, name: str) -> Any:
        def enter(_: nn.Module, inputs: tuple[Any, ...]) -> None:
            if name in self._calls:
                self.spoiled.add(name)
            self._calls.add(name)
            self._inside.append(name)
            if name not in self.norms or not inputs or not isinstance(inputs[0], Tensor):
                return
            layer = self._outputs.get(memory_of(inputs[0]))
            if layer is None:
                return
            if layer in self.fed or _channel_axis(self.layers[layer], inputs[0]) != 1:
                self.spoiled.add(layer)
            self.fed.setdefault(layer, name)

        return enter

    def _leaving(self, name: str) -> Any:
        def leave(_module: nn.Module, _inputs: Any, output: Any) -> None:
            self._inside.remove(name)
            if name in self.layers and isinstance(output, Tensor):
                self._outputs[memory_of(output)] = name
                # The weak reference keeps the address from being given to another tensor.
                self.memory[name] = StorageWeakRef(output.untyped_storage())

        return leave


def _is_norm(module: nn.Module) -> bool:
    return type(module) in NORMS and getattr(module, "running_mean", None) is not None


def _hooked(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


def _channel_axis(layer: nn.Module, output: Tensor) -> int:
    return output.dim() - 1 if isinstance(layer, nn.Linear) else 1


def memory_of(tensor: Tensor) -> int:
    """What tells the memory behind a tensor, shared by its views, from any other that lives."""
    return tensor.untyped_storage()._cdata
