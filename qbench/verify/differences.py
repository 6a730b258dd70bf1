"""Intervals of the difference between a network and its fixed-point form (QEBVerif, arXiv:2212.02781).

Propagated with intervals only, the paper's mode Base. Bounds hold up to what float64 rounds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

from qbench.verify.fixed_point import PIXELS, FixedPoint, Layer
from qbench.verify.interval import Interval


def activation_difference(floats: Interval, fixed: Interval, difference: Interval, top: float | Tensor) -> Interval:
    """The interval of `clamp(n', 0, top) - max(n, 0)`.

    Args:
        floats: of n.
        fixed: of n'.
        difference: of n' - n.
        top: largest activation in fixed point.
    """
    l, u, lq, uq, dl, du = floats.low, floats.high, fixed.low, fixed.high, difference.low, difference.high  # noqa: E741
    top = torch.as_tensor(top, dtype=l.dtype)
    least, most = torch.minimum, torch.maximum
    zero = torch.zeros_like(l)
    cl, cu = most(zero, least(lq, top)), most(zero, least(uq, top))
    linear, constant = (lq >= 0) & (uq <= top), (uq <= 0) | (lq >= top)
    always = torch.ones_like(linear)
    # Of the conditions, the first that holds counts.
    active = [
        (linear, dl, du),
        (constant, cl - u, cu - l),
        (uq <= top, most(-u, dl), most(-l, du)),
        (lq >= 0, least(top - u, dl), least(top - l, du)),
        (always, most(-u, least(top - u, dl)), most(-l, least(top - l, du))),
    ]
    crossing = [
        (linear, least(lq, dl), least(uq, du)),
        (constant, cl - u, cu),
        (
            uq <= top,
            torch.where(dl >= 0, zero, most(dl, -u)),
            torch.where(du <= 0, zero, least(du, uq)),
        ),
        (lq >= 0, least(least(dl, lq), top - u), least(du, top)),
        (always, least(least(top - u, zero), most(dl, -u)), most(zero, least(du, top))),
    ]
    cases = [(u <= 0, cl, cu), *(((l >= 0) & when, low, high) for when, low, high in active), *crossing]

    def choose(side: int) -> Tensor:
        return reduce(lambda rest, case: torch.where(case[0], case[side], rest), reversed(cases), zero)

    return Interval(choose(1), choose(2)).intersect(Interval(cl - u.clamp(min=0), cu - l.clamp(min=0)))


@dataclass(frozen=True)
class Stage:
    """What is known behind one layer, (n,) each."""

    floats: Interval
    """The float network, in front of the activation."""
    fixed: Interval
    """The fixed-point one, rounded (but for the last layer)."""
    difference: Interval
    """Fixed point minus float, behind the activation."""


def propagate(layers: Sequence[Layer], form: FixedPoint, low: Tensor, high: Tensor) -> list[Stage]:
    """Where both networks, and their difference, can be behind each layer, for any pixels in a box.

    Args:
        layers: of the float network.
        form: of the fixed-point network.
        low: least value of each pixel (d,).
        high: greatest value.
    """
    x = Interval(low.double() / PIXELS, high.double() / PIXELS)
    fixed = Interval(low.double() / (PIXELS + 1), high.double() / (PIXELS + 1))
    difference = Interval(-x.high / (PIXELS + 1), -x.low / (PIXELS + 1))
    stages = []
    *hidden, last = zip(layers, form.quantize(layers), strict=True)
    for layer, rounded in hidden:
        before, after, difference = _linear(layer, rounded, x, fixed, difference)
        after = Interval(form.round(after.low), form.round(after.high))
        difference = Interval(difference.low - form.half, difference.high + form.half)
        difference = activation_difference(before, after, difference, form.top)
        x, fixed = before.clamp(0, torch.inf), after.clamp(0, form.top)
        stages.append(Stage(before, after, difference))
    before, after, difference = _linear(*last, x, fixed, difference)
    return [*stages, Stage(before, after, difference.intersect(after.minus(before)))]


def _linear(
    layer: Layer, rounded: Layer, x: Interval, fixed: Interval, difference: Interval
) -> tuple[Interval, Interval, Interval]:
    """Behind both layers: the intervals of the float network, of the fixed-point one and of their difference."""
    apart = x.times(rounded.weight - layer.weight).plus(difference.times(rounded.weight))
    return (
        x.times(layer.weight).plus(layer.bias),
        fixed.times(rounded.weight).plus(rounded.bias),
        apart.plus(rounded.bias - layer.bias),
    )
