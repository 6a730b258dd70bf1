"""Which symbols of an alphabet occur, as a bitmap."""

import numpy as np

from qbench.quant.coding.damage import DamagedError


def bitmap(counts: np.ndarray) -> np.ndarray:
    """Which of the symbols (levels,) occur, eight to a byte."""
    return np.packbits(counts > 0)


def used(stored: np.ndarray, levels: int) -> np.ndarray:
    """The symbols that a bitmap names, ascending.

    Raises:
        DamagedError: it is not a bitmap of that many symbols.
    """
    if len(stored) != -(-levels // 8):
        raise DamagedError("the alphabet has another size")
    return np.flatnonzero(np.unpackbits(stored)[:levels])
