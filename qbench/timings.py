"""Measured times in pyperf's own format, for its tools."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from qbench.errors import UserError
from qbench.run import Result

if TYPE_CHECKING:
    import pyperf

_METRICS = ("latency", "throughput")
_SERIES = ("quantized", "float", "float_again")


def write_pyperf(result: Result, path: Path) -> None:
    """Write `path`, replacing what is there.

    Raises:
        UserError: the result has no times, or the file cannot be written.
    """
    suite = to_pyperf(result)
    try:
        suite.dump(str(path), replace=True)
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror})") from error


def to_pyperf(result: Result) -> pyperf.BenchmarkSuite:
    """The times of a result for pyperf's own tools (`show`, `stats`, `check`, `compare_to`).

    Benchmarks are named `<dataset>/<model>/<metric>/<series>`, without the recipe, so that two recipes compare.

    Raises:
        UserError: the result has no latency.
    """
    import pyperf

    where = "/".join(result.label.split("/")[:2])
    benchmarks = []
    for name, measured in result.metrics.items():
        if name.partition("[")[0] not in _METRICS or measured.status != "ok":
            continue
        for series in _SERIES:
            if series in measured.values:
                metadata = {
                    "name": f"{where}/{name}/{series}",
                    "unit": "second",
                    "loops": measured.values["loops"],
                    "description": result.label,
                    "cpu_model_name": result.provenance.get("cpu", "unknown"),
                }
                run = pyperf.Run(measured.values[series], metadata=metadata, collect_metadata=False)
                benchmarks.append(pyperf.Benchmark([run]))
    if not benchmarks:
        raise UserError(f"{result.label} has no latency; add `latency` to the suite's metrics and run it again")
    return pyperf.BenchmarkSuite(benchmarks)
