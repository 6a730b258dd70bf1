"""ReLUs in front of layers whose inputs are signs: the sign of what is never negative says nothing."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn

from qbench.errors import Unsupported
from qbench.quant import structure
from qbench.quant.calls import Args, first_of, watch_calls

_RECTIFIERS = (nn.ReLU, nn.ReLU6)


class RPReLU(nn.Module):
    """PReLU between two learned shifts, all of them per channel, counted by axis 1 (ReActNet, arXiv:2003.03488)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.before, self.after = (nn.Parameter(torch.zeros(channels)) for _ in range(2))
        self.slope = nn.Parameter(torch.full((channels,), 0.25))

    def forward(self, x: Tensor) -> Tensor:
        before, slope, after = (p.reshape(-1, *[1] * (x.dim() - 2)) for p in (self.before, self.slope, self.after))
        x = x - before
        return torch.where(x > 0, x, slope * x) + after


@structure.operation("drop_rectifier")
def _drop(model: nn.Module, *, module: str) -> None:
    _replace(model, module, nn.Identity())


@structure.operation("rprelu")
def _rprelu(model: nn.Module, *, module: str, channels: int) -> None:
    parameter = next(model.parameters())
    _replace(model, module, RPReLU(channels).to(parameter))


def _replace(model: nn.Module, module: str, new: nn.Module) -> None:
    """Under all names that the module has."""
    gone = model.get_submodule(module)
    for name in [name for name, other in model.named_modules(remove_duplicate=False) if other is gone]:
        structure.replace_module(model, name, new)


def drop_rectifiers(model: nn.Module, example: Tensor, layers: Collection[str]) -> None:
    """Take away the ReLUs in front of `layers`.

    Args:
        model: in evaluation mode.
        example: an input of it.
        layers: names of those whose inputs are to be signs.

    Raises:
        Unsupported: the input of one is never negative even so.
    """
    for module in _rectifiers(model, example, layers):
        structure.apply(model, "drop_rectifier", module=module)
    least: dict[str, float] = {}

    def see(name: str, args: Args, kwargs: dict[str, Any]) -> None:
        least[name] = min(least.get(name, 0.0), first_of(args, kwargs).amin().item())

    watch_calls(model, example, {name: model.get_submodule(name) for name in layers}, see)
    rectified = [name for name, value in least.items() if value >= 0]
    if rectified:
        raise Unsupported(
            f"the input of {rectified[0]} is never negative, so its sign says nothing: skip=[{rectified[0]}]"
        )


def replace_rectifiers(model: nn.Module, example: Tensor, layers: Collection[str]) -> None:
    """Put an `RPReLU` in the place of each ReLU in front of `layers`.

    Raises:
        Unsupported: a ReLU is called with different numbers of channels.
    """
    for module, channels in _rectifiers(model, example, layers).items():
        if len(channels) > 1:
            raise Unsupported(f"{module} is called with {sorted(channels)} channels, but can learn for one set only")
        structure.apply(model, "rprelu", module=module, channels=min(channels))


def _rectifiers(model: nn.Module, example: Tensor, layers: Collection[str]) -> dict[str, set[int]]:
    """ReLUs, with the numbers of channels they see, which one of `layers` comes after and before the next ReLU."""
    channels: dict[str, set[int]] = {}
    found: set[str] = set()
    last = ""
    rectifiers = {name: module for name, module in model.named_modules() if isinstance(module, _RECTIFIERS)}

    def see(name: str, args: Args, kwargs: dict[str, Any]) -> None:
        nonlocal last
        if name in rectifiers:
            channels.setdefault(name, set()).add(first_of(args, kwargs).shape[1])
            last = name
        else:
            found.add(last)

    watch_calls(model, example, rectifiers | {name: model.get_submodule(name) for name in layers}, see)
    return {name: seen for name, seen in channels.items() if name in found}
