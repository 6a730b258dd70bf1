"""The blocks that a network is built of, found from its structure and one forward pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from qbench.quant.layers import full_name, named_weight_layers, within

_CONTAINERS = (nn.Sequential, nn.ModuleList)
_SUMS = {"add", "add_"}


def blocks(model: nn.Module, example: Tensor) -> list[str]:
    """The names of the blocks, none inside another, in registration order.

    A block holds weight layers, is called once, with one tensor, and returns one tensor. The innermost modules that
    themselves add two of their tensors are blocks (residual blocks); so are those members of sequences that hold two
    weight layers or more, where no residual block is inside or around. The network itself is none.

    Args:
        model: in evaluation mode.
        example: an image as a batch of one.
    """
    watch = _Watch(model)
    try:
        with torch.no_grad(), watch:
            # Two images, so that what is added from a parameter has another shape.
            model(torch.cat([example, example]))
    finally:
        watch.detach()
    found = _innermost({name for name in watch.sums if watch.usable(name)})
    members = {name for name in _members(model) if watch.usable(name) and not _related(name, found)}
    found |= _innermost(members)
    return [name for name, _ in model.named_modules() if name in found]


def _members(model: nn.Module) -> list[str]:
    """Modules in sequences with two weight layers or more, which are no sequences themselves."""
    return [
        full_name(name, child)
        for name, module in model.named_modules()
        if isinstance(module, _CONTAINERS)
        for child, member in module.named_children()
        if not isinstance(member, _CONTAINERS) and len(named_weight_layers(member)) > 1
    ]


def _innermost(names: set[str]) -> set[str]:
    return {name for name in names if not any(other.startswith(name + ".") for other in names)}


def _related(name: str, others: set[str]) -> bool:
    return any(within(name, other) or within(other, name) for other in others)


class _Watch(TorchDispatchMode):
    """Which module is running when two activations of one shape are added, and how modules are called."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.sums: set[str] = set()
        self._running: list[str] = []
        self._calls: dict[str, int] = {}
        self._odd: set[str] = set()
        self._handles = []
        self._holders = {name for name, module in model.named_modules() if name and named_weight_layers(module)}
        for name, module in model.named_modules():
            self._handles.append(module.register_forward_pre_hook(self._entering(name), with_kwargs=True))
            self._handles.append(module.register_forward_hook(self._leaving(name)))

    def detach(self) -> None:
        for handle in self._handles:
            handle.remove()

    def usable(self, name: str) -> bool:
        """It has weight layers, and is called once, with one tensor and nothing else, for one tensor."""
        return name in self._holders and self._calls.get(name) == 1 and name not in self._odd

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in _SUMS and self._running:
            pair = args[:2]
            if all(isinstance(value, Tensor) for value in pair) and pair[0].shape == pair[1].shape:
                self.sums.add(self._running[-1])
        return func(*args, **(kwargs or {}))

    def _entering(self, name: str) -> Any:
        def enter(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._running.append(name)
            self._calls[name] = self._calls.get(name, 0) + 1
            given = [value for value in tree_leaves((args[1:], kwargs)) if value is not None and value is not False]
            if given or not args or not isinstance(args[0], Tensor):
                self._odd.add(name)

        return enter

    def _leaving(self, name: str) -> Any:
        def leave(_module: nn.Module, _args: Any, output: Any) -> None:
            self._running.pop()
            if not isinstance(output, Tensor):
                self._odd.add(name)

        return leave
