"""Is the error of quantization below a bound for every input in a box? Proved, falsified, or not known."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from qbench.errors import UserError
from qbench.verify.differences import Interval, propagate
from qbench.verify.exact import Exact
from qbench.verify.fixed_point import PIXELS, FixedPoint, Layer, answer

_STARTS = 8
"""Ascents for each output and sign."""


State = Literal["proved", "falsified", "unknown"]


@dataclass(frozen=True)
class Verdict:
    """What is known of the difference of each output (n,), fixed point minus float, in a box of pixels."""

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
    proved = stages[-1].difference
    by_intervals = _largest(proved) < epsilon
    points, differences = search(layers, form, low, high, samples=samples, steps=steps, seed=seed)
    if seconds > 0 and float(differences.abs().max()) < epsilon <= _largest(proved):
        program = Exact(layers, form, low, high, stages)
        proved, solutions = _tightened(program, proved, epsilon, seconds)
        points = torch.cat([points, *solutions])
        differences = torch.cat([differences, *(difference_at(layers, form, pixels) for pixels in solutions)])
    greatest = differences.abs().amax(1)
    state: State = "proved" if _largest(proved) < epsilon else "unknown"
    if float(greatest.max()) >= epsilon:
        state = "falsified"
    found = Interval(differences.amin(0), differences.amax(0))
    return Verdict(state, by_intervals, proved, found, points[greatest.argmax()])


def _largest(differences: Interval) -> float:
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
    layers: Sequence[Layer], form: FixedPoint, low: Tensor, high: Tensor, *, samples: int, steps: int, seed: int
) -> tuple[Tensor, Tensor]:
    """Whole pixels in the box (points, d), and the differences of the outputs there (points, n).

    They are random points and the two ends of the box, and what is tried in ascents from the best of them, for each
    output and sign: steps along the gradient straight through the rounding, and steps by chance. The best is kept.
    """
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.rand(samples, len(low), generator=generator, dtype=torch.float64)
    points = torch.cat([low[None], high[None], low + (drawn * (high - low + 1)).floor().minimum(high - low)])
    difference = partial(difference_at, layers, form)

    seen, differences = [points], [difference(points)]
    outputs = differences[0].shape[1]
    signs = torch.cat([torch.eye(outputs, dtype=torch.float64), -torch.eye(outputs, dtype=torch.float64)])
    now = points[(differences[0] @ signs.T).topk(min(_STARTS, len(points)), 0).indices.flatten()]
    signs = signs.repeat(len(now) // len(signs), 1)
    for step in range(steps):
        start = now.clone().requires_grad_()
        (slope,) = torch.autograd.grad((difference(start) * signs).sum(), start)
        stride = ((high - low) / 4 * (1 - step / steps)).ceil()
        by_chance = stride * (2 * torch.rand(now.shape, generator=generator, dtype=torch.float64) - 1)
        tried = torch.stack([now, now + stride * slope.sign(), now + by_chance.round()]).minimum(high).maximum(low)
        found = difference(tried)
        now = tried[(found * signs).sum(2).argmax(0), torch.arange(len(now))]
        seen.append(tried[1:].flatten(0, 1))
        differences.append(found[1:].flatten(0, 1))
    return torch.cat(seen), torch.cat(differences)
