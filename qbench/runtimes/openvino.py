"""OpenVINO on the CPU: integer kernels for convolutions and linear layers whose weights and inputs are integers."""

from __future__ import annotations

import copy
import re
import sys
import warnings
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from qbench.errors import Unsupported
from qbench.registry import runtime
from qbench.runtimes.base import Compiled, Device, Runtime
from qbench.runtimes.integers import NOT, is_quantized, judge, with_integers
from qbench.runtimes.padding import fix_padding

_COMPUTE = ("Convolution", "Deconvolution", "FullyConnected", "MatMul")
_NAME = re.compile(
    r"^__module\.([^/]+)/aten::(?:_convolution|linear|matmul)\b|^self\.([^/]+)\.parametrizations\.weight\b"
)


@runtime("openvino")
def openvino() -> Runtime:
    """OpenVINO on the CPU, one stream tuned for latency; int8 kernels need quantized weights and inputs."""
    return _OpenVino()


class _OpenVino:
    device: Device = "cpu"

    def compile(self, module: nn.Module, example: Tensor, *, threads: int) -> Compiled:
        converted, integer, floats = to_openvino(module, example)
        core = import_openvino().Core()
        network = core.compile_model(
            converted,
            "CPU",
            {
                "INFERENCE_NUM_THREADS": threads,
                "NUM_STREAMS": 1,
                "PERFORMANCE_HINT": "LATENCY",
                "INFERENCE_PRECISION_HINT": "f32",
            },
        )
        kernels = _kernels(network, integer)
        verified = sum(kernel.integer for kernel in kernels)
        if integer and not verified:
            raise Unsupported(
                f"{NOT}OpenVINO runs none of the {len(integer)} integer layers with an integer kernel here"
            )
        lost = {
            kernel.layer: f"OpenVINO has no integer kernel for it here: it takes {kernel.primitive}"
            for kernel in kernels
            if not kernel.integer and kernel.layer in integer
        }
        return Compiled(_runner(network), verified, len(kernels), integer, {**floats, **lost})


def to_openvino(module: nn.Module, example: Tensor) -> tuple[Any, tuple[str, ...], Mapping[str, str]]:
    """The network as an `openvino.Model` for batches like `example`, the layers that are integers, and the others.

    Raises:
        Unsupported: OpenVINO is missing, or the network is quantized in a way that it can only simulate.
    """
    integer, floats = judge(module) if is_quantized(module) else ((), {})
    ov = import_openvino()
    plain = with_integers(module, integer) if integer else copy.deepcopy(module).cpu().eval()
    fix_padding(plain, example.cpu())
    return _convert(ov, plain, example.cpu()), integer, floats


def import_openvino() -> Any:
    """
    Raises:
        Unsupported: the optional package is missing.
    """
    # OpenVINO's converter sends usage statistics unless their package is missing.
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    try:
        import openvino
    except ImportError:
        raise Unsupported(f"{NOT}openvino is not installed (pip install 'qbench[openvino]')") from None
    return openvino


def _convert(ov: Any, module: nn.Module, example: Tensor) -> Any:
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # of the tracer, about branches that depend on shapes, which are fixed here
        converted = ov.convert_model(module, example_input=example)
    converted.reshape(list(example.shape))
    return converted


@dataclass(frozen=True)
class _Kernel:
    """What executes a convolution or a product: a primitive such as `brgconv_avx512_I8`."""

    primitive: str
    layer: str | None
    """Whose it is: by its own name or, where that is lost, its weight's; None where neither is kept."""
    integer: bool


def _kernels(network: Any, claimed: Collection[str]) -> list[_Kernel]:
    found = []
    for operation in network.get_runtime_model().get_ordered_ops():
        kind, primitive = _info(operation, "layerType"), _info(operation, "primitiveType")
        sources = [port.get_source_output().get_node() for port in operation.inputs()]
        names = _info(operation, "originalLayersNames").split(",")
        if kind in _COMPUTE:
            names += [
                _info(source, "originalLayersNames") for source in sources if _info(source, "layerType") == "Const"
            ]
            layer = next((layer for name in names if (layer := _layer(name)) is not None), None)
            found.append(_Kernel(primitive, layer, primitive.lower().endswith("_i8")))
        elif kind == "Subgraph":
            # Several products as one kernel, whose name tells the type of its first input, be it an image of floats:
            # those of integers are given a weight or an operand of integers each.
            given = sum(_info(source, "outputPrecisions") in ("i8", "u8") for source in sources)
            layers = [_layer(name) for name in names if name.endswith("/MatMul")]
            whole = given >= sum(layer in claimed for layer in layers)
            found += [_Kernel(primitive, layer, whole and layer in claimed) for layer in layers]
    return found


def _layer(name: str) -> str | None:
    match = _NAME.search(name)
    return match and (match[1] or match[2])


def _info(operation: Any, key: str) -> str:
    text: str = operation.get_rt_info()[key].astype(str)
    return text


def _runner(network: Any) -> Any:
    request = network.create_infer_request()
    outputs = range(len(network.outputs))

    def run(batch: np.ndarray) -> list[np.ndarray]:
        request.infer([batch], share_inputs=True)
        return [request.get_output_tensor(i).data.copy() for i in outputs]

    return run
