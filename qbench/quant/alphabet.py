"""Alphabets: the values that path-following quantizers choose from, with the thresholds between them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from qbench.errors import UserError
from qbench.quant.encodings import Affine, Codebook, Encoding

Kind = Literal["midtread", "clipped", "linspace_zero", "median"]
Step = Literal["radius", "mse"]
Granularity = Literal["layer", "channel"]
Sparsity = Literal["none", "soft", "hard"]


@dataclass(frozen=True)
class Alphabet:
    """Ascending levels and the thresholds between them; a value on a threshold takes the upper level.

    Attributes:
        levels: (K,), or (N, K) with one alphabet per neuron.
        thresholds: (K - 1,) or (N, K - 1).
        step: distance of neighbours, () or (N, 1), of an alphabet that is `code * step`; None for others.
        low: first code of such an alphabet.
    """

    levels: Tensor
    thresholds: Tensor
    step: Tensor | None = None
    low: int = 0

    @property
    def reach(self) -> Tensor:
        """How far a value between the lowest and the highest level can be from its level: (), or (N, 1)."""
        below, above = self.thresholds - self.levels[..., :-1], self.levels[..., 1:] - self.thresholds
        return torch.maximum(below, above).amax(-1, keepdim=self.levels.dim() == 2)

    def encoding(self, indices: Tensor) -> Encoding:
        """Indices into the levels, of a weight's shape, as an encoding."""
        if self.step is not None:
            high = self.low + self.levels.shape[-1] - 1
            codes = (indices + self.low).to(torch.int32)
            return Affine(codes, self.step.float().reshape(-1, 1), self.low, high)
        rows = self.levels.float().reshape(-1, 1, self.levels.shape[-1])
        return Codebook(indices.to(torch.int32), rows)


def radius(weight: Tensor, percentile: float = 1.0, per_channel: bool = False) -> Tensor:
    """The quantile of each neuron's absolute weights, averaged over the layer unless `per_channel`.

    Args:
        weight: (N, d).
        percentile: in (0, 1]; 1 is the largest.
        per_channel: one radius per neuron, (N, 1), instead of one, ().
    """
    largest = _quantile(weight.abs(), percentile)
    return largest if per_channel else largest.mean()


def median_radius(weight: Tensor) -> Tensor:
    """The median of all absolute weights, ()."""
    return _quantile(weight.abs().reshape(1, -1), 0.5).reshape(())


def _quantile(rows: Tensor, share: float) -> Tensor:
    """(N, 1), between neighbours linearly; torch.quantile refuses more than 16 million numbers."""
    ordered = rows.sort(1).values
    place = share * (rows.shape[1] - 1)
    low = math.floor(place)
    high = min(low + 1, rows.shape[1] - 1)
    return torch.lerp(ordered[:, low, None], ordered[:, high, None], place - low)


def uniform(step: Tensor, bits: int, clipped: bool = False, soft: float = 0.0) -> Alphabet:
    """`k * step` for k in -K..K, K = 2**(bits - 1): 2**bits + 1 levels; clipped leaves the last out.

    Args:
        step: () or (N, 1); zeros (dead neurons) are taken as 1.
        bits: see above.
        clipped: 2**bits levels, so that codes fit `bits` bits.
        soft: values are moved towards zero by this much before they are rounded (L1-sparse GPFQ).
    """
    top = 2 ** (bits - 1)
    step = torch.where(step > 0, step, torch.ones_like(step))
    codes = torch.arange(-top, top + (0 if clipped else 1), dtype=step.dtype, device=step.device)
    middles = codes[1:] - 0.5
    return Alphabet(codes * step, middles * step + soft * middles.sign(), step, low=-top)


def hard(largest: Tensor, bits: int, threshold: float) -> Alphabet:
    """0 and +-(threshold + k * step), k = 0..K, up to `largest`; all that is not beyond the threshold becomes 0.

    Raises:
        UserError: the threshold is not below the largest level.
    """
    if bool((largest <= threshold).any()):
        raise UserError(
            f"threshold={threshold} leaves no level: the largest would be {float(largest.min()):.3g}; lower it"
        )
    top = 2 ** (bits - 1)
    step = (largest - threshold) / top
    beyond = torch.arange(top + 1, dtype=largest.dtype, device=largest.device) * step + threshold
    middles = beyond[..., 1:] - step / 2
    edge = torch.full_like(beyond[..., :1], threshold)
    # The threshold itself still becomes 0, on both sides.
    above = torch.nextafter(edge, torch.full_like(edge, torch.inf))
    levels = torch.cat([-beyond.flip(-1), torch.zeros_like(edge), beyond], -1)
    return Alphabet(levels, torch.cat([-middles.flip(-1), -edge, above, middles], -1))


def nearest(levels: Tensor) -> Alphabet:
    """Each value takes the nearest level: (K,) or (N, K), in any order."""
    ordered = levels.sort(-1).values
    return Alphabet(ordered, (ordered[..., 1:] + ordered[..., :-1]) / 2)


def linspace(largest: Tensor, levels: int, zero: bool) -> Alphabet:
    """`levels` values from -largest to largest at equal distances, and 0 if asked for; largest is () or (N, 1)."""
    unit = torch.linspace(-1, 1, levels, dtype=largest.dtype, device=largest.device)
    if zero:
        unit = torch.cat([unit, unit.new_zeros(1)])
    return nearest(unit * largest)


def least_squares_step(weight: Tensor, bits: int, clipped: bool = False, per_channel: bool = False) -> Tensor:
    """The step whose rounding error has the least squares, among 100 fractions of the largest weight.

    Args:
        weight: (N, d).
        bits: of the uniform alphabet.
        clipped: whether it has the level K.
        per_channel: (N, 1) steps instead of one, ().
    """
    top = 2 ** (bits - 1)
    rows = weight if per_channel else weight.reshape(1, -1)
    largest = rows.abs().amax(1, keepdim=True)
    best = largest / top
    least = torch.full_like(best, torch.inf)
    for percent in range(1, 101):
        step = (largest * percent / 100 / top).clamp(min=torch.finfo(rows.dtype).tiny)
        rounded = torch.floor(rows / step + 0.5).clamp(-top, top - 1 if clipped else top) * step
        error = (rows - rounded).square().sum(1, keepdim=True)
        best, least = torch.where(error < least, step, best), torch.minimum(error, least)
    return best if per_channel else best.reshape(())


@dataclass(frozen=True)
class Alphabets:
    """How the alphabet of a layer is made; the options of `gpfq` say what each means."""

    kind: Kind
    count: int | None
    c: float
    percentile: float
    step: Step
    granularity: Granularity
    sparsity: Sparsity
    threshold: float

    def check(self) -> None:
        """Raises UserError where choices contradict each other."""
        if self.sparsity != "none" and self.kind != "midtread":
            raise UserError(f"sparsity={self.sparsity} has an alphabet of its own; use alphabet=midtread")
        if self.step == "mse" and (self.kind not in ("midtread", "clipped") or self.sparsity == "hard"):
            raise UserError("step=mse is for the alphabets midtread and clipped without hard sparsity; use step=radius")
        if self.count is not None and self.kind != "median":
            raise UserError("levels is for alphabet=median; the others have 2**bits or one more, so leave it out")
        if self.kind == "median" and self.granularity == "channel":
            raise UserError("alphabet=median has one radius a layer; use granularity=layer")

    def build(self, weight: Tensor, bits: int) -> Alphabet:
        """The alphabet of a layer's weight (N, d).

        Raises:
            UserError: the threshold is not below the largest level.
        """
        per_channel, clipped = self.granularity == "channel", self.kind == "clipped"
        if self.kind == "median":
            return linspace(self.c * median_radius(weight), self.count or 2**bits, zero=False)
        largest = self.c * radius(weight, self.percentile, per_channel)
        if self.kind == "linspace_zero":
            return linspace(largest, 2**bits, zero=True)
        if self.sparsity == "hard":
            return hard(largest, bits, self.threshold)
        by_error = self.step == "mse"
        step = least_squares_step(weight, bits, clipped, per_channel) if by_error else largest / 2 ** (bits - 1)
        return uniform(step, bits, clipped, self.threshold if self.sparsity == "soft" else 0.0)
