"""Bits and bytes of the artifact."""

import tempfile
import zlib
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from qbench.errors import Unsupported
from qbench.metrics.base import Finished
from qbench.quant.coding import entropy, hac
from qbench.quant.encodings import Affine, Cast, Codebook, Encoding, VectorCodebook, leaves
from qbench.quant.layers import encodings
from qbench.registry import metric
from qbench.runtimes.files import write_onnx, write_openvino

Format = Literal["onnx", "openvino"]


@metric("size", unit="MiB", direction="lower")
def size(finished: Finished, *, formats: tuple[Format, ...] = ()) -> dict[str, Any]:
    """Bytes of the artifact: nominal, packed, and on disk, beside the float model's.

    `covered_*` counts the quantized tensors alone: their numbers, the bits of their codes, the bytes of codes, scales,
    zero points and codebooks, and the bytes they had in float32. `coding` is what lossless coders of these codes could
    reach, and what HAC and sHAC would take as their paper counts; `gzip_bytes` is what gzip makes of the artifact.
    `formats` has the bytes of the network's files in each of them, and of the float network's, or the `reason` why
    there are none.

    Args:
        finished: the run.
        formats: in which the network is written, too: files for ONNX Runtime, or for OpenVINO.
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
        "gzip_bytes": _gzipped(finished.artifact),
        "float_bytes": finished.float_bytes,
        "weights": finished.sizes.weights,
        "covered_weights": numbers,
        "covered_nominal_bits": sum(encoding.nominal_bits for encoding in covered.values()),
        "covered_bytes": sum(tensor.numel() * tensor.element_size() for tensor in parts),
        "covered_float_bytes": 4 * numbers,
        "coding": _coding([leaf for encoding in covered.values() for leaf in leaves(encoding)]),
        "formats": {name: _exported(finished, name) for name in formats},
    }


def _gzipped(path: Path) -> int:
    """Bytes of the file behind gzip, without keeping them."""
    packer, total = zlib.compressobj(6, zlib.DEFLATED, 16 + zlib.MAX_WBITS), 0
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            total += len(packer.compress(chunk))
    return total + len(packer.flush())


def _exported(finished: Finished, name: Format) -> dict[str, Any]:
    example = finished.data.example.cpu()
    found: dict[str, Any] = {}
    for key, network in (("bytes", finished.quantized), ("float_bytes", finished.load_float())):
        with tempfile.TemporaryDirectory() as made:
            folder = Path(made)
            try:
                if name == "onnx":
                    write_onnx(network, example, folder, dynamic=True)
                else:
                    write_openvino(network, example, folder)
            except Unsupported as error:
                return {"reason": str(error)}
            found[key] = sum(path.stat().st_size for path in folder.iterdir())
    return found


def _coding(parts: list[Encoding]) -> dict[str, float]:
    """Bits of all codes; each tensor has an alphabet of its own.

    `entropy_bits` is the bound, `huffman_bits` the code words of a Huffman code, `mask_bits` the part of the bound that
    tells which weights are zero (the rest tells what the others are), `zeros` their number. `hac_bits` and `shac_bits`
    follow the formulas of arXiv 2108.12704, tables included; sHAC leaves out the most frequent code.
    """
    total = dict.fromkeys(("entropy_bits", "huffman_bits", "mask_bits", "zeros", "hac_bits", "shac_bits"), 0.0)
    for part in parts:
        symbols = _symbols(part)
        counts, shape = np.bincount(symbols.ravel()), (len(symbols), symbols[:1].size)
        decoded = part.decode()
        zeros = int((decoded == 0).sum())
        total["entropy_bits"] += entropy.entropy_bits(counts)
        total["huffman_bits"] += entropy.huffman_bits(counts)
        total["mask_bits"] += entropy.mask_bits(decoded.numel(), zeros)
        total["zeros"] += zeros
        total["hac_bits"] += hac.dense_bits(counts)
        total["shac_bits"] += hac.sparse_bits(counts, int(counts.argmax()), shape)
    return total


def _symbols(part: Encoding) -> np.ndarray:
    """What is stored of a tensor as integers from 0 on, one row per index of its first axis."""
    match part:
        case Affine():
            codes = part.codes - part.low
        case Codebook() | VectorCodebook():
            codes = part.codes
        case Cast():
            narrow = part.values.contiguous()
            codes = narrow.view(torch.int16).int() & 0xFFFF if narrow.element_size() == 2 else narrow.view(torch.uint8)
        case _:
            raise TypeError(f"{type(part).__name__} holds no codes")
    symbols: np.ndarray = codes.reshape(len(codes), -1).cpu().numpy()
    return symbols
