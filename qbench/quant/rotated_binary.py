"""A weight quantizer that binarizes in a basis that its inputs choose, in the manner of BiTAT (arXiv:2207.01394)."""

from __future__ import annotations

import math
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor, nn

from qbench.quant import clustering
from qbench.quant.binary import BinaryWeight
from qbench.quant.encodings import Affine, Cast, Rotated, Sum, from_rows, to_rows
from qbench.quant.rows import rotate
from qbench.quant.straight_through import straight_through


class RotatedBinaryWeight(nn.Module):
    """A parametrization of a weight whose output channels are axis 0; it lets weights pass until `rotate` is called.

    The columns are cut into blocks, and each block is rotated to the principal axes of its inputs. The axes that matter
    most (energy of the input times that of the weight) are kept at more bits. The others are signs, with a scale for
    each output channel and each group of axes that matter alike, which k-means finds.
    """

    basis: Tensor

    def __init__(self, weight: Tensor, *, block_size: int, share: float, kept_bits: int, groups: int) -> None:
        """
        Args:
            weight: of a convolution or linear layer.
            block_size: columns of a block at most, but all positions of the kernel are in one.
            share: of the axes of a block that are kept, rounded up.
            kept_bits: bits of those; 32 leaves them in float.
            groups: of the other axes.
        """
        super().__init__()
        self.kept_bits, self.groups, self.waiting = kept_bits, groups, True
        channels, positions = weight.shape[1], math.prod(weight.shape[2:])
        size = positions * _divisor(channels, max(1, block_size // positions))
        self.kept = math.ceil(share * size)
        self.ends = [self.kept, size]
        self.register_buffer("basis", torch.eye(size).repeat(channels * positions // size, 1, 1))

    @torch.no_grad()
    def rotate(self, weight: Tensor, gram: Tensor) -> None:
        """Choose the basis and begin.

        Args:
            weight: as it is now.
            gram: (d, d), the mean outer product of the layer's inputs.
        """
        blocks, size, _ = self.basis.shape
        cut = [gram[i : i + size, i : i + size] for i in range(0, blocks * size, size)]
        energy, axes = torch.linalg.eigh(torch.stack(cut).double())
        self.basis.copy_(axes)
        importance = energy.clamp(min=0) * self._inner(weight).square().sum(0)
        importance, order = importance.sort(dim=1, descending=True)
        self.basis.copy_(axes.gather(2, order[:, None].expand_as(axes)))
        self.ends = [self.kept, *(self.kept + end for end in accumulate(self._groups(importance.mean(0)[self.kept :])))]
        self.waiting = False

    def get_extra_state(self) -> dict[str, Any]:
        return {"ends": self.ends, "waiting": self.waiting}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.ends, self.waiting = state["ends"], state["waiting"]

    def _groups(self, importance: Tensor) -> list[int]:
        """How many axes are in each group, of (n,) in descending order."""
        if not len(importance):
            return []
        levels = clustering.kmeans(importance[None], self.groups)
        middles = (levels[0, 1:] + levels[0, :-1]) / 2
        counts = torch.searchsorted(middles, importance.contiguous()).bincount()
        return [count for count in reversed(counts.tolist()) if count]

    def _inner(self, weight: Tensor) -> Tensor:
        """(N, blocks, size), in the coordinates of the basis."""
        blocks, size, _ = self.basis.shape
        return rotate(to_rows(weight), self.basis.mT).unflatten(1, (blocks, size))

    def _parts(self, weight: Tensor) -> list[tuple[bool, Tensor, Tensor]]:
        """Whether it is kept, coordinates (N, blocks p) and basis (blocks, size, p) of the axes that share scales."""
        inner, spans = self._inner(weight), [(a, b) for a, b in pairwise([0, *self.ends]) if b > a]
        return [(b <= self.kept, inner[:, :, a:b].flatten(1), self.basis[:, :, a:b].contiguous()) for a, b in spans]

    def forward(self, weight: Tensor) -> Tensor:
        if self.waiting:
            return weight
        pieces = [
            rotate(straight_through(part, self._grid(part).decode()) if kept else BinaryWeight()(part), basis)
            for kept, part, basis in self._parts(weight)
        ]
        return from_rows(sum(pieces[1:], pieces[0]), weight.shape)

    def _grid(self, part: Tensor) -> Affine | Cast:
        if self.kept_bits == 32:
            return Cast(part.detach())
        return Affine.nearest(part, part.detach().abs().amax(1) / (2 ** (self.kept_bits - 1) - 1), bits=self.kept_bits)

    def encoding(self, quantized: Tensor) -> Sum:
        """All parts in turn; quantizing what is quantized gives it again."""
        shape = tuple(quantized.shape)
        return Sum(
            tuple(
                Rotated(self._grid(part) if kept else BinaryWeight().encoding(BinaryWeight()(part)), basis, 0, shape)
                for kept, part, basis in self._parts(quantized)
            )
        )


def _divisor(number: int, most: int) -> int:
    """The largest divisor that is no larger than `most`."""
    return next(d for d in range(min(number, most), 0, -1) if number % d == 0)
