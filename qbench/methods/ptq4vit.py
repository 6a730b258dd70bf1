"""PTQ4ViT: twin uniform quantization, with scales searched by how much they change the network's outputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.func import functional_call

from qbench.data import Data
from qbench.errors import UserError
from qbench.quant.activations import StaticQuantizer, input_quantizers, quantize_input
from qbench.quant.channels import refuse_quantized
from qbench.quant.encodings import Affine, to_rows
from qbench.quant.evidence import Evidence, gather, probes
from qbench.quant.fakequant import reached
from qbench.quant.layers import encode, output_axis, select_layers, weight_of
from qbench.quant.matmuls import MatMul, expose, operands, products
from qbench.quant.origins import origins
from qbench.quant.scale_search import Factor, search
from qbench.quant.twin_quantizers import TwinGelu, TwinSoftmax
from qbench.registry import EdgeBits, method

_SPLITS = 2.0 ** -torch.arange(20)
_FIRST_SPLIT = 7  # of the search: about 0.01
_BATCH = 8  # images whose graph is in memory at a time


@method("ptq4vit", paper="arXiv:2111.12293", in_the_manner_of=True)
def ptq4vit(
    model: nn.Module,
    data: Data,
    *,
    bits: Annotated[int, Field(ge=2, le=8)] = 8,
    activation_bits: Annotated[int, Field(ge=2, le=8)] = 8,
    granularity: Literal["tensor", "channel"] = "tensor",
    twin: bool = True,
    metric: Literal["hessian", "mse"] = "hessian",
    least: Annotated[float, Field(gt=0)] = 0.01,
    most: Annotated[float, Field(gt=0)] = 1.2,
    candidates: Annotated[int, Field(ge=2)] = 101,
    rounds: Annotated[int, Field(ge=1)] = 3,
    images: Annotated[int, Field(ge=1)] = 32,
    edge_bits: EdgeBits = None,
    skip: tuple[str, ...] = (),
) -> nn.Module:
    """Quantize a transformer's weights, inputs and attention, with the scales that change its outputs least.

    The scales of a layer's weight and input, or of the two operands of a product, are searched in turn among multiples
    of the one that reaches to the extremes. Each layer is looked at by itself, in the float network. The error of each
    of its answers is squared and weighted by the Hessian's diagonal of the divergence of the network's outputs from
    themselves. In the manner of PTQ4ViT, because the authors' weight, that divergence's squared gradient, is 0 but for
    rounding errors; here it is estimated along random directions (`qbench.quant.evidence`).

    Args:
        model: changed in place.
        data: its calibration images.
        bits: width of the weights' codes.
        activation_bits: width of the codes of inputs and operands.
        granularity: of the weights' scales: one a tensor, as the authors have it, or one an output channel.
        twin: quantize what softmax and GELU return with two steps, one for small numbers or for those below 0, and one
            for the others.
        metric: `mse` does not weight the errors.
        least: the smallest multiple.
        most: the greatest multiple.
        candidates: how many there are, evenly spaced.
        rounds: how often weight and input are searched in turn, at most: less if nothing changes any more.
        images: use the first so many calibration images.
        edge_bits: bits of weights and inputs of the first and the last layer; 32 leaves them in float.
        skip: names, or first parts of names, of layers and products left in float.

    Raises:
        Unsupported: there is no attention, or it cannot be taken out of its function; the outputs are no logits.
        UserError: a layer or an input is quantized already; there are fewer images.
    """
    model.eval()
    expose(model, data.example)
    called = reached(model, data.example)
    weights = {name: width for name, _, width in select_layers(model, bits, edge_bits, skip) if name in called}
    inputs = {name: width for name, _, width in select_layers(model, activation_bits, edge_bits, skip)}
    refuse_quantized({name: model.get_submodule(name) for name in weights}, "ptq4vit")
    if input_quantizers(model):
        raise UserError("inputs are quantized already, and ptq4vit quantizes them: leave that step out")
    free = operands(model, skip).keys()
    whole = [name for name in products(model) if {f"{name}.left", f"{name}.right"} <= free]
    batches = data.calibration.first(images, _BATCH)
    combinations = probes(model, batches, data.seed)
    kinds = origins(model, data.example, ["gelu", "_softmax"], [*weights, *free]) if twin else {}
    grid = torch.linspace(least, most, candidates, device=data.device)
    found: list[Callable[[], None]] = []
    errors: dict[str, float] = {}
    for name in [*weights, *whole]:
        evidence = gather(model, name, batches, combinations)
        module = model.get_submodule(name)
        if name in weights:
            sides = (
                _weight(module, weights[name], granularity, grid),
                _input(module, evidence.inputs[0], inputs[name], kinds.get(name), grid),
            )
        else:
            left, right = (
                _input(operand, x, activation_bits, kinds.get(f"{name}.{side}"), grid)
                for (side, operand), x in zip(module.named_children(), evidence.inputs, strict=True)
            )
            sides = (left, right)
        errors[name] = _search(module, sides, evidence, metric, rounds)
        found += [side.attachment() for side in sides]
        data.progress(len(errors) / (len(weights) + len(whole)))
    # Only now, so that all of them were looked at in the float network.
    for attach in found:
        attach()
    data.record("ptq4vit", {"weighted_error": errors})
    return model


@dataclass
class _Side:
    """A factor of a product, and what attaches its quantization with the point that was found: it outlives the data."""

    factor: Factor
    attachment: Callable[[], Callable[[], None]]


def _weight(layer: nn.Module, width: int, granularity: str, grid: Tensor) -> _Side:
    weight, axis, half = weight_of(layer), output_axis(layer), 2 ** (width - 1)
    top = to_rows(weight, axis).abs().amax(1)
    reach = top.max() if granularity == "tensor" else top
    base = torch.where(reach > 0, reach, 1.0) / (half - 0.5)

    def spread(scale: Tensor) -> Tensor:
        return scale.reshape([-1 if i == axis else 1 for i in range(weight.dim())]) if scale.dim() else scale

    def quantized(point: Tensor) -> Tensor:
        scale = spread(point * base)
        return (weight / scale).round_().clamp_(-half, half - 1).mul_(scale)

    factor = Factor(quantized, grid, torch.ones_like(base))

    def attachment() -> Callable[[], None]:
        code = Affine.nearest(weight, factor.point * base, low=-half, high=half - 1, axis=axis)
        return partial(encode, layer, code)

    return _Side(factor, attachment)


def _input(module: nn.Module, x: Tensor, width: int, origin: str | None, grid: Tensor) -> _Side:
    reach = float(x.max() if origin == "gelu" else x.abs().max())
    base = (reach if reach > 0 else 1.0) / (2 ** (width - 1) - 0.5)
    start = torch.ones((), device=x.device)

    def quantizer(point: Tensor) -> nn.Module:
        if origin == "_softmax":
            return TwinSoftmax(width, float(point)).to(x.device)
        if origin == "gelu":
            return TwinGelu(width, float(point) * base).to(x.device)
        return StaticQuantizer(width, True, float(point) * base).to(x.device)

    if origin == "_softmax":
        grid, start = _SPLITS.to(x.device), start * _SPLITS[_FIRST_SPLIT]
    factor = Factor(lambda point: quantizer(point)(x), grid, start)
    return _Side(factor, lambda: partial(quantize_input, module, quantizer(factor.point)))


def _search(module: nn.Module, sides: tuple[_Side, _Side], evidence: Evidence, metric: str, rounds: int) -> float:
    def product(left: Tensor, right: Tensor) -> Tensor:
        if isinstance(module, MatMul):
            return left @ right
        answer: Tensor = functional_call(module, {"weight": left}, (right,))
        return answer

    importance = evidence.importance if metric == "hessian" else torch.ones_like(evidence.importance)
    channels = -1 if isinstance(module, (nn.Linear, MatMul)) else 1
    factors = (sides[0].factor, sides[1].factor)
    with torch.no_grad():
        return search(factors, product, evidence.outputs, importance, rounds=rounds, channels=channels)
