"""SPFQ: stochastic path-following quantization."""

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from qbench.data import Data
from qbench.errors import Unsupported
from qbench.quant.alphabet import radius
from qbench.quant.encodings import Affine
from qbench.quant.gram import Sampling
from qbench.quant.layers import encode, select_layers, weight_of
from qbench.quant.layerwise import Report, enough_rows, float_weight, same_inputs
from qbench.quant.path_following import align
from qbench.quant.stochastic import stochastic_path
from qbench.quant.sweep import sweep
from qbench.registry import EdgeBits, LayerBits, method


@method("spfq", paper="arXiv:2309.10975")
def spfq(
    model: nn.Module,
    data: Data,
    *,
    bits: Annotated[int, Field(ge=1, le=12)] = 4,
    order: Annotated[int, Field(ge=1, le=100)] = 1,
    alphabet: Literal["midtread", "infinite"] = "midtread",
    c: Annotated[float, Field(gt=0)] = 1.16,
    percentile: Annotated[float, Field(gt=50, le=100)] = 100.0,
    granularity: Literal["layer", "channel"] = "layer",
    images: Annotated[int, Field(ge=1)] | None = None,
    oversample: Annotated[int, Field(ge=1)] | None = 32,
    layer_bits: LayerBits = None,
    edge_bits: EdgeBits = None,
    skip: tuple[str, ...] = (),
) -> nn.Module:
    """Choose weights one after the other like GPFQ, but round each value up or down by chance, without bias.

    The chances are drawn from the run's seed, so results differ from seed to seed: compare means over several.

    Args:
        model: changed in place.
        data: its calibration images, its float network, and its seed.
        bits: levels are k * step with step = c * radius / K, K = 2**(bits - 1).
        order: passes over a neuron's weights that fit float weights to the inputs in the network quantized so far,
            before those weights are rounded.
        alphabet: `midtread`: |k| <= K, which is 2**bits + 1 levels; `infinite`: k is not bounded, so that codes take
            as many bits as the layer turns out to need.
        c: the largest level in units of the radius.
        percentile: of a neuron's absolute weights (from order 2 on, of the fitted ones), in percent; their mean over
            the neurons is the radius.
        granularity: one radius a layer, as the authors have it, or one an output channel.
        images: use the first so many calibration images; default all.
        oversample: use about so many input patches for each weight of a neuron (and at least 16384 in all), spread
            evenly over the images; null uses every patch.
        layer_bits: bits of the layers whose name equals or begins with a key; 32 leaves them in float.
        edge_bits: bits of the first and the last layer; 32 leaves them in float.
        skip: names, or first parts of names, of layers left in float.

    Raises:
        Unsupported: a layer whose output is not its weight times its input patches, such as transposed convolutions;
            an infinite alphabet that needs more than 16 bits.
    """
    model.eval()
    chosen = {name: width for name, _, width in select_layers(model, bits, edge_bits, skip, layer_bits)}
    batches = data.calibration if images is None else data.calibration.first(images)
    report = Report("stochastic")
    for stop in sweep(model, batches, reference=data.reference, layers=chosen):
        weight, seed = float_weight(stop), data.seed + stop.index
        sums = stop.grams(Sampling(rows=enough_rows(oversample, weight.shape[-1]), seed=seed))
        aligned = align(weight, sums.H, sums.G, order)
        seen = (weight if order == 1 else aligned).flatten(0, 1)
        largest = c * radius(seen, percentile / 100, granularity == "channel")
        width = chosen[stop.name]
        step = _above_zero(largest / 2 ** (width - 1))
        uniforms = torch.rand(weight.shape, generator=torch.Generator().manual_seed(seed))
        try:
            codes, values = stochastic_path(
                aligned, sums.H.float(), step, uniforms, None if alphabet == "infinite" else width
            )
        except Unsupported as error:
            raise Unsupported(f"{stop.name}: {error}") from None
        top = int(codes.abs().max()) if alphabet == "infinite" else 2 ** (width - 1)
        shaped = codes.reshape(weight_of(stop.layer).shape).to(torch.int32)
        encode(stop.layer, Affine(shaped, step.float().reshape(-1, 1), -top, top))
        report.add_path(stop, weight, None if same_inputs(stop) else aligned, values, step, sums)
        data.progress((stop.index + 1) / stop.total)
    report.record(data, "spfq", chosen)
    return model


def _above_zero(step: Tensor) -> Tensor:
    """Dead neurons have no radius; any step will do for them."""
    return torch.where(step > 0, step, torch.ones_like(step))
