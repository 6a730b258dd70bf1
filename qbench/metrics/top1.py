"""How many images are classified correctly."""

from __future__ import annotations

from qbench.metrics.base import Finished
from qbench.registry import metric


@metric("top1", unit="%", direction="higher", task="classification")
def top1(finished: Finished) -> dict[str, int]:
    """Share of the evaluation images whose first guess is right, as counts."""
    correct = finished.outcomes["correct"]
    return {"correct": int(correct.sum()), "images": len(correct)}
