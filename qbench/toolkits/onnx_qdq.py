"""ONNX graphs with QuantizeLinear and DequantizeLinear nodes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from qbench.errors import Unsupported
from qbench.quant.encodings import Affine
from qbench.quant.layers import TRANSPOSED, named_weight_layers
from qbench.runtimes.onnx_graph import INPUT, ROOT, import_onnx, to_onnx
from qbench.runtimes.onnxruntime import open_session
from qbench.toolkits.exported import affine, grid
from qbench.toolkits.places import Graph, Step

_THROUGH = {"Relu", "MaxPool", "Identity", "Dropout", "Pad"}
_MOVES = {"Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze", "Slice", "Split", "Expand", "Gather"}
"""Operators that commute with quantizers; torch's exporter pads with zeros where it writes no value."""
_LAYERS = {"Conv", "ConvTranspose", "Gemm", "MatMul"}
_NOT_READ = {"Shape", "Size"}


def write(model: nn.Module, example: Tensor, *, dynamic: bool = False) -> Any:
    """The float network as an `onnx.ModelProto` whose weights are constants, which is what toolkits quantize.

    Args:
        model: on the CPU.
        example: a batch (B, C, H, W), float32.
        dynamic: the batch may have any size; otherwise that of `example`.

    Raises:
        Unsupported: the network has something that ONNX cannot say.
    """
    import_onnx()
    graph = to_onnx(model, example, dynamic=dynamic)
    _fold_transposes(graph.graph)
    return graph


def read(graph: Any, model: nn.Module, toolkit: str) -> Graph:
    """The quantized graph, operation by operation.

    Args:
        graph: an `onnx.GraphProto`, made of what `write` returned.
        model: that was written.
        toolkit: its name, for errors.

    Raises:
        Unsupported: something is quantized in a way that is not known here.
    """
    return _Reader(graph, model, toolkit).read()


def answering(graph: Any) -> Callable[[Tensor], list[Tensor]]:
    """What a quantized `onnx.ModelProto` answers, operator by operator in ONNX Runtime."""
    session = open_session(graph.SerializeToString(), optimize=False)
    return lambda batch: [torch.from_numpy(output) for output in session.run(None, {INPUT: batch.numpy()})]


def divide_and_round(x: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """Codes as QuantizeLinear makes them."""
    return (x / scale).round() + zero


def _fold_transposes(graph: Any) -> None:
    """Transpose weights where they are stored."""
    from onnx import numpy_helper

    weights = {tensor.name: tensor for tensor in graph.initializer}
    for node in [node for node in graph.node if node.op_type == "Transpose" and node.input[0] in weights]:
        order = next((list(a.ints) for a in node.attribute if a.name == "perm"), None)
        turned = np.ascontiguousarray(np.transpose(numpy_helper.to_array(weights[node.input[0]]), order))
        graph.initializer.append(numpy_helper.from_array(turned, node.output[0]))
        graph.node.remove(node)


class _Reader:
    def __init__(self, graph: Any, model: nn.Module, toolkit: str) -> None:
        from onnx import numpy_helper

        self.graph, self.toolkit = graph, toolkit
        self.layers = named_weight_layers(model)
        self.constants: dict[str, np.ndarray] = {t.name: numpy_helper.to_array(t) for t in graph.initializer}
        self.nodes = {output: node for node in graph.node for output in node.output}
        for node in graph.node:
            if node.op_type == "Constant":
                self.constants[node.output[0]] = numpy_helper.to_array(node.attribute[0].t)

    def read(self) -> Graph:
        steps: dict[str, Step] = {}
        for node in self.graph.node:
            if any(self.is_value(name) for name in node.input) and node.op_type not in _NOT_READ:
                steps |= dict.fromkeys(node.output, self.step(node))
        return Graph(self.toolkit, steps, tuple(output.name for output in self.graph.output))

    def is_value(self, name: str) -> bool:
        """Whether it depends on what the network is called with."""
        if not name or name in self.constants:
            return False
        node = self.nodes.get(name)
        return node is None or (node.op_type not in _NOT_READ and any(self.is_value(other) for other in node.input))

    def step(self, node: Any) -> Step:
        module, inputs = self.module(node), tuple(name if self.is_value(name) else None for name in node.input)
        if node.op_type == "QuantizeLinear":
            scale, zero = (torch.from_numpy(self.constants[name].copy()) for name in node.input[1:3])
            limits = torch.iinfo(zero.dtype)
            return Step("quantizer", node.op_type, inputs[:1], grid=grid(scale, zero, limits.min, limits.max))
        if node.op_type == "DequantizeLinear":
            return Step("quantizer", node.op_type, inputs[:1])
        if node.op_type in _THROUGH:
            return Step("through", node.op_type, inputs[:1], module)
        if node.op_type in _MOVES:
            return Step("moves", node.op_type, inputs[:1], module)
        if node.op_type in _LAYERS and inputs[1] is None and module in self.layers:
            return Step("layer", node.op_type, inputs[:1], module, parameters=self.parameters(node, module))
        self.refuse_constants(node, module)
        return Step("other", node.op_type, tuple(name for name in inputs if name), module)

    def module(self, node: Any) -> str:
        """The module whose forward function has the operator, by torch's name: `/a/a.0/b/Conv` is of `a.0.b`."""
        found: list[str] = []
        for part in node.name.strip("/").split("/")[:-1]:
            if found and part.startswith(found[-1] + "."):
                found[-1] = part
            else:
                found.append(part)
        return ".".join(found[1:] if found[:1] == [ROOT] else found)

    def parameters(self, node: Any, module: str) -> dict[str, Affine | Tensor]:
        weight = self.decoder(node.input[1])
        if weight is None:
            return {}
        found: dict[str, Affine | Tensor] = {"weight": self.weight(weight, node, module)}
        if len(node.input) > 2:
            bias = self.decoder(node.input[2])
            value = self.constants[node.input[2]] if bias is None else self.decoded(bias)
            found["bias"] = torch.from_numpy(value.copy()).float()
        return found

    def decoder(self, name: str) -> Any:
        """The DequantizeLinear that makes a constant of codes."""
        node = self.nodes.get(name)
        return node if node is not None and node.op_type == "DequantizeLinear" else None

    def weight(self, decoder: Any, node: Any, module: str) -> Affine:
        codes, scale, zero = (torch.from_numpy(self.constant(name).copy()) for name in decoder.input)
        axis = _axis(decoder) % codes.ndim if scale.numel() > 1 else 0
        limits = torch.iinfo(codes.dtype)
        transposed = node.op_type == "MatMul" or (
            node.op_type == "Gemm" and not any(a.name == "transB" and a.i for a in node.attribute)
        )
        if transposed:
            codes, axis = codes.T.contiguous(), 1 - axis if scale.numel() > 1 else 0
        outputs = 1 if isinstance(self.layers[module], TRANSPOSED) else 0
        if scale.numel() > 1 and axis != outputs:
            raise Unsupported(f"{self.toolkit} quantizes the weight of {module} with a scale for each index of {axis}")
        return affine(codes, scale, zero, limits.min, limits.max, outputs)

    def constant(self, name: str) -> np.ndarray:
        """A constant as it is stored, or its codes where a QuantizeLinear makes them when the network is loaded."""
        if name in self.constants:
            return self.constants[name]
        node = self.nodes[name]
        value, scale, zero = (self.constants[part] for part in node.input)
        axis = _axis(node) % value.ndim
        shape = [-1 if i == axis else 1 for i in range(value.ndim)] if scale.ndim else []
        limits = np.iinfo(zero.dtype)
        codes = np.rint(value / scale.reshape(shape)) + zero.reshape(shape)
        made: np.ndarray = codes.clip(limits.min, limits.max).astype(zero.dtype)
        return made

    def decoded(self, decoder: Any) -> np.ndarray:
        codes, scale = (self.constant(name) for name in decoder.input[:2])
        zero = self.constants[decoder.input[2]] if len(decoder.input) > 2 else np.zeros((), codes.dtype)
        value: np.ndarray = (codes.astype(np.float32) - zero.astype(np.float32)) * scale
        return value

    def refuse_constants(self, node: Any, module: str) -> None:
        if any(self.decoder(name) is not None and not self.is_value(name) for name in node.input):
            raise Unsupported(f"{self.toolkit} quantizes a constant of {node.op_type} in {module or 'the network'}")


def _axis(node: Any) -> int:
    """Along which scales differ; from the end where it is negative."""
    return next((int(a.i) for a in node.attribute if a.name == "axis"), 1)
