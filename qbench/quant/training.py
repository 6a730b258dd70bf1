"""The training loop that float training and every quantization-aware method share.

A step depends on nothing but the seed, its number and the state of model and optimizer, so the same seed gives the same
weights, bit for bit, on the CPU, even if the training was killed and went on from a checkpoint.
"""

from __future__ import annotations

import itertools
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from qbench.data import Data, Training
from qbench.quant.arithmetic import check, integer_products
from qbench.quant.clock import Clock
from qbench.quant.distillation import Objective, distil
from qbench.quant.ema import Ema
from qbench.quant.schedule import Schedule
from qbench.quant.stepper import Stepper
from qbench.quant.timing import Pairs

Groups = Callable[[nn.Module], list[dict[str, Any]]]
"""`model -> parameter groups` of the optimizer; a group's `lr` and `weight_decay` replace the common ones."""


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
    memory: dict[str, Any] | None = None,
    timing_steps: int = 10,
) -> nn.Module:
    """Train the model in place on `data.train`.

    Loss and seconds of every step go to `data.record("training", ...)`. Where there is a `data.reference`, some early
    steps are also done on a copy of it in float32, so that both are timed in the same window. Where there are
    `data.checkpoints`, a training that was killed goes on from its last one: all that the network learns must be part
    of its state, and what `on_step` remembers must follow from a single step, or be in `memory`. It is called once more
    with the last step that was done, before state and memory are read back.

    Args:
        model: on `data.device`.
        data: of the run; order, augmentation and dropout follow `data.seed`.
        schedule: how long, on what batches, and how fast.
        objective: what is minimised; None is `data.loss` of the model's outputs.
        groups: parameter groups; None is `decay_groups`.
        on_step: called after every step.
        memory: part of the checkpoints: numbers, texts, tensors, and lists and dicts of them.
        timing_steps: how many steps are timed against the reference.

    Returns:
        The model in evaluation mode.

    Raises:
        Unsupported: the device cannot compute with that precision; distillation is asked for, and there is no float
            network or its outputs are not logits.
        FloatingPointError: the loss is not finite.
    """
    check(schedule.precision, data.device)
    with (
        torch.random.fork_rng([data.device] if data.device.type == "cuda" else []),
        torch.enable_grad(),
        integer_products(model, schedule.precision),
    ):
        torch.manual_seed(data.seed)
        training = _Training(model, data, schedule, objective, groups, memory, timing_steps)
        state = training.saved()
        if state is not None:
            if on_step is not None:
                on_step(Step(**state["last"], model=model))
            training.resume(state)
        for x, y, loading in training.batches():
            step = training.step(x, y, loading)
            if on_step is not None:
                on_step(step)
            training.after(step)
    training.finish()
    return model.eval()


class _Training:
    """A training under way."""

    def __init__(
        self,
        model: nn.Module,
        data: Data,
        schedule: Schedule,
        objective: Objective | None,
        groups: Groups | None,
        memory: dict[str, Any] | None,
        timing_steps: int,
    ) -> None:
        def plain(net: nn.Module, x: Tensor, y: Any) -> Tensor:
            return data.loss(net(x), y)

        def float_stepper(net: nn.Module) -> Stepper:
            in_float = schedule.model_copy(update={"precision": "float32"})
            return Stepper(net, decay_groups(net.parameters(), schedule.weight_decay), plain, in_float)

        minimised = objective or plain
        if schedule.distillation:
            minimised = distil(minimised, data.reference, schedule.distillation)
        own_groups = groups(model) if groups else decay_groups(model.parameters(), schedule.weight_decay)
        self.model, self.data, self.schedule = model, data, schedule
        self.stepper = Stepper(model, own_groups, minimised, schedule)
        self.clock = Clock(schedule, steps_per_epoch(data.train, schedule.batch_size))
        self.pairs = Pairs(data.reference, float_stepper, self.clock.total or sys.maxsize, timing_steps)
        self.ema = None if schedule.ema is None else Ema(model, schedule.ema)
        self.frozen: bool | None = None
        self.memory = {} if memory is None else memory
        self.history: dict[str, list[float]] = {"loss": [], "seconds": [], "loading_seconds": [], "resumed_at": []}
        self.began = time.monotonic()
        self.checkpoint = data.checkpoints.next() if data.checkpoints is not None else None

    def saved(self) -> dict[str, Any] | None:
        """What a training that was killed has left."""
        return self.checkpoint.load() if self.checkpoint is not None else None

    def resume(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        for name, part in self._parts().items():
            part.load_state_dict(state[name])
        self.history = state["history"]
        self.history["resumed_at"].append(self.clock.steps)
        self.memory.clear()
        self.memory.update(state["memory"])
        torch.set_rng_state(state["random"])
        if self.data.device.type == "cuda":
            torch.cuda.set_rng_state(state["random_cuda"], self.data.device)
        self.began -= state["elapsed"]
        assert self.data.checkpoints is not None
        self.data.checkpoints.seconds += state["elapsed"]

    def batches(self) -> Iterator[tuple[Tensor, Any, float]]:
        """Images, targets and the seconds it took to get them, until the training is done."""
        first, skipped = divmod(self.clock.steps, self.clock.per_epoch)
        size, seed = self.schedule.batch_size, self.data.seed
        # What is taken up may be done: the stop came before what follows the training.
        for number in itertools.takewhile(lambda _: self.clock.done < 1, itertools.count(first)):
            start = time.perf_counter()
            for x, y in self.data.train.epoch(number, batch_size=size, seed=seed, skipped=skipped):
                yield x, y, time.perf_counter() - start
                if self.clock.done >= 1:
                    return
                start = time.perf_counter()
            skipped = 0

    def step(self, x: Tensor, y: Any, loading: float) -> Step:
        """Do a step on one batch.

        Raises:
            FloatingPointError: the loss is not finite.
        """
        number = self.clock.steps
        if self.frozen != self.clock.frozen:
            self.frozen = self.clock.frozen
            for net in (self.model, *self.pairs.networks):
                set_training(net, frozen=self.frozen)
        self.stepper.slow_down(self.clock.factor)
        loss, seconds = self.pairs.step(number, self.stepper, x, y)
        if not math.isfinite(loss):
            raise FloatingPointError(f"the loss is {loss} at step {number}; try a smaller lr")
        self.clock.step(seconds + loading)
        for key, value in (("loss", loss), ("seconds", seconds), ("loading_seconds", loading)):
            self.history[key].append(value)
        return Step(number, self.clock.done, loss, self.model)

    def after(self, step: Step) -> None:
        """What follows when the network is as the next step finds it."""
        if self.ema is not None:
            self.ema.update(self.model)
        if self.checkpoint is not None and self.checkpoint.due:
            self.checkpoint.save(self._state(step))
        self.data.progress(step.done)

    def finish(self) -> None:
        """Give the network its averages, and record what happened."""
        if self.ema is not None:
            self.ema.copy_to(self.model)
        about: dict[str, Any] = {"steps_per_epoch": self.clock.per_epoch, "timing": self.pairs.record()}
        about |= {"batch_size": self.schedule.batch_size, "precision": self.schedule.precision}
        self.data.record("training", self.history | about)

    def _parts(self) -> dict[str, Any]:
        parts = {"stepper": self.stepper, "clock": self.clock, "pairs": self.pairs}
        return parts if self.ema is None else parts | {"ema": self.ema}

    def _state(self, last: Step) -> dict[str, Any]:
        known: dict[str, Any] = {name: part.state_dict() for name, part in self._parts().items()}
        known["last"] = {"number": last.number, "done": last.done, "loss": last.loss}
        known |= {"history": self.history, "memory": self.memory, "random": torch.get_rng_state()}
        if self.data.device.type == "cuda":
            known["random_cuda"] = torch.cuda.get_rng_state(self.data.device)
        return known | {"elapsed": time.monotonic() - self.began}


def joined(records: list[dict[str, Any]]) -> dict[str, Any]:
    """The records of trainings that followed each other as one."""
    lists = {key for key, value in records[0].items() if isinstance(value, list)}
    return records[0] | {key: [value for record in records for value in record[key]] for key in lists}


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
