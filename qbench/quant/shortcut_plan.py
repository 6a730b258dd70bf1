"""Where shortcuts around convolutions can be, found from the network's structure and one forward pass.

What changes the shape is bridged without weights (averages over the stride, channels that are repeated, as in ReActNet,
arXiv:2003.03488), or by the block's own branch if that begins at the same input, as in Bi-Real Net (arXiv:1808.00278).
Where shortcuts carry the input of a residual block all the way, the sum at its end goes.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterator
from dataclasses import asdict, dataclass
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp

from qbench.quant import structure
from qbench.quant.adjacency import foldable
from qbench.quant.gram import CONVOLUTIONS
from qbench.quant.hooks import hooked
from qbench.quant.layers import full_name, named_weight_layers
from qbench.quant.rewiring import trace, upstream
from qbench.quant.shortcuts import Shortcut

_ADDITIONS = {operator.add, operator.iadd, torch.add, "add", "add_"}


class ShortcutPlan:
    """The modules of a network that call convolutions and the norms behind them, with what can be added there."""

    def __init__(self, model: nn.Module, example: Tensor) -> None:
        """
        Args:
            model: in evaluation mode.
            example: an input of it, a batch of one.

        Raises:
            Unsupported: one of these modules cannot be traced.
        """
        self.model = model
        pairs: dict[str, dict[str, str]] = {}
        for layer, norm in foldable(model, example):
            if isinstance(model.get_submodule(layer), CONVOLUTIONS):
                owner = _owner(layer, norm)
                cut = len(owner) + 1 if owner else 0
                pairs.setdefault(owner, {})[layer[cut:]] = norm[cut:]
        inputs = _inputs(model, example, pairs)
        self.callers = {name: _Caller(model.get_submodule(name), pairs[name], inputs[name]) for name in pairs}

    def branches(self) -> set[str]:
        """The layers in the branches of residual blocks: they belong to shortcuts and need none."""
        return {
            full_name(name, layer)
            for name, caller in self.callers.items()
            for sum_ in caller.sums
            for layer in sum_.branch
        }

    def apply(self, layers: Collection[str]) -> list[str]:
        """Add the shortcuts that can be around these layers, and return the names of those that have one then."""
        done: list[str] = []
        for name, caller in self.callers.items():
            chosen = [layer for layer in caller.norms if full_name(name, layer) in layers]
            shortcuts, gone = caller.plan(chosen)
            if shortcuts:
                added = [asdict(shortcut) for shortcut in shortcuts]
                structure.apply(self.model, "shortcuts", module=name, added=added, sums=gone)
                done += [full_name(name, shortcut.layer) for shortcut in shortcuts]
        return done


@dataclass(frozen=True)
class _Sum:
    """The end of a residual block."""

    node: fx.Node
    place: int
    """Of the summand that comes through most layers."""
    main: frozenset[str]
    """The layers that only this one comes through."""
    branch: frozenset[str]
    """The layer, if any, that only the other one comes through."""

    @property
    def other(self) -> fx.Node:
        other = self.node.args[1 - self.place]
        assert isinstance(other, fx.Node)
        return other


class _Caller:
    """A module as a graph with shapes; the names of its parts are those within it."""

    def __init__(self, module: nn.Module, norms: dict[str, str], inputs: tuple[Any, ...]) -> None:
        self.module, self.norms = module, norms
        self.graph = trace(module, [*norms, *norms.values()])
        with torch.no_grad():
            ShapeProp(fx.GraphModule(module, self.graph)).propagate(*inputs)
        self.calls = {node.target: node for node in self.graph.nodes if node.op == "call_module"}
        self.sums = list(self._sums())

    def plan(self, layers: Collection[str]) -> tuple[list[Shortcut], dict[str, int]]:
        """Shortcuts around those layers that can have one, and the sums that go with the place of what stays."""
        found = {layer: self._branched(layer) or self._bridged(layer) for layer in layers}
        gone: dict[str, int] = {}
        for sum_ in self.sums:
            if all(found.get(layer) for layer in sum_.main) and self._carried(sum_, found):
                gone[sum_.node.name] = sum_.place
            else:
                found |= {layer: self._bridged(layer) for layer in sum_.main & found.keys()}
        return [shortcut for shortcut in found.values() if shortcut is not None], gone

    def _carried(self, sum_: _Sum, found: dict[str, Shortcut | None]) -> bool:
        """Whether the other summand comes through the shortcuts as well."""
        if sum_.branch:
            return any(shortcut and shortcut.branch == sum_.node.name for shortcut in found.values())
        return any(self.calls[layer].args[0] is sum_.other for layer in sum_.main)

    def _branched(self, layer: str) -> Shortcut | None:
        """A shortcut through the branch of the block that the layer begins."""
        start, out = self._ends(layer)
        for sum_ in self.sums:
            begins = layer in sum_.main and sum_.branch and not self._layers(start) & sum_.main
            if begins and start in upstream(sum_.other) and _shape(sum_.other) == _shape(out) != _shape(start):
                return Shortcut(layer, self.norms[layer], branch=sum_.node.name)
        return None

    def _bridged(self, layer: str) -> Shortcut | None:
        """A shortcut without weights."""
        (_, channels, *sizes), (_, wanted, *left) = (_shape(node) for node in self._ends(layer))
        stride: Any = self.module.get_submodule(layer).stride
        strides = tuple(stride) if max(stride) > 1 else ()
        if strides:
            sizes = [-(-size // step) for size, step in zip(sizes, strides, strict=True)]
        if sizes != left or wanted % channels:
            return None
        return Shortcut(layer, self.norms[layer], strides, wanted // channels)

    def _ends(self, layer: str) -> tuple[fx.Node, fx.Node]:
        start = self.calls[layer].args[0]
        assert isinstance(start, fx.Node)
        return start, self.calls[self.norms[layer]]

    def _sums(self) -> Iterator[_Sum]:
        for node in self.graph.nodes:
            if node.op == "call_module" or node.target not in _ADDITIONS or len(node.all_input_nodes) != 2:
                continue
            sides = [self._layers(summand) for summand in node.args]
            own = [frozenset(sides[0] - sides[1]), frozenset(sides[1] - sides[0])]
            place = int(len(own[1]) > len(own[0]))
            if len(own[1 - place]) < min(2, len(own[place])):
                yield _Sum(node, place, own[place], own[1 - place])

    def _layers(self, node: fx.Node) -> set[str]:
        """The weight layers that come before, by name."""
        called = [str(before.target) for before in upstream(node) if before.op == "call_module"]
        return {
            full_name(part, name) for part in called for name in named_weight_layers(self.module.get_submodule(part))
        }


def _shape(node: fx.Node) -> tuple[int, ...]:
    return tuple(node.meta["tensor_meta"].shape)


def _owner(layer: str, norm: str) -> str:
    """The innermost module that both are in."""
    parts = zip(layer.split(".")[:-1], norm.split(".")[:-1], strict=False)
    return ".".join(part for part, _ in takewhile(lambda pair: pair[0] == pair[1], parts))


def _inputs(model: nn.Module, example: Tensor, names: Collection[str]) -> dict[str, tuple[Any, ...]]:
    """What each of the modules is called with."""
    found: dict[str, tuple[Any, ...]] = {}
    handles = (
        model.get_submodule(name).register_forward_pre_hook(lambda _, args, name=name: found.update({name: args}))
        for name in names
    )
    with hooked(handles), torch.no_grad():
        model(example)
    return found
