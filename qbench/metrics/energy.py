"""Energy per image in a real runtime, by the hardware's own counters, with what the idle machine uses subtracted."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Annotated, Any

import numpy as np
from pydantic import Field

from qbench.metrics.base import Finished
from qbench.metrics.joules import Counter, counter
from qbench.registry import metric
from qbench.runtimes.choice import AUTO, RuntimeChoice, engines
from qbench.runtimes.pair import deploy

Window = dict[str, float]
"""`joules` and `seconds` of one window, and the `images` that were answered in it."""


@metric("energy", unit="mJ/image", direction="lower", exclusive=True)
def energy(
    finished: Finished,
    *,
    runtime: RuntimeChoice = AUTO,
    batch_size: Annotated[int, Field(ge=1)] = 1,
    threads: Annotated[int, Field(ge=1)] = 1,
    rounds: Annotated[int, Field(ge=3)] = 8,
    seconds: Annotated[float, Field(gt=0)] = 1.0,
) -> dict[str, Any]:
    """Joules of the integer network and of the float network in the same runtime, in alternating windows.

    Returns:
        `windows`: by `idle`, `quantized` (not for the float reference), `float` and `float_again`, one window a round;
        `counter`: whose joules; with them what ran, as for the latency. `millijoules` judges them.

    Args:
        finished: the run.
        runtime: that executes both; `auto` is the one that executes the quantized network fastest.
        batch_size: images per call.
        threads: of the runtime.
        rounds: windows of each kind.
        seconds: length of a window.

    Raises:
        Unsupported: there is no counter that may be read, or the network is not deployable as integers.
    """
    devices = {engine.device for engine in engines(runtime).values()}
    for device in devices:
        counter(device)  # nothing is compiled where nothing can be measured
    deployed = deploy(finished, runtime, batch_size, threads)
    meter = counter(deployed.engine.device)
    calls = {name: partial(network.run, deployed.batch) for name, network in deployed.networks.items()}
    windows = alternate(calls, meter, images=batch_size, rounds=rounds, seconds=seconds)
    return {**deployed.facts, "counter": meter.name, "windows": windows}


def alternate(
    calls: Mapping[str, Callable[[], object]], meter: Counter, *, images: int, rounds: int, seconds: float
) -> dict[str, list[Window]]:
    """One window of idling and one of each call, a round; the order rotates from round to round."""
    names = ["idle", *calls]
    for call in calls.values():
        call()
    windows: dict[str, list[Window]] = {name: [] for name in names}
    for number in range(rounds):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            windows[name].append(_window(calls.get(name), meter, images, seconds))
    return windows


def _window(call: Callable[[], object] | None, meter: Counter, images: int, seconds: float) -> Window:
    answered = 0
    joules, begin = meter.read(), time.perf_counter()
    if call is None:
        time.sleep(seconds)
    else:
        while time.perf_counter() - begin < seconds:
            call()
            answered += images
    joules, spent = meter.read() - joules, time.perf_counter() - begin
    return {"joules": joules, "seconds": spent, "images": answered}


def millijoules(windows: Mapping[str, list[Window]]) -> dict[str, list[float]]:
    """Energy per image of each round in mJ, less what the idle machine used at the median of its windows.

    Args:
        windows: as the metric returns them.

    Returns:
        One list for each kind of window but `idle`; a value below zero means that the energy was lost in the noise.
    """
    idle = float(np.median([w["joules"] / w["seconds"] for w in windows["idle"]]))
    return {
        name: [1000 * (w["joules"] - idle * w["seconds"]) / w["images"] for w in measured]
        for name, measured in windows.items()
        if name != "idle"
    }
