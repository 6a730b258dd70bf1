"""Integer codes as bytes: at their true bit width, or by a lossless coder.

What a coder leaves is one run of bytes: a mark (0: at true bit width, because that was smaller; 1: coded), the CRC-32
of the codes, and the coder's sections.
"""

from __future__ import annotations

import itertools
import math
import struct
import zlib
from collections.abc import Sequence
from typing import Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from qbench.quant import bits as bitpack
from qbench.quant.coding import hac, huffman, rans, runs
from qbench.quant.coding.damage import DamagedError

__all__ = ["Coder", "DamagedError", "decode", "encode"]

Coder = Literal["huffman", "rans", "hac", "shac", "csr"]
_PLAIN, _CODED = 0, 1


class _Module(Protocol):
    def encode(self, codes: np.ndarray, levels: int) -> list[np.ndarray]: ...
    def decode(self, sections: list[np.ndarray], shape: tuple[int, ...], levels: int) -> np.ndarray: ...


_CODERS: dict[str, _Module] = {"huffman": huffman, "rans": rans, "hac": hac.Dense, "shac": hac.Sparse, "csr": runs}


def encode(codes: Tensor, levels: int, coder: Coder | None = None) -> Tensor:
    """Codes in [0, levels) of any shape as bytes (n,), uint8.

    Args:
        codes: integers.
        levels: at most 65,536.
        coder: None stores them at their true bit width; so does every coder where that is smaller.

    Raises:
        ValueError: a code is out of range.
    """
    width = bitpack.width_of(levels)
    plain = bitpack.pack(codes, width)
    if coder is None:
        return plain
    array = codes.detach().cpu().numpy().astype("<u2")
    coded = _join(_CODERS[coder].encode(array, levels))
    body = [bytes([_CODED]), coded] if len(coded) < plain.numel() else [bytes([_PLAIN]), plain.numpy().tobytes()]
    whole = body[0] + struct.pack("<I", zlib.crc32(array.tobytes())) + body[1]
    return torch.frombuffer(bytearray(whole), dtype=torch.uint8)


def decode(stored: Tensor, levels: int, shape: Sequence[int], coder: Coder | None = None) -> Tensor:
    """The inverse of `encode`: int32 codes of that shape.

    Raises:
        DamagedError: these are not the bytes that were written.
    """
    width, count = bitpack.width_of(levels), math.prod(shape)
    if coder is None:
        return _unpack(stored, width, count).reshape(tuple(shape))
    raw = stored.cpu().numpy().astype(np.uint8, copy=False)
    if raw.size < 5 or raw[0] not in (_PLAIN, _CODED):
        raise DamagedError(f"the {coder} stream has no beginning")
    (check,) = struct.unpack("<I", raw[1:5].tobytes())
    try:
        if raw[0] == _PLAIN:
            array = _unpack(torch.from_numpy(raw[5:].copy()), width, count).numpy().reshape(tuple(shape))
        else:
            array = _CODERS[coder].decode(_split(raw[5:]), tuple(shape), levels)
    except (ValueError, IndexError, struct.error) as error:
        raise DamagedError(f"the {coder} stream is damaged: {error}") from error
    if zlib.crc32(array.astype("<u2").tobytes()) != check:
        raise DamagedError(f"the {coder} stream is damaged: its codes do not match their checksum")
    return torch.from_numpy(array.astype(np.int32))


def _unpack(stored: Tensor, width: int, count: int) -> Tensor:
    if stored.numel() != -(-count * width // 8):
        raise DamagedError(f"{stored.numel()} bytes cannot be {count} codes of {width} bits")
    return bitpack.unpack(stored, width, count)


def _join(sections: list[np.ndarray]) -> bytes:
    raw = [section.tobytes() for section in sections]
    return b"".join([struct.pack("<B", len(raw)), *(struct.pack("<I", len(part)) for part in raw), *raw])


def _split(raw: np.ndarray) -> list[np.ndarray]:
    if not raw.size:
        raise DamagedError("it ends early")
    number = int(raw[0])
    sizes = np.frombuffer(raw[1 : 1 + 4 * number].tobytes(), "<u4").astype(np.int64)
    edges = 1 + 4 * number + np.concatenate([[0], sizes.cumsum()])
    if len(sizes) != number or edges[-1] != raw.size:
        raise DamagedError(f"its parts need {edges[-1]} bytes, and there are {raw.size}")
    return [raw[a:b] for a, b in itertools.pairwise(edges)]
