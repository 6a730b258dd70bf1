"""A deployed network's score beside that of the network that was scored, and a warning where they disagree."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from qbench.run import Measurement, Result
from qbench.stats import Interval

Outcomes = Mapping[str, np.ndarray]
Compare = Callable[[Outcomes, Outcomes], tuple[float, Interval]]

_EXCESS_DB = 6.0
"""So much more noise than rounding that flips makes between two float executions is another network."""
_FINEST = 2.0**-24
_AUDIBLE_DB = 30.0
"""Differences below this are smaller than those that 8 bits make, whatever two float executions have between them."""


@dataclass(frozen=True)
class Deployed:
    """What the board shows of one row."""

    cells: dict[str, Any]
    warnings: list[str]


def judge_deployed(result: Result, outcomes: Callable[[str], Outcomes], compare: Compare) -> Deployed | None:
    """Judge the metric `parity` of a result; None if it has none.

    Of several runtimes that one counts whose latency was measured, else the first.

    Args:
        result: of a run that was scored.
        outcomes: all arrays of a result, by its key.
        compare: the score of some outcomes, and its paired difference to others.
    """
    found = next(((k, m) for k, m in result.metrics.items() if k.partition("[")[0] == "parity" and _done(m)), None)
    if found is None:
        return None
    key, measurement = found
    runtimes: dict[str, Any] = measurement.values["runtimes"]
    runtime = next((name for name in _timed(result) if name in runtimes), next(iter(runtimes)))
    prefix = f"{key}/{runtime}/"
    arrays = outcomes(result.key)
    own = {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}
    score, difference = compare(own, arrays)
    sqnr, noise = (float(np.median(v)) for v in (runtimes[runtime]["sqnr_db"], measurement.values["noise_db"]))
    cells = {
        "deployed_runtime": runtime,
        "deployed_score": score,
        "deployed_difference": difference,
        "deployed_sqnr_db": sqnr,
        "deployed_noise_db": noise,
    }
    return Deployed(cells, _warnings(runtime, score, difference, sqnr, noise))


def _done(measurement: Measurement) -> bool:
    return measurement.status == "ok"


def _timed(result: Result) -> list[str]:
    """The runtimes of measured latencies."""
    return [
        m.values["runtime"] for name, m in result.metrics.items() if name.partition("[")[0] == "latency" and _done(m)
    ]


def judge_timed(result: Result) -> list[str]:
    """A warning for each runtime whose answers, when it was timed, were not those of the network that was scored."""
    found = []
    for name, measurement in result.metrics.items():
        agreement = measurement.values.get("agreement") if name.partition("[")[0] == "latency" else None
        if agreement and _done(measurement):
            sqnr, noise = (
                -20 * float(np.log10(max(np.median(agreement[key]), _FINEST)))
                for key in ("relative_difference", "noise")
            )
            found += _too_far(f"what {measurement.values['runtime']} was timed with", sqnr, noise)
    return found


def _warnings(runtime: str, score: float, difference: Interval, sqnr: float, noise: float) -> list[str]:
    found = []
    if difference.excludes_zero:
        d = difference
        change = f"{100 * d.estimate:+.2f} [{100 * d.low:+.2f}, {100 * d.high:+.2f}]"
        found.append(f"what {runtime} runs scores {100 * score:.2f}, which is {change} from what was scored")
    return [*found, *_too_far(f"what {runtime} runs", sqnr, noise)]


def _too_far(what: str, sqnr: float, noise: float) -> list[str]:
    if sqnr >= min(noise - _EXCESS_DB, _AUDIBLE_DB):
        return []
    return [
        f"{what} answers with {sqnr:.1f} dB of signal over difference to what was scored, "
        f"where rounding alone leaves {noise:.1f} dB"
    ]
