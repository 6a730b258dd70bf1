"""Histograms of what layers are called with."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import nn

from qbench.quant.activations import input_quantizer, quantize_input
from qbench.quant.calls import Args, first_of
from qbench.quant.observers import Histogram


@contextmanager
def observed(layers: dict[str, nn.Module], histograms: dict[str, Histogram]) -> Iterator[None]:
    """While active, each layer's input is counted in its histogram, and input quantizers are off."""

    def see(histogram: Histogram, _layer: nn.Module, args: Args, kwargs: dict[str, Any]) -> None:
        histogram.observe(first_of(args, kwargs))

    hooks = []
    quantizers = {name: input_quantizer(layer) for name, layer in layers.items()}
    for name, layer in layers.items():
        if quantizers[name] is not None:
            quantize_input(layer, nn.Identity())
        hooks.append(layer.register_forward_pre_hook(partial(see, histograms[name]), with_kwargs=True))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for name, quantizer in quantizers.items():
            if quantizer is not None:
                quantize_input(layers[name], quantizer)
