"""Which grids lie where: what profiles of hardware are compared with."""

from __future__ import annotations

from typing import Any

from qbench.metrics.base import Finished
from qbench.quant.placement import placement as facts_of
from qbench.registry import metric


@metric("placement", unit="facts", direction="none")
def placement(finished: Finished) -> dict[str, Any]:
    """Widths and grids of every layer's weights and inputs, and of what sums, joins and pools read.

    Boards say which profiles the network satisfies (`qbench.profiles`), and rank under one of them.
    """
    return facts_of(finished.quantized, finished.data.example)
