"""torchao's post-training quantization of exported networks (PT2E), as a baseline."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from qbench.data import Data
from qbench.registry import method
from qbench.toolkits.adopt import adopt, largest_batch, prepare, record, require
from qbench.toolkits.agreement import compare
from qbench.toolkits.exported import export, read


@method("torchao_pt2e")
def torchao_pt2e(model: nn.Module, data: Data) -> nn.Module:
    """Quantize with torchao: `prepare_pt2e` and `convert_pt2e` with the quantizer for x86 CPUs, 8 bits.

    Its codes and activation ranges, found by its histogram observers in batches of the calibration images, are put on
    the model, also those of sums and of pooling.

    Args:
        model: changed in place; batch norms are folded.
        data: its calibration images.

    Raises:
        Unsupported: torchao is not installed, or quantizes something that cannot be quantized here.
    """
    require("torchao", extra="torchao")
    from torchao.quantization.pt2e import quantize_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    floats = prepare(model, data)
    batches = largest_batch(data)
    exported = export(floats, next(iter(batches)).cpu())
    quantizer = x86.X86InductorQuantizer().set_global(x86.get_default_x86_inductor_quantization_config())
    observed: Any = quantize_pt2e.prepare_pt2e(exported, quantizer)
    with torch.no_grad():
        for done, batch in enumerate(batches, 1):
            observed(batch.cpu())
            data.progress(done / len(batches))
    quantized: Any = quantize_pt2e.convert_pt2e(observed)
    adopt(model, read(quantized, exported, "torchao"))
    record(model, data, "torchao", compare(model, quantized, floats, batches, "torchao"))
    return model
