"""How good the steps are that training ended with."""

from __future__ import annotations

from typing import Any

from qbench.errors import Unsupported
from qbench.metrics.base import Finished
from qbench.registry import metric


@metric("scale_error", unit="of least error", direction="lower")
def scale_error(finished: Finished) -> dict[str, Any]:
    """Squared error of rounding the trained weights, over that with the best step: 1 where training found it.

    Returns:
        `value`, the mean over layers; `error` and `least_error` of each layer.

    Raises:
        Unsupported: no method of the recipe trains weights that are rounded to a uniform grid with a code for 0.
    """
    record = finished.records.get("oscillation", {})
    error, least = record.get("error"), record.get("least_error")
    if not error:
        raise Unsupported("this recipe trains no weights on uniform grids with a code for 0")
    ratios = [error[name] / least[name] for name in error if least[name] > 0]
    return ({"value": sum(ratios) / len(ratios)} if ratios else {}) | {"error": error, "least_error": least}
