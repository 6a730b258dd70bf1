"""The loop of methods that round a layer from its float weight and the Hessian of its squared error."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from qbench.data import Data
from qbench.errors import Unsupported, UserError
from qbench.quant.encodings import Encoding
from qbench.quant.gram import Sampling, grouped_weight
from qbench.quant.layers import encode, select_layers, weight_of
from qbench.quant.layerwise import enough_rows, float_weight
from qbench.quant.path_following import squared_error
from qbench.quant.sweep import sweep
from qbench.registry import EdgeBits, LayerBits

Round = Callable[[Tensor, Tensor, int, torch.Size], Encoding]
"""From the weight (groups, n, d), H (groups, d, d), the bits and the weight's shape to the encoding of the weight."""


def round_layers(
    model: nn.Module,
    data: Data,
    rounding: Round,
    *,
    bits: int,
    images: int | None,
    oversample: int | None,
    layer_bits: LayerBits,
    edge_bits: EdgeBits,
    skip: tuple[str, ...],
) -> nn.Module:
    """Round layer by layer in the order of execution, H being X~'X~ of the inputs in the network quantized so far.

    `||X W - X~ Q|| / ||X W||` of each layer is recorded as `layer_error`.

    Args:
        model: changed in place.
        data: its calibration images, and its float network.
        rounding: how a layer is rounded.
        bits: of all layers but the edges.
        images: use the first so many calibration images; None for all.
        oversample: use about so many input patches for each weight of a neuron; None for all.
        layer_bits: of single layers.
        edge_bits: bits of the first and the last layer.
        skip: layers left in float.

    Raises:
        Unsupported: a layer whose output is not its weight times its input patches, or that `rounding` cannot do.
        UserError: what `rounding` raises, with the layer's name.
    """
    model.eval()
    chosen = {name: width for name, _, width in select_layers(model, bits, edge_bits, skip, layer_bits)}
    batches = data.calibration if images is None else data.calibration.first(images)
    errors: dict[str, float] = {}
    for stop in sweep(model, batches, reference=data.reference, layers=chosen):
        weight = float_weight(stop)
        rows = enough_rows(oversample, weight.shape[-1])
        sums = stop.grams(Sampling(rows=rows, seed=data.seed + stop.index))
        try:
            encode(stop.layer, rounding(weight, sums.H, chosen[stop.name], weight_of(stop.layer).shape))
        except (Unsupported, UserError) as reason:
            raise type(reason)(f"{stop.name}: {reason}") from None
        assert sums.F is not None
        error, energy = squared_error(weight, grouped_weight(stop.layer), sums.H, sums.G, sums.F)
        errors[stop.name] = float((error.sum() / energy.sum().clamp(min=torch.finfo(torch.float64).tiny)).sqrt())
        data.progress((stop.index + 1) / stop.total)
    data.record("layer_error", errors)
    return model
