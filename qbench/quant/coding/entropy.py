"""What a lossless coder could reach at best, from how often each symbol occurs."""

import numpy as np

from qbench.quant.coding import huffman


def entropy_bits(counts: np.ndarray) -> float:
    """The empirical entropy of all symbols together, in bits; no coder of single symbols needs less.

    Args:
        counts: (K,) how often each symbol occurs.
    """
    seen = counts[counts > 0].astype(np.float64)
    return float((seen * np.log2(seen.sum() / seen)).sum())


def huffman_bits(counts: np.ndarray) -> int:
    """The bits of all code words of a Huffman code with words of at most 16 bits; a single symbol needs none."""
    return int((counts * huffman.code_lengths(counts)).sum())


def mask_bits(count: int, zeros: int) -> float:
    """The part of the entropy that tells which of `count` weights are zero.

    With the entropy of the others it is the sparsity-aware bound H(s) + s H(nonzero), which equals the entropy of all.
    """
    return entropy_bits(np.array([zeros, count - zeros]))
