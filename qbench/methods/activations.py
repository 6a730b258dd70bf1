"""Quantized activations."""

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import nn

from qbench.data import Data
from qbench.errors import Unsupported
from qbench.quant.activations import DynamicQuantizer, StaticQuantizer, quantize_input
from qbench.quant.input_histograms import observed
from qbench.quant.layers import select_layers
from qbench.quant.observers import Calibration, Histogram
from qbench.registry import EdgeBits, method


@method("activations")
def activations(
    model: nn.Module,
    data: Data,
    *,
    bits: Annotated[int, Field(ge=2, le=16)] = 8,
    mode: Literal["static", "dynamic"] = "static",
    granularity: Literal["tensor", "token"] = "tensor",
    calibration: Calibration = "minmax",
    percentile: Annotated[float, Field(gt=50, le=100)] = 99.99,
    power_of_two: bool = False,
    symmetric: bool = False,
    edge_bits: EdgeBits = None,
    skip: tuple[str, ...] = (),
) -> nn.Module:
    """Quantize the inputs of convolutions and linear layers to unsigned codes with a zero point.

    Static ranges are found in one pass of the calibration images through the model as it is, with the quantizers of
    these layers off. Inputs without negative values get the zero point 0. A layer whose forward is never called (its
    weight is used by its parent) gets no quantizer, and is recorded as `unreached`.

    Args:
        model: changed in place.
        data: its calibration images, for the static mode.
        bits: width of the codes.
        mode: `static` ranges are fixed; `dynamic` ones are the extremes of each image at run time.
        granularity: of dynamic ranges: one an image, or one a token in linear layers.
        calibration: of static ranges: to the extremes or their moving average over the batches (`ema`), to a
            percentile, to the least squared error or error to the power of 2.4, to where a Laplace or Gauss
            distribution is best clipped (ACIQ), or to the least divergence (as TensorRT, masked, as CFWS).
        percentile: cut off at either end of a static range, in percent.
        power_of_two: every static scale is the power of two, near the calibrated one, with the least squared error.
        symmetric: signed codes with zero point 0, where there are negative values.
        edge_bits: bits of the inputs of the first and the last layer; 32 leaves them in float.
        skip: names, or first parts of names, of layers whose input stays in float.

    Raises:
        Unsupported: tokens without a linear layer, or static tokens.
    """
    layers = {name: (layer, width) for name, layer, width in select_layers(model, bits, edge_bits, skip)}
    if granularity == "token" and mode == "static":
        raise Unsupported("a static range for every token does not exist; use mode=dynamic")
    if granularity == "token" and not any(isinstance(layer, nn.Linear) for layer, _ in layers.values()):
        raise Unsupported("granularity=token needs linear layers; the model has none to quantize")
    histograms = {name: Histogram() for name in layers}
    batches = data.calibration if mode == "static" else data.calibration.first(1)
    model.eval()
    with observed({name: layer for name, (layer, _) in layers.items()}, histograms), torch.no_grad():
        for done, images in enumerate(batches, 1):
            model(images)
            data.progress(done / len(batches))
    reached = {name for name, histogram in histograms.items() if histogram.seen}
    for name in reached:
        (layer, width), histogram = layers[name], histograms[name]
        signed = symmetric and histogram.low < 0
        if mode == "static":
            scale, zero = histogram.grid(
                bits=width,
                symmetric=signed,
                calibration=calibration,
                percentile=percentile,
                power_of_two=power_of_two,
            )
            quantize_input(layer, StaticQuantizer(width, signed, scale, zero))
        else:
            tokens = granularity == "token" and isinstance(layer, nn.Linear)
            quantize_input(layer, DynamicQuantizer(width, symmetric, "token" if tokens else "tensor"))
    data.record("activations", {"quantized": len(reached), "unreached": sorted(layers.keys() - reached)})
    return model
