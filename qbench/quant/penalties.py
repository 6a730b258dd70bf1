"""What is minimised besides the task's loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from qbench.data import Data
from qbench.quant.distillation import Objective
from qbench.quant.free_weights import free_weight, quantized_layers

_UNIFORM = 1.8
"""Kurtosis of a uniform distribution."""


def penalised(data: Data, penalty: Callable[[nn.Module], Tensor]) -> Objective:
    """The task's loss, and the penalty of the network."""

    def objective(model: nn.Module, x: Tensor, y: Any) -> Tensor:
        return data.loss(model(x), y) + penalty(model)

    return objective


def kurtosis(model: nn.Module) -> Tensor:
    """The mean of (kurtosis - 1.8)**2 over the weights that are quantized: 0 for uniform ones (arXiv:2002.07686)."""
    parts: list[Tensor] = []
    for layer, _ in quantized_layers(model).values():
        weight = free_weight(layer)
        centred = weight - weight.mean()
        variance = centred.square().mean().clamp(min=torch.finfo(weight.dtype).tiny)
        parts.append((centred.square().square().mean() / variance.square() - _UNIFORM).square())
    return sum(parts, torch.zeros(())) / max(1, len(parts))
