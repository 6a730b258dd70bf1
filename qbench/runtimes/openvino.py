"""OpenVINO on the CPU: integer kernels for convolutions and linear layers whose weights and inputs are integers."""

from __future__ import annotations

import copy
import re
import sys
import warnings
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from qbench.errors import Unsupported
from qbench.registry import runtime
from qbench.runtimes.base import Compiled, Runtime
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
    device: Literal["cpu", "cuda"] = "cpu"

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
        kernels = _kernels(network)
        verified = sum(_is_integer(primitive) for primitive, _ in kernels)
        if integer and not verified:
            raise Unsupported(
                f"{NOT}OpenVINO runs none of the {len(integer)} integer layers with an integer kernel here"
            )
        lost = {
            name: f"OpenVINO has no integer kernel for it here: it takes {primitive}"
            for primitive, names in kernels
            if not _is_integer(primitive)
            for name in names & set(integer)
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


def _kernels(network: Any) -> list[tuple[str, set[str]]]:
    """The primitives that execute convolutions and products, such as `brgconv_avx512_I8`, each with its layer's name.

    The name is that of the weight where the layer's own is lost; there is none where neither is kept.
    """
    found = []
    for operation in network.get_runtime_model().get_ordered_ops():
        kind, primitive = _info(operation, "layerType"), _info(operation, "primitiveType")
        sources = [port.get_source_output().get_node() for port in operation.inputs()]
        names = _info(operation, "originalLayersNames").split(",")
        if kind in _COMPUTE:
            constants = [source for source in sources if _info(source, "layerType") == "Const"]
            names += [name for source in constants for name in _info(source, "originalLayersNames").split(",")]
            found.append((primitive, _layers(names)))
        elif kind == "Subgraph":
            # Attention as one kernel; its products are integers if all that it is given is.
            whole = all(_info(source, "outputPrecisions") in ("i8", "u8") for source in sources)
            products = [name for name in names if name.endswith("/MatMul")]
            found += [(primitive if whole else f"{primitive} of floats", _layers([name])) for name in products]
    return found


def _layers(names: list[str]) -> set[str]:
    matches = [match for name in names if (match := _NAME.search(name))]
    return {match[1] or match[2] for match in matches}


def _info(operation: Any, key: str) -> str:
    text: str = operation.get_rt_info()[key].astype(str)
    return text


def _is_integer(primitive: str) -> bool:
    return primitive.lower().endswith("_i8")


def _runner(network: Any) -> Any:
    request = network.create_infer_request()
    outputs = range(len(network.outputs))

    def run(batch: np.ndarray) -> list[np.ndarray]:
        request.infer([batch], share_inputs=True)
        return [request.get_output_tensor(i).data.copy() for i in outputs]

    return run
