"""Products of activations (attention) as modules, so that quantizers can be attached to their operands.

Attention multiplies queries with keys, and its softmax with values, inside of its own forward function. `expose` makes
each such product a `MatMul` module, whose two operands pass a module each: to quantize an operand is to quantize the
input of that module, as it is for a layer. The float function stays.
"""

from __future__ import annotations

import inspect
import operator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import TorchDispatchMode

from qbench.errors import Unsupported
from qbench.quant import structure
from qbench.quant.adjacency import memory_of
from qbench.quant.layers import WEIGHT_LAYERS, within

_PRODUCTS = {"bmm", "baddbmm"}
_FUSED = ("_scaled_dot_product", "_native_multi_head_attention", "_transformer_encoder_layer_fwd")
_CALLS = {operator.matmul, torch.matmul, torch.bmm, "matmul", "bmm", "__matmul__"}
_SCALARS = (bool, int, float, str)


class Operand(nn.Module):
    """What an operand of a product passes; its input can be quantized."""

    def forward(self, x: Tensor) -> Tensor:
        return x


class MatMul(nn.Module):
    """The product of two activations, `left @ right`."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = Operand(), Operand()

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        product: Tensor = self.left(left) @ self.right(right)
        return product


def products(model: nn.Module) -> dict[str, MatMul]:
    """The exposed products by name, in registration order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, MatMul)}


def operands(model: nn.Module, skip: tuple[str, ...] = ()) -> dict[str, Operand]:
    """The operands of exposed products by name, but for those whose name equals or begins with one of `skip`."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, Operand) and not any(within(name, prefix) for prefix in skip)
    }


def expose(model: nn.Module, example: Tensor) -> None:
    """Make every product of activations a `MatMul`, by recorded operations; what is exposed already is left alone.

    Args:
        model: in evaluation mode; changed in place.
        example: an input of the model, a batch of one.

    Raises:
        Unsupported: there are no such products, or those of a module cannot be taken out of its forward function.
    """
    watch = _Watch(model)
    try:
        with torch.no_grad(), watch:
            model(example)
    finally:
        watch.detach()
    for name in watch.found:
        structure.apply(model, "expose_matmuls", module=name, constants=watch.constants(name))
    if not products(model):
        raise Unsupported("the model multiplies no activations with each other: it has no attention")


@structure.operation("expose_matmuls")
def _expose(model: nn.Module, *, module: str, constants: dict[str, Any]) -> None:
    """Rewrite the forward function of one module; `constants` are its arguments that are no tensors."""
    attention = model.get_submodule(module)
    kind = type(attention)
    where = f"the attention {module} ({kind.__name__})"
    if hasattr(attention, "fused_attn"):
        vars(attention)["fused_attn"] = False
    try:
        graph = _Tracer().trace(attention, constants)
    except Exception as error:  # whatever code does that was not written to be traced
        raise Unsupported(f"{where} cannot be traced: {type(error).__name__}: {_line(error)}") from error
    if any(node.op == "get_attr" and str(node.target).startswith("_tensor_constant") for node in graph.nodes):
        raise Unsupported(f"{where} makes tensors of its own, which cannot be traced")
    found = [node for node in graph.nodes if node.target in _CALLS and all(a.op != "get_attr" for a in node.args[:2])]
    if not found:
        raise Unsupported(f"{where} multiplies inside of a function that cannot be taken apart")
    for number, node in enumerate(found):
        attention.add_module(f"matmul{number}", MatMul().train(attention.training))
        with graph.inserting_before(node):
            call = graph.call_module(f"matmul{number}", tuple(node.args[:2]))
        node.replace_all_uses_with(call)
        graph.erase_node(node)
    # Only the function is taken from the graph: the module keeps its attributes, hooks and names.
    forward = type(fx.GraphModule(attention, graph)).forward
    attention.__class__ = type(kind.__name__, (kind,), {"forward": forward})


def _line(error: Exception) -> str:
    return str(error).partition("\n")[0]


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


class _Watch(TorchDispatchMode):
    """Which modules multiply activations, and what they are called with."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.found: list[str] = []
        self._parameters = {memory_of(parameter) for parameter in model.parameters()}
        self._running: list[tuple[str, nn.Module]] = []
        self._calls: dict[str, list[dict[str, Any]]] = {}
        self._handles = []
        for name, module in model.named_modules():
            self._handles.append(module.register_forward_pre_hook(self._entering(name), with_kwargs=True))
            self._handles.append(module.register_forward_hook(lambda *_: self._leave()))

    def detach(self) -> None:
        for handle in self._handles:
            handle.remove()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        operation = func.overloadpacket.__name__
        product = operation in _PRODUCTS and all(memory_of(a) not in self._parameters for a in args[-2:])
        if (product or operation.startswith(_FUSED)) and self._running:
            name, module = self._running[-1]
            if not isinstance(module, (MatMul, *WEIGHT_LAYERS)) and name not in self.found:
                self.found.append(name)
        return func(*args, **(kwargs or {}))

    def constants(self, name: str) -> dict[str, Any]:
        """The arguments of a module that were no tensors, and the defaults of those that were not given.

        Raises:
            Unsupported: they cannot be written down.
        """
        first, *others = self._calls[name]
        for key, value in first.items():
            if value is not None and not isinstance(value, _SCALARS):
                raise Unsupported(f"the attention {name} is called with {key}={value!r}: a constant that is no scalar")
        if any(other != first for other in others):
            raise Unsupported(f"the attention {name} is called several times, in several ways")
        return first

    def _entering(self, name: str) -> Any:
        def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._running.append((name, module))
            bound = inspect.signature(module.forward).bind(*args, **kwargs)
            bound.apply_defaults()
            constants = {key: value for key, value in bound.arguments.items() if not isinstance(value, Tensor)}
            self._calls.setdefault(name, []).append(constants)

        return enter

    def _leave(self) -> None:
        self._running.pop()
