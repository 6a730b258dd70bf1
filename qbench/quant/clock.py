"""How far a training is, whether steps or seconds set its end."""

from __future__ import annotations

from typing import Any

from qbench.quant.schedule import Schedule

_TICKS = 10_000
"""As many steps is a training said to have whose end is set by time."""


class Clock:
    """Counts steps and seconds, and says what the schedule wants next."""

    def __init__(self, schedule: Schedule, per_epoch: int) -> None:
        self.schedule, self.per_epoch, self.total = schedule, per_epoch, schedule.total(per_epoch)
        self.steps, self.seconds = 0, 0.0

    def step(self, seconds: float) -> None:
        """A step was done, in that time."""
        self.steps, self.seconds = self.steps + 1, self.seconds + seconds

    @property
    def done(self) -> float:
        """From 0 to 1."""
        if self.schedule.seconds is not None:
            return min(1.0, self.seconds / self.schedule.seconds)
        return self.steps / (self.total or 1)

    @property
    def factor(self) -> float:
        """Of the learning rate in the next step."""
        if self.total is None:
            return self.schedule.factor(self.done * _TICKS, _TICKS)
        return self.schedule.factor(self.steps, self.total)

    @property
    def frozen(self) -> bool:
        """Whether batch norms keep their statistics in the next step."""
        return self.schedule.freeze_bn is not None and self.done >= self.schedule.freeze_bn

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps, "seconds": self.seconds}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps, self.seconds = state["steps"], state["seconds"]
