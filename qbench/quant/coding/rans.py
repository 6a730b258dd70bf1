"""Range asymmetric numeral systems (Duda, arXiv 1311.2540), by the constriction library."""

from __future__ import annotations

import math
from types import ModuleType

import numpy as np

from qbench.errors import Unsupported
from qbench.quant.coding import symbols
from qbench.quant.coding.damage import DamagedError

_TOP = 65535  # the largest frequency stored


def encode(codes: np.ndarray, levels: int) -> list[np.ndarray]:
    """Sections: the alphabet's bitmap, the frequencies of its symbols (uint16), the words (uint32).

    Raises:
        Unsupported: the constriction library is missing.
    """
    counts = np.bincount(codes.ravel(), minlength=levels)
    used = counts > 0
    stored = counts[used]
    top = int(stored.max(initial=1))
    frequencies = (stored if top <= _TOP else np.maximum(1, stored * _TOP // top)).astype("<u2")
    words = np.zeros(0, np.uint32)
    if len(stored) > 1:
        stream = _constriction().stream
        ranks = (used.cumsum() - 1).astype(np.int32)[codes.ravel()]
        coder = stream.stack.AnsCoder()
        coder.encode_reverse(ranks, _model(frequencies))
        words = coder.get_compressed()
    return [symbols.bitmap(counts), frequencies, words.astype("<u4")]


def decode(sections: list[np.ndarray], shape: tuple[int, ...], levels: int) -> np.ndarray:
    """The inverse of `encode`.

    Raises:
        DamagedError: the sections are not what was written.
        Unsupported: the constriction library is missing.
    """
    if len(sections) != 3:
        raise DamagedError("parts are missing")
    used, frequencies = symbols.used(sections[0], levels), np.frombuffer(sections[1].tobytes(), "<u2")
    if len(used) != len(frequencies) or (len(used) and not frequencies.all()):
        raise DamagedError("the alphabet and its frequencies disagree")
    count = math.prod(shape)
    if len(used) < 2:
        if len(sections[2]) or (count and not len(used)):
            raise DamagedError("the words do not fit the alphabet")
        return np.full(shape, used[0] if len(used) else 0, np.uint16)
    words = np.frombuffer(sections[2].tobytes(), "<u4").astype(np.uint32)
    ranks = _constriction().stream.stack.AnsCoder(words).decode(_model(frequencies), count)
    return used[ranks].astype(np.uint16).reshape(shape)


def _model(frequencies: np.ndarray) -> object:
    # Exact sums of powers of two: the same probabilities on every machine.
    return _constriction().stream.model.Categorical(frequencies.astype(np.float64), perfect=False)


def _constriction() -> ModuleType:
    try:
        import constriction
    except ImportError as error:
        raise Unsupported("rANS needs the constriction library: pip install constriction") from error
    return constriction
