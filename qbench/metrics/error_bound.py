"""Errors of layers against what theory guarantees of them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from qbench.errors import Unsupported
from qbench.metrics.base import Finished
from qbench.registry import metric

_CHANCE = 0.01  # that the likely bound does not hold


@metric("error_bound", unit="of the bound", direction="none")
def error_bound(finished: Finished) -> dict[str, Any]:
    """How much of its guaranteed bound the error of each layer takes, where the weights follow a path or a vertex.

    Sources: arXiv:2201.11113 (GPFQ), arXiv:2309.10975 (SPFQ), arXiv:2209.03487 (vertices). The bounds are for the
    rounding of weights that fit the layer's inputs in the network quantized so far; where those inputs differ from the
    float network's, what the float weights' best fit leaves, `alignment`, is added.

    Returns:
        `value`: the largest error in units of its bound, over the layers that the bound applies to, if any; `layers`:
        of each layer `error`, `bound` (see `judge`), `applies`, and if not `reason`.

    Raises:
        Unsupported: no method of the recipe recorded errors and what bounds are made of.
    """
    terms, errors = finished.records.get("error_terms"), finished.records.get("layer_error")
    if terms is None or errors is None:
        raise Unsupported("no method of this recipe records errors of layers that have a bound (gpfq, spfq ... do)")
    layers = {name: judge(terms["rule"], error, terms["layers"][name]) for name, error in errors.items()}
    taken = [layer["error"] / layer["bound"] for layer in layers.values() if layer["applies"] and layer["bound"] > 0]
    return ({"value": max(taken)} if taken else {}) | {"applies_to": len(taken), "layers": layers}


def judge(rule: str, error: float, terms: Mapping[str, Any]) -> dict[str, Any]:
    """One layer's error and bounds, in units of the norm of its output.

    Args:
        rule: `nearest`, `stochastic` or `vertices`, how values were rounded.
        error: `||X W - X~ Q|| / ||X W||`.
        terms: as `qbench.quant.layerwise.Report` records them.

    Returns:
        `bound`: before rounding, from the alphabet's step and the inputs alone; it applies unless values were beyond
        the alphabet. `after`: the same from the distances of values to their levels, which holds in any case.
        `likely`, for stochastic rounding: holds for all outputs together with probability 0.99.
    """
    energy, alignment = terms["energy"], terms["alignment"]
    known = {"error": error, "saturated": terms["saturated"], "same_inputs": terms["same_inputs"]}
    if energy == 0:
        return known | {"bound": 0.0, "applies": False, "reason": "the layer's output is 0"}
    bounds = {"bound": terms["rounding"], "after": terms["residuals"]}
    if rule == "stochastic":
        # delta sqrt(2 pi p log d) max||X~_t|| holds for all m N outputs but with chance sqrt(2) m N d^-p, of which p
        # is the root; in norm, that of m N outputs.
        exponent = math.log(math.sqrt(2) * terms["outputs"] / _CHANCE)
        bounds["likely"] = math.sqrt(terms["outputs"] * 2 * math.pi * exponent) * terms["largest"]
    known |= {"alignment": alignment / energy}
    known |= {name: (alignment + rounding) / energy for name, rounding in bounds.items()}
    if terms["saturated"] > 0:
        share = f"{100 * terms['saturated']:.2g} % of the values were beyond the alphabet"
        return known | {"applies": False, "reason": share}
    return known | {"applies": True}
