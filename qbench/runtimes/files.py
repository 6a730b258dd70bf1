"""Networks as the files that runtimes load."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn

from qbench.runtimes.onnx_graph import to_onnx
from qbench.runtimes.openvino import import_openvino, to_openvino


def write_onnx(model: nn.Module, example: Tensor, folder: Path, *, dynamic: bool) -> Path:
    """Write `model.onnx`; see `to_onnx`.

    Raises:
        Unsupported: the network has something that ONNX cannot say.
    """
    path = folder / "model.onnx"
    path.write_bytes(to_onnx(model, example, dynamic=dynamic).SerializeToString())
    return path


def write_openvino(model: nn.Module, example: Tensor, folder: Path) -> Path:
    """Write `model.xml`, and `model.bin` beside it, with float weights in float32.

    Raises:
        Unsupported: OpenVINO is missing, or the network is quantized in a way that it can only simulate.
    """
    network, _, _ = to_openvino(model, example)
    path = folder / "model.xml"
    import_openvino().save_model(network, path, compress_to_fp16=False)
    return path
