"""Codes at their true bit width: bit-exact packing of non-negative integers, 1 to 16 bits each."""

import numpy as np
import torch
from torch import Tensor

_CHUNK = 1 << 20  # codes unpacked at a time; a multiple of 8, so that every chunk ends on a byte


def width_of(levels: int) -> int:
    """The bits that tell `levels` values apart, at least 1."""
    return max(1, (levels - 1).bit_length())


def pack(codes: Tensor, width: int) -> Tensor:
    """Pack n codes in [0, 2**width) of any shape, least significant bit first: uint8 (ceil(n * width / 8),)."""
    if not 1 <= width <= 16:
        raise ValueError(f"width must be 1 to 16 bits, not {width}")
    flat = codes.detach().cpu().reshape(-1).numpy()
    if flat.size and (flat.min() < 0 or flat.max() >= 1 << width):
        raise ValueError(f"codes in [{flat.min()}, {flat.max()}] do not fit {width} bits")
    flat = flat.astype("<u2")
    if width == 8:
        return torch.from_numpy(flat.astype(np.uint8))
    pieces = []
    for start in range(0, flat.size, _CHUNK):
        octets = flat[start : start + _CHUNK].view(np.uint8).reshape(-1, 2)
        bits = np.unpackbits(octets, axis=1, bitorder="little")[:, :width]
        pieces.append(np.packbits(bits.reshape(-1), bitorder="little"))
    return torch.from_numpy(np.concatenate(pieces) if pieces else np.zeros(0, np.uint8))


def unpack(packed: Tensor, width: int, count: int) -> Tensor:
    """The inverse of `pack`: int32 codes (count,)."""
    raw = packed.cpu().numpy()
    if width == 8:
        return torch.from_numpy(raw[:count].astype(np.int32))
    out = np.zeros(count, np.int32)
    for start in range(0, count, _CHUNK):
        size = min(_CHUNK, count - start)
        first = start * width // 8
        bits = np.unpackbits(raw[first : first + -(-size * width // 8)], bitorder="little")[: size * width]
        octets = np.zeros((size, 16), np.uint8)
        octets[:, :width] = bits.reshape(size, width)
        out[start : start + size] = np.packbits(octets, axis=1, bitorder="little").view("<u2").reshape(-1)
    return torch.from_numpy(out)
