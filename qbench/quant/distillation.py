"""Learning from the float network's answers (arXiv:1503.02531)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qbench.errors import Unsupported
from qbench.quant.answers import are_class_scores, relative_error
from qbench.quant.hooks import hooked

Objective = Callable[[nn.Module, Tensor, Any], Tensor]
"""`(model, images, targets) -> scalar`"""
_TEMPERATURE = 4.0


def distil(objective: Objective, teacher: nn.Module | None, share: float) -> Objective:
    """The objective, `share` of which is the divergence from the teacher's softened answers.

    Args:
        objective: calls the network with the images.
        teacher: the float network.
        share: from 0 to 1.

    Raises:
        Unsupported: there is no teacher.
    """
    if teacher is None:
        raise Unsupported("there is no float network to distil from")
    teacher.eval()

    def mixed(model: nn.Module, x: Tensor, y: Any) -> Tensor:
        answers: list[Any] = []
        with hooked([model.register_forward_hook(lambda _model, _inputs, output: answers.append(output))]):
            own = objective(model, x, y)
        with torch.no_grad():
            soft = teacher(x)
        return (1 - share) * own + share * divergence(answers[-1], soft)

    return mixed


def divergence(outputs: Any, soft: Any, temperature: float = _TEMPERATURE) -> Tensor:
    """Kullback-Leibler divergence of the class probabilities (B, classes) at that temperature, times its square.

    Of outputs that are no class scores, as those of a detector, the relative squared error.
    """
    if not are_class_scores(outputs):
        return relative_error(outputs, soft)
    wide = torch.promote_types(outputs.dtype, torch.float32)
    own, wanted = (F.log_softmax(z.to(wide) / temperature, dim=1) for z in (outputs, soft))
    return F.kl_div(own, wanted, reduction="batchmean", log_target=True) * temperature**2
