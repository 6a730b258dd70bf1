"""Features of a network that linear projections take to those of the float network."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qbench.models.base import first_device
from qbench.quant.hooks import hooked

_NAME = "feature_projection"


class Projection(nn.Module):
    """A weight of its own for each pair of a float channel and a channel of the trained network."""

    def __init__(self, channels: int, factor: int) -> None:
        """
        Args:
            channels: of the float network.
            factor: copies of them, whose mean it starts with.
        """
        super().__init__()
        self.weight = nn.Parameter(torch.eye(channels).repeat(1, factor) / factor)

    def forward(self, x: Tensor) -> Tensor:
        """From channels (axis 1) of the trained network to those of the float network."""
        return torch.einsum("cd,bd...->bc...", self.weight, x)


def add_projections(model: nn.Module, channels: Mapping[str, int], factor: int) -> None:
    """Give each of these modules, which do not call their parts, a projection of what it returns."""
    for name, count in channels.items():
        module = model.get_submodule(name)
        module.add_module(_NAME, Projection(count, factor).to(first_device(module)))


def drop_projections(model: nn.Module) -> None:
    """Take them away again."""
    for module in model.modules():
        module._modules.pop(_NAME, None)


def distance(model: nn.Module, own: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> Tensor:
    """The mean over modules of the squared distances, each relative to the mean square of the wanted features."""
    distances = []
    for name, target in wanted.items():
        projected = model.get_submodule(name).get_submodule(_NAME)(own[name])
        distances.append(F.mse_loss(projected, target) / target.square().mean().clamp(min=1e-12))
    return torch.stack(distances).mean()


@contextmanager
def features(model: nn.Module, names: list[str]) -> Iterator[dict[str, Tensor]]:
    """What those modules return in the next forward pass, by name."""
    found: dict[str, Tensor] = {}

    def keep(name: str, output: Tensor) -> None:
        # A copy, because what comes next may work in place.
        found[name] = output.clone()

    handles = (
        model.get_submodule(name).register_forward_hook(lambda _module, _inputs, output, name=name: keep(name, output))
        for name in names
    )
    with hooked(handles):
        yield found
