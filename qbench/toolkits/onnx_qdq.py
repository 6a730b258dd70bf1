"""ONNX graphs with QuantizeLinear and DequantizeLinear nodes."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from qbench.errors import Unsupported
from qbench.quant.encodings import Affine
from qbench.quant.layers import TRANSPOSED, named_weight_layers
from qbench.toolkits.exported import affine, grid
from qbench.toolkits.places import Graph, Step

_THROUGH = {"Relu", "MaxPool", "Identity", "Dropout", "Pad"}
_MOVES = {"Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze", "Slice", "Split", "Expand", "Gather"}
"""Operators that commute with quantizers; torch's exporter pads with zeros where it writes no value."""
_LAYERS = {"Conv", "ConvTranspose", "Gemm", "MatMul"}
_NOT_READ = {"Shape", "Size"}


def read(graph: Any, model: nn.Module, toolkit: str, root: str) -> Graph:
    """The quantized graph, operation by operation.

    Args:
        graph: an `onnx.GraphProto`, whose nodes have the names that torch's exporter gives them, such as
            `/body/body.0/Conv`: whose module's code they are.
        model: that was exported.
        toolkit: its name, for errors.
        root: name of the module that the model was in when it was exported.

    Raises:
        Unsupported: something is quantized in a way that is not known here.
    """
    return _Reader(graph, model, toolkit, root).read()


class _Reader:
    def __init__(self, graph: Any, model: nn.Module, toolkit: str, root: str) -> None:
        from onnx import numpy_helper

        self.graph, self.toolkit, self.root = graph, toolkit, root
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
        """The module whose forward function has the operator: `/a/a.0/b/Conv` is of `a.0.b`."""
        found: list[str] = []
        for part in node.name.strip("/").split("/")[:-1]:
            if found and part.startswith(found[-1] + "."):
                found[-1] = part
            else:
                found.append(part)
        return ".".join(found[1:] if found[:1] == [self.root] else found)

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
        codes, scale, zero = (torch.from_numpy(self.constants[name].copy()) for name in decoder.input)
        axis = next((a.i for a in decoder.attribute if a.name == "axis"), 1) if scale.numel() > 1 else 0
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

    def decoded(self, decoder: Any) -> np.ndarray:
        codes, scale = (self.constants[name] for name in decoder.input[:2])
        zero = self.constants[decoder.input[2]] if len(decoder.input) > 2 else np.zeros((), codes.dtype)
        value: np.ndarray = (codes.astype(np.float32) - zero.astype(np.float32)) * scale
        return value

    def refuse_constants(self, node: Any, module: str) -> None:
        if any(self.decoder(name) is not None and not self.is_value(name) for name in node.input):
            raise Unsupported(f"{self.toolkit} quantizes a constant of {node.op_type} in {module or 'the network'}")
