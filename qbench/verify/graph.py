"""A network as a list of operations of few kinds, along which bounds can be sent in place of tensors."""

from __future__ import annotations

import operator
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from qbench.errors import Unsupported
from qbench.quant.activations import StaticQuantizer, input_quantizer
from qbench.quant.channel_clip import ChannelClip
from qbench.quant.dropped_input import DroppedInput
from qbench.quant.fakequant import LearnedInput
from qbench.quant.folding import NORMS

T = TypeVar("T")
Kind = Literal["linear", "norm", "quantizer", "relu", "monotone", "extreme", "average", "shape", "add"]
"""A convolution or linear layer; a batch norm with fixed statistics; a quantizer; a non-decreasing function of each
number, with slopes of at most 1 (`relu` is one of them); the greatest of some numbers; the mean of some; a copy in
another order; the sum of two tensors."""

LINEAR = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
_MODULES: dict[Kind, tuple[Any, ...]] = {
    "shape": (nn.Identity, nn.Flatten, nn.Unflatten, *_DROPOUTS),
    "relu": (nn.ReLU,),
    "monotone": (nn.ReLU6, nn.Hardtanh, nn.Sigmoid, nn.Hardsigmoid, nn.Tanh, ChannelClip),
    "extreme": (nn.MaxPool1d, nn.MaxPool2d, nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d),
    "average": (nn.AvgPool1d, nn.AvgPool2d, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d),
}
_FUNCTIONS: dict[Kind, tuple[Any, ...]] = {
    "shape": (torch.flatten, torch.reshape, "flatten", "view", "reshape", "permute", "contiguous"),
    "relu": (F.relu, torch.relu, "relu", "relu_"),
    "monotone": (F.relu6, F.hardtanh, F.hardsigmoid, torch.sigmoid, torch.tanh, "sigmoid", "tanh"),
    "extreme": (F.max_pool2d, F.adaptive_max_pool2d),
    "average": (F.avg_pool2d, F.adaptive_avg_pool2d, torch.mean, "mean"),
}
_SUMS = (operator.add, operator.iadd, torch.add)
_KINDS: dict[Any, Kind] = {each: kind for table in (_MODULES, _FUNCTIONS) for kind in table for each in table[kind]}


@dataclass(frozen=True)
class Operation:
    """One step of a network."""

    kind: Kind
    name: str
    """Of the module; of the place in the traced graph where there is none."""
    operands: tuple[int, ...]
    """What it takes: 0 is the network's input, k the outcome of the k-th operation, counted from 1."""
    function: Any
    """The module, or a function of one tensor; None for a sum."""


@dataclass(frozen=True)
class Graph:
    """The operations of a network in order; the outcome of the last is the network's."""

    operations: tuple[Operation, ...]

    def head(self) -> tuple[Graph, nn.Linear]:
        """All that is in front of the last layer, and that layer.

        Raises:
            Unsupported: the outputs do not come from a linear layer.
        """
        last = self.operations[-1]
        if not isinstance(last.function, nn.Linear):
            raise Unsupported(f"the outputs come from {last.name}, not from a linear layer")
        return Graph(self.operations[: last.operands[0]]), last.function


class Walk(ABC, Generic[T]):
    """Sends a T along a graph; subclasses say what operations make of it."""

    def run(self, graph: Graph, x: T) -> T:
        """What comes out for x."""
        values = [x]
        for operation in graph.operations:
            a, *b = (values[place] for place in operation.operands)
            values.append(self.add(a, *b) if operation.kind == "add" else self.step(operation, a))
        return values[-1]

    @abstractmethod
    def step(self, operation: Operation, x: T) -> T:
        """Any operation but a sum."""

    @abstractmethod
    def add(self, a: T, b: T) -> T:
        """The sum of two."""


def trace(network: nn.Module) -> Graph:
    """The operations of a network in the mode it is in; they refer to its own modules, whatever these learn later.

    Raises:
        Unsupported: something is of no `Kind`, or the network's code depends on numbers.
    """
    tracer = _Tracer()
    try:
        traced = tracer.trace(network)
    except Exception as error:  # whatever code does with tensors that have no numbers
        raise Unsupported(f"the network cannot be traced at {tracer.inside or 'its beginning'} ({error})") from error
    builder = _Builder(network)
    for node in traced.nodes:
        if _overwrites(network, node) and len(node.all_input_nodes[0].users) > 1:
            raise Unsupported(f"{node.name} overwrites what is used elsewhere as well")
        builder.visit(node)
    return Graph(tuple(builder.operations))


class _Tracer(fx.Tracer):
    inside = ""
    """The module that was called last."""

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        self.inside = self.path_of_module(m)
        return super().call_module(m, forward, args, kwargs)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        known = isinstance(m, (*LINEAR, *NORMS)) or _kind(m) is not None
        return known or super().is_leaf_module(m, module_qualified_name)


class _Builder:
    """Makes operations of the nodes of a traced graph."""

    def __init__(self, network: nn.Module) -> None:
        self.network = network
        self.operations: list[Operation] = []
        self.places: dict[Any, int] = {}

    def visit(self, node: fx.Node) -> None:
        """Take up the next node.

        Raises:
            Unsupported: it is of no kind.
        """
        alone = len(node.args) == 1 and not node.kwargs
        if node.op == "placeholder" and not self.places:
            self.places[node] = 0
        elif node.op == "output":
            self.operations = self.operations[: self._place(node, node.args[0])]
        elif node.op == "call_module" and alone:
            self._layer(node, str(node.target))
        elif node.target in _SUMS and len(node.args) == 2 and not node.kwargs:
            self._append(node, "add", node.name, None, *(self._place(node, operand) for operand in node.args))
        elif not _is_batch_size(node):
            self._function(node)

    def _layer(self, node: fx.Node, name: str) -> None:
        module, place = self.network.get_submodule(name), self._place(node, node.args[0])
        quantizer = input_quantizer(module)
        if len(module._forward_pre_hooks) > (quantizer is not None) or module._forward_hooks:
            raise _refused(name, f"{type(module).__name__} with hooks")
        if quantizer is not None:
            place = self._module(node, f"{name}.input_quantizer", quantizer, place)
        self._module(node, name, module, place)

    def _module(self, node: fx.Node, name: str, module: nn.Module, place: int) -> int:
        kind = _kind(module)
        if kind is None:
            learning = module.training and isinstance(module, (*NORMS, *_DROPOUTS))
            raise _refused(name, type(module).__name__ + (" in training mode" if learning else ""))
        place = self._append(node, kind, name, module, place)
        for part in ("drop", "act") if kind == "norm" else ():
            if hasattr(module, part):
                place = self._module(node, f"{name}.{part}", getattr(module, part), place)
        return place

    def _function(self, node: fx.Node) -> None:
        name, target = getattr(node.target, "__name__", str(node.target)), node.target
        kind = _KINDS.get(target) if node.args else None
        function: Any = getattr(Tensor, target) if isinstance(target, str) else target
        function = _Call(function, node.args[1:], node.kwargs)
        if target is F.dropout and node.kwargs.get("training") is False:
            kind, function = "shape", nn.Identity()
        if kind is None or not all(map(_is_batch_size, node.all_input_nodes[1:])):
            raise _refused(node.name, name)
        self._append(node, kind, node.name, function, self._place(node, node.args[0]))

    def _append(self, node: fx.Node, kind: Kind, name: str, function: Any, *places: int) -> int:
        self.operations.append(Operation(kind, name, places, function))
        self.places[node] = len(self.operations)
        return len(self.operations)

    def _place(self, node: fx.Node, operand: Any) -> int:
        if not isinstance(operand, fx.Node) or operand not in self.places:
            raise _refused(node.name, f"it takes {operand}")
        return self.places[operand]


class _Call:
    """A function of its first argument; the size of the batch may be among the others."""

    def __init__(self, function: Any, args: Any, kwargs: Any) -> None:
        self.function, self.others = function, (args, kwargs)

    def __call__(self, x: Tensor) -> Tensor:
        args, kwargs = fx.node.map_arg(self.others, lambda _: len(x))
        result: Tensor = self.function(x, *args, **kwargs)
        return result


def _kind(module: nn.Module) -> Kind | None:
    if isinstance(module, LINEAR):
        # Subclasses may pad in their own way.
        return "linear" if any(type(module).forward is kind.forward for kind in LINEAR) else None
    if isinstance(module, (StaticQuantizer, LearnedInput)):
        return None if isinstance(module, DroppedInput) and module.keep < 1 else "quantizer"
    if isinstance(module, NORMS):
        return "norm" if isinstance(module.running_mean, Tensor) and not module.training else None
    if isinstance(module, _DROPOUTS) and module.training and module.p > 0:
        return None
    return _KINDS.get(type(module))


def _refused(name: str, what: object) -> Unsupported:
    return Unsupported(f"there are no bounds for {name} ({what})")


def _is_batch_size(node: Any) -> bool:
    """Whether a node is `x.size(0)` or `x.shape[0]`, or the sizes on the way to it."""
    if node.op == "call_function" and node.target is getattr:
        return node.args[1] == "shape"
    if node.op == "call_function" and node.target is operator.getitem:
        return _is_batch_size(node.args[0]) and node.args[1] == 0
    return node.op == "call_method" and node.target == "size" and node.args[1:] in ((), (0,))


def _overwrites(network: nn.Module, node: fx.Node) -> bool:
    if node.op == "call_module":
        return bool(getattr(network.get_submodule(str(node.target)), "inplace", False))
    return bool(node.kwargs.get("inplace")) or (node.op == "call_method" and str(node.target).endswith("_"))
