"""A shortcut around every convolution (Bi-Real Net, arXiv:1808.00278), in networks that were built without them."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from qbench.quant import structure
from qbench.quant.rewiring import rewire, trace, upstream

_AVERAGES = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}


@dataclass(frozen=True)
class Shortcut:
    """From the input of a layer to the output of its norm; names are those within the module that calls both."""

    layer: str
    norm: str
    stride: tuple[int, ...] = ()
    """Positions that are averaged; empty if as many come out as go in."""
    repeat: int = 1
    """How often the channels come."""
    branch: str = ""
    """The sum whose other summand is taken in place of the layer's input."""


@structure.operation("shortcuts")
def _shortcuts(model: nn.Module, *, module: str, added: list[dict[str, Any]], sums: dict[str, int]) -> None:
    """Add shortcuts to what a module calls, and let of each of `sums` only the summand at that place go on."""
    owner = model.get_submodule(module)
    shortcuts = [Shortcut(**arguments) for arguments in added]
    graph = trace(owner, [name for shortcut in shortcuts for name in (shortcut.layer, shortcut.norm)])
    nodes = {node.name: node for node in graph.nodes}
    calls = {node.target: node for node in graph.nodes if node.op == "call_module"}
    for shortcut in shortcuts:
        layer, norm = calls[shortcut.layer], calls[shortcut.norm]
        start = layer.args[0]
        if shortcut.branch:
            start = nodes[shortcut.branch].args[1 - sums[shortcut.branch]]
            _move_before(layer, start)
        with graph.inserting_after(norm):
            total = graph.call_function(operator.add, (norm, norm))
        norm.replace_all_uses_with(total, delete_user_cb=lambda user, total=total: user is not total)
        with graph.inserting_before(total):
            total.args = (norm, _bridge(graph, start, shortcut))
    for name, place in sums.items():
        nodes[name].replace_all_uses_with(nodes[name].args[place])
        graph.erase_node(nodes[name])
    rewire(owner, graph)


def _move_before(place: fx.Node, last: fx.Node) -> None:
    """Compute the node, and what it needs, before `place`."""
    needed = upstream(last)
    order = list(place.graph.nodes)
    for node in order[order.index(place) :]:
        if node in needed:
            place.prepend(node)


def _bridge(graph: fx.Graph, start: fx.Node, shortcut: Shortcut) -> fx.Node:
    """The start in the shape that is behind the norm."""
    if shortcut.stride:
        average, stride = _AVERAGES[len(shortcut.stride)], tuple(shortcut.stride)
        start = graph.call_function(average, (start, stride), {"ceil_mode": True, "count_include_pad": False})
    return graph.call_function(torch.cat, ([start] * shortcut.repeat, 1)) if shortcut.repeat > 1 else start
