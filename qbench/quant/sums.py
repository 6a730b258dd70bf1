"""Sums of activations (residual connections) as modules, so that quantizers can be attached to what is added."""

from __future__ import annotations

import operator
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, fx, nn

from qbench.errors import Unsupported
from qbench.quant import structure
from qbench.quant.exposing import Watch, call_instead, rewrite, trace
from qbench.quant.layers import WEIGHT_LAYERS

_CALLS = {operator.add, operator.iadd, torch.add, "add", "add_", "__add__", "__iadd__"}


class Addend(nn.Module):
    """What passes before it is added; its input can be quantized."""

    def forward(self, x: Tensor) -> Tensor:
        return x


class Sum(nn.Module):
    """`left + right`."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = Addend(), Addend()

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        total: Tensor = self.left(left) + self.right(right)
        return total


def expose_sums(model: nn.Module, example: Tensor) -> None:
    """Make the sums of activations `Sum` modules, by recorded operations, where forward functions can be rewritten.

    Args:
        model: in evaluation mode; changed in place.
        example: an input of the model, a batch of one.
    """
    watch = Watch(model, _recognise, (Sum, *WEIGHT_LAYERS))
    watch.run(example)
    for name in watch.found:
        with suppress(Unsupported):
            structure.apply(model, "expose_sums", module=name, constants=watch.constants(name))


def _recognise(operation: str, args: tuple[Any, ...], watch: Watch) -> str | None:
    return "sum" if operation in ("add", "add_") and watch.computed(*args[:2]) else None


@structure.operation("expose_sums")
def _expose(model: nn.Module, *, module: str, constants: dict[str, Any]) -> None:
    """Rewrite the forward function of one module; `constants` are its arguments that are no tensors."""
    block = model.get_submodule(module)
    where = f"{module or 'the network'} ({type(block).__name__})"
    graph = trace(block, constants, where)
    found = [node for node in graph.nodes if node.target in _CALLS and _adds_values(node)]
    if not found:
        raise Unsupported(f"{where} adds inside of a function that cannot be taken apart")
    for number, node in enumerate(found):
        call_instead(block, graph, node, f"sum{number}", Sum(), *node.args[:2])
    rewrite(block, graph)


def _adds_values(node: fx.Node) -> bool:
    operands = node.args[:2]
    return len(operands) == 2 and all(isinstance(a, fx.Node) and a.op != "get_attr" for a in operands)
