"""Quantized activations."""

from typing import Annotated, Literal

from pydantic import Field
from torch import nn

from qbench.data import Data
from qbench.errors import Unsupported, UserError
from qbench.quant.activations import DynamicQuantizer, StaticQuantizer, quantize_input
from qbench.quant.edges import edges
from qbench.quant.edges import expose as expose_edges
from qbench.quant.input_histograms import input_histograms
from qbench.quant.layers import select_layers
from qbench.quant.log_quantizer import LogQuantizer
from qbench.quant.matmuls import expose, operands
from qbench.quant.observers import Calibration
from qbench.quant.origins import origins
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
    placement: Literal["inputs", "every_edge"] = "inputs",
    matmuls: bool = False,
    softmax: Literal["uniform", "log2", "log_sqrt2"] = "uniform",
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
        placement: `inputs` of layers alone, as OpenVINO has integer kernels for, or also what sums, products and
            concatenations of activations and pools read: `every_edge`, as ONNX Runtime and integer hardware take it.
        matmuls: quantize the operands of products of activations (queries, keys, softmax, values), too. Dynamic ranges
            of operands are one an image.
        softmax: of the operands that a softmax returns: a uniform grid, or powers of two (in the manner of FQ-ViT,
            arXiv:2111.13824) or of its square root (RepQ-ViT, arXiv:2212.08254) below the end of the static range.
        edge_bits: bits of the inputs of the first and the last layer; 32 leaves them in float.
        skip: names, or first parts of names, of layers whose input stays in float.

    Raises:
        Unsupported: tokens without a linear layer, or static tokens; no products of activations; or some, or sums, that
            cannot be taken out of their function.
        UserError: a logarithmic softmax without static operands.
    """
    if granularity == "token" and mode == "static":
        raise Unsupported("a static range for every token does not exist; use mode=dynamic")
    if softmax != "uniform" and not (matmuls and mode == "static"):
        raise UserError(f"softmax={softmax} is for operands with static ranges: set matmuls=true and mode=static")
    widths = {name: width for name, _, width in select_layers(model, bits, edge_bits, skip, for_inputs=True)}
    layers = {name: model.get_submodule(name) for name in widths}
    if granularity == "token" and not any(isinstance(layer, nn.Linear) for layer in layers.values()):
        raise Unsupported("granularity=token needs linear layers; the model has none to quantize")
    model.eval()
    if matmuls:
        expose(model, data.example)
        layers |= operands(model, skip)
    if placement == "every_edge":
        expose_edges(model, data.example)
        layers |= edges(model, skip)
    batches = data.calibration if mode == "static" else data.calibration.first(1)
    reached = input_histograms(model, layers, data, batches)
    probabilities = origins(model, data.example, ["_softmax"], operands(model)) if softmax != "uniform" else {}
    for name, histogram in reached.items():
        layer, width = layers[name], widths.get(name, bits)
        quantizer: nn.Module
        if mode == "dynamic":
            tokens = granularity == "token" and isinstance(layer, nn.Linear)
            quantizer = DynamicQuantizer(width, symmetric, "token" if tokens else "tensor")
        elif name in probabilities:
            top = histogram.range(calibration, percentile, bits=width)[1]
            quantizer = LogQuantizer(width, 1 if softmax == "log2" else 2, top)
        else:
            signed = symmetric and histogram.low < 0
            scale, zero = histogram.grid(
                bits=width,
                symmetric=signed,
                calibration=calibration,
                percentile=percentile,
                power_of_two=power_of_two,
            )
            quantizer = StaticQuantizer(width, signed, scale, zero)
        quantize_input(layer, quantizer.to(data.device))
    data.record("activations", {"quantized": len(reached), "unreached": sorted(layers.keys() - reached)})
    return model
