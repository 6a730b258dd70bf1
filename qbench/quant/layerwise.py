"""What methods that answer for a float layer's output share: its weight, the rows to sum, the report of each layer."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor

from qbench.data import Data
from qbench.errors import Unsupported
from qbench.quant.gram import Grams, grouped_weight
from qbench.quant.path_following import squared_error
from qbench.quant.sweep import Stop

Rule = Literal["nearest", "stochastic", "vertices"]
_LEAST_ROWS = 16384


def float_weight(stop: Stop) -> Tensor:
    """The layer's weight in the float network, (groups, n, d), float32.

    Raises:
        Unsupported: the layer has another shape there.
    """
    if stop.reference_layer.weight.shape != stop.layer.weight.shape:
        raise Unsupported(f"{stop.name} has another shape in the float network: a step before changed the structure")
    return grouped_weight(stop.reference_layer).float()


def enough_rows(oversample: int | None, inputs: int) -> int | None:
    """How many input patches to sum for neurons of so many inputs; None for all."""
    return None if oversample is None else max(_LEAST_ROWS, oversample * inputs)


def same_inputs(stop: Stop) -> bool:
    """Whether the layer is reached by the same numbers in both networks."""
    return all(torch.equal(xt, x) for xt, x in zip(stop.inputs, stop.reference_inputs, strict=True))


class Report:
    """The error of each layer, and what its bounds are made of (`qbench.metrics.error_bound`).

    The error of a layer is split by weights w~ for its inputs X~ in the network quantized so far:
    `X w - X~ q = (X w - X~ w~) + X~ (w~ - q)`. The first part is the `alignment`. Of the second, `rounding` bounds the
    norm when no value was beyond the alphabet, and `residuals` bounds it by the distances of the values that were
    rounded to their levels, whatever they were. All are norms over the whole layer, of the rows that were summed.
    """

    def __init__(self, rule: Rule) -> None:
        self.rule = rule
        self.errors: dict[str, float] = {}
        self.terms: dict[str, dict[str, Any]] = {}

    def add(
        self,
        stop: Stop,
        weight: Tensor,
        aligned: Tensor | None,
        sums: Grams,
        *,
        rounding: float,
        residuals: float,
        largest: float,
        saturated: float = 0.0,
    ) -> None:
        """A layer that was just encoded.

        Args:
            stop: where the sweep stands.
            weight: w, (groups, n, d).
            aligned: w~ as well; None where it is w, because the inputs are the same.
            sums: with F.
            rounding: see above.
            residuals: see above.
            largest: the greatest distance of a value to its level, times the norm of its input.
            saturated: share of values that were further away.
        """
        assert sums.F is not None
        quantized = grouped_weight(stop.layer).double()
        candidates = torch.stack([quantized, weight.double() if aligned is None else aligned.double()])
        squares, energy = squared_error(weight, candidates, sums.H, sums.G, sums.F)
        error, alignment = squares.sum(1).sqrt().tolist()
        norm = float(energy.sum().sqrt())
        self.errors[stop.name] = error / max(norm, torch.finfo(torch.float64).tiny)
        self.terms[stop.name] = {
            "energy": norm,
            "alignment": 0.0 if aligned is None else alignment,
            "rounding": rounding,
            "residuals": residuals,
            "largest": largest,
            "outputs": sums.rows * weight.shape[0] * weight.shape[1],
            "saturated": saturated,
            "same_inputs": aligned is None,
        }

    def add_path(
        self, stop: Stop, weight: Tensor, aligned: Tensor | None, values: Tensor, reach: Tensor, sums: Grams
    ) -> None:
        """A layer whose weights were chosen one after the other.

        A step leaves `<X~_t, u_t> = (a_t - q_t) ||X~_t||^2` of the error u and shortens the rest, so that the squares
        of `(a_t - q_t) ||X~_t||` add up to no less than the square of the path's error.

        Args:
            stop: where the sweep stands.
            weight: see `add`.
            aligned: see `add`.
            values: a, what was rounded, (groups, n, d).
            reach: how far values between the lowest and the highest level can be from theirs: () or (groups * n, 1).
            sums: with F.
        """
        groups, n, _ = weight.shape
        norms = sums.H.diagonal(dim1=1, dim2=2)[:, None]
        reach = reach.double().expand(groups * n, 1).reshape(groups, n, 1)
        distance = (values.double() - grouped_weight(stop.layer)).abs()
        live = (norms > 0).expand_as(distance)
        self.add(
            stop,
            weight,
            aligned,
            sums,
            rounding=float((reach.square() * norms).sum().sqrt()),
            residuals=float((distance.square() * norms).sum().sqrt()),
            largest=float((reach * norms.sqrt()).max()),
            # More than float32 rounds, less than anything that matters.
            saturated=float(((distance > 1.001 * reach) & live).sum() / live.sum().clamp(min=1)),
        )

    def record(self, data: Data, method: str, chosen: Iterable[str]) -> None:
        """Put it into the result, with how many of the chosen layers were reached."""
        data.record("layer_error", self.errors)
        data.record("error_terms", {"rule": self.rule, "layers": self.terms})
        unreached = sorted(set(chosen) - self.errors.keys())
        data.record(method, {"quantized": len(self.errors), "unreached": unreached})
