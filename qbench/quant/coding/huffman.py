"""Canonical Huffman coding, code words of at most 16 bits; decoding by table lookup at every bit position at once."""

from __future__ import annotations

import math

import numpy as np

from qbench.quant.coding import symbols
from qbench.quant.coding.damage import DamagedError

LIMIT = 16
_SEGMENT = 1 << 22  # bits decoded at a time
_JUMPS = 6  # a jump passes 2**_JUMPS code words


def encode(codes: np.ndarray, levels: int) -> list[np.ndarray]:
    """Sections: the alphabet's bitmap, the code lengths of its symbols, the bits."""
    counts = np.bincount(codes.ravel(), minlength=levels)
    lengths = code_lengths(counts)
    return [symbols.bitmap(counts), lengths[counts > 0], write(codes.ravel(), lengths)]


def decode(sections: list[np.ndarray], shape: tuple[int, ...], levels: int) -> np.ndarray:
    """The inverse of `encode`.

    Raises:
        DamagedError: the sections are not what was written.
    """
    if len(sections) != 3:
        raise DamagedError("parts are missing")
    bitmap, stored, stream = sections
    used, count = symbols.used(bitmap, levels), math.prod(shape)
    if len(used) != len(stored):
        raise DamagedError("the alphabet and its code lengths disagree")
    if len(used) < 2:
        if len(stream) or (count and not len(used)):
            raise DamagedError("its bits do not fit the alphabet")
        return np.full(shape, used[0] if len(used) else 0, np.uint16)
    lengths = np.zeros(levels, np.uint8)
    lengths[used] = stored
    return read(stream, count, lengths).reshape(shape)


def code_lengths(counts: np.ndarray, limit: int = LIMIT) -> np.ndarray:
    """The lengths (K,) of an optimal prefix code with words of at most `limit` bits, by package-merge; 0 for no word.

    A single symbol gets the length 0: how often it occurs is all there is to know.

    Args:
        counts: (K,) how often each symbol occurs, K at most 2**limit.
        limit: longest code word.
    """
    lengths = np.zeros(len(counts), np.uint8)
    used = np.flatnonzero(counts)
    if len(used) < 2:
        return lengths
    order = used[np.argsort(counts[used], kind="stable")]
    coins = counts[order].astype(np.int64)
    merged, is_coin = coins, [np.ones(len(coins), bool)]
    for _ in range(limit - 1):
        pairs = len(merged) // 2
        packages = merged[: 2 * pairs].reshape(-1, 2).sum(1)
        both = np.concatenate([coins, packages])
        place = np.argsort(both, kind="stable")
        merged = both[place]
        is_coin.append(place < len(coins))
    take = 2 * len(coins) - 2
    for coin in reversed(is_coin):
        chosen = int(coin[:take].sum())
        lengths[order[:chosen]] += 1
        take = 2 * (take - chosen)
    return lengths


def code_words(lengths: np.ndarray) -> np.ndarray:
    """The canonical code words (K,): ascending by length, then by symbol."""
    words = np.zeros(len(lengths), np.uint32)
    used = np.flatnonzero(lengths)
    order = used[np.argsort(lengths[used], kind="stable")]
    spans = np.left_shift(1, LIMIT - lengths[order].astype(np.int64))
    words[order] = (spans.cumsum() - spans) >> (LIMIT - lengths[order].astype(np.int64))
    return words


def write(codes: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Codes (n,) as bits, first bit first; uint8."""
    words, pieces = code_words(lengths), []
    for start in range(0, len(codes), 1 << 18):
        part = codes[start : start + (1 << 18)]
        size = lengths[part].astype(np.int64)
        shift = size[:, None] - 1 - np.arange(LIMIT)
        ones = (words[part][:, None] >> np.maximum(shift, 0)) & 1
        pieces.append(ones[shift >= 0].astype(bool))
    return np.packbits(np.concatenate(pieces)) if pieces else np.zeros(0, np.uint8)


def read(stream: np.ndarray, count: int, lengths: np.ndarray) -> np.ndarray:
    """The codes (count,) of a stream.

    Raises:
        DamagedError: the lengths are no prefix code, or the stream has not that many code words.
    """
    symbol, length = _table(lengths)
    out = np.empty(count, np.uint16)
    padded = np.concatenate([stream, np.zeros(4, np.uint8)])
    done, at, total = 0, 0, 8 * len(stream)
    while done < count:
        if at >= total:
            raise DamagedError(f"it ends after {done} of {count} code words")
        first = at // 8
        window = _windows(padded[first : first + _SEGMENT // 8 + 4])
        starts = _starts(length[window], at - 8 * first, count - done)
        out[done : done + len(starts)] = symbol[window[starts]]
        done += len(starts)
        at = 8 * first + int(starts[-1]) + int(length[window[starts[-1]]])
    if not total - 32 < at <= total:
        raise DamagedError(f"it has {total} bits, and {count} code words end at bit {at}")
    return out


def _table(lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Symbol and code length for each of the 2**16 values that the next bits may have."""
    used = np.flatnonzero(lengths)
    order = used[np.argsort(lengths[used], kind="stable")]
    if lengths.max() > LIMIT:
        raise DamagedError("a code word is too long")
    spans = np.left_shift(1, LIMIT - lengths[order].astype(np.int64))
    if spans.sum() != 1 << LIMIT:
        raise DamagedError("the code lengths are those of no prefix code")
    return np.repeat(order, spans).astype(np.uint16), np.repeat(lengths[order], spans).astype(np.int32)


def _windows(padded: np.ndarray) -> np.ndarray:
    """The 16 bits from each bit position on."""
    wide = padded.astype(np.uint32)
    three = wide[:-2] << 16 | wide[1:-1] << 8 | wide[2:]
    return ((three[:, None] >> np.arange(8, 0, -1, dtype=np.uint32)) & 0xFFFF).ravel()


def _starts(length: np.ndarray, first: int, most: int) -> np.ndarray:
    """The positions of up to `most` code words, the first given, where one at p is followed by one at p + length[p]."""
    end = len(length) - 16
    after = [np.append(np.minimum(np.arange(len(length), dtype=np.int32) + length, len(length)), len(length))]
    for _ in range(_JUMPS):
        after.append(after[-1][after[-1]])
    starts = [first]
    while starts[-1] < end and len(starts) << _JUMPS < most:
        starts.append(int(after[-1][starts[-1]]))
    found = np.array(starts, np.int64)
    for jump in reversed(after[:-1]):
        found = np.stack([found, jump[found]], axis=1).ravel()
    return found[: int(np.searchsorted(found, end))][:most]
