"""How many images are classified correctly."""

from __future__ import annotations

from qbench.metrics.base import Finished
from qbench.registry import metric


@metric("top1", unit="%", direction="higher", task="classification")
def top1(finished: Finished) -> dict[str, int]:
    """Share of the evaluation images whose first guess is right, as counts; also among the first five."""
    correct, top5 = finished.outcomes["correct"], finished.outcomes["top5"]
    return {"correct": int(correct.sum()), "top5": int(top5.sum()), "images": len(correct)}
