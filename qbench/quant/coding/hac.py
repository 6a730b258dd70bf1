"""HAC and sHAC: Huffman-coded matrices, dense and sparse, in 32-bit words by columns (arXiv 2108.12704).

HAC codes every entry; sHAC all but the most frequent one, with their row indices and the number of them per column
uncompressed. `dense_bits` and `sparse_bits` count as the paper's own code does, for comparison with the bytes written.
"""

from __future__ import annotations

import math

import numpy as np

from qbench.quant.coding import huffman
from qbench.quant.coding.damage import DamagedError

_WORD = 32


class Dense:
    """HAC."""

    @staticmethod
    def encode(codes: np.ndarray, levels: int) -> list[np.ndarray]:
        """Sections: the alphabet's bitmap, the code lengths of its symbols, the words."""
        return _encode(_columns(codes).ravel(), levels)

    @staticmethod
    def decode(sections: list[np.ndarray], shape: tuple[int, ...], levels: int) -> np.ndarray:
        """The inverse of `encode`; raises DamagedError."""
        flat = huffman.decode(sections, (math.prod(shape),), levels)
        return _from_columns(flat.reshape(_sides(shape)[::-1]), shape)


class Sparse:
    """sHAC."""

    @staticmethod
    def encode(codes: np.ndarray, levels: int) -> list[np.ndarray]:
        """Sections: those of HAC for what is listed; the frequent code (uint16); row indices; counts per column."""
        columns = _columns(codes)
        frequent = int(np.bincount(columns.ravel(), minlength=1).argmax())
        listed = columns != frequent
        kind = _integers(columns.shape[1])
        rows = np.nonzero(listed)[1].astype(kind)
        counts = listed.sum(1).astype(kind)
        return [*_encode(columns[listed], levels), np.array([frequent], "<u2"), rows, counts]

    @staticmethod
    def decode(sections: list[np.ndarray], shape: tuple[int, ...], levels: int) -> np.ndarray:
        """The inverse of `encode`; raises DamagedError."""
        if len(sections) != 6 or len(sections[3]) != 2:
            raise DamagedError("parts are missing")
        height, width = _sides(shape)
        kind = _integers(height)
        frequent = np.frombuffer(sections[3].tobytes(), "<u2")[0]
        rows, counts = (np.frombuffer(part.tobytes(), kind).astype(np.int64) for part in sections[4:])
        if len(counts) != width or counts.sum() != len(rows) or (len(rows) and rows.max() >= height):
            raise DamagedError("the row indices do not fit the matrix")
        columns = np.full((width, height), frequent, np.uint16)
        columns[np.repeat(np.arange(width), counts), rows] = huffman.decode(sections[:3], (len(rows),), levels)
        return _from_columns(columns, shape)


def _encode(flat: np.ndarray, levels: int) -> list[np.ndarray]:
    bitmap, lengths, stream = huffman.encode(flat, levels)
    return [bitmap, lengths, np.pad(stream, (0, -len(stream) % (_WORD // 8)))]


def _sides(shape: tuple[int, ...]) -> tuple[int, int]:
    height = shape[0] if shape else 1
    return height, math.prod(shape[1:])


def _columns(codes: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(codes.reshape(_sides(codes.shape)).T)


def _from_columns(columns: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    return np.ascontiguousarray(columns.T).reshape(shape)


def _integers(largest: int) -> str:
    return f"<u{_bits_for(largest) // 8}"


def _bits_for(largest: int) -> int:
    """8, 16, 32, ...: of an unsigned integer that holds it."""
    bits = 8
    while largest >> bits:
        bits *= 2
    return bits


def dense_bits(counts: np.ndarray) -> int:
    """Bits of HAC by the paper's formula: words, symbols in float32, and the tables of a canonical decoder.

    Args:
        counts: (K,) how often each symbol occurs.
    """
    return payload_bits(counts) + _table_bits(counts)


def sparse_bits(counts: np.ndarray, frequent: int, shape: tuple[int, int]) -> int:
    """Bits of sHAC by the paper's formula.

    Args:
        counts: (K,) how often each symbol occurs.
        frequent: the symbol that is not listed; the paper's is the weight 0.
        shape: rows and columns of the matrix.
    """
    listed = counts.copy()
    listed[frequent] = 0
    index = _bits_for(shape[0])
    return payload_bits(listed) + (int(listed.sum()) + shape[1]) * index + _table_bits(listed)


def payload_bits(counts: np.ndarray) -> int:
    """Bits of the code words, in whole 32-bit words."""
    bits = int((counts * huffman.code_lengths(counts)).sum())
    return -(-bits // _WORD) * _WORD


def _table_bits(counts: np.ndarray) -> int:
    longest, k = int(huffman.code_lengths(counts).max(initial=0)), int((counts > 0).sum())
    first_symbols, first_codes = (longest + 1) * _bits_for(k), (longest + 2) * _bits_for(2**longest)
    return k * _WORD + first_symbols + first_codes
