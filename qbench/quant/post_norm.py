"""One grid for all channels behind a layer norm, that fits each as its own would (RepQ-ViT, arXiv:2212.08254).

The norm's scale and shift move each channel's grid onto the common one, and the weights and biases of the layers that
read the norm undo it: the float function stays.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qbench.quant.biases import shift_bias
from qbench.quant.layers import weight_of
from qbench.quant.links import links


@dataclass(frozen=True)
class Alignment:
    """Channel j becomes `x_j / ratio_j - shift_j`."""

    ratio: Tensor
    shift: Tensor
    scale: float
    """Of the common grid."""
    zero: int

    @staticmethod
    def of(scale: Tensor, zero: Tensor, bits: int) -> Alignment:
        """From each channel's grid; the common one has the mean scale, and the mean zero point rounded to a code.

        Args:
            scale: (C,).
            zero: (C,) any integers.
            bits: width of the codes, 0 to 2**bits - 1.
        """
        common = scale.mean()
        middle = int(zero.mean().round().clamp(0, 2**bits - 1))
        ratio = scale / common
        return Alignment(ratio, -zero * scale / ratio + middle * common, float(common), middle)

    def apply(self, x: Tensor) -> Tensor:
        """The aligned input, channels last."""
        return x / self.ratio - self.shift

    @torch.no_grad()
    def fold_into_norm(self, norm: nn.Module) -> None:
        """Let the layer norm return the aligned channels."""
        affine: Any = norm
        affine.weight.div_(self.ratio)
        affine.bias.div_(self.ratio).sub_(self.shift)

    @torch.no_grad()
    def fold_into_reader(self, model: nn.Module, name: str) -> None:
        """Let the linear layer expect the aligned channels."""
        layer: Any = model.get_submodule(name)
        layer.weight.mul_(self.ratio)
        shift_bias(model, name, weight_of(layer).double() @ self.shift.double())


def post_norm_layers(model: nn.Module, example: Tensor) -> dict[str, tuple[str, ...]]:
    """Every layer norm that nothing but linear layers read, with these layers.

    Args:
        model: in evaluation mode.
        example: an input of the model, a batch of one.
    """
    norms = {
        name: -1
        for name, module in model.named_modules()
        if isinstance(module, nn.LayerNorm) and module.bias is not None and len(module.normalized_shape) == 1
    }
    return {
        link.source: link.readers
        for link in links(model, example, {**norms})
        if link.shiftable
        and not link.clips
        and all(isinstance(model.get_submodule(r), nn.Linear) for r in link.readers)
    }
