"""Steps that are powers of two, and learned as logarithms."""

from __future__ import annotations

from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from qbench.quant.encodings import Affine
from qbench.quant.fakequant import Granularity, LearnedStep
from qbench.quant.rows import sharing_rows, spread
from qbench.quant.step_search import best_step
from qbench.quant.straight_through import straight_through

_MEMORY = 0.99


def settled(exponents: Tensor, nearest: Tensor, logarithms: Tensor, hysteresis: float) -> Tensor:
    """The exponents after the steps have moved: all the nearest ones without hysteresis.

    Args:
        exponents: of before.
        nearest: those that suit the steps now.
        logarithms: of the steps, to the base 2.
        hysteresis: an exponent stays until the logarithm is further than 1/2 + hysteresis from it.
    """
    if hysteresis == 0:
        return nearest
    return torch.where((logarithms - exponents).abs() > 0.5 + hysteresis, nearest, exponents)


class _Normalised(torch.autograd.Function):
    """The gradient divided by the root of its mean square so far, at most 1 in magnitude."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mean_square: Tensor, updates: Tensor) -> Tensor:
        ctx.state = mean_square, updates
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,), (mean_square, updates) = grads, ctx.state
        updates += 1
        mean_square.lerp_(grad.square(), 1 - _MEMORY)
        root = (mean_square / (1 - _MEMORY ** updates.item())).sqrt()
        return (grad / root.clamp(min=torch.finfo(grad.dtype).tiny)).clamp(-1, 1), None, None


class PowerWeight(nn.Module):
    """LSQ with narrow codes and the steps 2**round(t), where t is learned (arXiv:1903.08066; ln 2 from the base).

    The gradient of t is normalised, so that its learning rate is in octaves.
    """

    power_of_two: ClassVar[bool] = True
    learning: ClassVar[dict[str, dict[str, float]]] = {"log_scale": {"lr": 0.01, "momentum": 0.0}}
    exponents: Tensor
    mean_square: Tensor
    updates: Tensor

    def __init__(
        self, weight: Tensor, bits: int, granularity: Granularity, axis: int = 0, *, hysteresis: float = 0.0
    ) -> None:
        """
        Args:
            weight: its steps of least squared error are where t begins.
            bits: width of the codes, at least 2.
            granularity: one step per tensor or per output channel.
            axis: output-channel axis of the weight.
            hysteresis: an exponent stays until t is further than half an octave, and this, from it.
        """
        super().__init__()
        self.high, self.axis, self.hysteresis = 2 ** (bits - 1) - 1, axis, hysteresis
        rows = sharing_rows(weight.detach().float(), granularity, axis)
        self.log_scale = nn.Parameter(spread(best_step(rows, -self.high, self.high).log2(), weight.dim(), axis))
        self.register_buffer("exponents", self.log_scale.detach().round().to(torch.int32))
        self.register_buffer("mean_square", torch.zeros_like(self.log_scale))
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))

    @property
    def scale(self) -> Tensor:
        """The steps, broadcastable to the weight."""
        return torch.exp2(self.exponents.to(self.log_scale))

    @torch.no_grad()
    def update(self, _weight: Tensor) -> None:
        """Round what was learned."""
        nearest = self.log_scale.round().to(torch.int32)
        self.exponents.copy_(settled(self.exponents, nearest, self.log_scale, self.hysteresis))

    def forward(self, weight: Tensor) -> Tensor:
        learned = cast(Tensor, _Normalised.apply(self.log_scale, self.mean_square, self.updates))
        scale = torch.exp2(straight_through(learned, self.exponents.to(learned)))
        return cast(Tensor, LearnedStep.apply(weight, scale, -self.high, self.high, 1.0))

    def encoding(self, quantized: Tensor) -> Affine:
        return Affine.nearest(quantized, self.scale.flatten(), low=-self.high, high=self.high, axis=self.axis)
