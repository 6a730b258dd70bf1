"""How far the answers of two networks are apart, for any task."""

from __future__ import annotations

from typing import Any, TypeGuard

import torch
from torch import Tensor

from qbench.runtimes.base import flatten


def are_class_scores(outputs: Any) -> TypeGuard[Tensor]:
    """Whether a network's outputs are those of a classifier, (B, classes)."""
    return isinstance(outputs, Tensor) and outputs.dim() == 2


def relative_error(outputs: Any, wanted: Any) -> Tensor:
    """The squared distance of each output from the wanted one, relative to its size; mean over outputs.

    Args:
        outputs: tensors in lists, tuples and dicts, such as a detector's scores and boxes.
        wanted: the same; no gradients flow through these.
    """
    pairs = zip(flatten(outputs), (tensor.detach() for tensor in flatten(wanted)), strict=True)
    apart = [(own - other).square().sum() / other.square().sum().clamp(min=1e-12) for own, other in pairs]
    return torch.stack(apart).mean()
