"""The weights that learn behind quantizers."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from qbench.quant.encodings import Encoding
from qbench.quant.fakequant import WeightQuantizer, weight_quantizer
from qbench.quant.layers import named_weight_layers


def quantized_layers(model: nn.Module) -> dict[str, tuple[nn.Module, nn.Module]]:
    """The layers whose weights go through quantizers, and these; of layers that share one, the first."""
    found: dict[int, tuple[str, tuple[nn.Module, nn.Module]]] = {}
    for name, layer in named_weight_layers(model).items():
        quantizer = weight_quantizer(layer)
        if quantizer is not None and hasattr(quantizer, "encoding"):
            found.setdefault(id(quantizer), (name, (layer, quantizer)))
    return dict(found.values())


def free_weight(layer: nn.Module) -> nn.Parameter:
    """The weight that learns, of a layer whose weight goes through a quantizer."""
    return layer.get_parameter("parametrizations.weight.original")


def weight_encoding(layer: nn.Module) -> Encoding:
    """What the layer's weight would be stored as if its quantizer were deployed now."""
    quantizer = weight_quantizer(layer)
    assert quantizer is not None
    training = quantizer.training
    with torch.no_grad():
        encoding = cast(WeightQuantizer, quantizer.eval()).encoding(cast(Tensor, layer.weight).detach())
    quantizer.train(training)
    return encoding


def update_quantizers(model: nn.Module) -> None:
    """Show the weights as they are now to those quantizers that have an `update`."""
    for layer, quantizer in quantized_layers(model).values():
        if hasattr(quantizer, "update"):
            cast(Any, quantizer).update(free_weight(layer).detach())
