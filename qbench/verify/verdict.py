"""Is the error of quantization below a bound for every input in a box? Proved, falsified, or not known."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from qbench.errors import UserError
from qbench.verify.differences import propagate
from qbench.verify.exact import Exact, fixed_point
from qbench.verify.fixed_point import PIXELS, FixedPoint, Layer, answer
from qbench.verify.interval import Interval

State = Literal["proved", "falsified", "open"]
Difference = Callable[[Tensor], Tensor]
"""Quantized minus float outputs (points, n) for pixels (points, d), both float64, with gradients."""


@dataclass(frozen=True)
class Verdict:
    """What is known of the difference of each output (n,), quantized minus float, in a box of pixels."""

    state: State
    by_intervals: bool
    """Whether the intervals proved it, without the program."""
    proved: Interval
    """The differences are in here."""
    found: Interval
    """Differences of this size there are."""
    witness: Tensor
    """The pixels (d,) with the greatest difference that was found."""


def verify(
    layers: Sequence[Layer],
    bits: int,
    low: Tensor,
    high: Tensor,
    *,
    epsilon: float,
    samples: int = 1000,
    steps: int = 30,
    seconds: float = 0.0,
    seed: int = 0,
) -> Verdict:
    """Bound the differences of all outputs from above by a proof, and from below by a search.

    Args:
        layers: of the float network (`layers_of`).
        bits: of weights, biases and activations in fixed point.
        low: least value of each pixel (d,), whole numbers from 0.
        high: greatest value, up to 255.
        epsilon: what no output's difference may reach.
        samples: random points to look at.
        steps: of the search that starts from the best of them.
        seconds: that a mixed-integer program may take where intervals and search do not decide; 0 leaves it out. What
            it proves holds up to the solver's tolerances.
        seed: of the points.

    Raises:
        UserError: fewer than 3 bits, or a box that is empty or beyond the pixels.
    """
    if bits < 3:
        raise UserError(f"bits={bits}: activations have two bits in front of the point; use 3 bits or more")
    form, low, high = FixedPoint(bits), low.double(), high.double()
    if not bool(((low >= 0) & (low <= high) & (high <= PIXELS) & (low.frac() == 0) & (high.frac() == 0)).all()):
        raise UserError(f"low and high must be whole pixels from 0 to {PIXELS}, low not above high")
    stages = propagate(layers, form, low, high)
    difference = partial(difference_at, layers, form)
    program = partial(Exact, fixed_point(layers, form), low, high, stages)
    points = search(difference, low, high, samples=samples, steps=steps, seed=seed)
    proved, given = stages[-1].difference, program if seconds > 0 else None
    return judge(proved, difference, points, epsilon=epsilon, seconds=seconds, program=given)


def judge(
    proved: Interval,
    difference: Difference,
    points: Tensor,
    *,
    epsilon: float,
    seconds: float = 0.0,
    program: Callable[[], Exact] | None = None,
) -> Verdict:
    """What intervals, points that were tried, and a program together say.

    Args:
        proved: the differences (n,) are in here.
        difference: of the two networks, (points, n) for pixels (points, d).
        points: that were tried (points, d).
        epsilon: what no output's difference may reach.
        seconds: that the program may take where intervals and points do not decide.
        program: of both networks; None leaves it out.
    """
    by_intervals = largest(proved) < epsilon
    differences = difference(points)
    if program is not None and float(differences.abs().max()) < epsilon <= largest(proved):
        proved, solutions = _tightened(program(), proved, epsilon, seconds)
        points = torch.cat([points, *solutions])
        differences = torch.cat([differences, *(difference(pixels) for pixels in solutions)])
    greatest = differences.abs().amax(1)
    state: State = "proved" if largest(proved) < epsilon else "open"
    if float(greatest.max()) >= epsilon:
        state = "falsified"
    found = Interval(differences.amin(0), differences.amax(0))
    return Verdict(state, by_intervals, proved, found, points[greatest.argmax()])


def largest(differences: Interval) -> float:
    """The largest magnitude in the intervals."""
    return float(torch.maximum(-differences.low, differences.high).max())


def _tightened(program: Exact, proved: Interval, epsilon: float, seconds: float) -> tuple[Interval, list[Tensor]]:
    """Ends of the intervals that reach epsilon, by the program; and the pixels (1, d) that it found."""
    until = time.monotonic() + seconds
    ends = torch.stack([-proved.low, proved.high])
    solutions = []
    for side, output in (ends >= epsilon).nonzero().tolist():
        bound, pixels = program.greatest(output, 2 * side - 1, max(until - time.monotonic(), 0.0))
        ends[side, output] = min(bound, float(ends[side, output]))
        if pixels is not None:
            solutions.append(torch.from_numpy(pixels)[None])
    return Interval(-ends[0], ends[1]), solutions


def difference_at(layers: Sequence[Layer], form: FixedPoint, pixels: Tensor) -> Tensor:
    """Fixed point minus float (..., n) for pixels (..., d)."""
    return form.answer(form.quantize(layers), pixels) - answer(layers, pixels)


def search(
    difference: Difference, low: Tensor, high: Tensor, *, samples: int, steps: int, seed: int, starts: int = 8
) -> Tensor:
    """Whole pixels (points, d) in the box: the best that were found, for each output and sign.

    There are random points and the two ends of the box, and what is tried in ascents from the best of them, for each
    output and sign: steps along the gradient straight through the rounding, and steps by chance. The best is kept.

    Args:
        difference: of the two networks, (points, n) for pixels (points, d), with gradients.
        low: least value of each pixel (d,).
        high: greatest value.
        samples: random points.
        steps: of the ascents.
        seed: of the points.
        starts: ascents for each output and sign.
    """
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.rand(samples, len(low), generator=generator, dtype=torch.float64)
    points = torch.cat([low[None], high[None], low + (drawn * (high - low + 1)).floor().minimum(high - low)])
    with torch.no_grad():
        first = difference(points)
    outputs = first.shape[1]
    signs = torch.cat([torch.eye(outputs, dtype=torch.float64), -torch.eye(outputs, dtype=torch.float64)])
    now = points[(first @ signs.T).topk(min(starts, len(points)), 0).indices.flatten()]
    signs = signs.repeat(len(now) // len(signs), 1)
    for step in range(steps):
        start = now.clone().requires_grad_()
        with torch.enable_grad():
            (slope,) = torch.autograd.grad((difference(start) * signs).sum(), start)
        stride = ((high - low) / 4 * (1 - step / steps)).ceil()
        by_chance = stride * (2 * torch.rand(now.shape, generator=generator, dtype=torch.float64) - 1)
        tried = torch.stack([now, now + stride * slope.sign(), now + by_chance.round()]).minimum(high).maximum(low)
        with torch.no_grad():
            found = difference(tried.flatten(0, 1)).unflatten(0, tried.shape[:2])
        now = tried[(found * signs).sum(2).argmax(0), torch.arange(len(now))]
    return now
