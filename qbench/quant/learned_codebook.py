"""A weight quantizer whose levels are learned; the gradient of each is the sum of its members' (arXiv:1510.00149)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qbench.quant import clustering
from qbench.quant.encodings import Codebook, from_rows, to_rows
from qbench.quant.fakequant import Granularity
from qbench.quant.pruning import with_zero
from qbench.quant.straight_through import straight_through


class LearnedCodebook(nn.Module):
    """A parametrization of a weight that takes each number to one of 2**bits levels, which start with k-means.

    Numbers that are 0 stay 0 if there are any: they were pruned, and one of the levels is 0.
    """

    kept: Tensor
    free: Tensor
    codes: Tensor

    def __init__(
        self,
        weight: Tensor,
        bits: int,
        axis: int = 0,
        *,
        granularity: Granularity = "tensor",
        start: clustering.Start = "linear",
        seed: int = 0,
        fixed: bool = True,
        waits: bool = False,
    ) -> None:
        """
        Args:
            weight: what is clustered.
            bits: width of the codes.
            axis: of the output channels.
            granularity: what shares levels.
            start: of k-means.
            seed: of a random start.
            fixed: keep the codes. Else weights learn as well, straight through, and take the level nearest to them.
            waits: let the numbers that are not 0 pass as they are until `cluster` is called.
        """
        super().__init__()
        self.k, self.axis, self.granularity, self.start, self.seed = 2**bits, axis, granularity, start, seed
        self.fixed, self.waiting = fixed, waits
        self.register_buffer("kept", weight.detach() != 0)
        levels, free, codes = self._clustered(weight)
        self.levels = nn.Parameter(levels)
        self.register_buffer("free", free)
        self.register_buffer("codes", codes)

    @torch.no_grad()
    def cluster(self, weight: Tensor) -> None:
        """Begin anew with levels and codes of this weight."""
        for old, new in zip((self.levels, self.free, self.codes), self._clustered(weight), strict=True):
            old.copy_(new)
        self.waiting = False

    def get_extra_state(self) -> bool:
        return self.waiting

    def set_extra_state(self, state: bool) -> None:
        self.waiting = state

    def _clustered(self, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Levels (R, K), which of them may move, and codes (N, d)."""
        rows = to_rows(weight.detach(), self.axis)
        points = rows if self.granularity == "channel" else rows.reshape(1, -1)
        levels = clustering.kmeans(points, self.k, self.start, self.seed)
        if self.kept.all():
            return levels, torch.ones_like(levels, dtype=torch.bool), _nearest(rows, levels)
        levels = with_zero(levels)
        return levels, levels != 0, _nearest(rows, levels)

    def forward(self, weight: Tensor) -> Tensor:
        if self.waiting:
            return weight * self.kept
        levels = self.levels * self.free
        codes = self.codes if self.fixed else _nearest(to_rows(weight.detach(), self.axis), levels.detach())
        value = from_rows(levels.expand(len(codes), -1).gather(1, codes), weight.shape, self.axis)
        return value if self.fixed else straight_through(weight, value, self.kept)

    def encoding(self, quantized: Tensor) -> Codebook:
        return Codebook.nearest(quantized, (self.levels * self.free).detach(), axis=self.axis)


def _nearest(rows: Tensor, levels: Tensor) -> Tensor:
    """The index (N, d) of the level (R, K), in any order, that is nearest to each number."""
    ordered, order = levels.sort(dim=1)
    middles = ((ordered[:, 1:] + ordered[:, :-1]) / 2).expand(len(rows), -1).contiguous()
    return order.expand(len(rows), -1).gather(1, torch.searchsorted(middles, rows.contiguous()))
