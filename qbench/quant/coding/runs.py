"""Compressed sparse rows with relative index, as Deep Compression stores pruned layers (arXiv 1510.00149).

All but the most frequent code are listed, each with its distance from the one before: 5 bits in matrices, 8 bits in
convolutions. Where a distance does not fit, entries with the frequent code itself fill the gap.
"""

from __future__ import annotations

import math

import numpy as np
import torch

from qbench.quant import bits as bitpack
from qbench.quant.coding.damage import DamagedError


def run_bits(shape: tuple[int, ...]) -> int:
    """The bits of a distance: 8 in convolutions, 5 in matrices."""
    return 5 if len(shape) <= 2 else 8


def encode(codes: np.ndarray, levels: int) -> list[np.ndarray]:
    """Sections: the frequent code and the number of entries (uint32), the distances, the codes."""
    flat, width, run = codes.ravel(), bitpack.width_of(levels), run_bits(codes.shape)
    frequent = int(np.bincount(flat, minlength=1).argmax())
    places = np.flatnonzero(flat != frequent)
    gaps = np.diff(places, prepend=-1) - 1
    fillers = gaps >> run
    last = (fillers + 1).cumsum() - 1
    entries = int(last[-1]) + 1 if len(last) else 0
    distances, values = np.full(entries, (1 << run) - 1), np.full(entries, frequent)
    distances[last], values[last] = gaps - (fillers << run), flat[places]
    head = np.array([frequent, entries], "<u4")
    return [head, _pack(distances, run), _pack(values, width)]


def decode(sections: list[np.ndarray], shape: tuple[int, ...], levels: int) -> np.ndarray:
    """The inverse of `encode`.

    Raises:
        DamagedError: the sections are not what was written.
    """
    if len(sections) != 3 or len(sections[0]) != 8:
        raise DamagedError("parts are missing")
    frequent, entries = (int(v) for v in np.frombuffer(sections[0].tobytes(), "<u4"))
    distances = _unpack(sections[1], run_bits(shape), entries)
    values = _unpack(sections[2], bitpack.width_of(levels), entries)
    places = (distances.astype(np.int64) + 1).cumsum() - 1
    flat = np.full(math.prod(shape), frequent, np.uint16)
    if entries and places[-1] >= len(flat):
        raise DamagedError("an entry lies behind the end")
    flat[places] = values
    return flat.reshape(shape)


def _pack(values: np.ndarray, width: int) -> np.ndarray:
    packed: np.ndarray = bitpack.pack(torch.from_numpy(values), width).numpy()
    return packed


def _unpack(stored: np.ndarray, width: int, count: int) -> np.ndarray:
    if len(stored) != -(-count * width // 8):
        raise DamagedError("the number of entries is another")
    values: np.ndarray = bitpack.unpack(torch.from_numpy(stored.copy()), width, count).numpy()
    return values
