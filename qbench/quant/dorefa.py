"""The quantizers of DoReFa-Net (arXiv:1606.06160): weights through a tangent, inputs on a fixed range, gradients."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from qbench.quant.activations import StaticQuantizer
from qbench.quant.encodings import Affine, Codebook
from qbench.quant.fakequant import FirstBatchInput, LearnedStep
from qbench.quant.hooks import hooked
from qbench.quant.observers import least_error_grid
from qbench.quant.straight_through import sign, straight_through


class EvenWeight(nn.Module):
    """2**bits levels at equal distances from -top to top, none of which is 0: `(code - (2**bits - 1) / 2) * scale`."""

    scale: Tensor

    def __init__(self, bits: int, axis: int, top: Tensor) -> None:
        """
        Args:
            bits: width of the codes.
            axis: output-channel axis of the weight.
            top: () largest level.
        """
        super().__init__()
        self.steps, self.axis = 2**bits - 1, axis
        self.register_buffer("scale", torch.empty_like(top))
        self.set_top(top)

    def set_top(self, top: Tensor) -> None:
        """Change the largest level; 0 is taken as 1."""
        self.scale.copy_(torch.where(top > 0, top, 1.0) * 2 / self.steps)

    def rounded(self, share: Tensor) -> Tensor:
        """The level nearest to each share, from -1 to 1, of the largest; gradients pass."""
        codes = (share + 1) * (self.steps / 2)
        return (straight_through(codes, codes.detach().round()) - self.steps / 2) * self.scale

    def encoding(self, quantized: Tensor) -> Affine:
        return Affine.nearest(quantized, self.scale, low=0, high=self.steps, zero_point=self.steps / 2, axis=self.axis)


class TanhWeight(EvenWeight):
    """DoReFa on a weight: `top * (2 round((2**bits - 1) (tanh(w) / (2 max|tanh w|) + 1/2)) / (2**bits - 1) - 1)`."""

    def __init__(self, weight: Tensor, bits: int, axis: int = 0, unit: bool = False) -> None:
        """
        Args:
            weight: what is to be quantized.
            bits: width of the codes, at least 2.
            axis: output-channel axis of the weight.
            unit: top is 1 as in the paper; otherwise max|tanh w| of this weight, so that small weights begin with
                about their own values.
        """
        super().__init__(bits, axis, weight.new_ones(()) if unit else weight.tanh().abs().amax())

    def forward(self, weight: Tensor) -> Tensor:
        squashed = weight.tanh()
        return self.rounded(squashed / squashed.abs().amax().clamp(min=torch.finfo(weight.dtype).tiny))


class SignWeight(nn.Module):
    """DoReFa's one bit: the sign of each weight times the mean of all magnitudes; gradients pass."""

    def __init__(self, axis: int = 0) -> None:
        """
        Args:
            axis: output-channel axis of the weight.
        """
        super().__init__()
        self.axis = axis

    def forward(self, weight: Tensor) -> Tensor:
        free = weight.detach()
        return straight_through(weight, sign(free) * free.abs().mean())

    def encoding(self, quantized: Tensor) -> Codebook:
        levels = torch.tensor([[[-1.0, 1.0]]], device=quantized.device)
        scale = quantized.abs().amax().reshape(1, 1)
        return Codebook((quantized >= 0).to(torch.int32), levels, self.axis, scale=scale)


class FixedInput(FirstBatchInput):
    """A layer's input on codes whose range stays what it is; gradients pass inside."""

    scale: Tensor

    def __init__(self, bits: int, unit: bool = False) -> None:
        """
        Args:
            bits: width of the codes.
            unit: the range ends at 1 as in the paper; else where the squared error of the first batch is least.
        """
        super().__init__(bits)
        self.unit = unit
        self.register_buffer("scale", torch.ones(()))

    def begin(self, x: Tensor) -> None:
        unit = 1 / max(1, self.high)
        self.scale.fill_(unit if self.unit else least_error_grid(x, bits=self.bits, symmetric=self.signed)[0])

    def quantized(self, x: Tensor) -> Tensor:
        return cast(Tensor, LearnedStep.apply(x, self.scale, self.low, self.high, 1.0))

    def deployed(self) -> StaticQuantizer:
        """The fixed quantizer with the same range."""
        return StaticQuantizer(self.bits, self.signed, self.scale.item())


class _RoundGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bits: int) -> Tensor:
        ctx.bits = bits
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return rounded_gradient(grads[0], ctx.bits), None


def rounded_gradient(grad: Tensor, bits: int) -> Tensor:
    """The gradient on 2**bits levels up to the largest magnitude of each image, after noise of up to half a step.

    Args:
        grad: (B, ...).
        bits: of the levels.
    """
    steps = 2**bits - 1
    reach = 2 * grad.abs().amax(tuple(range(1, grad.dim())), keepdim=True)
    share = grad / torch.where(reach > 0, reach, 1.0) + 0.5
    codes = (share * steps + torch.rand_like(grad) - 0.5).round_().clamp_(0, steps)
    return (codes / steps - 0.5) * reach


@contextmanager
def rounded_gradients(layers: list[nn.Module], bits: int) -> Iterator[None]:
    """Meanwhile, the gradients of the layers' outputs are rounded."""

    def attach(_layer: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
        return cast(Tensor, _RoundGradient.apply(output, bits))

    with hooked([layer.register_forward_hook(attach) for layer in layers]):
        yield
