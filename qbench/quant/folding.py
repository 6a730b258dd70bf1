"""Folding a batch norm into the layer in front of it."""

from __future__ import annotations

import torch
from timm.layers import BatchNormAct2d, FrozenBatchNormAct2d
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

from qbench.errors import UserError
from qbench.quant import structure
from qbench.quant.channels import scale_outputs
from qbench.quant.layers import encodings

WITH_ACTIVATION = (BatchNormAct2d, FrozenBatchNormAct2d)
NORMS = (
    nn.BatchNorm1d,
    nn.BatchNorm2d,
    nn.BatchNorm3d,
    nn.SyncBatchNorm,
    FrozenBatchNorm2d,
    *WITH_ACTIVATION,
)
"""Types whose forward is known: `(x - mean) / sqrt(var + eps) * weight + bias`, then an activation in some."""


@structure.operation("fold_bn")
def _fold(model: nn.Module, *, layer: str, norm: str) -> None:
    """Scale and shift the layer's output like the norm, and put what is left of the norm in its place."""
    target, gone = model.get_submodule(layer), model.get_submodule(norm)
    if encodings(target):
        raise UserError(f"{layer} is quantized already, so its batch norm cannot be folded; put fold_bn first")
    scale, shift = scale_and_shift(gone)
    with torch.no_grad():
        weight = target.weight
        assert isinstance(weight, Tensor)
        bias = target.bias.double() if isinstance(target.bias, Tensor) else torch.zeros_like(scale)
        weight.copy_(scale_outputs(target, weight.double(), scale))
        target.bias = nn.Parameter((bias * scale + shift).to(weight.dtype))
    structure.replace_module(model, norm, _remainder(gone).train(gone.training))


def scale_and_shift(norm: nn.Module) -> tuple[Tensor, Tensor]:
    """Scale and shift (N,) in float64."""
    mean, var = norm.running_mean, norm.running_var
    assert isinstance(mean, Tensor)
    assert isinstance(var, Tensor)
    assert isinstance(norm.eps, (int, float))
    scale = (var.double() + norm.eps).rsqrt()
    if isinstance(norm.weight, Tensor):
        scale = scale * norm.weight.double()
    shift = -mean.double() * scale
    return scale, shift + norm.bias.double() if isinstance(norm.bias, Tensor) else shift


def _remainder(norm: nn.Module) -> nn.Module:
    if not isinstance(norm, WITH_ACTIVATION):
        return nn.Identity()
    rest = [part for part in (norm.drop, norm.act) if not isinstance(part, nn.Identity)]
    if len(rest) == 1:
        return rest[0]
    return nn.Sequential(*rest) if rest else nn.Identity()
