"""Bits and bytes of the artifact."""

from typing import Any

from qbench.metrics.base import Finished
from qbench.quant.layers import encodings
from qbench.registry import metric


@metric("size", unit="MiB", direction="lower")
def size(finished: Finished) -> dict[str, Any]:
    """Bytes of the artifact: nominal, packed, and on disk, beside the float model's.

    `covered_*` counts the quantized tensors alone: their numbers, the bits of their codes, the bytes of codes, scales,
    zero points and codebooks, and the bytes they had in float32.
    """
    covered = encodings(finished.quantized)
    parts = [tensor for encoding in covered.values() for tensor in encoding.tensors().values()]
    state = finished.quantized.state_dict()
    numbers = sum(state[name].numel() for name in covered)
    return {
        "value": finished.sizes.file_bytes / 2**20,
        "nominal_bytes": finished.sizes.nominal_bits / 8,
        "packed_bytes": finished.sizes.packed_bytes,
        "file_bytes": finished.sizes.file_bytes,
        "float_bytes": finished.float_bytes,
        "weights": finished.sizes.weights,
        "covered_weights": numbers,
        "covered_nominal_bits": sum(encoding.nominal_bits for encoding in covered.values()),
        "covered_bytes": sum(tensor.numel() * tensor.element_size() for tensor in parts),
        "covered_float_bytes": 4 * numbers,
    }
