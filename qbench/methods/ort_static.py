"""ONNX Runtime's static quantization, as a baseline."""

from __future__ import annotations

import itertools
import tempfile
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field
from torch import nn

from qbench.data import Batches, Data
from qbench.registry import method
from qbench.runtimes.onnx_graph import INPUT, import_onnx
from qbench.toolkits.adopt import adopt, largest_batch, prepare, record
from qbench.toolkits.agreement import compare
from qbench.toolkits.onnx_qdq import answering, divide_and_round, read, write


@method("ort_static")
def ort_static(
    model: nn.Module,
    data: Data,
    *,
    calibration: Literal["minmax", "entropy", "percentile"] = "minmax",
    percentile: Annotated[float, Field(gt=50, le=100)] = 99.999,
    granularity: Literal["tensor", "channel"] = "channel",
    places: Literal["all", "inputs"] = "all",
) -> nn.Module:
    """Quantize with ONNX Runtime: `quantize_static` on the network as ONNX, unsigned activations, signed weights.

    Its codes, biases in integers and activation ranges are put on the model.

    Args:
        model: changed in place; batch norms are folded.
        data: its calibration images.
        calibration: of activation ranges: to the extremes, to the least divergence, or to a percentile.
        percentile: of the values within the range, in percent.
        granularity: what shares a weight's scale: a tensor or an output channel.
        places: quantize `all` edges that ONNX Runtime quantizes by default, also the output of the network, or the
            `inputs` of convolutions and matrix products only, and whatever else reads the same values.

    Raises:
        Unsupported: ONNX Runtime is not installed, or quantizes something that cannot be quantized here.
    """
    onnx = import_onnx()
    floats = prepare(model, data)
    graph = write(floats, data.example.cpu(), dynamic=True)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "quantized.onnx"
        _quantize(graph, file, _reader(largest_batch(data)), calibration, percentile, granularity, places)
        quantized = onnx.load(file)
    adopt(model, read(quantized.graph, floats, "onnxruntime"))
    agreement = compare(model, answering(quantized), floats, data.calibration, "onnxruntime", divide_and_round)
    record(model, data, "onnxruntime", agreement)
    return model


def _quantize(
    graph: Any, file: Path, reader: Any, calibration: str, percentile: float, granularity: str, places: str
) -> None:
    from onnxruntime.quantization import CalibrationMethod, QuantType, quantize_static

    options: dict[str, Any] = {"CalibStridedMinMax": 1}  # batches whose activations are held at a time
    if calibration == "percentile":
        options["CalibPercentile"] = percentile
    if places == "inputs":
        options["OpTypesToExcludeOutputQuantization"] = list(_LAYERS)
    quantize_static(
        graph,
        file,
        reader,
        op_types_to_quantize=list(_LAYERS) if places == "inputs" else None,
        per_channel=granularity == "channel",
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        calibrate_method=CalibrationMethod[_CALIBRATIONS[calibration]],
        extra_options=options,
    )


_LAYERS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
_CALIBRATIONS = {"minmax": "MinMax", "entropy": "Entropy", "percentile": "Percentile"}


def _reader(batches: Batches) -> Any:
    """The calibration images as ONNX Runtime reads them."""
    from onnxruntime.quantization import CalibrationDataReader

    class Reader(CalibrationDataReader):
        def __len__(self) -> int:
            return len(batches)

        def set_range(self, start_index: int, end_index: int) -> None:
            self.left = itertools.islice(batches, start_index, end_index)

        def get_next(self) -> dict[str, np.ndarray] | None:
            batch = next(self.left, None)
            return None if batch is None else {INPUT: batch.cpu().numpy()}

    return Reader()
