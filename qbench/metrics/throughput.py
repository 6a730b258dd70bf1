"""Images per second, all of them at hand: batches, and every core."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from qbench.metrics.base import Finished
from qbench.metrics.latency import latency
from qbench.registry import metric
from qbench.runtimes.choice import AUTO, RuntimeChoice


@metric("throughput", unit="images/s", direction="higher", exclusive=True)
def throughput(
    finished: Finished,
    *,
    runtime: RuntimeChoice = AUTO,
    batch_size: Annotated[int, Field(ge=1)] = 8,
    threads: Annotated[int, Field(ge=1)] | None = None,
    samples: Annotated[int, Field(ge=5)] = 30,
    warmup: Annotated[int, Field(ge=1)] = 3,
    seconds: Annotated[float, Field(gt=0)] = 30.0,
) -> dict[str, Any]:
    """Time of batches by the integer network and by the float network in the same runtime, in pairs.

    Returns:
        As `latency` does: seconds per batch, and what ran.

    Args:
        finished: the run.
        runtime: that executes both; `auto` is the one that executes the quantized network fastest.
        batch_size: images per call.
        threads: of the runtime; None is all cores that the run may use.
        samples: rounds.
        warmup: rounds that are thrown away.
        seconds: after which no further round begins.

    Raises:
        Unsupported: the network is not deployable as integers.
    """
    return latency(
        finished,
        runtime=runtime,
        batch_size=batch_size,
        threads=threads or finished.threads,
        samples=samples,
        warmup=warmup,
        seconds=seconds,
    )
