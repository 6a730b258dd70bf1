"""What training a quantized network costs beside training the float one."""

from __future__ import annotations

from typing import Any

from qbench.errors import Unsupported
from qbench.metrics.base import Finished
from qbench.registry import metric


@metric("training_time", unit="s/step", direction="lower")
def training_time(finished: Finished) -> dict[str, Any]:
    """Seconds per training step, paired with steps of the float network on the same batches in the same window.

    Returns:
        `quantized` and `float`: seconds of each pair of steps; `steps_per_epoch`, `steps`, `batch_size`; `seconds` of
        the whole training without loading images, `loading_seconds`; `saved_bytes`: what either step keeps in memory
        for its backward pass; `peak_memory_bytes` of the process; `last_epoch_loss`: of every step of the last epoch.

    Raises:
        Unsupported: no method of the recipe trains, or too few steps were done to time any.
    """
    record = finished.records.get("training")
    if record is None:
        raise Unsupported("this recipe does not train")
    if not record["timing"]:
        raise Unsupported("the training was too short to time a step of it")
    return {
        **record["timing"],
        "steps_per_epoch": record["steps_per_epoch"],
        "steps": len(record["loss"]),
        "batch_size": record["batch_size"],
        "seconds": sum(record["seconds"]),
        "loading_seconds": sum(record["loading_seconds"]),
        "peak_memory_bytes": finished.cost.get("peak_memory_bytes"),
        "last_epoch_loss": record["loss"][-record["steps_per_epoch"] :],
    }
