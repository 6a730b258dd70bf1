"""Functions inside of a module's forward, such as a product or a sum of activations, made modules of their own.

A forward pass shows which modules call such functions; their forward functions are rewritten by recorded operations.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import TorchDispatchMode

from qbench.errors import Unsupported
from qbench.quant.adjacency import memory_of
from qbench.quant.hooks import hooked

Recognise = Callable[[str, tuple[Any, ...], "Watch"], str | None]
"""`(operation, arguments, watch) -> event`, or None for an operation of another kind."""
_SCALARS = (bool, int, float, str)


class Watch(TorchDispatchMode):
    """Which modules call functions of a kind themselves, not in a child, and what the modules are called with.

    Attributes:
        found: by module, the events of its calls in order.
        computed: whether a tensor is an activation rather than a parameter.
    """

    def __init__(self, model: nn.Module, recognise: Recognise, leaves: tuple[type[nn.Module], ...]) -> None:
        super().__init__()
        self.found: dict[str, list[str]] = {}
        self._recognise, self._leaves = recognise, leaves
        self._parameters = {memory_of(parameter) for parameter in model.parameters()}
        self._running: list[tuple[str, nn.Module]] = []
        self._calls: dict[str, list[dict[str, Any]]] = {}
        self._model = model

    def run(self, example: Tensor) -> None:
        """Watch one forward pass."""
        handles = (
            handle
            for name, module in self._model.named_modules()
            for handle in (
                module.register_forward_pre_hook(self._entering(name), with_kwargs=True),
                module.register_forward_hook(lambda *_: self._leave()),
            )
        )
        with hooked(handles), torch.no_grad(), self:
            self._model(example)

    def computed(self, *tensors: Any) -> bool:
        return all(isinstance(t, Tensor) and memory_of(t) not in self._parameters for t in tensors)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        event = self._recognise(func.overloadpacket.__name__, args, self)
        if event is not None and self._running:
            name, module = self._running[-1]
            if not isinstance(module, self._leaves) and len(self._calls[name]) == 1:
                self.found.setdefault(name, []).append(event)
        return func(*args, **(kwargs or {}))

    def constants(self, name: str) -> dict[str, Any]:
        """The arguments of a module that were no tensors, and the defaults of those that were not given.

        Raises:
            Unsupported: they cannot be written down.
        """
        first, *others = self._calls[name]
        for key, value in first.items():
            if value is not None and not isinstance(value, _SCALARS):
                raise Unsupported(f"{name} is called with {key}={value!r}: a constant that is no scalar")
        if any(other != first for other in others):
            raise Unsupported(f"{name} is called several times, in several ways")
        return first

    def _entering(self, name: str) -> Any:
        def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._running.append((name, module))
            bound = inspect.signature(module.forward).bind(*args, **kwargs)
            bound.apply_defaults()
            constants = {key: value for key, value in bound.arguments.items() if not _tensors(value)}
            self._calls.setdefault(name, []).append(constants)

        return enter

    def _leave(self) -> None:
        self._running.pop()


def _tensors(value: Any) -> bool:
    """Whether it is a tensor, or a list of tensors."""
    several = isinstance(value, (list, tuple)) and bool(value)
    return all(isinstance(part, Tensor) for part in value) if several else isinstance(value, Tensor)


class _Tracer(fx.Tracer):
    """Traces one module's own code; those inside of it are called as they are."""

    def __init__(self) -> None:
        super().__init__()
        self.proxy_buffer_attributes = True

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:  # noqa: ARG002
        return True

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> tuple[Any, list[Any]]:
        function, arguments = super().create_args_for_root(root_fn, is_module)
        names = list(inspect.signature(root_fn).parameters)
        return function, [concrete_args.get(name, value) for name, value in zip(names, arguments, strict=True)]


def trace(module: nn.Module, constants: dict[str, Any], where: str) -> fx.Graph:
    """The graph of a module's own forward function.

    Args:
        module: whose children are called as they are.
        constants: its arguments that are no tensors.
        where: what messages call it.

    Raises:
        Unsupported: it cannot be traced.
    """
    try:
        graph = _Tracer().trace(module, constants)
    except Exception as error:  # whatever code does that was not written to be traced
        line = str(error).partition("\n")[0]
        raise Unsupported(f"{where} cannot be traced: {type(error).__name__}: {line}") from error
    if any(node.op == "get_attr" and str(node.target).startswith("_tensor_constant") for node in graph.nodes):
        raise Unsupported(f"{where} makes tensors of its own, which cannot be traced")
    return graph


def call_instead(module: nn.Module, graph: fx.Graph, node: fx.Node, name: str, made: nn.Module, *args: Any) -> None:
    """Add the module `made`, and call it in place of a node of the graph."""
    module.add_module(name, made.train(module.training))
    with graph.inserting_before(node):
        call = graph.call_module(name, args)
    node.replace_all_uses_with(call)
    graph.erase_node(node)


def rewrite(module: nn.Module, graph: fx.Graph) -> None:
    """Make the graph the module's forward function; it keeps its attributes, hooks and names."""
    kind = type(module)
    forward = type(fx.GraphModule(module, graph)).forward
    module.__class__ = type(kind.__name__, (kind,), {"forward": forward})
