"""RepQ-ViT: post-training quantization of vision transformers by scale reparameterization."""

from __future__ import annotations

from functools import partial
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from qbench.data import Data
from qbench.quant.activations import StaticQuantizer, input_quantizer, quantize_input
from qbench.quant.channels import refuse_quantized
from qbench.quant.encodings import Affine, to_rows
from qbench.quant.layers import encode, output_axis, select_layers, weight_of
from qbench.quant.log_quantizer import LogQuantizer
from qbench.quant.matmuls import Operand, expose, operands
from qbench.quant.origins import origins
from qbench.quant.percentile_search import percentile_grids, percentile_top
from qbench.quant.post_norm import Alignment, post_norm_layers
from qbench.quant.sweep import Stop, sweep
from qbench.registry import EdgeBits, method


@method("repq_vit", paper="arXiv:2212.08254")
def repq_vit(
    model: nn.Module,
    data: Data,
    *,
    bits: Annotated[int, Field(ge=2, le=8)] = 4,
    activation_bits: Annotated[int, Field(ge=2, le=8)] = 4,
    images: Annotated[int, Field(ge=1)] = 32,
    edge_bits: EdgeBits = None,
    skip: tuple[str, ...] = (),
) -> nn.Module:
    """Quantize a transformer's weights, inputs and attention; each channel behind a layer norm by a grid of its own.

    These grids are then made one, with the norm and the layers that read it changed so that the float function stays
    (`qbench.quant.post_norm`). Softmax is quantized to powers of the square root of 2. All ranges end at a percentile,
    99.9, 99.99 or 99.999, which has the least squared error; they are found in the order of execution, in the network
    quantized so far. Weights have a scale and a zero point for each output channel. Wherever a layer norm is read by
    linear layers only, it is reparameterized: in front of the classifier, too.

    Args:
        model: changed in place.
        data: its calibration images.
        bits: width of the weights' codes.
        activation_bits: width of the codes of inputs and operands.
        images: use the first so many calibration images.
        edge_bits: bits of weights and inputs of the first and the last layer; 32 leaves them in float.
        skip: names, or first parts of names, of layers and operands left in float.

    Raises:
        Unsupported: there is no attention, or it cannot be taken out of its function.
        UserError: a layer is quantized already; there are fewer images.
    """
    model.eval()
    expose(model, data.example)
    weights = {name: width for name, _, width in select_layers(model, bits, edge_bits, skip)}
    refuse_quantized({name: model.get_submodule(name) for name in weights}, "repq_vit")
    inputs = {name: width for name, _, width in select_layers(model, activation_bits, edge_bits, skip)}
    inputs |= dict.fromkeys(operands(model, skip), activation_bits)
    walk = _Walk(model, weights, inputs, data.example)
    for stop in sweep(model, data.calibration.first(images), layers=inputs, walk_reference=False):
        walk.visit(stop)
        data.progress((stop.index + 1) / stop.total)
    walk.finish()
    data.record("repq_vit", {"aligned": sorted(walk.aligned), "softmax": sorted(walk.softmax)})
    return model


class _Walk:
    """The state of one pass: what each norm's channels are aligned by."""

    def __init__(self, model: nn.Module, weights: dict[str, int], inputs: dict[str, int], example: Tensor) -> None:
        self.model, self.weights, self.inputs = model, weights, inputs
        self.norms = {
            reader: norm
            for norm, readers in post_norm_layers(model, example).items()
            for reader in readers
            # A norm whose readers are quantized differently, or not all, stays as it is.
            if reader in inputs and len({inputs.get(other) for other in readers}) == 1
        }
        self.softmax = origins(model, example, ["_softmax"], operands(model)).keys()
        self.aligned: dict[str, Alignment] = {}

    def visit(self, stop: Stop) -> None:
        """Quantize an operand, or a layer with its input."""
        width = self.inputs[stop.name]
        x = torch.cat([part.reshape(-1, part.shape[-1]) for part in stop.inputs])
        quantizer: nn.Module
        if stop.name in self.norms:
            quantizer = _Aligned(self._alignment(stop.name, x, width), width)
            quantizer.alignment.fold_into_reader(self.model, stop.name)
        elif stop.name in self.softmax:
            quantizer = LogQuantizer(width, 2, percentile_top(x, partial(_log_sqrt2, width)))
        else:
            scale, zero = percentile_grids(x.reshape(1, -1), width)
            quantizer = StaticQuantizer(width, False, float(scale), int(zero))
        quantize_input(stop.layer, quantizer.to(x.device))
        if not isinstance(stop.layer, Operand):
            _round(stop.layer, self.weights[stop.name])

    def _alignment(self, name: str, x: Tensor, width: int) -> Alignment:
        norm = self.norms[name]
        if norm not in self.aligned:
            self.aligned[norm] = Alignment.of(*percentile_grids(x.T, width, around_zero=False), width)
        return self.aligned[norm]

    def finish(self) -> None:
        """Let the norms align the channels themselves."""
        for norm, alignment in self.aligned.items():
            alignment.fold_into_norm(self.model.get_submodule(norm))
        for reader in self.norms:
            layer = self.model.get_submodule(reader)
            quantizer = input_quantizer(layer)
            if isinstance(quantizer, _Aligned):
                quantize_input(layer, quantizer.common)


class _Aligned(nn.Module):
    """Stands in for a norm's alignment while images wait behind the norm."""

    def __init__(self, alignment: Alignment, width: int) -> None:
        super().__init__()
        self.alignment, self.common = alignment, StaticQuantizer(width, False, alignment.scale, alignment.zero)

    def forward(self, x: Tensor) -> Tensor:
        quantized: Tensor = self.common(self.alignment.apply(x))
        return quantized


def _log_sqrt2(width: int, points: Tensor, top: float) -> Tensor:
    quantized: Tensor = LogQuantizer(width, 2, top).to(points.device)(points)
    return quantized


def _round(layer: nn.Module, width: int) -> None:
    axis = output_axis(layer)
    scale, zero = percentile_grids(to_rows(weight_of(layer), axis), width)
    encode(layer, Affine.nearest(weight_of(layer), scale, bits=width, zero_point=zero, axis=axis))
