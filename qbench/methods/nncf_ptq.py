"""NNCF's post-training quantization, as a baseline."""

from __future__ import annotations

import logging
from typing import Any, Literal

from torch import nn

from qbench.data import Data
from qbench.registry import method
from qbench.toolkits.adopt import adopt, prepare, record, require
from qbench.toolkits.agreement import compare
from qbench.toolkits.exported import export, read


@method("nncf_ptq")
def nncf_ptq(
    model: nn.Module,
    data: Data,
    *,
    preset: Literal["performance", "mixed"] = "performance",
    fast_bias_correction: bool = True,
) -> nn.Module:
    """Quantize with NNCF: `nncf.quantize` on the exported network, 8 bits.

    NNCF sees all calibration images, one at a time, as it recommends. Its codes, corrected biases and activation ranges
    are put on the model, also those of sums and products of activations, and of pooling.

    Args:
        model: changed in place; batch norms are folded.
        data: its calibration images.
        preset: `performance` has symmetric ranges of activations, `mixed` has zero points, too.
        fast_bias_correction: estimate the shift of each layer by itself, instead of in the network quantized so far.

    Raises:
        Unsupported: NNCF is not installed, or quantizes something that cannot be quantized here.
    """
    require("nncf", "torchao", extra="nncf")
    import nncf

    logging.getLogger("nncf").setLevel(logging.ERROR)
    floats = prepare(model, data)
    images = data.calibration.first(data.calibration.images, 1)
    exported = export(floats, data.example.cpu())
    quantized: Any = nncf.quantize(
        exported,
        nncf.Dataset(images, lambda batch: batch.cpu()),
        preset=nncf.QuantizationPreset(preset),
        subset_size=images.images,
        fast_bias_correction=fast_bias_correction,
    )
    adopt(model, read(quantized, exported, "nncf"))
    record(model, data, "nncf", compare(model, quantized, floats, images, "nncf"))
    return model
