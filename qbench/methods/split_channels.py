"""Outlier channel splitting."""

from __future__ import annotations

import math
from typing import Annotated

from pydantic import Field
from torch import nn

from qbench.data import Data
from qbench.quant import structure
from qbench.quant.channels import input_ranges, refuse_quantized
from qbench.quant.layers import select_layers, weight_of
from qbench.quant.links import called
from qbench.quant.splitting import halvings, is_split
from qbench.registry import method


@method("split_channels", track="structure", paper="arXiv:1901.09504")
def split_channels(
    model: nn.Module,
    data: Data,
    *,
    ratio: Annotated[float, Field(gt=0, le=1)] = 0.02,
    skip: tuple[str, ...] = (),
) -> nn.Module:
    """Double the input channels with the largest weights, and halve these; the float function stays.

    The largest weight of a layer gets smaller, and with it the step of a grid that reaches to it, for a little more
    weights. Weights are halved exactly: this is not the paper's variant for a known grid, which rounds the halves
    apart. Layers with groups, layers whose forward is not called (their weight is used by their parent), and those that
    were split before stay as they are; they are recorded as `kept`.

    Args:
        model: changed in place.
        data: its first calibration image shows which layers are called.
        ratio: copies made, as a share of a layer's input channels, rounded up.
        skip: names, or first parts of names, of layers to leave as they are.

    Raises:
        UserError: a layer is quantized already.
    """
    model.eval()
    layers = {name: layer for name, layer, _ in select_layers(model, 16, skip=skip)}
    refuse_quantized(layers, "split_channels")
    free = called(model, data.example)
    kept = []
    for name, layer in layers.items():
        if getattr(layer, "groups", 1) > 1 or is_split(layer) or name not in free:
            kept.append(name)
            continue
        ranges = input_ranges(layer, weight_of(layer))
        channels = halvings(ranges, math.ceil(ratio * len(ranges)))
        structure.apply(model, "split_channels", layer=name, channels=channels)
    data.record("split_channels", {"split": len(layers) - len(kept), "kept": kept})
    return model
