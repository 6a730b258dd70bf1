"""Cross-layer equalization and the absorption of high biases."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from qbench.data import Batches, Data
from qbench.quant import structure
from qbench.quant.biases import shift_bias
from qbench.quant.channel_clip import ChannelClip
from qbench.quant.channels import channel_rows, refuse_quantized, scale_inputs, scale_outputs
from qbench.quant.equalization import equalizing_factors
from qbench.quant.layers import TRANSPOSED, weight_of
from qbench.quant.links import Link, links
from qbench.quant.norm_statistics import rewrite
from qbench.registry import method


@method("equalize", track="structure", paper="arXiv:1906.04721")
def equalize(model: nn.Module, data: Data, *, absorb: bool = False) -> nn.Module:
    """Scale channels between layers until writer and readers use the same range of each; the float function stays.

    A channel of a layer's output is divided by a factor, and its readers' weights are multiplied by it, where there is
    nothing in between but ReLU, pooling and the like (`fold_bn` goes first). ReLU6 becomes a clipping with a limit for
    each channel. Pairs whose ReLU6 is no module of its own, or is called more than once, stay as they are; they are
    recorded as `clipped`.

    Args:
        model: changed in place.
        data: its first calibration image shows the pairs; all are used to absorb.
        absorb: move what a channel never falls below from its bias into the biases of the readers, where these are
            pointwise (padding would show). The paper takes 3 standard deviations below the mean by the batch norm's
            statistics, and changes the function in their tails; here it is the least value on the calibration images,
            whose outputs stay.

    Raises:
        UserError: a layer is quantized already.
    """
    model.eval()
    found = links(model, data.example)
    pairs = [link for link in found if all(clip.module for clip in link.clips)]
    layers = {name: model.get_submodule(name) for link in pairs for name in (link.source, *link.readers)}
    refuse_quantized(layers, "equalize")
    solved = equalizing_factors(layers, pairs)
    for link, factor in zip(pairs, solved.factors, strict=True):
        _scale(model, link, factor)
    absorbed = _absorb(model, pairs, data.calibration) if absorb else 0
    clipped = [link.source for link in found if link not in pairs]
    values = {"pairs": len(pairs), "clipped": clipped, "rounds": solved.rounds, "change": solved.change}
    data.record("equalize", values | {"absorbed": absorbed})
    return model


@torch.no_grad()
def _scale(model: nn.Module, link: Link, factor: Tensor) -> None:
    source: Any = model.get_submodule(link.source)
    source.weight.copy_(scale_outputs(source, weight_of(source).double(), 1 / factor))
    if source.bias is not None:
        source.bias.copy_(source.bias.double() / factor)
    rewrite(source, 1 / factor)
    for name in link.readers:
        reader: Any = model.get_submodule(name)
        reader.weight.copy_(scale_inputs(reader, weight_of(reader).double(), factor))
    for clip in link.clips:
        structure.apply(
            model, "channel_clip", module=clip.module, channels=len(factor), axis=clip.axis, limit=clip.limit
        )
        limit = _limit(model, clip.module)
        limit.copy_(limit.double() / factor.reshape(limit.shape))


@torch.no_grad()
def _absorb(model: nn.Module, pairs: list[Link], batches: Batches) -> int:
    """Shift outputs down by what they never fall below, and the readers' biases up; how many channels it was."""
    shifted = [link for link in pairs if link.shiftable and all(_pointwise(model, name) for name in link.readers)]
    lowest = _minima(model, [link.source for link in shifted], batches)
    count = 0
    for link in shifted:
        offset = lowest[link.source].clamp(min=0).double()
        limits = [_limit(model, clip.module) for clip in link.clips]
        for limit in limits:
            offset = torch.minimum(offset, limit.flatten().double())
        for limit in limits:
            limit.copy_(limit.double() - offset.reshape(limit.shape))
        shift_bias(model, link.source, -offset)
        rewrite(model.get_submodule(link.source), shift=-offset)
        for name in link.readers:
            reader = model.get_submodule(name)
            shift_bias(model, name, scale_inputs(reader, weight_of(reader).double(), offset).flatten(1).sum(1))
        count += int((offset > 0).sum())
    return count


def _minima(model: nn.Module, names: Iterable[str], batches: Batches) -> dict[str, Tensor]:
    """The least value of each output channel over all images and positions."""
    found: dict[str, Tensor] = {}

    def watch(name: str) -> torch.utils.hooks.RemovableHandle:
        def see(layer: nn.Module, _inputs: object, output: Tensor) -> None:
            least = channel_rows(layer, output).amin(1)
            found[name] = torch.minimum(found[name], least) if name in found else least

        return model.get_submodule(name).register_forward_hook(see)

    handles = [watch(name) for name in names]
    try:
        for batch in batches:
            model(batch)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _pointwise(model: nn.Module, name: str) -> bool:
    layer: Any = model.get_submodule(name)
    padded = not isinstance(layer, nn.Linear) and any(layer.padding)
    return not isinstance(layer, TRANSPOSED) and layer.weight.shape[2:].numel() == 1 and not padded


def _limit(model: nn.Module, name: str) -> Tensor:
    clip = model.get_submodule(name)
    assert isinstance(clip, ChannelClip)
    return clip.limit
