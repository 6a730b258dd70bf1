"""NNCF's post-training quantization, as a baseline."""

from __future__ import annotations

import logging
from typing import Any, Literal

from torch import nn

from qbench.data import Batches, Data
from qbench.registry import method
from qbench.runtimes.onnx_graph import INPUT
from qbench.toolkits import exported, onnx_qdq
from qbench.toolkits.adopt import adopt, prepare, record, require
from qbench.toolkits.agreement import compare


@method("nncf_ptq")
def nncf_ptq(
    model: nn.Module,
    data: Data,
    *,
    preset: Literal["performance", "mixed"] = "performance",
    fast_bias_correction: bool = True,
    backend: Literal["onnx", "torch"] = "onnx",
) -> nn.Module:
    """Quantize with NNCF: `nncf.quantize`, 8 bits.

    NNCF sees all calibration images, one at a time, as it recommends. Its codes, corrected biases and activation ranges
    are put on the model, also those of sums and products of activations, and of pooling.

    Args:
        model: changed in place; batch norms are folded.
        data: its calibration images.
        preset: `performance` has symmetric ranges of activations, `mixed` has zero points, too.
        fast_bias_correction: estimate the shift of each layer by itself, instead of in the network quantized so far.
        backend: what NNCF is given: the network as ONNX, or as torch exports it. NNCF's decisions differ.

    Raises:
        Unsupported: NNCF is not installed, or quantizes something that cannot be quantized here.
    """
    require("nncf", *_PACKAGES[backend], extra="nncf")
    import nncf

    logging.getLogger("nncf").setLevel(logging.ERROR)
    floats = prepare(model, data)
    images = data.calibration.first(data.calibration.images, 1)

    def quantized(network: Any, feed: Any) -> Any:
        return nncf.quantize(
            network,
            nncf.Dataset(images, feed),
            preset=nncf.QuantizationPreset(preset),
            subset_size=images.images,
            fast_bias_correction=fast_bias_correction,
        )

    run = _through_onnx if backend == "onnx" else _through_torch
    record(model, data, "nncf", run(model, floats, images, quantized))
    return model


_PACKAGES = {"onnx": ("onnx", "onnxruntime"), "torch": ("torchao",)}


def _through_onnx(model: nn.Module, floats: nn.Module, images: Batches, quantized: Any) -> dict[str, Any]:
    graph = onnx_qdq.write(floats, next(iter(images)).cpu())
    made = quantized(graph, lambda batch: {INPUT: batch.cpu().numpy()})
    adopt(model, onnx_qdq.read(made.graph, floats, "nncf"))
    return compare(model, onnx_qdq.answering(made), floats, images, "nncf", onnx_qdq.divide_and_round)


def _through_torch(model: nn.Module, floats: nn.Module, images: Batches, quantized: Any) -> dict[str, Any]:
    graph = exported.export(floats, next(iter(images)).cpu())
    made = quantized(graph, lambda batch: batch.cpu())
    adopt(model, exported.read(made, graph, "nncf"))
    return compare(model, made, floats, images, "nncf")
