"""Interval bound propagation: what a quantized network can answer for any input in a box (arXiv:2211.16187).

Quantizers are non-decreasing, so that what they make of both ends of an interval are its ends; gradients pass through
them as in training.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qbench.verify.graph import Graph, Operation, Walk
from qbench.verify.interval import Affine, Interval

FLOAT32 = 2.0**-24
"""What one operation in float32 is off by at most, as a share of its outcome."""
ROUNDINGS = 8
"""Roundings in what is neither exact nor a sum of many numbers."""


class Bounds(Walk[Interval]):
    """Intervals of everything that a network computes.

    Attributes:
        widths: mean widths of the intervals that the layers are called with.
    """

    def __init__(self, unit: float = 0.0) -> None:
        """
        Args:
            unit: what every operation of the network may be off by, as a share of its outcome; the bounds hold then
                whatever the order of the sums. They have to be computed in a higher precision. 0 leaves rounding out.
        """
        self.unit = unit
        self.widths: list[Tensor] = []

    def step(self, operation: Operation, x: Interval) -> Interval:
        if operation.kind in ("linear", "norm"):
            return self._affine(operation, x)
        if operation.kind == "quantizer":
            return self._off(self._off(x, ROUNDINGS).map(operation.function), ROUNDINGS)
        y = x.map(operation.function)
        if operation.kind in ("shape", "extreme", "relu"):
            return y
        return self._off(y, x.low[0].numel() + 1 if operation.kind == "average" else ROUNDINGS)

    def add(self, a: Interval, b: Interval) -> Interval:
        return self._off(a.plus(b), ROUNDINGS)

    def _affine(self, operation: Operation, x: Interval) -> Interval:
        if operation.kind == "linear":
            self.widths.append((x.high - x.low).mean())
        affine = Affine.of(operation.function, x.low.dtype)
        y = affine(x)
        return y.widened(affine.rounding(x, self.unit)) if self.unit else y

    def _off(self, x: Interval, roundings: int) -> Interval:
        return x.widened(roundings * self.unit * x.size) if self.unit else x


def margins(graph: Graph, box: Interval, targets: Tensor, bounds: Bounds) -> Tensor:
    """Lower bounds (B, classes) of the true class's output less each other one, for any input in a box.

    The last layer is taken together with the differences, which is tighter than bounding the outputs one by one.

    Args:
        graph: of a classifier.
        box: of inputs (B, ...).
        targets: true classes (B,); their own column is infinite.
        bounds: how the intervals are computed.

    Raises:
        Unsupported: the outputs do not come from a linear layer.
    """
    body, last = graph.head()
    hidden = bounds.run(body, box)
    bounds.widths.append((hidden.high - hidden.low).mean())
    affine = Affine.of(last, hidden.low.dtype)
    weight, bias = affine.weight[targets, None] - affine.weight, affine.bias[targets, None] - affine.bias
    centre, radius = (hidden.low + hidden.high) / 2, (hidden.high - hidden.low) / 2
    lowest = torch.einsum("bkd,bd->bk", weight, centre) + bias - torch.einsum("bkd,bd->bk", weight.abs(), radius)
    if bounds.unit:
        off = affine.rounding(hidden, bounds.unit)
        lowest = lowest - off - off.gather(1, targets[:, None])
    return lowest.scatter(1, targets[:, None], torch.inf)
