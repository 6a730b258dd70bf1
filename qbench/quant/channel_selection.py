"""Channels between a layer with its batch norm and the layers that read them, and having more or fewer of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qbench.quant import structure
from qbench.quant.adjacency import foldable
from qbench.quant.biases import shift_bias
from qbench.quant.calls import Args, first_of, watch_calls
from qbench.quant.layers import TRANSPOSED
from qbench.quant.links import links
from qbench.quant.splitting import is_split


@dataclass(frozen=True)
class Channels:
    """What one layer and its norm write, and nothing but `readers` reads."""

    layer: str
    norm: str
    readers: tuple[str, ...]


def selectable(model: nn.Module, example: Tensor) -> list[Channels]:
    """The channels whose number can change: on the way to the readers is nothing but ReLU, pooling and views.

    Args:
        model: in evaluation mode.
        example: an input of it, a batch of one.
    """
    layer_of = {norm: layer for layer, norm in foldable(model, example)}
    found = links(model, example, dict.fromkeys(layer_of, 1))
    return [
        Channels(layer_of[link.source], link.source, link.readers)
        for link in found
        if getattr(model.get_submodule(link.source), "weight", None) is not None
        and all(_plain(model.get_submodule(name)) for name in (layer_of[link.source], *link.readers))
    ]


def _plain(layer: nn.Module) -> bool:
    return getattr(layer, "groups", 1) == 1 and not isinstance(layer, TRANSPOSED) and not is_split(layer)


def select(model: nn.Module, channels: Channels, index: list[int]) -> None:
    """Have the channels `index` in place of all; what comes n times is read with its weights divided by n."""
    structure.apply(
        model,
        "select_channels",
        layer=channels.layer,
        norm=channels.norm,
        readers=list(channels.readers),
        index=index,
    )


def constants(model: nn.Module, kept: Mapping[Channels, Sequence[int]], example: Tensor) -> dict[str, Tensor]:
    """What each reader's output owes to channels that are not kept, when their norm's weight is set to 0 (N,).

    The norm's bias is then all that comes. A reader that pads with zeros sees it less at the border: that is neglected.

    Args:
        model: in evaluation mode; the weights of the norms are changed.
        kept: positions of the channels that are.
        example: an input of the model.
    """
    gone: dict[str, list[int]] = {}
    for channels, index in kept.items():
        norm: Any = model.get_submodule(channels.norm)
        others = sorted(set(range(len(norm.weight))) - set(index))
        gone |= dict.fromkeys(channels.readers, others)
        with torch.no_grad():
            norm.weight[others] = 0
    readers = {name: model.get_submodule(name) for name in gone}
    found: dict[str, Tensor] = {}

    def see(name: str, args: Args, kwargs: dict[str, Any]) -> None:
        values = first_of(args, kwargs).transpose(0, 1).flatten(1).mean(1)[gone[name]]
        taps: Any = readers[name].weight
        found[name] = taps.detach()[:, gone[name]].unsqueeze(-1).flatten(2).sum(2) @ values

    watch_calls(model, example, readers, see)
    return found


def add_constants(model: nn.Module, outputs: Mapping[str, Tensor], example: Tensor) -> None:
    """Add a constant (N,) to each of these layers' outputs: in the mean of the norm behind it, or else in its bias."""
    norms = dict(foldable(model, example))
    for name, shift in outputs.items():
        if name in norms:
            mean = model.get_submodule(norms[name]).running_mean
            assert isinstance(mean, Tensor)
            mean.sub_(shift)
        else:
            shift_bias(model, name, shift)


@structure.operation("select_channels")
def _select(model: nn.Module, *, layer: str, norm: str, readers: list[str], index: list[int]) -> None:
    source, statistics = model.get_submodule(layer), model.get_submodule(norm)
    for module, names in (
        (source, ("weight", "bias")),
        (statistics, ("weight", "bias", "running_mean", "running_var")),
    ):
        for name in names:
            _take(module, name, 0, index)
    _count(source, "out_features" if isinstance(source, nn.Linear) else "out_channels", index)
    _count(statistics, "num_features", index)
    times = torch.bincount(torch.tensor(index))[index]
    for name in readers:
        reader = model.get_submodule(name)
        _take(reader, "weight", 1, index)
        weight: Any = reader.weight
        with torch.no_grad():
            weight.div_(times.to(weight).reshape(1, -1, *[1] * (weight.dim() - 2)))
        _count(reader, "in_features" if isinstance(reader, nn.Linear) else "in_channels", index)


def _take(module: nn.Module, name: str, axis: int, index: list[int]) -> None:
    old = getattr(module, name)
    if old is None:
        return
    new = old.detach().index_select(axis, torch.tensor(index, device=old.device))
    setattr(module, name, nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new)


def _count(module: nn.Module, name: str, index: list[int]) -> None:
    setattr(module, name, len(index))
