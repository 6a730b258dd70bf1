"""Do codes and steps of weights come to rest while a network is trained?"""

from __future__ import annotations

from typing import Any, Literal

from qbench.errors import Unsupported
from qbench.metrics.base import Finished
from qbench.registry import metric


@metric("scale_oscillation", unit="flips/1000 steps", direction="lower")
def scale_oscillation(finished: Finished, *, of: Literal["exponents", "codes"] = "exponents") -> dict[str, Any]:
    """How often, in 1000 steps of the training, a power of two that weights are multiplied with changes, or a code.

    Args:
        finished: the run.
        of: powers of two, or codes of weights, which are compared in some pairs of successive steps.

    Returns:
        `value`, the mean over all; of each layer `flips`, and `count`, how many things can flip; `steps`, in which they
        were counted.

    Raises:
        Unsupported: no method of the recipe trains quantizers, or none of the kind asked for.
    """
    record = finished.records.get("oscillation")
    if record is None:
        raise Unsupported("this recipe does not train quantizers of weights")
    kind, steps = ("exponent", record["steps"]) if of == "exponents" else ("code", record["pairs"])
    flips, count = record[f"{kind}_flips"], record[of]
    if not flips or not steps:
        raise Unsupported(f"no {of} were counted: is that a method with powers of two?")
    return {
        "value": 1000 * sum(flips.values()) / (steps * sum(count[name] for name in flips)),
        "flips": flips,
        "count": count,
        "steps": steps,
    }
