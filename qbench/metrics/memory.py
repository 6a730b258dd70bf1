"""The most memory that a process takes which does nothing but run the network."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field
from torch import Tensor, nn

from qbench.metrics.base import Finished
from qbench.registry import metric
from qbench.runtimes.files import write_onnx, write_openvino

_SECONDS = 300.0
_HEAD = """
import json, resource, sys
import numpy as np
path, threads, shape = sys.argv[1], int(sys.argv[2]), json.loads(sys.argv[3])
images = np.zeros(shape, dtype=np.float32)
def peak():
    if sys.platform == "linux":  # where getrusage also tells what the parent had
        with open("/proc/self/status") as file:
            return next(1024 * int(line.split()[1]) for line in file if line.startswith("VmHWM"))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
"""
_TAIL = """
for _ in range(3):
    run()
print(json.dumps({"before": before, "peak": peak()}))
"""
_BODIES = {
    "openvino": """
sys.modules["openvino_telemetry"] = None
import openvino
core = openvino.Core()
core.available_devices
before = peak()
settings = {"INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1, "INFERENCE_PRECISION_HINT": "f32"}
network = core.compile_model(path, "CPU", settings)
run = lambda: network([images])
""",
    "onnxruntime": """
import onnxruntime
before = peak()
options = onnxruntime.SessionOptions()
options.intra_op_num_threads, options.inter_op_num_threads, options.log_severity_level = threads, 1, 3
options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
run = lambda: session.run(None, {session.get_inputs()[0].name: images})
""",
}
_WRITERS: dict[str, Callable[[nn.Module, Tensor, Path], Path]] = {
    "openvino": write_openvino,
    "onnxruntime": lambda model, example, folder: write_onnx(model, example, folder, dynamic=False),
}


@metric("memory", unit="MiB", direction="lower")
def memory(
    finished: Finished,
    *,
    runtime: Literal["openvino", "onnxruntime"] = "openvino",
    batch_size: Annotated[int, Field(ge=1)] = 1,
    threads: Annotated[int, Field(ge=1)] = 1,
) -> dict[str, Any]:
    """Peak resident memory of a process of its own that loads the network's file and runs it, PyTorch not loaded.

    Returns:
        For `quantized` (not for the float reference) and `float`: bytes `before` the file was loaded, and `peak`.

    Args:
        finished: the run.
        runtime: that loads the file.
        batch_size: images per call.
        threads: of the runtime.

    Raises:
        Unsupported: the network cannot be written for the runtime, or has no integer form there.
    """
    (example,) = finished.data.calibration.first(batch_size, batch_size)
    networks = {"quantized": finished.quantized, "float": finished.load_float()}
    if finished.is_reference:
        del networks["quantized"]
    return {name: peak_memory(network, example.cpu(), runtime, threads) for name, network in networks.items()}


def peak_memory(network: nn.Module, example: Tensor, runtime: str, threads: int) -> dict[str, int]:
    """Bytes of the process `before` the network's file was loaded, and their `peak`.

    Raises:
        Unsupported: the network cannot be written for the runtime.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = _WRITERS[runtime](network, example, Path(folder))
        code = _HEAD + _BODIES[runtime] + _TAIL
        command = [sys.executable, "-c", code, str(path), str(threads), json.dumps(list(example.shape))]
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=False)
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise RuntimeError(f"the process that runs the file ended with exit code {done.returncode}: {last}")
    found: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return found
