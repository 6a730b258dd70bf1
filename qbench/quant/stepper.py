"""One step of training: forwards, backwards, update."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from qbench.models.base import first_device
from qbench.quant.arithmetic import autocast
from qbench.quant.distillation import Objective
from qbench.quant.schedule import Schedule

_MOMENTUM = 0.9


class Stepper:
    """One network with its optimizer: a call does one step and returns the loss."""

    def __init__(
        self, model: nn.Module, groups: list[dict[str, Any]], objective: Objective, schedule: Schedule
    ) -> None:
        """
        Args:
            model: learns.
            groups: of parameters; their `lr` and `weight_decay` replace those of the schedule.
            objective: what is minimised.
            schedule: optimizer, clipping, precision.
        """
        device = first_device(model)
        if device.type == "cuda":
            model.to(memory_format=torch.channels_last)  # what tensor cores read; on CPUs it gains nothing
        self.model, self.objective, self.schedule = model, objective, schedule
        self.called = cast(nn.Module, torch.compile(model)) if schedule.compile else model
        self.optimizer = _optimizer(groups, schedule)
        self.highest = [group["lr"] for group in self.optimizer.param_groups]
        self.scaler = torch.amp.GradScaler(device.type, enabled=schedule.precision == "fp16")

    def slow_down(self, factor: float) -> None:
        """Set the learning rates to that share of the highest."""
        for group, highest in zip(self.optimizer.param_groups, self.highest, strict=True):
            group["lr"] = highest * factor

    def __call__(self, x: Tensor, y: Any) -> float:
        self.optimizer.zero_grad(set_to_none=True)
        with autocast(self.schedule.precision, x.device):
            loss = self.objective(self.called, x, y)
        self.scaler.scale(loss).backward()
        if self.schedule.clip is not None:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), self.schedule.clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return float(loss.item())

    def state_dict(self) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])


def _optimizer(groups: list[dict[str, Any]], schedule: Schedule) -> torch.optim.Optimizer:
    if schedule.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=schedule.lr, weight_decay=schedule.weight_decay)
    return torch.optim.SGD(groups, lr=schedule.lr, weight_decay=schedule.weight_decay, momentum=_MOMENTUM)
