"""A quantizer whose levels are no uniform grid."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from qbench.quant.quantizer import Quantizer


class LevelQuantizer(Quantizer):
    """The nearest of fixed levels, times a scale."""

    kind: ClassVar[str] = "levels"
    values: Tensor
    scale: Tensor

    def __init__(self, bits: int = 8, count: int = 256, values: Tensor | None = None, scale: float = 1.0) -> None:
        """
        Args:
            bits: width of the codes.
            count: of levels, at most 2**bits.
            values: (count,) the levels, ascending.
            scale: of the levels, in units of the activation.
        """
        super().__init__(bits)
        self.count = count
        self.register_buffer("values", torch.zeros(count) if values is None else values.detach().float().clone())
        self.register_buffer("scale", torch.tensor(float(scale)))

    @property
    def levels(self) -> int:
        """How many there are."""
        return self.count

    def config(self) -> dict[str, Any]:
        return {**super().config(), "count": self.count}

    def forward(self, x: Tensor) -> Tensor:
        return nearest_level(x / self.scale, self.values) * self.scale


def nearest_level(x: Tensor, levels: Tensor) -> Tensor:
    """The nearest of the levels (K,), which ascend, for every number; halfway between two it is the lower one."""
    middles = (levels[1:] + levels[:-1]) / 2
    return levels[torch.bucketize(x.contiguous(), middles)]
