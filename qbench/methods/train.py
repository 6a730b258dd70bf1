"""Training the float network on: what precision, time and steps do to training itself."""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn

from qbench.data import Data
from qbench.quant.layers import clear_encodings, weight_layers
from qbench.quant.schedule import Schedule
from qbench.quant.training import fit
from qbench.registry import method

_EMBEDDING = 0.02
"""Standard deviation of parameters that no layer knows how to draw: embeddings of tokens and places."""


@method("train", track="qat")
def train(
    model: nn.Module,
    data: Data,
    *,
    start: Literal["given", "scratch"] = "given",
    schedule: Schedule = Schedule(),
) -> nn.Module:
    """Train the float network, from its weights or from random ones, in any precision; its weights stay float32.

    Args:
        model: the float model.
        data: with training images.
        start: `scratch` draws new weights first.
        schedule: of the training.

    Raises:
        Unsupported: the device cannot compute with that precision.
    """
    for layer in weight_layers(model):
        clear_encodings(layer)
    if start == "scratch":
        draw(model, data.seed)
    return fit(model, data, schedule)


@torch.no_grad()
def draw(model: nn.Module, seed: int) -> None:
    """New weights for all layers, as PyTorch draws them, and new statistics for norms."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        drawn: set[int] = set()
        for module in model.modules():
            reset = getattr(module, "reset_parameters", None)
            if callable(reset):
                reset()
                drawn |= {id(parameter) for parameter in module.parameters()}
        for parameter in model.parameters():
            if id(parameter) not in drawn:
                parameter.copy_(_EMBEDDING * torch.randn(parameter.shape))
