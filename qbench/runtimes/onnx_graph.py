"""A network as an ONNX graph: integer weights as they are stored, quantizers as QuantizeLinear and DequantizeLinear."""

from __future__ import annotations

import contextlib
import copy
import io
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from qbench.errors import Unsupported
from qbench.quant.activations import StaticQuantizer, input_quantizers, quantize_input
from qbench.quant.encodings import Encoding, move
from qbench.quant.layers import encodings
from qbench.runtimes.base import flatten
from qbench.runtimes.onnx_nodes import DequantizeLinear, QuantizeLinear, know_exp2
from qbench.runtimes.onnx_weights import FOUR_BITS, stored
from qbench.runtimes.padding import fix_padding

OPSET = 21
"""The first with integers of four bits, and with scales for blocks."""
INPUT = "images"
ROOT = "network"
"""Where the network is in what is exported: the names of nodes and weights begin with it."""


def to_onnx(model: nn.Module, example: Tensor, *, dynamic: bool) -> Any:
    """The network as an `onnx.ModelProto`, checked; the model is left as it was.

    The file declares opset 21. Batch norms are left where the model has them, except behind float convolutions, into
    which torch's exporter folds them. Biases of convolutions of integers with integers become int32 with the product of
    both scales, as integer kernels take them, where they fit. Outputs are those of `flatten`.

    Args:
        model: a float network, or one with encodings and input quantizers attached.
        example: a batch (B, C, H, W), float32.
        dynamic: the batch may have any size; otherwise that of `example`.

    Raises:
        Unsupported: the network has something that ONNX cannot say.
    """
    onnx = import_onnx()
    plain = _Flat(_written(model))
    fix_padding(plain, example)
    with torch.no_grad():
        outputs = plain(example)
    names = [f"output{i}" for i in range(len(outputs))] if len(outputs) > 1 else ["output"]
    know_exp2()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "graph.onnx"
        _trace(plain, example, file, names, dynamic=dynamic)
        graph = onnx.load(file)
    graph.producer_name, graph.ir_version = "qbench", 10
    graph.graph.ClearField("value_info")
    _pack_four_bits(graph.graph)
    onnx.checker.check_model(graph, full_check=True)
    return graph


def _trace(plain: nn.Module, example: Tensor, file: Path, names: list[str], *, dynamic: bool) -> None:
    # The tracer warns about branches that depend on shapes, which are fixed here, and prints whole graphs on errors.
    with warnings.catch_warnings(), torch.no_grad(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        try:
            torch.onnx.export(
                plain,
                (example,),
                file,
                dynamo=False,
                opset_version=OPSET,
                do_constant_folding=False,
                input_names=[INPUT],
                output_names=names,
                dynamic_axes={name: {0: "batch"} for name in (INPUT, *names)} if dynamic else None,
            )
        except RuntimeError as error:
            raise Unsupported(f"torch cannot export the network to ONNX: {str(error).partition(chr(10))[0]}") from error


def import_onnx() -> Any:
    """
    Raises:
        Unsupported: the optional packages are missing.
    """
    try:
        import onnx
        import onnxruntime  # noqa: F401
    except ImportError as error:
        raise Unsupported(f"{error.name} is not installed (pip install 'qbench[onnx]')") from None
    return onnx


class _Flat(nn.Module):
    """The outputs as a flat tuple."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(flatten(self.network(x)))


def _written(model: nn.Module) -> nn.Module:
    """A copy on the CPU that computes weights from codes, and quantizes inputs with nodes of ONNX."""
    attached = {name: move(encoding, "cpu") for name, encoding in encodings(model).items()}
    copied = copy.deepcopy(model).cpu().eval().requires_grad_(False)
    quantized: dict[str, _Quantized] = {}
    for name, quantizer in input_quantizers(copied).items():
        if isinstance(quantizer, StaticQuantizer) and _fits(quantizer):
            quantized[name] = _Quantized(quantizer)
            quantize_input(copied.get_submodule(name), quantized[name])
    for key, encoding in attached.items():
        name, _, parameter = key.rpartition(".")
        try:
            _store(copied.get_submodule(name), parameter, encoding, quantized.get(name))
        except Unsupported as error:
            raise Unsupported(f"{key}: {error}") from None
    return copied


def _fits(quantizer: StaticQuantizer) -> bool:
    low = -128 if quantizer.symmetric else 0
    return quantizer.bits <= 8 and low <= int(quantizer.zero_point) <= low + 255


def _store(layer: nn.Module, parameter: str, encoding: Encoding, quantizer: _Quantized | None) -> None:
    # Kernels that multiply integers take bytes: four bits are for weights that meet floats.
    narrow = quantizer is None
    weight = stored(encoding, narrow=narrow)
    parametrize.register_parametrization(layer, parameter, _Ignoring(weight), unsafe=True)
    if parameter != "weight":
        return
    if type(layer).forward is nn.Linear.forward:
        _multiply(layer, stored(encoding, narrow=narrow, transposed=True), integers=quantizer is not None)
    elif quantizer is not None and isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        _round_bias(layer, weight, quantizer)


class _Ignoring(nn.Module):
    """What `parametrize` calls with the original, which is not needed."""

    def __init__(self, weight: nn.Module) -> None:
        super().__init__()
        self.stored = weight

    def forward(self, _original: Tensor) -> Tensor:
        weight: Tensor = self.stored()
        return weight


def _multiply(layer: nn.Module, transposed: nn.Module, *, integers: bool) -> None:
    """Make a linear layer a product with the transposed weight: the form for which runtimes have integer kernels."""
    layer.add_module("stored", transposed)
    bias: Tensor | None = layer.bias  # type: ignore[assignment]
    if integers and bias is not None:
        layer.register_buffer("negated_bias", -bias.detach())

    def forward(x: Tensor) -> Tensor:
        product = x @ transposed()
        if bias is None:
            return product
        # ONNX Runtime makes a float Gemm of a product of integers and a sum, but not of one and a difference.
        return product - layer.get_buffer("negated_bias") if integers else product + bias

    layer.forward = forward


def _round_bias(layer: nn.Module, weight: nn.Module, quantizer: _Quantized) -> None:
    """Make the bias integers in units of the products that it is added to, where it fits."""
    bias, scale = layer.bias, getattr(weight, "scale", None)
    if (
        bias is None
        or parametrize.is_parametrized(layer, "bias")
        or scale is None
        or getattr(weight, "block", None) != 0
    ):
        return
    assert isinstance(bias, Tensor)
    step = (quantizer.scale * scale).expand(bias.shape)
    codes = (bias.detach().double() / step.double()).round()
    if bool((codes.abs() < 2**31).all()):
        parametrize.register_parametrization(layer, "bias", _Ignoring(_Bias(codes, step)), unsafe=True)


class _Bias(nn.Module):
    codes: Tensor
    scale: Tensor

    def __init__(self, codes: Tensor, scale: Tensor) -> None:
        super().__init__()
        self.register_buffer("codes", codes.to(torch.int32))
        self.register_buffer("scale", scale.contiguous())

    def forward(self) -> Tensor:
        bias: Tensor = DequantizeLinear.apply(self.codes, self.scale, None, 0, 0)
        return bias


class _Quantized(nn.Module):
    """A static quantizer of at most 8 bits as nodes of 8 bits, behind a Clip to the range of fewer bits."""

    scale: Tensor
    zero_point: Tensor

    def __init__(self, quantizer: StaticQuantizer) -> None:
        super().__init__()
        self.register_buffer("scale", quantizer.scale)
        self.register_buffer("zero_point", quantizer.zero_point.to(torch.int8 if quantizer.symmetric else torch.uint8))
        zero, step = int(quantizer.zero_point), float(quantizer.scale)
        self.range = ((quantizer.low - zero) * step, (quantizer.high - zero) * step) if quantizer.bits < 8 else None

    def forward(self, x: Tensor) -> Tensor:
        if self.range is not None:
            x = x.clamp(*self.range)
        codes = QuantizeLinear.apply(x, self.scale, self.zero_point)
        quantized: Tensor = DequantizeLinear.apply(codes, self.scale, self.zero_point, 0, 0)
        return quantized


def _pack_four_bits(graph: Any) -> None:
    """Give the numbers of four bits their type, and the zero points that belong to them."""
    import onnx

    kinds = {onnx.TensorProto.INT8: onnx.TensorProto.INT4, onnx.TensorProto.UINT8: onnx.TensorProto.UINT4}
    initializers = {tensor.name: tensor for tensor in graph.initializer}
    sources = {name for name in initializers if name.endswith(FOUR_BITS)}
    for node in graph.node:
        if node.op_type == "DequantizeLinear" and node.input[0] in sources and len(node.input) > 2:
            # The exporter merges equal tensors: this zero point may also be that of a wider type.
            zero = onnx.TensorProto()
            zero.CopyFrom(initializers[node.input[2]])
            zero.name = f"{node.output[0]}.zero_point{FOUR_BITS}"
            node.input[2] = zero.name
            graph.initializer.append(zero)
    used = {name for node in graph.node for name in node.input}
    kept = [tensor for tensor in graph.initializer if tensor.name in used]
    for tensor in kept:
        if tensor.name.endswith(FOUR_BITS):
            numbers = onnx.numpy_helper.to_array(tensor).reshape(-1)
            tensor.ClearField("raw_data")
            tensor.data_type = kinds[tensor.data_type]
            tensor.raw_data = _nibbles(numbers)
    packed = [copy.deepcopy(tensor) for tensor in kept]
    del graph.initializer[:]
    graph.initializer.extend(packed)


def _nibbles(numbers: np.ndarray) -> bytes:
    """Two numbers a byte, the first in the low half."""
    octets = np.append(numbers, np.zeros(len(numbers) % 2, numbers.dtype)).view(np.uint8) & 15
    return bytes(octets[::2] | octets[1::2] << 4)
