"""Which recipes must not be worse than which: those with more bits, or a finer granularity, and all else the same."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Step = tuple[str, Mapping[str, Any]]
"""Name of a method, and its options with the defaults filled in."""


def finer(a: Sequence[Step], b: Sequence[Step]) -> str | None:
    """How recipe `a` is finer than `b`: "more bits", "finer granularity", or both.

    They are the same methods with the same options, but for options that have an order; in all of these `a` is finer.
    None where that is not so.
    """
    if [name for name, _ in a] != [name for name, _ in b]:
        return None
    how: dict[str, None] = {}
    for (name, mine), (_, others) in zip(a, b, strict=True):
        if mine.keys() != others.keys():
            return None
        mine, others = _edges_filled(mine), _edges_filled(others)
        for option in mine:
            if mine[option] == others[option]:
                continue
            word, fineness = _ORDERED.get(option, ("", _unknown))
            own, other = fineness(mine[option]), fineness(others[option])
            if (name, option) in _UNORDERED or own is None or other is None or own <= other:
                return None
            if name not in _PREPARING:
                how[word] = None
    return " and ".join(how) or None


def _edges_filled(options: Mapping[str, Any]) -> Mapping[str, Any]:
    """With the width of the first and the last layer written out where it is that of all layers."""
    if "edge_bits" not in options or options["edge_bits"] is not None:
        return options
    return {**options, "edge_bits": options["bits"] if "bits" in options else _in_name(options.get("format"))}


def _unknown(_: Any) -> float | None:
    return None


def _number(value: Any) -> float | None:
    return value if isinstance(value, (int, float)) else None


def _smaller(value: Any) -> float | None:
    return -value if isinstance(value, (int, float)) else None


def _or_float(value: Any) -> float | None:
    return 32 if value is None else _number(value)


def _in_name(value: Any) -> float | None:
    """The width in the name of a number format: 8 of fp8_e4m3."""
    found = re.search(r"\d+", str(value))
    return int(found[0]) if found else None


_GRANULARITY = {"network": 0.0, "layer": 1.0, "tensor": 1.0, "channel": 2.0, "token": 2.0, "group": 3.0}
_ORDERED: dict[str, tuple[str, Callable[[Any], float | None]]] = {
    "bits": ("more bits", _number),
    "activation_bits": ("more bits", _or_float),
    "edge_bits": ("more bits", _number),
    "boxes": ("more bits", _number),
    "scores": ("more bits", _number),
    "format": ("more bits", _in_name),
    "dtype": ("more bits", _in_name),
    "levels": ("more levels", _number),
    "granularity": ("finer granularity", lambda word: _GRANULARITY.get(word)),
    "group_size": ("finer granularity", _smaller),
    "block_size": ("finer granularity", _smaller),
}
_UNORDERED = {("prune", "granularity")}  # it divides up a number of zeros: finer means less freedom
_PREPARING = {"msq_preprocess", "split_channels"}  # their grid is that of a later step, and alone means nothing
