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
    bits: Annotated[int, Field(ge=2, le=16)] | None = None,
    skip: tuple[str, ...] = (),
) -> nn.Module:
    """Double the input channels with the largest weights, and halve these; the float function stays.

    The largest weight of a layer gets smaller, and with it the step of a grid that reaches to it, for a little more
    weights. Layers with groups, layers whose forward is not called once (their parent uses their weight), and those
    that were split before stay as they are; they are recorded as `kept`.

    Args:
        model: changed in place.
        data: its first calibration image shows which layers are called.
        ratio: copies made, as a share of a layer's input channels, rounded up.
        bits: of the grid that follows, one symmetric grid per tensor: the halves then lie half a step apart, so that
            they are rounded to the sum that the whole would be. None halves exactly, which doubles rounding errors.
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
        channels, top = halvings(ranges, math.ceil(ratio * len(ranges)))
        # A quarter of a step is added to the largest half, so the step is what is larger by that.
        apart = 0.0 if bits is None else top / (2 ** (bits - 1) - 1.25) / 2
        structure.apply(model, "split_channels", layer=name, channels=channels, apart=apart)
    data.record("split_channels", {"split": len(layers) - len(kept), "kept": kept})
    return model
