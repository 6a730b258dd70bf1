"""Time per batch in a real runtime, quantized and float interleaved in one process."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import torch
from pydantic import Field
from torch.utils._pytree import tree_structure, tree_unflatten

from qbench.errors import Unsupported, UserError
from qbench.metrics.base import Finished
from qbench.registry import metric
from qbench.runtimes.pair import deploy

if TYPE_CHECKING:
    import pyperf

    from qbench.run import Result

SERIES = ("quantized", "float", "float_again")
_SHORTEST = 0.002  # seconds of a sample: shorter ones say more about the clock and the call than about the network
_FEWEST = 5  # rounds that are measured even when the budget is spent


@metric("latency", unit="ms", direction="lower", exclusive=True)
def latency(
    finished: Finished,
    *,
    runtime: str = "openvino",
    batch_size: Annotated[int, Field(ge=1)] = 1,
    threads: Annotated[int, Field(ge=1)] = 1,
    samples: Annotated[int, Field(ge=5)] = 60,
    warmup: Annotated[int, Field(ge=1)] = 5,
    seconds: Annotated[float, Field(gt=0)] = 20.0,
    decoding: bool = False,
) -> dict[str, Any]:
    """Time of the integer network and of the float network in the same runtime, in pairs.

    Returns:
        Seconds per batch, one number a round: `quantized` (not for the float reference), `float`, and `float_again`, a
        second instance of the float network, whose ratio to `float` is the noise. Sample i of each was taken in round
        i. With them what ran: layers on integer kernels as verified and as claimed, and the agreement of the timed
        network's answers with the scored network's.

    Args:
        finished: the run.
        runtime: that executes both.
        batch_size: images per call.
        threads: of the runtime.
        samples: rounds.
        warmup: rounds that are thrown away.
        seconds: after which no further round begins.
        decoding: of a detector, from images to boxes: decoding and suppression are timed with the network.

    Raises:
        Unsupported: the network is not deployable as integers, or is no detector that could be timed to its boxes.
    """
    deployed = deploy(finished, runtime, batch_size, threads)
    runs = {name: partial(network.run, deployed.batch) for name, network in deployed.networks.items()}
    calls = {name: _to_boxes(finished, run, threads) if decoding else run for name, run in runs.items()}
    before = os.getloadavg()[0]
    loops, times = interleave(calls, samples=samples, warmup=warmup, seconds=seconds)
    return {**deployed.facts, "loops": loops, "load": [before, os.getloadavg()[0]], **times}


def _to_boxes(finished: Finished, run: Callable[[], list[np.ndarray]], threads: int) -> Callable[[], object]:
    decode = finished.model.decode
    if decode is None:
        raise Unsupported("decoding=true is for detectors: this network's outputs are no boxes")
    torch.set_num_threads(threads)
    structure = tree_structure(finished.quantized(finished.data.example))
    return lambda: decode(tree_unflatten([torch.from_numpy(output) for output in run()], structure))


def interleave(
    calls: Mapping[str, Callable[[], object]], *, samples: int, warmup: int, seconds: float
) -> tuple[int, dict[str, list[float]]]:
    """Time each call once a round, in an order that rotates from round to round.

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


def to_pyperf(result: Result) -> pyperf.BenchmarkSuite:
    """The latencies of a result for pyperf's own tools (`show`, `stats`, `check`, `compare_to`).

    Benchmarks are named `<dataset>/<model>/<metric>/<series>`, without the recipe, so that two recipes compare.

    Raises:
        UserError: the result has no latency.
    """
    import pyperf

    where = "/".join(result.label.split("/")[:2])
    benchmarks = []
    for name, measured in result.metrics.items():
        if name.partition("[")[0] != "latency" or measured.status != "ok":
            continue
        for series in SERIES:
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
