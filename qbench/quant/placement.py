"""How a network is quantized, layer by layer: what hardware must have to execute it."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn

from qbench.errors import Unsupported
from qbench.quant.activations import StaticQuantizer, input_quantizer
from qbench.quant.adjacency import foldable
from qbench.quant.edges import edges, expose
from qbench.quant.encodings import Affine, Encoding
from qbench.quant.layers import encodings, full_name, named_weight_layers


def placement(model: nn.Module, example: Tensor) -> dict[str, Any]:
    """Facts that a profile is compared with.

    Returns:
        `layers`: by name the `weight` and the `input`, None where they are float, else `kind` and, of uniform grids,
        `bits`, `symmetric`, `power_of_two` and of weights `granularity`; `edges`: the same of quantized operands of
        sums, products and concatenations, and of pools; `float_edges`: how many of these are not quantized, or None,
        with the `reason`; `norms`: how many batch norms could be folded.

    Args:
        model: in evaluation mode.
        example: an input, a batch of one.
    """
    attached = encodings(model)
    layers = {
        name: {"weight": _weight(attached.get(full_name(name, "weight"))), "input": _input(layer)}
        for name, layer in named_weight_layers(model).items()
    }
    quantized = {name: found for name, edge in edges(model).items() if (found := _input(edge)) is not None}
    return {
        "layers": layers,
        "edges": quantized,
        "norms": len(foldable(model, example)),
        **_float_edges(model, example),
    }


def _float_edges(model: nn.Module, example: Tensor) -> dict[str, Any]:
    exposed = copy.deepcopy(model)
    try:
        expose(exposed, example)
    except Unsupported as error:
        return {"float_edges": None, "reason": str(error)}
    # What joins read must be quantized; a maximum of codes is one without it.
    plain = [edge for edge in edges(exposed).values() if not isinstance(edge, (nn.MaxPool2d, nn.AdaptiveMaxPool2d))]
    return {"float_edges": sum(input_quantizer(edge) is None for edge in plain)}


def _weight(encoding: Encoding | None) -> dict[str, Any] | None:
    if encoding is None:
        return None
    if not isinstance(encoding, Affine):
        return {"kind": type(encoding).__name__}
    rows, groups = encoding.scale.shape
    return {
        "kind": "Affine",
        "bits": math.ceil(math.log2(encoding.levels)),
        "symmetric": encoding.zero_point is None or not bool(encoding.zero_point.any()),
        "power_of_two": _powers_of_two(encoding.scale),
        "granularity": "group" if groups > 1 else "channel" if rows > 1 else "tensor",
    }


def _input(module: nn.Module) -> dict[str, Any] | None:
    quantizer = input_quantizer(module)
    if quantizer is None:
        return None
    if not isinstance(quantizer, StaticQuantizer):
        return {"kind": getattr(quantizer, "kind", type(quantizer).__name__)}
    return {
        "kind": "static",
        "bits": quantizer.bits,
        "symmetric": int(quantizer.zero_point) == 0,
        "power_of_two": _powers_of_two(quantizer.scale),
    }


def _powers_of_two(scale: Tensor) -> bool:
    mantissa, _ = torch.frexp(scale)
    return bool((mantissa == 0.5).all())
