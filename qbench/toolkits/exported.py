"""Graphs of torch.export, before and after a toolkit has quantized them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn

from qbench.errors import Unsupported
from qbench.quant.encodings import Affine
from qbench.toolkits.places import Graph, Grid, Step

_LAYERS = ("conv", "linear")
_THROUGH = {
    *("clone", "contiguous", "alias", "detach", "dropout", "relu", "relu_", "pad", "constant_pad_nd"),
    *("max_pool1d", "max_pool2d", "max_pool3d", "adaptive_max_pool2d"),
}
_MOVES = {
    *("view", "reshape", "flatten", "unflatten", "permute", "transpose", "t", "mT", "squeeze", "unsqueeze", "expand"),
    *("slice", "select", "split", "chunk", "unbind", "getitem"),
}
"""Operators that commute with quantizers, padding if it is with zeros."""


def export(model: nn.Module, example: Tensor) -> fx.GraphModule:
    """The network as a graph of torch's operators, for batches of the example's shape.

    Raises:
        Unsupported: torch cannot export it.
    """
    try:
        return torch.export.export(model, (example,)).module()
    except Exception as error:  # whatever code does that was not written to be traced
        line = str(error).strip().partition("\n")[0]
        raise Unsupported(f"torch cannot export the network: {type(error).__name__}: {line}") from error


def read(quantized: fx.GraphModule, exported: fx.GraphModule, toolkit: str) -> Graph:
    """The quantized graph, operation by operation.

    Args:
        quantized: what the toolkit made of the exported graph.
        exported: as `export` returned it: its operations say which module's they are.
        toolkit: its name, for errors.

    Raises:
        Unsupported: a weight is quantized in a way that is not known here.
    """
    modules = {node.name: _module(node) for node in exported.graph.nodes}
    steps: dict[str, Step] = {}
    outputs: list[str] = []
    for node in quantized.graph.nodes:
        if node.op == "output":
            outputs = [value.name for value in _nodes(node.args)]
        elif node.op == "call_function" and not _is_constant(node):
            steps[node.name] = _step(quantized, node, modules.get(node.name) or _module(node), toolkit)
    return Graph(toolkit, steps, tuple(outputs))


def _step(graph: fx.GraphModule, node: fx.Node, module: str, toolkit: str) -> Step:
    operation = _operation(node)
    if operation.startswith("quantize_per"):
        return Step("quantizer", operation, _inputs(node)[:1], grid=_grid(graph, node, toolkit))
    if operation.startswith("dequantize_per"):
        return Step("quantizer", operation, _inputs(node)[:1])
    if operation in _THROUGH and _pads_zeros(node):
        return Step("through", operation, _inputs(node)[:1], module)
    if operation in _MOVES:
        return Step("moves", operation, _inputs(node)[:1], module)
    if operation.startswith(_LAYERS):
        parameters = {}
        for name, argument in zip(("weight", "bias"), node.args[1:3], strict=False):
            if isinstance(argument, fx.Node):
                value = _constant(graph, argument, toolkit)
                # A weight without codes is one that the toolkit left in float.
                if name == "bias" or isinstance(value, Affine):
                    parameters[name] = value
        return Step("layer", operation, _inputs(node)[:1], module, parameters=parameters)
    return Step("other", operation, _inputs(node), module)


def _operation(node: fx.Node) -> str:
    packet = getattr(node.target, "overloadpacket", node.target)
    return str(getattr(packet, "__name__", packet))


def _module(node: fx.Node) -> str:
    """The module whose forward function calls the operator."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    return str(stack[-1][0]) if stack else ""


def _nodes(arguments: Any) -> Iterator[fx.Node]:
    found: list[fx.Node] = []
    fx.map_arg(arguments, found.append)
    yield from found


def _inputs(node: fx.Node) -> tuple[str | None, ...]:
    return tuple(None if _is_constant(value) else value.name for value in _nodes((node.args, node.kwargs)))


def _is_constant(node: fx.Node) -> bool:
    """Whether it depends on no input of the network."""
    if node.op == "call_function":
        return all(_is_constant(value) for value in node.all_input_nodes)
    return node.op == "get_attr"


def _pads_zeros(node: fx.Node) -> bool:
    if _operation(node) == "pad":
        mode, value = (*node.args[2:], *("constant", None)[len(node.args) - 2 :])[:2]
        return bool(mode == "constant" and not value)
    return _operation(node) != "constant_pad_nd" or not (node.args[2:] and node.args[2])


def _attribute(graph: fx.GraphModule, argument: Any) -> Any:
    """A number as it is, or the tensor behind a node."""
    if not isinstance(argument, fx.Node):
        return argument
    owner, _, name = str(argument.target).rpartition(".")
    value = getattr(graph.get_submodule(owner), name)
    return value.detach() if isinstance(value, Tensor) else value


def _grid(graph: fx.GraphModule, node: fx.Node, toolkit: str) -> Grid:
    scale, zero, *rest = (_attribute(graph, argument) for argument in node.args[1:])
    if _operation(node) == "quantize_per_channel" and rest.pop(0) != 1:
        raise Unsupported(f"{toolkit} quantizes {node.name} with a scale for each index of an axis that is not 1")
    return grid(scale, zero, rest[0], rest[1])


def _constant(graph: fx.GraphModule, node: fx.Node, toolkit: str) -> Affine | Tensor:
    """A parameter: what it is, or its codes and how to decode them."""
    operation = _operation(node)
    if node.op == "get_attr":
        value: Tensor = _attribute(graph, node)
        return value
    if operation == "dequantize_per_channel":
        codes, scale, zero, axis, low, high = (_attribute(graph, argument) for argument in node.args[:6])
        return affine(codes, scale, zero, low, high, axis)
    if operation == "dequantize_per_tensor":
        codes, scale, zero, low, high = (_attribute(graph, argument) for argument in node.args[:5])
        return affine(codes, torch.as_tensor(scale), torch.as_tensor(zero), low, high)
    if operation == "sub" and _operation(product := node.args[0]) == "mul":  # type: ignore[arg-type]
        # Codes times scales, minus zero points times scales.
        codes, scale, shift = (_attribute(graph, a) for a in (*product.args, node.args[1]))  # type: ignore[union-attr]
        limits = torch.iinfo(codes.dtype)
        axis = next((axis for axis, size in enumerate(scale.shape) if size > 1), 0)
        return affine(codes, scale.flatten(), (shift / scale).round().flatten(), limits.min, limits.max, axis)
    raise Unsupported(f"{toolkit} decodes a weight by {operation}, which is not known here")


def affine(codes: Tensor, scale: Tensor, zero: Tensor, low: int, high: int, axis: int = 0) -> Affine:
    """Codes with one scale and zero point (a number each), or one an index of the axis.

    Args:
        codes: integers of the weight's shape.
        scale: () or (N,).
        zero: () or (N,).
        low: least code.
        high: greatest code.
        axis: of the output channels.
    """
    zero_point = zero.float().reshape(-1, 1) if bool((zero != 0).any()) else None
    return Affine(codes.detach().to(torch.int32), scale.detach().float().reshape(-1, 1), low, high, zero_point, axis)


def grid(scale: Tensor | float, zero: Tensor | int, low: int, high: int) -> Grid:
    """A quantizer from numbers, or from tensors with one or one a channel."""
    scales, zeros = torch.as_tensor(scale).flatten().tolist(), torch.as_tensor(zero).flatten().tolist()
    return Grid(tuple(scales), tuple(int(value) for value in zeros), int(low), int(high))
