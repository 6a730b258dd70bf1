"""DropBits: in training the outer levels of a weight's grid are dropped at random, bit by bit (arXiv:2109.02100)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from qbench.quant.cpq import CpqWeight, promoted
from qbench.quant.encodings import Affine
from qbench.quant.straight_through import slower, straight_through

_LOW, _HIGH, _TEMPERATURE = -0.1, 1.1, 0.2  # of the hard concrete distribution (arXiv:1712.01312)
_KEPT = 0.9
"""First probability of a bit."""
_LEAST = 1e-12


class DropBitsWeight(CpqWeight):
    """CPQ whose bits above the first have masks Z: a level that k bits have and k - 1 have not is there with Z_2...Z_k.

    While training, masks are drawn from the hard concrete distribution, whose logits are learned; in evaluation a mask
    is 1 where its logit is positive, else 0. Probabilities of levels are multiplied by their masks, and by what makes
    their sum what it was.
    """

    fixed: Tensor

    def __init__(self, weight: Tensor, bits: int, axis: int = 0) -> None:
        super().__init__(weight, bits, axis)
        self.logits = nn.Parameter(torch.full((bits - 1,), math.log(_KEPT / (1 - _KEPT)), device=weight.device))
        self.register_buffer("fixed", torch.zeros((), dtype=torch.bool, device=weight.device))

    def kept(self) -> int:
        """Bits whose masks, and those before, are 1 in evaluation."""
        return 1 + int((self.logits > 0).long().cumprod(0).sum())

    def cost(self) -> Tensor:
        """The expected number of masks above 0, () (the L0 norm)."""
        return torch.sigmoid(self.logits - _TEMPERATURE * math.log(-_LOW / _HIGH)).sum()

    def fix(self) -> None:
        """From now on masks are those of evaluation, in training too."""
        self.fixed.fill_(True)
        self.logits.requires_grad_(False)

    def forward(self, weight: Tensor) -> Tensor:
        if self.fixed or not self.training:
            high = 2 ** (self.kept() - 1) - 1
            return promoted(weight, self.scale, self.log_sigma.exp(), -high - 1, high, self.gain)
        return self.dropped(weight, self._masks())

    def _masks(self) -> Tensor:
        """(bits - 1,), drawn."""
        noise = torch.rand_like(self.logits).clamp(1e-6, 1 - 1e-6)
        share = torch.sigmoid((noise.logit() + self.logits) / _TEMPERATURE)
        return (share * (_HIGH - _LOW) + _LOW).clamp(0, 1)

    def dropped(self, weight: Tensor, masks: Tensor) -> Tensor:
        """The weight with these masks (bits - 1,), from 0 to 1."""
        scale, sigma = (slower(p, self.gain) for p in (self.scale, self.log_sigma.exp()))
        steps, width = weight / scale, sigma / scale
        masks = torch.cat([torch.ones_like(masks[:1]), masks.cumprod(0)])
        group, codes = _likeliest(steps.detach(), width.detach(), masks.detach())
        chosen = _mass(steps, width, codes - 0.5, codes + 0.5) * masks[group]
        grids = [_mass(steps, width, -high - 0.5, high - 0.5) for high in (2**k for k in range(len(masks)))]
        parts = [masks[0] * grids[0], *(m * (b - a) for m, a, b in zip(masks[1:], grids, grids[1:], strict=False))]
        share = chosen * grids[-1] / sum(parts, torch.zeros(())).clamp(min=_LEAST)
        return straight_through(share, torch.ones_like(share)) * (codes * scale)

    def encoding(self, quantized: Tensor) -> Affine:
        high = 2 ** (self.kept() - 1) - 1
        return Affine.nearest(quantized, self.scale.detach().flatten(), low=-high - 1, high=high, axis=self.axis)


def _mass(steps: Tensor, width: Tensor, low: Tensor | float, high: Tensor | float) -> Tensor:
    """Of the logistic distribution around each number, between two bounds; all in steps of the grid."""
    # Seen from the side where both sigmoids are small: near 1 their difference has no digits left.
    side = torch.where(steps < (low + high) / 2, -1.0, 1.0)
    above, below = (torch.sigmoid(side * (bound - steps) / width) for bound in (high, low))
    return side * (above - below)


def _likeliest(steps: Tensor, width: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
    """The level with the greatest mass times mask: the place of its mask (0 for levels -1 and 0), and its code.

    Among levels with the same mask that is the nearest one.
    """
    negative = steps < -0.5
    folded = torch.where(negative, -1 - steps, steps)  # level i of the negative ones is level -1 - i here
    near = [torch.zeros_like(folded)]
    near += [folded.round().clamp(2 ** (k - 1), 2**k - 1) for k in range(1, len(masks))]
    candidates = torch.stack(near)
    above, below = ((candidates + side - folded) / width for side in (0.5, -0.5))
    # The logarithm of the mass, but for a constant: S(a) - S(b) = S(a) S(-b) (1 - exp(b - a)).
    mass = logsigmoid(above) + logsigmoid(-below)
    group = (mass + masks.log().reshape(-1, *[1] * steps.dim())).argmax(0)
    codes = candidates.gather(0, group[None])[0]
    return group, torch.where(negative, -1 - codes, codes)
