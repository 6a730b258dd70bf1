"""Weights moved to the ends of the grid where the data do not notice, then rounded (Maly & Saab)."""

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from qbench.data import Data
from qbench.quant.encodings import Affine
from qbench.quant.gram import Grams, Sampling, grouped_weight
from qbench.quant.layers import encode, select_layers, weight_of
from qbench.quant.layerwise import Report, enough_rows, float_weight, same_inputs
from qbench.quant.path_following import align
from qbench.quant.sweep import Stop, sweep
from qbench.quant.vertices import principal_rows, to_vertex
from qbench.registry import EdgeBits, LayerBits, method

_TINY = 1e-20  # the end of the grid of a neuron whose weights are 0


@method("msq_preprocess", paper="arXiv:2209.03487", in_the_manner_of=True)
def msq_preprocess(
    model: nn.Module,
    data: Data,
    *,
    bits: Annotated[int, Field(ge=1, le=16)] = 4,
    granularity: Literal["layer", "channel"] = "channel",
    share: Annotated[float, Field(gt=0, le=1)] = 0.5,
    rows: Annotated[int, Field(ge=1)] = 64,
    order: Annotated[int, Field(ge=1, le=100)] = 5,
    images: Annotated[int, Field(ge=1)] | None = None,
    oversample: Annotated[int, Field(ge=1)] | None = 32,
    layer_bits: LayerBits = None,
    edge_bits: EdgeBits = None,
    skip: tuple[str, ...] = (),
) -> nn.Module:
    """Move most weights to the ends of the grid without changing the answers, then round each to the nearest level.

    In the manner of Maly & Saab. A neuron's weights can move as long as its answers to m samples stay, until all but m
    of its d weights are at plus or minus the greatest; those are levels, so that only the others are rounded. Here the
    samples are the main directions of many inputs, and layers after the first start from weights that fit their inputs
    in the network quantized so far. Where few directions do not stand for the inputs, it is worse than rounding.

    Args:
        model: changed in place.
        data: its calibration images, and its float network.
        bits: 2**bits levels from -c to c.
        granularity: c is the greatest absolute weight of an output channel, or of the layer.
        share: directions that are kept, as part of a neuron's weights; 1 and few images give the paper's method.
        rows: keep no more than so many; time grows with their square.
        order: passes that fit the float weights to the inputs in the network quantized so far.
        images: use the first so many calibration images; default all.
        oversample: use about so many input patches for each weight of a neuron (and at least 16384 in all), spread
            evenly over the images; null uses every patch.
        layer_bits: bits of the layers whose name equals or begins with a key; 32 leaves them in float.
        edge_bits: bits of the first and the last layer; 32 leaves them in float.
        skip: names, or first parts of names, of layers left in float.

    Raises:
        Unsupported: a layer whose output is not its weight times its input patches, such as transposed convolutions.
    """
    model.eval()
    chosen = {name: width for name, _, width in select_layers(model, bits, edge_bits, skip, layer_bits)}
    batches = data.calibration if images is None else data.calibration.first(images)
    report = Report("vertices")
    for stop in sweep(model, batches, reference=data.reference, layers=chosen):
        weight = float_weight(stop)
        sampling = Sampling(rows=enough_rows(oversample, weight.shape[-1]), seed=data.seed + stop.index)
        sums, same = stop.grams(sampling), same_inputs(stop)
        start = weight.double() if same else align(weight, sums.H, sums.G, order)
        top = start.abs().amax(2, keepdim=True) if granularity == "channel" else start.abs().max().expand(1, 1, 1)
        limit = top.expand(*weight.shape[:2], 1).clamp(min=_TINY)
        kept = principal_rows(sums.H, min(rows, max(1, int(share * weight.shape[-1]))))
        z = to_vertex(start, kept, limit)
        gaps = 2 ** chosen[stop.name] - 1
        values = z.reshape(weight_of(stop.layer).shape)
        scale = 2 * (limit.flatten() if granularity == "channel" else limit[0, 0]) / gaps
        encode(stop.layer, Affine.nearest(values, scale.float(), low=0, high=gaps, zero_point=gaps / 2))
        _add(report, stop, weight, z, limit, gaps, sums)
        data.progress((stop.index + 1) / stop.total)
    report.record(data, "msq_preprocess", chosen)
    return model


def _add(report: Report, stop: Stop, weight: Tensor, z: Tensor, limit: Tensor, gaps: int, sums: Grams) -> None:
    """Weights at the ends are levels; each other one is at most half a gap from its own."""
    norms = sums.H.diagonal(dim1=1, dim2=2).clamp(min=0).sqrt()[:, None]
    distance = (z - grouped_weight(stop.layer)).abs()
    half = torch.where(z.abs() < limit, limit / gaps, 0.0)
    report.add(
        stop,
        weight,
        z,
        sums,
        rounding=float((half * norms).sum(2).norm()),
        residuals=float((distance * norms).sum(2).norm()),
        largest=float((half * norms).max()),
    )
