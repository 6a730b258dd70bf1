"""Networks of timm with random weights whose activations are of sane size, and images of noise, for the benchmarks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import timm
import torch
from torch import Tensor, nn

from qbench import registry
from qbench.data import Batches, Data
from qbench.models.base import cross_entropy


class Noise:
    """Images of standard normal noise."""

    def __init__(self, count: int, size: int) -> None:
        self.count, self.size = count, size

    def __len__(self) -> int:
        return self.count

    def batch(self, positions: Sequence[int]) -> Tensor:
        return torch.stack([self._image(position) for position in positions])

    def _image(self, position: int) -> Tensor:
        return torch.randn(3, self.size, self.size, generator=torch.Generator().manual_seed(position))


def random_network(name: str, size: int, **options: Any) -> nn.Module:
    """With the statistics of its batch norms taken from noise: without them activations grow from layer to layer."""
    torch.manual_seed(0)
    model: nn.Module = timm.create_model(name, pretrained=False, **options).eval().requires_grad_(False)
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.train()
        norm.momentum = 1.0
    if norms:
        model(Noise(8, size).batch(range(8)))
    return model.eval()


def quantized(model: nn.Module, recipe: str, images: int, size: int) -> nn.Module:
    """After the steps of a recipe, written with ` + ` between them and calibrated on noise."""
    data = Data(Batches(Noise(images, size), torch.device("cpu")), None, cross_entropy)
    for step in recipe.split(" + "):
        model = registry.resolve("method", *registry.parse(step))(model, data)
    return model.eval()
