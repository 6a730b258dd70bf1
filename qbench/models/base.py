"""What a model plugin returns: an architecture, its weights, its preprocessing, and how its outputs are read."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from qbench.datasets.base import Task
from qbench.errors import UserError


@dataclass(frozen=True)
class Preprocess:
    """From a decoded image to the network's input."""

    size: tuple[int, int]
    """(height, width) of the network's input."""
    resize: int | None = None
    """Before the centre crop: the shorter side (mode `crop`; None crops without resizing), or both (mode `squash`;
    None is `size`)."""
    mode: Literal["crop", "squash", "letterbox"] = "crop"
    interpolation: Literal["nearest", "bilinear", "bicubic"] = "bicubic"
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)
    """Of the images scaled to [0, 1]; their length is the number of channels, 1 or 3."""

    @property
    def channels(self) -> int:
        return len(self.mean)

    def normalize(self, pixels: Tensor) -> Tensor:
        """What the network is called with, float32, for pixels (..., C, H, W) from 0 to 255."""
        mean, std = (torch.tensor(values, device=pixels.device)[:, None, None] for values in (self.mean, self.std))
        return (pixels.float() / 255 - mean) / std


class Weights(Protocol):
    """Where the float weights come from."""

    def fingerprint(self) -> str:
        """Hash of the weights, cheap enough for planning."""

    def load(self) -> Mapping[str, Tensor]:
        """The state dict."""


@dataclass(frozen=True)
class Detections:
    """What a detector found on one image, boxes in pixels of the network's input."""

    xyxy: Tensor
    """(n, 4)"""
    scores: Tensor
    """(n,)"""
    labels: Tensor
    """(n,) indices into the dataset's classes"""


def cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    """The mean cross-entropy of logits (B, classes) against class indices (B,)."""
    return nn.functional.cross_entropy(outputs.float(), targets)


@dataclass(frozen=True)
class Model:
    """A float model. `build` makes the architecture without touching the weights, so that artifacts load anywhere."""

    task: Task
    build: Callable[[], nn.Module]
    weights: Weights
    preprocess: Preprocess
    loss: Callable[[Any, Any], Tensor] = cross_entropy
    """`(outputs, targets) -> scalar`; detection targets are a list of `Boxes` in pixels of the network's input."""
    name: str = ""
    """What boards call it; empty for the plugin's reference."""
    decode: Callable[[Any], list[Detections]] | None = None
    """Detection: raw outputs of a batch to detections per image."""

    def load(self) -> nn.Module:
        """The float model with its weights, in evaluation mode.

        Raises:
            UserError: the weights are missing, damaged, or do not fit the architecture.
        """
        from qbench.models.checkpoints import fill

        module = self.build()
        if not isinstance(module, nn.Module):
            raise UserError(f"the model plugin builds a {type(module).__name__}, not a torch.nn.Module")
        fill(module, self.weights.load(), str(self.weights))
        return module.eval()


def first_device(module: nn.Module) -> torch.device:
    """The device of the module's first parameter, or else buffer; the CPU if it has neither."""
    first = next(itertools.chain(module.parameters(), module.buffers()), None)
    return torch.device("cpu") if first is None else first.device
