"""Activation quantizers of two levels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from qbench.quant.quantizer import Quantizer
from qbench.quant.straight_through import sign


class BinaryQuantizer(Quantizer):
    """`scale` where x >= shift, else `-scale`."""

    kind: ClassVar[str] = "binary"
    shift: Tensor
    scale: Tensor

    def __init__(self, shape: Sequence[int] = ()) -> None:
        """
        Args:
            shape: of the shift, broadcastable to the activation: () for one, (C, 1, 1) for one per channel.
        """
        super().__init__(bits=1)
        self.register_buffer("shift", torch.zeros(tuple(shape)))
        self.register_buffer("scale", torch.ones(()))

    def config(self) -> dict[str, Any]:
        return {"shape": list(self.shift.shape)}

    def forward(self, x: Tensor) -> Tensor:
        return sign(x - self.shift) * self.scale


class BinaryMeanQuantizer(Quantizer):
    """The sign of x times the mean magnitude over the channels, computed at run time (XNOR-Net, arXiv:1603.05279)."""

    kind: ClassVar[str] = "binary_mean"

    def __init__(self, axis: int = 1) -> None:
        """
        Args:
            axis: of the channels.
        """
        super().__init__(bits=1)
        self.axis = axis

    def config(self) -> dict[str, Any]:
        return {"axis": self.axis}

    def forward(self, x: Tensor) -> Tensor:
        return sign(x) * x.abs().mean(self.axis, keepdim=True)
