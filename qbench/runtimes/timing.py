"""Timing calls side by side, so that whatever disturbs the machine disturbs all of them."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping

_SHORTEST = 0.002  # seconds of a sample: shorter ones say more about the clock and the call than about the network
_FEWEST = 5  # rounds that are measured even when the budget is spent


def interleave(
    calls: Mapping[str, Callable[[], object]], *, samples: int, warmup: int, seconds: float
) -> tuple[int, dict[str, list[float]]]:
    """Time each call once a round, in an order that rotates from round to round.

    Args:
        calls: by name.
        samples: rounds.
        warmup: rounds that are thrown away.
        seconds: after which no further round begins.

    Returns:
        How often each is called per sample, and the seconds per call of each round.
    """
    names = list(calls)
    quickest = min(_timed(calls[name], 1) for _ in range(warmup) for name in names)
    loops = max(1, math.ceil(_SHORTEST / max(quickest, 1e-9)))
    times: dict[str, list[float]] = {name: [] for name in names}
    end = time.perf_counter() + seconds
    for number in range(samples):
        if number >= _FEWEST and time.perf_counter() > end:
            break
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            times[name].append(_timed(calls[name], loops))
    return loops, times


def _timed(call: Callable[[], object], loops: int) -> float:
    begin = time.perf_counter()
    for _ in range(loops):
        call()
    return (time.perf_counter() - begin) / loops
