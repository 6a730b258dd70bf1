"""Sums, products and concatenations of activations as modules, and pools: what else reads activations beside layers.

Integer hardware adds, joins and pools codes, so that their inputs are quantized, too. `expose` makes a module of each
such function; what it reads passes an `Edge` each, and to quantize it is to quantize the input of that.
"""

from __future__ import annotations

import operator
from contextlib import nullcontext, suppress
from typing import Any

import torch
from torch import Tensor, fx, nn

from qbench.errors import Unsupported
from qbench.quant import structure
from qbench.quant.exposing import Watch, call_instead, rewrite, trace
from qbench.quant.layers import WEIGHT_LAYERS, within
from qbench.quant.matmuls import MatMul

POOLS = (nn.AvgPool2d, nn.MaxPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d)
_BINARY: dict[Any, str] = {
    **dict.fromkeys((operator.add, operator.iadd, torch.add, "add", "add_", "__add__"), "add"),
    **dict.fromkeys((operator.mul, operator.imul, torch.mul, "mul", "mul_", "__mul__"), "mul"),
}
_CONCATENATIONS = {torch.cat, torch.concat, torch.concatenate}


class Edge(nn.Module):
    """What an activation passes on its way into a sum, a product or a concatenation; its input can be quantized."""

    def forward(self, x: Tensor) -> Tensor:
        return x


class Join(nn.Module):
    """The sum, the product, or the concatenation of activations."""

    def __init__(self, kind: str, count: int) -> None:
        super().__init__()
        self.kind = kind
        self.edges = nn.ModuleList(Edge() for _ in range(count))

    def forward(self, tensors: list[Tensor], dim: int = 0) -> Tensor:
        read = [edge(tensor) for edge, tensor in zip(self.edges, tensors, strict=True)]
        if self.kind == "cat":
            return torch.cat(read, dim)
        left, right = read
        return left + right if self.kind == "add" else left * right


def edges(model: nn.Module, skip: tuple[str, ...] = ()) -> dict[str, nn.Module]:
    """The exposed edges and the pools by name, but for those whose name equals or begins with one of `skip`."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, (Edge, *POOLS)) and not any(within(name, prefix) for prefix in skip)
    }


def expose(model: nn.Module, example: Tensor, *, every: bool = True) -> None:
    """Make every sum, product and concatenation of activations a `Join`, by recorded operations.

    What is exposed already is left alone, as are products with something that has no more than one number.

    Args:
        model: in evaluation mode; changed in place.
        example: an input of the model, a batch of one.
        every: without it, modules are left as they are whose functions cannot be taken out.

    Raises:
        Unsupported: those of a module cannot be taken out of its forward function.
    """
    watch = Watch(model, _recognise, (Join, MatMul, *WEIGHT_LAYERS))
    watch.run(example)
    for name, events in watch.found.items():
        with nullcontext() if every else suppress(Unsupported):
            structure.apply(model, "expose_edges", module=name, constants=watch.constants(name), events=events)


def _recognise(operation: str, args: tuple[Any, ...], watch: Watch) -> str | None:
    if operation == "cat" and watch.computed(*args[0]):
        return f"cat{len(args[0])}"
    kind = _BINARY.get(operation)
    whole = kind is not None and watch.computed(*args[:2]) and all(tensor.numel() > 1 for tensor in args[:2])
    return f"{kind}2" if whole else None


@structure.operation("expose_edges")
def _expose(model: nn.Module, *, module: str, constants: dict[str, Any], events: list[str]) -> None:
    """Rewrite the forward function of one module; `events` are its functions in order, with their operands' number."""
    owner = model.get_submodule(module)
    where = f"{module or 'the network'} ({type(owner).__name__})"
    graph = trace(owner, constants, where)
    found = [node for node in graph.nodes if _kind(node) is not None]
    if [_kind(node) for node in found] != [event.rstrip("0123456789") for event in events]:
        raise Unsupported(f"{where} adds, multiplies or joins inside of a function that cannot be taken apart")
    for number, (node, event) in enumerate(zip(found, events, strict=True)):
        kind = event.rstrip("0123456789")
        made = Join(kind, int(event.removeprefix(kind)))
        operands = [node.args[0], node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)]
        arguments = operands if kind == "cat" else [operands]
        call_instead(owner, graph, node, f"join{number}", made, *arguments)
    rewrite(owner, graph)


def _kind(node: fx.Node) -> str | None:
    if node.op not in ("call_function", "call_method"):
        return None
    if node.target in _CONCATENATIONS and node.args:
        return "cat"
    both = len(node.args) == 2 and all(isinstance(a, fx.Node) and a.op != "get_attr" for a in node.args)
    return _BINARY.get(node.target) if both and not node.kwargs else None
