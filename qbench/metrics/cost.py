"""What quantizing cost."""

from typing import Any

from qbench.errors import Unsupported
from qbench.metrics.base import Finished
from qbench.registry import metric


@metric("cost", unit="s", direction="lower")
def cost(finished: Finished) -> dict[str, Any]:
    """Seconds, peak memory in bytes, and calibration images used to quantize.

    Raises:
        Unsupported: the run did not record it.
    """
    if "seconds" not in finished.cost:
        raise Unsupported("the run did not record what quantizing cost")
    return {"value": finished.cost["seconds"], **finished.cost}
