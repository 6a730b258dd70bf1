"""Weight quantizers whose steps are not learned but computed from the weights, after every step of the training."""

from __future__ import annotations

from typing import Literal, cast

import torch
from torch import Tensor, nn

from qbench.quant.encodings import Affine
from qbench.quant.fakequant import Granularity, LearnedStep
from qbench.quant.grids import nearest_power
from qbench.quant.powers import settled
from qbench.quant.rows import sharing_rows, spread
from qbench.quant.step_search import alternating_step, best_step

_TURNS = 3
"""Of the alternating search, which goes on from where it was before the last step of the training."""


class RecomputedWeight(nn.Module):
    """Codes from -high to high = 2**(bits - 1) - 1; gradients pass inside the range (arXiv:1712.05877).

    With the step the largest weight has the largest code.
    """

    steps: Tensor

    def __init__(self, weight: Tensor, bits: int, granularity: Granularity, axis: int = 0) -> None:
        """
        Args:
            weight: what is to be quantized.
            bits: width of the codes, at least 2.
            granularity: one step per tensor or per output channel.
            axis: output-channel axis of the weight.
        """
        super().__init__()
        self.high, self.granularity, self.axis, self.dims = 2 ** (bits - 1) - 1, granularity, axis, weight.dim()
        self.register_buffer("steps", self.found(self.rows(weight)))

    def rows(self, weight: Tensor) -> Tensor:
        """(R, n): what shares a step."""
        return sharing_rows(weight.detach().float(), self.granularity, self.axis)

    def found(self, rows: Tensor) -> Tensor:
        """The steps (R,) for the weights; 1 where all are 0."""
        largest = rows.abs().amax(1)
        return torch.where(largest > 0, largest, 1.0) / self.high

    def used(self) -> Tensor:
        """The steps (R,) with which weights are quantized."""
        return self.steps

    @property
    def scale(self) -> Tensor:
        """The steps, broadcastable to the weight."""
        return spread(self.used(), self.dims, self.axis)

    @torch.no_grad()
    def update(self, weight: Tensor) -> None:
        """Compute the steps from the weight as it is now."""
        self.steps.copy_(self.found(self.rows(weight)))

    def forward(self, weight: Tensor) -> Tensor:
        return cast(Tensor, LearnedStep.apply(weight, self.scale, -self.high, self.high, 1.0))

    def encoding(self, quantized: Tensor) -> Affine:
        return Affine.nearest(quantized, self.used(), low=-self.high, high=self.high, axis=self.axis)


class MsqeWeight(RecomputedWeight):
    """The same with the steps of least squared error, or powers of two near them (arXiv:2210.03671).

    Once it is `frozen` they stay.
    """

    exponents: Tensor

    def __init__(
        self,
        weight: Tensor,
        bits: int,
        granularity: Granularity,
        axis: int = 0,
        *,
        search: Literal["exact", "alternating"] = "exact",
        power_of_two: bool = True,
        momentum: float = 0.0,
        hysteresis: float = 0.0,
    ) -> None:
        """
        Args:
            weight: what is to be quantized.
            bits: width of the codes, at least 2.
            granularity: one step per tensor or per output channel.
            axis: output-channel axis of the weight.
            search: `alternating` takes a few turns from the steps of before.
            power_of_two: of those near the step, the one with the least error.
            momentum: share of the past in the moving average of the steps.
            hysteresis: a power of two stays until the step is further than half an octave, and this, from it.
        """
        super().__init__(weight, bits, granularity, axis)
        self.bits, self.search, self.power_of_two = bits, search, power_of_two
        self.momentum, self.hysteresis, self.frozen = momentum, hysteresis, False
        self.register_buffer("exponents", self._nearest(self.rows(weight)))

    def found(self, rows: Tensor) -> Tensor:
        return best_step(rows, -self.high, self.high)

    def used(self) -> Tensor:
        return torch.exp2(self.exponents.to(self.steps)) if self.power_of_two else self.steps

    def _nearest(self, rows: Tensor) -> Tensor:
        power = nearest_power(rows, self.steps, None, bits=self.bits, mass=None)
        return power.log2().round().to(torch.int32)

    @torch.no_grad()
    def update(self, weight: Tensor) -> None:
        if self.frozen:
            return
        rows = self.rows(weight)
        if self.search == "exact":
            found = self.found(rows)
        else:
            found = alternating_step(rows, self.steps, -self.high, self.high, _TURNS)
        self.steps.lerp_(found, 1 - self.momentum)
        if self.power_of_two:
            self.exponents.copy_(settled(self.exponents, self._nearest(rows), self.steps.log2(), self.hysteresis))
