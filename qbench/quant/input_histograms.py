"""Histograms of what layers are called with."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from qbench.data import Batches, Data
from qbench.quant.activations import input_quantizer, quantize_input
from qbench.quant.calls import Args, first_of
from qbench.quant.hooks import hooked
from qbench.quant.observers import Histogram


def input_histograms(
    model: nn.Module, layers: dict[str, nn.Module], data: Data, batches: Batches
) -> dict[str, Histogram]:
    """The histogram of each layer's input over all batches, with the input quantizers of these layers off.

    They are read from the cache where another run has made them. Layers that are never called are left out.

    Args:
        model: in evaluation mode.
        layers: of the model, by name.
        data: of the method.
        batches: its calibration images, or a part of them.
    """

    def compute() -> dict[str, np.ndarray]:
        histograms = {name: Histogram() for name in layers}
        with observed(layers, histograms), torch.no_grad():
            for done, images in enumerate(batches, 1):
                model(images)
                data.progress(done / len(batches))
        return {name: histogram.dump() for name, histogram in histograms.items() if histogram.seen}

    found = data.shared.arrays(f"input histograms of {sorted(layers)}", model, batches.identity, compute)
    return {name: Histogram.load(found[name]) for name in layers if name in found}


@contextmanager
def observed(layers: dict[str, nn.Module], histograms: dict[str, Histogram]) -> Iterator[None]:
    """While active, each layer's input is counted in its histogram, and input quantizers are off."""

    def see(histogram: Histogram, _layer: nn.Module, args: Args, kwargs: dict[str, Any]) -> None:
        histogram.observe(first_of(args, kwargs))

    quantizers = {name: input_quantizer(layer) for name, layer in layers.items()}
    for name, layer in layers.items():
        if quantizers[name] is not None:
            quantize_input(layer, nn.Identity())
    handles = (
        layer.register_forward_pre_hook(partial(see, histograms[name]), with_kwargs=True)
        for name, layer in layers.items()
    )
    try:
        with hooked(handles):
            yield
    finally:
        for name, quantizer in quantizers.items():
            if quantizer is not None:
                quantize_input(layers[name], quantizer)
