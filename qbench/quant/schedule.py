"""How long, on what batches, and how fast a network learns: the options that all training methods share."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Positive = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]


class Schedule(BaseModel):
    """A method takes one as a keyword-only parameter with defaults of its own; the fields are options of the method."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", use_attribute_docstrings=True)

    epochs: Annotated[int, Field(ge=1)] = 10
    """Passes over the training images."""
    steps: Annotated[int, Field(ge=1)] | None = None
    """Batches to train on, in place of `epochs`."""
    seconds: Positive | None = None
    """Time to train for, in place of both; how many steps that are depends on the machine."""
    batch_size: Annotated[int, Field(ge=1)] = 64
    """Images per step."""
    lr: Positive = 0.01
    """Highest learning rate."""
    optimizer: Literal["sgd", "adamw"] = "sgd"
    """`sgd` has momentum 0.9 (not Nesterov's)."""
    decay: Literal["cosine", "step"] = "cosine"
    """The learning rate falls to 0 along a cosine, or to a tenth after 1/2 and again after 3/4 of the training."""
    warmup: Share = 0.05
    """Share of the training in which the learning rate grows linearly to `lr`."""
    weight_decay: Annotated[float, Field(ge=0)] = 1e-4
    """Of parameters with at least two axes."""
    clip: Positive | None = None
    """Largest norm of the gradient; None does not clip."""
    freeze_bn: Share | None = None
    """Share of the training after which batch norms keep their statistics; None never freezes them."""
    ema: Annotated[float, Field(gt=0, lt=1)] | None = None
    """The network ends with moving averages of its weights, this being the share of the past; None takes the last."""
    distillation: Share = 0.0
    """Share of the loss that asks for the float network's soft answers (temperature 4)."""

    precision: Literal["float32", "bf16", "fp16", "int8"] = "float32"
    """Of the numbers in products; weights are float32. `int8` is for linear layers and needs torchao."""
    compile: bool = False
    """Whether the network goes through torch.compile: slow to start, then faster on many GPUs."""

    def total(self, per_epoch: int) -> int | None:
        """How many steps there are; None if that depends on time."""
        if self.seconds is not None:
            return None
        return self.steps if self.steps is not None else self.epochs * per_epoch

    def factor(self, step: float, total: float) -> float:
        """Factor of the learning rate when `step` of `total` are done."""
        warmup = round(self.warmup * total)
        if self.decay == "step" and step >= warmup:
            return float(0.1 ** ((step >= total / 2) + (step >= total * 3 / 4)))
        return cosine(step, total, warmup)


def cosine(step: float, total: float, warmup: int) -> float:
    """Linear up to 1 over `warmup` steps, then half a cosine down to 0 at `total`."""
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))
