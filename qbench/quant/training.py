"""The training loop that float training and every quantization-aware method share.

A step depends on nothing but the seed, its number and the state of model and optimizer, so the same seed gives the same
weights, bit for bit, on the CPU.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from qbench.data import Data, Training
from qbench.errors import UserError
from qbench.quant.timing import Pairs

Objective = Callable[[nn.Module, Tensor, Any], Tensor]
"""`(model, images, targets) -> scalar`"""
Groups = Callable[[nn.Module], list[dict[str, Any]]]
"""`model -> parameter groups` of the optimizer; a group's `lr` and `weight_decay` replace the common ones."""


@dataclass(frozen=True)
class Step:
    """A step that was just done."""

    number: int
    """From 0."""
    total: int
    loss: float
    model: nn.Module


def fit(
    model: nn.Module,
    data: Data,
    *,
    epochs: int | None = None,
    steps: int | None = None,
    batch_size: int = 32,
    lr: float = 1e-3,
    optimizer: Literal["adamw", "sgd"] = "adamw",
    weight_decay: float = 0.0,
    momentum: float = 0.9,
    warmup: float = 0.05,
    clip: float | None = None,
    freeze_bn: float | None = None,
    objective: Objective | None = None,
    groups: Groups | None = None,
    on_step: Callable[[Step], None] | None = None,
    timing_steps: int = 10,
) -> nn.Module:
    """Train the model in place on `data.train`; the learning rate falls to 0 along a cosine.

    Loss and seconds of every step go to `data.record("training", ...)`. Where there is a `data.reference`, some early
    steps are also done on a copy of it, so that both are timed in the same window.

    Args:
        model: on `data.device`.
        data: of the run; order, augmentation and dropout follow `data.seed`.
        epochs: passes over the training images; give this or `steps`.
        steps: batches to train on.
        batch_size: images per step.
        lr: highest learning rate.
        optimizer: `adamw`, or `sgd` with momentum (not Nesterov's).
        weight_decay: of parameters with at least two axes.
        momentum: of `sgd`.
        warmup: share of the steps in which the learning rate grows linearly to `lr`.
        clip: largest norm of the gradient; None does not clip.
        freeze_bn: share of the steps after which batch norms keep their statistics; None never freezes them.
        objective: what is minimised; None is `data.loss` of the model's outputs.
        groups: parameter groups; None is `decay_groups`.
        on_step: called after every step.
        timing_steps: how many steps are timed against the reference.

    Returns:
        The model in evaluation mode.

    Raises:
        UserError: neither or both of `epochs` and `steps` are given.
        FloatingPointError: the loss is not finite.
    """
    per_epoch = steps_per_epoch(data.train, batch_size)
    total = _total(epochs, steps, per_epoch)
    own_groups = groups or (lambda net: decay_groups(net.parameters(), weight_decay))

    def stepper(net: nn.Module, parameters: list[dict[str, Any]], minimised: Objective) -> _Stepper:
        return _Stepper(net, _optimizer(optimizer, parameters, lr, weight_decay, momentum), minimised, clip)

    def plain(net: nn.Module, x: Tensor, y: Any) -> Tensor:
        return data.loss(net(x), y)

    history: dict[str, list[float]] = {"loss": [], "seconds": [], "loading_seconds": []}
    freeze_at = total if freeze_bn is None else math.ceil(freeze_bn * total)
    with torch.random.fork_rng([data.device] if data.device.type == "cuda" else []), torch.enable_grad():
        torch.manual_seed(data.seed)
        own = stepper(model, own_groups(model), objective or plain)
        schedule = torch.optim.lr_scheduler.LambdaLR(own.optimizer, lambda n: cosine(n, total, round(warmup * total)))
        pairs = Pairs(
            data.reference,
            lambda net: stepper(net, decay_groups(net.parameters(), weight_decay), plain),
            total,
            timing_steps,
        )
        for number, (x, y), loading in _batches(data, total, batch_size):
            if number in (0, freeze_at):
                for net in (model, *pairs.networks):
                    set_training(net, frozen=number >= freeze_at)
            loss, seconds = pairs.step(number, own, x, y)
            if not math.isfinite(loss):
                raise FloatingPointError(f"the loss is {loss} at step {number} of {total}; try a smaller lr")
            schedule.step()
            for key, value in (("loss", loss), ("seconds", seconds), ("loading_seconds", loading)):
                history[key].append(value)
            if on_step is not None:
                on_step(Step(number, total, loss, model))
            data.progress((number + 1) / total)
    data.record(
        "training",
        history | {"steps_per_epoch": per_epoch, "batch_size": batch_size, "timing": pairs.record()},
    )
    return model.eval()


class _Stepper:
    """One network with its optimizer: a call does one step and returns the loss."""

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, objective: Objective, clip: float | None
    ) -> None:
        self.model, self.optimizer, self.objective, self.clip = model, optimizer, objective, clip

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


def cosine(step: int, total: int, warmup: int) -> float:
    """Factor of the learning rate: linear up to 1 over `warmup` steps, then half a cosine down to 0 at `total`."""
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


def decay_groups(parameters: Iterable[nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    """Weight decay on parameters with at least two axes; none on biases and norms."""
    trained = [p for p in parameters if p.requires_grad]
    return [
        {"params": [p for p in trained if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
    ]


def set_training(model: nn.Module, *, frozen: bool) -> None:
    """Training mode, but for the batch norms if `frozen`."""
    model.train()
    if frozen:
        for module in model.modules():
            if isinstance(module, _BatchNorm):
                module.eval()


def _total(epochs: int | None, steps: int | None, per_epoch: int) -> int:
    if (epochs is None) == (steps is None):
        raise UserError(f"training needs either epochs or steps, not epochs={epochs} and steps={steps}")
    return steps if steps is not None else (epochs or 0) * per_epoch


def _batches(data: Data, total: int, batch_size: int) -> Iterator[tuple[int, tuple[Tensor, Any], float]]:
    """Number of the step, batch, and the seconds it took to get it."""
    done = epoch = 0
    while done < total:
        batches = data.train.epoch(epoch, batch_size=batch_size, seed=data.seed)
        start = time.perf_counter()
        for batch in itertools.islice(batches, total - done):
            yield done, batch, time.perf_counter() - start
            done += 1
            start = time.perf_counter()
        epoch += 1


def _optimizer(
    name: Literal["adamw", "sgd"], parameters: list[dict[str, Any]], lr: float, weight_decay: float, momentum: float
) -> torch.optim.Optimizer:
    if name == "adamw":
        return torch.optim.AdamW(parameters, lr=lr, weight_decay=weight_decay)
    return torch.optim.SGD(parameters, lr=lr, weight_decay=weight_decay, momentum=momentum)
