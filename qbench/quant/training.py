"""The training loop that float training and every quantization-aware method share.

A step depends on nothing but the seed, its number and the state of model and optimizer, so the same seed gives the same
weights, bit for bit, on the CPU.
"""

from __future__ import annotations

import itertools
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from qbench.data import Data, Training
from qbench.quant.distillation import Objective, distil
from qbench.quant.ema import Ema
from qbench.quant.schedule import Schedule
from qbench.quant.timing import Pairs

Groups = Callable[[nn.Module], list[dict[str, Any]]]
"""`model -> parameter groups` of the optimizer; a group's `lr` and `weight_decay` replace the common ones."""
_MOMENTUM = 0.9
_TICKS = 10_000
"""As many steps is a training said to have whose end is set by time."""


@dataclass(frozen=True)
class Step:
    """A step that was just done."""

    number: int
    """From 0."""
    done: float
    """Share of the training that is done with it, 1 with the last."""
    loss: float
    model: nn.Module


def fit(
    model: nn.Module,
    data: Data,
    schedule: Schedule,
    *,
    objective: Objective | None = None,
    groups: Groups | None = None,
    on_step: Callable[[Step], None] | None = None,
    timing_steps: int = 10,
) -> nn.Module:
    """Train the model in place on `data.train`.

    Loss and seconds of every step go to `data.record("training", ...)`. Where there is a `data.reference`, some early
    steps are also done on a copy of it, so that both are timed in the same window.

    Args:
        model: on `data.device`.
        data: of the run; order, augmentation and dropout follow `data.seed`.
        schedule: how long, on what batches, and how fast.
        objective: what is minimised; None is `data.loss` of the model's outputs.
        groups: parameter groups; None is `decay_groups`.
        on_step: called after every step.
        timing_steps: how many steps are timed against the reference.

    Returns:
        The model in evaluation mode.

    Raises:
        Unsupported: distillation is asked for, and there is no float network or its outputs are not logits.
        FloatingPointError: the loss is not finite.
    """

    def plain(net: nn.Module, x: Tensor, y: Any) -> Tensor:
        return data.loss(net(x), y)

    def float_groups(net: nn.Module) -> list[dict[str, Any]]:
        return decay_groups(net.parameters(), schedule.weight_decay)

    minimised = objective or plain
    if schedule.distillation:
        minimised = distil(minimised, data.reference, schedule.distillation)
    history: dict[str, list[float]] = {"loss": [], "seconds": [], "loading_seconds": []}
    clock = _Clock(schedule, steps_per_epoch(data.train, schedule.batch_size))
    with torch.random.fork_rng([data.device] if data.device.type == "cuda" else []), torch.enable_grad():
        torch.manual_seed(data.seed)
        own = _Stepper(model, (groups or float_groups)(model), minimised, schedule)
        pairs = Pairs(
            data.reference,
            lambda net: _Stepper(net, float_groups(net), plain, schedule),
            clock.total or sys.maxsize,
            timing_steps,
        )
        ema = None if schedule.ema is None else Ema(model, schedule.ema)
        frozen = None
        for number, (x, y, loading) in enumerate(_batches(data, schedule.batch_size)):
            if frozen != clock.frozen:
                frozen = clock.frozen
                for net in (model, *pairs.networks):
                    set_training(net, frozen=frozen)
            own.slow_down(clock.factor)
            loss, seconds = pairs.step(number, own, x, y)
            if not math.isfinite(loss):
                raise FloatingPointError(f"the loss is {loss} at step {number}; try a smaller lr")
            clock.step(seconds + loading)
            for key, value in (("loss", loss), ("seconds", seconds), ("loading_seconds", loading)):
                history[key].append(value)
            if on_step is not None:
                on_step(Step(number, clock.done, loss, model))
            if ema is not None:
                ema.update(model)
            data.progress(clock.done)
            if clock.done >= 1:
                break
    if ema is not None:
        ema.copy_to(model)
    data.record(
        "training",
        history | {"steps_per_epoch": clock.per_epoch, "batch_size": schedule.batch_size, "timing": pairs.record()},
    )
    return model.eval()


class _Clock:
    """How much of a training is done."""

    def __init__(self, schedule: Schedule, per_epoch: int) -> None:
        self.schedule, self.per_epoch, self.total = schedule, per_epoch, schedule.total(per_epoch)
        self.steps, self.seconds = 0, 0.0

    def step(self, seconds: float) -> None:
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


class _Stepper:
    """One network with its optimizer: a call does one step and returns the loss."""

    def __init__(
        self, model: nn.Module, groups: list[dict[str, Any]], objective: Objective, schedule: Schedule
    ) -> None:
        self.model, self.objective, self.clip = model, objective, schedule.clip
        self.optimizer = _optimizer(schedule.optimizer, groups, schedule.lr, schedule.weight_decay)
        self.highest = [group["lr"] for group in self.optimizer.param_groups]

    def slow_down(self, factor: float) -> None:
        """Set the learning rates to that share of the highest."""
        for group, highest in zip(self.optimizer.param_groups, self.highest, strict=True):
            group["lr"] = highest * factor

    def __call__(self, x: Tensor, y: Any) -> float:
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.objective(self.model, x, y)
        loss.backward()
        if self.clip is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        self.optimizer.step()
        return loss.item()


def steps_per_epoch(train: Training, batch_size: int) -> int:
    """How many batches `Training.epoch` yields."""
    return max(1, train.images // batch_size)


def decay_groups(parameters: Iterable[nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    """Weight decay on parameters with at least two axes; none on biases and norms."""
    trained = [p for p in parameters if p.requires_grad]
    return [
        {"params": [p for p in trained if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
    ]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for a while, without gradients; then each module has the mode back that it was in."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        with torch.no_grad():
            model.eval()
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def set_training(model: nn.Module, *, frozen: bool) -> None:
    """Training mode, but for the batch norms if `frozen`."""
    model.train()
    if frozen:
        for module in model.modules():
            if isinstance(module, _BatchNorm):
                module.eval()


def _batches(data: Data, batch_size: int) -> Iterator[tuple[Tensor, Any, float]]:
    """Images, targets and the seconds it took to get them, without end."""
    for epoch in itertools.count():
        start = time.perf_counter()
        for x, y in data.train.epoch(epoch, batch_size=batch_size, seed=data.seed):
            yield x, y, time.perf_counter() - start
            start = time.perf_counter()


def _optimizer(
    name: Literal["adamw", "sgd"], groups: list[dict[str, Any]], lr: float, weight_decay: float
) -> torch.optim.Optimizer:
    if name == "adamw":
        return torch.optim.AdamW(groups, lr=lr, weight_decay=weight_decay)
    return torch.optim.SGD(groups, lr=lr, weight_decay=weight_decay, momentum=_MOMENTUM)
