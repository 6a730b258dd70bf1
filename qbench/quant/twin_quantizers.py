"""Twin uniform quantization: two steps for two parts of the range (PTQ4ViT, arXiv:2111.12293).

One bit of a code says which part it is in; the others count steps.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from qbench.quant.quantizer import Quantizer

GELU_LEAST = 0.16997124254703522
"""How far GELU goes below 0."""


class TwinSoftmax(Quantizer):
    """For numbers in [0, 1]: fine steps up to `split`, coarse ones above.

    As the authors' code has it, a number is the sum of its part up to the split and of that above, each rounded with
    its own step: above the split, `split` is added to the coarse codes, and the sum can exceed 1.
    """

    kind: ClassVar[str] = "twin_softmax"
    split: Tensor

    def __init__(self, bits: int = 8, split: float = 1.0) -> None:
        """
        Args:
            bits: width of the codes, at least 2.
            split: where the steps change.
        """
        super().__init__(bits)
        self.register_buffer("split", torch.tensor(float(split)))

    def forward(self, x: Tensor) -> Tensor:
        top = 2 ** (self.bits - 1) - 1
        fine = self.split / top
        high = (x.maximum(self.split).clamp(max=1) * top).round() / top
        low = (x.clamp(min=0).minimum(self.split) / fine).round() * fine
        return high + low


class TwinGelu(Quantizer):
    """For numbers behind GELU: a step of their own for those below 0, such that the codes reach the least of them.

    Half of the codes are 0 to 2**(bits-1) - 1, half count steps below 0.
    """

    kind: ClassVar[str] = "twin_gelu"
    scale: Tensor

    def __init__(self, bits: int = 8, scale: float = 1.0) -> None:
        """
        Args:
            bits: width of the codes.
            scale: step of the positive numbers.
        """
        super().__init__(bits)
        self.register_buffer("scale", torch.tensor(float(scale)))

    def forward(self, x: Tensor) -> Tensor:
        half = 2 ** (self.bits - 1)
        fine = GELU_LEAST / half
        high = (x / self.scale).round().clamp(0, half - 1) * self.scale
        low = (x / fine).round().clamp(-half, 0) * fine
        return high + low
