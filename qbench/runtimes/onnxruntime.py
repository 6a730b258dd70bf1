"""ONNX Runtime on the CPU: integer kernels where a product or convolution lies between quantizers."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from qbench.errors import Unsupported
from qbench.quant.layers import full_name
from qbench.registry import runtime
from qbench.runtimes.base import Compiled, Device, Runtime
from qbench.runtimes.integers import NOT, is_quantized, judge
from qbench.runtimes.onnx_graph import INPUT, import_onnx, to_onnx

_INTEGER = (
    "QLinearConv",
    "QGemm",
    "QLinearMatMul",
    "MatMulIntegerToFloat",
    "DynamicQuantizeMatMul",
    "MatMulInteger",
    "ConvInteger",
)
_FLOAT = ("Conv", "FusedConv", "ConvTranspose", "Gemm", "FusedGemm", "MatMul", "FusedMatMul")
_WHY = dict.fromkeys(("Conv", "FusedConv"), ": no quantizer follows it, directly or behind a ReLU")


@runtime("onnxruntime")
def onnxruntime() -> Runtime:
    """ONNX Runtime on the CPU; convolutions run on integers only where their outputs are quantized, too.

    It multiplies matrices on integers when both operands are quantized, which is how linear layers are simulated here.
    A convolution is fused to an integer kernel only when a quantizer follows it directly (or behind a ReLU): with
    quantizers on inputs only, as they are simulated here, residual sums, other activation functions and pooling stand
    between. Such convolutions dequantize and run in float, often slower than the float network; `integer_layers` says
    how many layers ran on integers. For convolutional networks take `openvino`, which needs quantized inputs only.
    """
    return _OnnxRuntime()


class _OnnxRuntime:
    device: Device = "cpu"

    def compile(self, module: nn.Module, example: Tensor, *, threads: int) -> Compiled:
        integer, floats = judge(module) if is_quantized(module) else ((), {})
        try:
            onnx = import_onnx()
            graph = to_onnx(module, example.cpu(), dynamic=False)
        except Unsupported as error:
            raise Unsupported(f"{NOT}{error}") from error
        with tempfile.TemporaryDirectory() as folder:
            optimized = Path(folder) / "optimized.onnx"
            session = open_session(graph.SerializeToString(), threads=threads, optimized=optimized)
            nodes = [(node.op_type, node.name) for node in onnx.load(optimized).graph.node]
        verified = sum(kind in _INTEGER for kind, _ in nodes)
        if integer and not verified:
            raise Unsupported(
                f"{NOT}ONNX Runtime runs none of the {len(integer)} integer layers with an integer kernel here"
            )
        in_float = [(kind, layer_of(name, integer)) for kind, name in nodes if kind in _FLOAT]
        lost = {layer: f"ONNX Runtime computes it as {kind}" + _WHY.get(kind, "") for kind, layer in in_float if layer}
        return Compiled(_runner(session), verified, verified + len(in_float), integer, {**floats, **lost})


def layer_of(node: str, layers: tuple[str, ...]) -> str | None:
    """The layer whose node this is, by the name that torch's exporter gave it: `/network/features/features.0/Conv`."""
    scopes = node.split("/")[2:]  # none in the names of nodes that ONNX Runtime made itself
    name = ""
    found = None
    # A child of a sequence repeats the name of the sequence.
    for scope in scopes:
        found = name if name in layers else found
        name = full_name(name, scope.rpartition(".")[2])
    return found


def open_session(source: bytes | str, *, threads: int = 1, optimize: bool = True, optimized: Path | None = None) -> Any:
    """A session on the CPU.

    Args:
        source: the model, or the path of its file.
        threads: that it may use.
        optimize: rewrite the graph, which is where integer kernels come from; without, every node runs as written.
        optimized: file to write the rewritten graph to.
    """
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    # By default it rounds float inputs of linear layers with integer weights to 8 bits, which nobody asked for.
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    options.log_severity_level = 3  # of errors: it warns that an optimized model is tied to this machine
    if not optimize:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
    return ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])


def _runner(session: Any) -> Any:
    def run(batch: np.ndarray) -> list[np.ndarray]:
        outputs: list[np.ndarray] = session.run(None, {INPUT: batch})
        return outputs

    return run
