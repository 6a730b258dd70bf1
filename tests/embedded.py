"""The scanned digits and the networks trained on them, which ship with the package: accuracy after real training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from qbench import registry
from qbench.data import Data
from qbench.workspace import Workspace


class Digits:
    """A float network, and what its methods see.

    Args:
        model: reference of the network.
        cache: an empty folder.
    """

    def __init__(self, model: str, cache: Path) -> None:
        dataset, network = registry.resolve("dataset", "digits"), registry.resolve("model", model)
        self.space = Workspace(dataset, network, (64, 0), cache, torch.device("cpu"))
        self.records: dict[str, Any] = {}
        images = self.space.images("evaluation")
        self.images, self.targets = images.batch(range(len(images))), torch.tensor(images.split.targets)

    def trained(self, method: str, **options: Any) -> nn.Module:
        """What a method makes of the network."""
        reference = self.space.model.load().eval().requires_grad_(False)
        data: Data = self.space.data(seed=0, trains=True, reference=reference, record=self.records.__setitem__)
        network: nn.Module = registry.resolve("method", method, options)(self.space.model.load(), data)
        return network

    def accuracy(self, network: nn.Module) -> float:
        """Share of right answers on the evaluation images."""
        with torch.no_grad():
            return (network(self.images).argmax(1) == self.targets).float().mean().item()
