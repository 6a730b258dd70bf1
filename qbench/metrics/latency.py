"""Time per batch in a real runtime, quantized and float interleaved in one process."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field
from torch.utils._pytree import tree_structure, tree_unflatten

from qbench.errors import Unsupported
from qbench.metrics.base import Finished
from qbench.registry import metric
from qbench.runtimes.choice import AUTO, RuntimeChoice
from qbench.runtimes.pair import deploy
from qbench.runtimes.timing import interleave


@metric("latency", unit="ms", direction="lower", exclusive=True)
def latency(
    finished: Finished,
    *,
    runtime: RuntimeChoice = AUTO,
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
        runtime: that executes both; `auto` is the one that executes the quantized network fastest.
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
