"""Weights and inputs on levels that are learned directly, without a float weight behind them (arXiv:2012.13762)."""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import Tensor, nn

from qbench.quant.bases import Digits, digits, fit_basis, levels_of, nearest_codes, refit, summed
from qbench.quant.encodings import Codebook, from_rows, to_rows
from qbench.quant.fakequant import FirstBatchInput, Granularity
from qbench.quant.level_quantizer import LevelQuantizer, nearest_level
from qbench.quant.rows import sharing_rows
from qbench.quant.straight_through import sign, slower, straight_through

_SAMPLE = 1 << 16  # numbers of an input that its levels are fitted to
_MOMENTUM = 0.9
_NEAREST = 0.01  # latents begin at least so far from 0
_CONSTANT = 1e-8  # of the largest variance


class _Signed(torch.autograd.Function):
    """`sum_i basis_i sign(latent_i)`; a latent gets basis_i times the gradient where it is between -1 and 1."""

    @staticmethod
    def forward(ctx: Any, latents: Tensor, basis: Tensor) -> Tensor:
        ctx.save_for_backward(latents, basis)
        return summed(basis, sign(latents))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        (grad,), (latents, basis) = grads, ctx.saved_tensors
        shares = (grad * sign(latents)).sum(2)
        basis_grad = shares.T.sum_to_size(basis.shape)
        return basis.T[:, :, None] * grad * (latents.abs() <= 1), basis_grad


class DirectWeight(nn.Module):
    """`w = sum_i v_i sign(B_i)`: the levels v and the latents B learn, the float weight does not.

    They begin with the levels and signs of least squared error. A latent begins as far from 0 as the weight is from
    where its sign would change, in units of v. As LSQ does it, the gradient of v is divided by the root of how many
    numbers it is summed from.
    """

    def __init__(self, weight: Tensor, bits: int, granularity: Granularity = "tensor", axis: int = 0) -> None:
        """
        Args:
            weight: any shape.
            bits: how many bits a weight has.
            granularity: levels per tensor or per output channel.
            axis: output-channel axis of the weight.
        """
        super().__init__()
        self.axis = axis
        points = sharing_rows(weight.detach().float(), granularity, axis)
        basis = fit_basis(points, bits, "signs")
        self.basis = nn.Parameter(basis)
        self.gain = 1 / math.sqrt(points.shape[1])
        self.latents = nn.Parameter(_latents(points, basis).reshape(bits, *to_rows(weight, axis).shape))

    def forward(self, weight: Tensor) -> Tensor:
        basis = slower(self.basis, self.gain)
        return from_rows(cast(Tensor, _Signed.apply(self.latents, basis)), weight.shape, self.axis)

    @torch.no_grad()
    def update(self, _weight: Tensor) -> None:
        """Keep the latents between -1 and 1."""
        self.latents.clamp_(-1, 1)

    def encoding(self, quantized: Tensor) -> Codebook:
        return Codebook.nearest(quantized, levels_of(self.basis.detach(), "signs")[:, None], axis=self.axis)


def _latents(points: Tensor, basis: Tensor) -> Tensor:
    """(bits, R, n) in [-1, 1], whose signs are those of the nearest levels."""
    signs = digits(basis.shape[1], "signs", basis)[nearest_codes(points, levels_of(basis, "signs"))]  # (R, n, bits)
    parts = signs * basis[:, None]
    error = points - parts.sum(2)
    # Where a bit's part and the error cancel, the weight is halfway to the level with the other sign.
    share = 1 + error[:, :, None] / torch.where(parts == 0, 1.0, parts)
    return (share.clamp(_NEAREST, 1) * signs).permute(2, 0, 1).contiguous()


class DirectInput(FirstBatchInput):
    """A layer's input on levels that are sums of `bits` numbers, signed ones where the first batch has negative values.

    They follow the levels of least error on each training batch by moving averages. Errors are divided by the variance
    of their channel, so that no channel counts more than others: axis 1, or the last one of tokens (B, T, C).
    """

    basis: Tensor

    def __init__(self, bits: int) -> None:
        super().__init__(bits)
        self.register_buffer("basis", torch.zeros(1, bits))

    @property
    def _kind(self) -> Digits:
        return "signs" if self.signed else "bits"

    def _levels(self) -> Tensor:
        return levels_of(self.basis, self._kind)[0].sort().values

    def begin(self, x: Tensor) -> None:
        points, mass = _sample(x)
        self.basis.copy_(fit_basis(points, self.bits, self._kind, mass=mass))

    def quantized(self, x: Tensor) -> Tensor:
        if self.training:
            points, mass = _sample(x.detach())
            self.basis.lerp_(refit(points, self.basis, self._kind, mass), 1 - _MOMENTUM)
        levels = self._levels()
        inside = (x.detach() >= levels[0]) & (x.detach() <= levels[-1])
        return straight_through(x, nearest_level(x.detach(), levels), inside)

    def deployed(self) -> LevelQuantizer:
        return LevelQuantizer(self.bits, 2**self.bits, self._levels())


def _sample(x: Tensor) -> tuple[Tensor, Tensor]:
    """Some numbers (1, n) of an input, and the masses (1, n) of their errors."""
    points, mass = x.float(), channel_mass(x.float()).expand(x.shape)
    every = -(-x.numel() // _SAMPLE)
    return points.flatten()[None, ::every], mass.flatten()[None, ::every]


def channel_mass(x: Tensor) -> Tensor:
    """What errors of an input are multiplied with: one over the variance of each channel, broadcastable to it.

    Channels that do not vary have 0, unless none does. They are counted by axis 1, or the last one of tokens (B, T, C).
    """
    channels = 2 if x.dim() == 3 else 1
    others = [axis for axis in range(x.dim()) if axis != channels]
    variance = x.var(others, correction=0, keepdim=True)
    varies = variance > _CONSTANT * variance.amax()
    mass = torch.where(varies, 1 / torch.where(varies, variance, 1.0), 0.0)
    return torch.where(varies.any(), mass, 1.0)
