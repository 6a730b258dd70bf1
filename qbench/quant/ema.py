"""Moving averages of a network's state during training."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class Ema:
    """Averages of the parameters and of the statistics of norms, which start with their first values.

    The share of the past is less at first: (1 + n) / (10 + n) after n steps.
    """

    def __init__(self, model: nn.Module, share: float) -> None:
        self.share, self.steps = share, 0
        self.averages = {name: value.clone() for name, value in _state(model).items()}

    def update(self, model: nn.Module) -> None:
        """Take the state after a step in."""
        self.steps += 1
        share = min(self.share, (1 + self.steps) / (10 + self.steps))
        for name, value in _state(model).items():
            self.averages[name].lerp_(value, 1 - share)

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps, "averages": self.averages}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps = state["steps"]
        for name, value in state["averages"].items():
            self.averages[name].copy_(value)

    def copy_to(self, model: nn.Module) -> None:
        """Give the averages to the network."""
        for name, value in _state(model).items():
            value.copy_(self.averages[name])


@torch.no_grad()
def _state(model: nn.Module) -> dict[str, Tensor]:
    named = (*model.named_parameters(), *model.named_buffers())
    return {name: value.detach() for name, value in named if value.is_floating_point()}
