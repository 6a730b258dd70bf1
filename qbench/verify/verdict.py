"""Is the error of quantization below a bound for every input in a box? Proved, falsified, or not known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from qbench.errors import UserError
from qbench.verify.differences import Interval, output_difference
from qbench.verify.fixed_point import PIXELS, FixedPoint, Layer, answer

_STARTS = 8
"""Ascents for each output and sign."""


@dataclass(frozen=True)
class Verdict:
    """What is known of the difference of each output (n,), fixed point minus float, in a box of pixels."""

    state: Literal["proved", "falsified", "unknown"]
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
        seed: of the points.

    Raises:
        UserError: fewer than 3 bits, or a box that is empty or beyond the pixels.
    """
    if bits < 3:
        raise UserError(f"bits={bits}: activations have two bits in front of the point; use 3 bits or more")
    if not bool(((low >= 0) & (low <= high) & (high <= PIXELS)).all()):
        raise UserError(f"low and high must be pixels from 0 to {PIXELS}, low not above high")
    form = FixedPoint(bits)
    proved = output_difference(layers, form, low, high)
    points, differences = search(layers, form, low.double(), high.double(), samples=samples, steps=steps, seed=seed)
    found = Interval(differences.amin(0), differences.amax(0))
    greatest = differences.abs().amax(1)
    state: Literal["proved", "falsified", "unknown"] = "unknown"
    if float(torch.maximum(-proved.low, proved.high).max()) < epsilon:
        state = "proved"
    elif float(greatest.max()) >= epsilon:
        state = "falsified"
    return Verdict(state, proved, found, points[greatest.argmax()])


def search(
    layers: Sequence[Layer], form: FixedPoint, low: Tensor, high: Tensor, *, samples: int, steps: int, seed: int
) -> tuple[Tensor, Tensor]:
    """Whole pixels in the box (points, d), and the differences of the outputs there (points, n).

    They are random points and the two ends of the box, and what is tried in ascents from the best of them, for each
    output and sign: steps along the gradient straight through the rounding, and steps by chance. The best is kept.
    """
    quantized = form.quantize(layers)
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.rand(samples, len(low), generator=generator, dtype=torch.float64)
    points = torch.cat([low[None], high[None], low + (drawn * (high - low + 1)).floor().minimum(high - low)])

    def difference(pixels: Tensor) -> Tensor:
        return form.answer(quantized, pixels) - answer(layers, pixels)

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
