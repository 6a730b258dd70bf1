"""Blocks that know how to become one layer: RepVGG, MobileOne and their like."""

from __future__ import annotations

import torch
from torch import nn

from qbench.quant import structure

_VERBS = ("fuse", "reparameterize", "switch_to_deploy")


def mergeable(model: nn.Module) -> list[str]:
    """Names of the blocks that offer it, outer ones before those within."""
    return [name for name, module in model.named_modules() if name and _verb(module)]


@structure.operation("reparameterize")
def _reparameterize(model: nn.Module, *, module: str) -> None:
    block = model.get_submodule(module)
    parameter = next(block.parameters())
    dtype, device = parameter.dtype, parameter.device
    verb = _verb(block)
    # In float64: kernels and batch norms are multiplied with each other.
    with torch.no_grad():
        merged = getattr(block.double(), verb)()
    if not isinstance(merged, nn.Module):
        merged = block
    structure.replace_module(model, module, merged.to(device, dtype).train(block.training))


def _verb(module: nn.Module) -> str:
    return next((verb for verb in _VERBS if callable(getattr(module, verb, None))), "")
