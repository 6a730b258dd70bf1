"""A weight quantizer whose levels are learned; the gradient of each is the sum of its members' (arXiv:1510.00149)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qbench.quant.encodings import Codebook, from_rows, to_rows
from qbench.quant.straight_through import straight_through


class LearnedCodebook(nn.Module):
    """A parametrization of a weight that takes each number to one of K levels."""

    codes: Tensor
    free: Tensor

    def __init__(self, start: Codebook, *, fixed: bool, zeros: bool = False) -> None:
        """
        Args:
            start: levels and codes to begin with; levels per tensor or per output channel, without scales.
            fixed: keep the codes. Else weights learn as well, straight through, and take the level nearest to them.
            zeros: the level 0 stays 0, and so do weights that are 0.
        """
        super().__init__()
        self.axis, self.fixed, self.zeros = start.axis, fixed, zeros
        levels = start.levels[:, 0]
        self.levels = nn.Parameter(levels.clone())
        self.register_buffer("free", levels != 0 if zeros else torch.ones_like(levels, dtype=torch.bool))
        self.register_buffer("codes", to_rows(start.codes, start.axis).long())

    def forward(self, weight: Tensor) -> Tensor:
        levels = self._levels()
        codes = self.codes if self.fixed else _nearest(to_rows(weight.detach(), self.axis), levels.detach())
        value = from_rows(levels.expand(len(codes), -1).gather(1, codes), weight.shape, self.axis)
        if self.fixed:
            return value
        return straight_through(weight, value, (weight.detach() != 0).float() if self.zeros else None)

    def _levels(self) -> Tensor:
        return self.levels * self.free

    def encoding(self, quantized: Tensor) -> Codebook:
        return Codebook.nearest(quantized, self._levels().detach(), axis=self.axis)


def _nearest(rows: Tensor, levels: Tensor) -> Tensor:
    """The index (N, d) of the level (R, K), in any order, that is nearest to each number."""
    ordered, order = levels.sort(dim=1)
    middles = ((ordered[:, 1:] + ordered[:, :-1]) / 2).expand(len(rows), -1).contiguous()
    return order.expand(len(rows), -1).gather(1, torch.searchsorted(middles, rows.contiguous()))
