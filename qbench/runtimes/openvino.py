"""OpenVINO on the CPU: integer kernels for convolutions and linear layers whose weights and inputs are integers."""

from __future__ import annotations

import copy
import sys
import warnings
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from timm.layers import Conv2dSame, get_same_padding
from torch import Tensor, nn

from qbench.errors import Unsupported
from qbench.registry import runtime
from qbench.runtimes.base import Compiled, Runtime
from qbench.runtimes.integers import NOT, is_quantized, judge, with_integers

_COMPUTE = ("Convolution", "Deconvolution", "FullyConnected", "MatMul")


@runtime("openvino")
def openvino() -> Runtime:
    """OpenVINO on the CPU, one stream tuned for latency; int8 kernels need quantized weights and inputs."""
    return _OpenVino()


class _OpenVino:
    device: Literal["cpu", "cuda"] = "cpu"

    def compile(self, module: nn.Module, example: Tensor, *, threads: int) -> Compiled:
        integer, floats = judge(module) if is_quantized(module) else ((), {})
        ov = _import()
        plain = with_integers(module, integer) if integer else copy.deepcopy(module).cpu().eval()
        _fix_padding(plain, example.cpu())
        network = ov.Core().compile_model(
            _convert(ov, plain, example.cpu()),
            "CPU",
            {
                "INFERENCE_NUM_THREADS": threads,
                "NUM_STREAMS": 1,
                "PERFORMANCE_HINT": "LATENCY",
                "INFERENCE_PRECISION_HINT": "f32",
            },
        )
        kernels = _kernels(network)
        verified = sum(kernel.lower().endswith("_i8") for kernel in kernels)
        if integer and not verified:
            raise Unsupported(
                f"{NOT}OpenVINO runs none of the {len(integer)} integer layers with an integer kernel here"
            )
        return Compiled(_runner(network), verified, len(kernels), integer, floats)


def _import() -> Any:
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


def _fix_padding(module: nn.Module, example: Tensor) -> None:
    """Make the SAME padding of timm's convolutions constant, so that it becomes part of the convolution.

    Otherwise it is computed from the input's shape, and a padded input with a zero point is not integer any more.
    """
    sizes: dict[Conv2dSame, set[tuple[int, ...]]] = {}

    def see(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        assert isinstance(layer, Conv2dSame)
        sizes.setdefault(layer, set()).add(tuple(inputs[0].shape[-2:]))

    hooks = [m.register_forward_pre_hook(see) for m in module.modules() if isinstance(m, Conv2dSame)]
    if not hooks:
        return
    with torch.no_grad():
        module(example)
    for hook in hooks:
        hook.remove()
    for layer, seen in sizes.items():
        if len(seen) > 1:
            continue
        (size,) = seen
        total = [
            get_same_padding(n, k, s, d)
            for n, k, s, d in zip(size, layer.kernel_size, layer.stride, layer.dilation, strict=True)
        ]
        pad = [side for n in reversed(total) for side in (n // 2, n - n // 2)]
        layer.padding = (0, 0)
        layer.forward = _padded(layer, pad)  # type: ignore[method-assign]


def _padded(layer: nn.Conv2d, pad: list[int]) -> Any:
    return lambda x: layer._conv_forward(F.pad(x, pad), layer.weight, layer.bias)


def _kernels(network: Any) -> list[str]:
    """The primitives that execute convolutions and matrix products, such as `brgconv_avx512_I8`."""
    found = []
    for operation in network.get_runtime_model().get_ordered_ops():
        info = operation.get_rt_info()
        if info["layerType"].astype(str) in _COMPUTE:
            found.append(info["primitiveType"].astype(str))
    return found


def _runner(network: Any) -> Any:
    request = network.create_infer_request()
    outputs = range(len(network.outputs))

    def run(batch: np.ndarray) -> list[np.ndarray]:
        request.infer([batch], share_inputs=True)
        return [request.get_output_tensor(i).data.copy() for i in outputs]

    return run
