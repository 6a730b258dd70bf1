"""Intervals of what quantization changes in a network, for any input in a box: differential reachability.

In the manner of QEBVerif (arXiv:2212.02781), whose rules are for fully connected layers in fixed point; here the two
networks are a float one and any quantized form of it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qbench.errors import Unsupported
from qbench.quant.activations import StaticQuantizer
from qbench.quant.fakequant import LearnedInput
from qbench.verify.differences import activation_difference
from qbench.verify.graph import Graph, Operation, Walk
from qbench.verify.ibp import ROUNDINGS, Bounds
from qbench.verify.interval import Affine, Interval


@dataclass(frozen=True)
class Reached:
    """A tensor in both networks."""

    floats: Interval
    quantized: Interval
    difference: Interval
    """Quantized minus float."""


class Reach(Walk[Reached]):
    """Sends intervals along the quantized network, and along the float one beside it.

    Attributes:
        seen: what was found behind every operation.
    """

    def __init__(self, counterparts: dict[str, Operation], unit: float = 0.0) -> None:
        """
        Args:
            counterparts: the float network's operations by the names of the quantized one's.
            unit: what every operation of both networks may be off by, as in `Bounds`.
        """
        self.counterparts, self.unit = counterparts, unit
        self.bounds = Bounds(unit)
        self.seen: dict[str, Reached] = {}

    def step(self, operation: Operation, x: Reached) -> Reached:
        own = self.bounds.step(operation, x.quantized)
        if operation.kind == "quantizer":
            floats, difference = x.floats, self._rounded(operation.function, x)
        else:
            other = self.counterparts[operation.name]
            floats, difference = self.bounds.step(other, x.floats), self._difference(operation, other, x)
        if operation.kind in ("monotone", "average"):
            difference = difference.widened(self._off(floats, own, x.floats.low[0].numel() + 1))
        self.seen[operation.name] = reached = Reached(floats, own, difference.intersect(own.minus(floats)))
        return reached

    def add(self, a: Reached, b: Reached) -> Reached:
        floats, own = self.bounds.add(a.floats, b.floats), self.bounds.add(a.quantized, b.quantized)
        difference = a.difference.plus(b.difference).widened(self._off(floats, own, ROUNDINGS))
        return Reached(floats, own, difference.intersect(own.minus(floats)))

    def _off(self, floats: Interval, own: Interval, roundings: int) -> Tensor:
        return roundings * self.unit * (floats.size + own.size)

    def _difference(self, operation: Operation, other: Operation, x: Reached) -> Interval:
        difference, function = x.difference, operation.function
        match operation.kind:
            case "linear" | "norm":
                return self._affine(function, other.function, x)
            case "relu":
                return activation_difference(x.floats, x.quantized, difference, torch.inf)
            case "monotone":  # with slopes of at most 1
                return Interval(difference.low.clamp(max=0), difference.high.clamp(min=0))
            case "extreme":
                return Interval(-function(-difference.low), function(difference.high))
            case _:  # "average" and "shape" are linear
                return difference.map(function)

    def _affine(self, function: nn.Module, other: nn.Module, x: Reached) -> Interval:
        """Of W~ x~ + b~ - (W x + b) = (W~ - W) x + W~ (x~ - x) + b~ - b."""
        own, floats = (Affine.of(module, x.floats.low.dtype) for module in (function, other))
        difference = own.minus(floats)(x.floats).plus(own(x.difference, offset=False))
        if not self.unit:
            return difference
        return difference.widened(own.rounding(x.quantized, self.unit) + floats.rounding(x.floats, self.unit))

    def _rounded(self, quantizer: nn.Module, x: Reached) -> Interval:
        """Of what a quantizer makes of the quantized network's numbers: it clips them, and rounds what is left."""
        first, last, step = codes(quantizer)
        low, high = first * step, last * step
        floats, own, difference = x.floats, x.quantized, x.difference
        # Of max(x~, low) - x = max(x~ - x, low - x), then of min(x~, high) - x, where they clip at all.
        ends = [torch.maximum(difference.low, low - floats.high), torch.maximum(difference.high, low - floats.low)]
        ends = [torch.where(own.low < low, *pair) for pair in zip(ends, (difference.low, difference.high), strict=True)]
        clipped = [torch.minimum(ends[0], high - floats.high), torch.minimum(ends[1], high - floats.low)]
        clipped = [torch.where(own.high > high, *pair) for pair in zip(clipped, ends, strict=True)]
        return Interval(*clipped).widened(step / 2 + self._off(floats, own, ROUNDINGS))


def codes(quantizer: nn.Module) -> tuple[int, int, float]:
    """The least and the greatest multiple of its step that a uniform quantizer returns, and the step."""
    assert isinstance(quantizer, StaticQuantizer | LearnedInput)
    zero = int(quantizer.zero_point) if isinstance(quantizer, StaticQuantizer) else 0
    return quantizer.low - zero, quantizer.high - zero, float(quantizer.scale)


def counterparts(quantized: Graph, floats: Graph) -> dict[str, Operation]:
    """The float network's operations by the names of the quantized one's, which does the same but for quantizers.

    Raises:
        Unsupported: it does not.
    """
    places, found = [0], {}
    rest = list(enumerate(floats.operations, 1))
    for operation in quantized.operations:
        if operation.kind == "quantizer":
            places.append(places[operation.operands[0]])
            continue
        place, other = rest.pop(0) if rest else (0, None)
        operands = tuple(places[operand] for operand in operation.operands)
        if other is None or (other.kind, other.name, other.operands) != (operation.kind, operation.name, operands):
            raise Unsupported(f"the float network has nothing like {operation.name}: structures differ")
        places.append(place)
        found[operation.name] = other
    if rest:
        raise Unsupported(f"the quantized network has nothing like {rest[0][1].name}: structures differ")
    return found
