"""Another forward for a module, written as a graph: what calls its parts changes, the parts and their names stay."""

from __future__ import annotations

from collections.abc import Collection

from torch import fx, nn

from qbench.errors import Unsupported
from qbench.quant.layers import within


class _Tracer(fx.Tracer):
    def __init__(self, shown: Collection[str]) -> None:
        super().__init__()
        self.shown = shown

    def is_leaf_module(self, _module: nn.Module, name: str) -> bool:
        return not any(within(shown, name) and shown != name for shown in self.shown)


def trace(module: nn.Module, shown: Collection[str]) -> fx.Graph:
    """What the module's forward does.

    Args:
        module: its forward takes the same way for all inputs.
        shown: names, within the module, of those of its parts whose calls are in the graph; parts that contain none of
            them are called as wholes.

    Raises:
        Unsupported: torch.fx cannot trace it.
    """
    try:
        return _Tracer(shown).trace(module)
    except Exception as error:
        raise Unsupported(f"the forward of {type(module).__name__} cannot be traced: {error}") from error


def rewire(module: nn.Module, graph: fx.Graph) -> None:
    """Let the module compute what the graph says, which was traced from it."""
    graph.lint()
    forward = type(fx.GraphModule(module, graph)).forward
    cls = type(module)
    module.__class__ = type(cls.__name__, (cls,), {"forward": forward, "__module__": cls.__module__})


def upstream(node: fx.Node) -> set[fx.Node]:
    """The node and all that it is computed from."""
    found: set[fx.Node] = set()
    waiting = [node]
    while waiting:
        current = waiting.pop()
        if current not in found:
            found.add(current)
            waiting += current.all_input_nodes
    return found
