"""GPFQ: greedy path-following quantization."""

from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor, nn

from qbench.data import Data
from qbench.quant.alphabet import Alphabets
from qbench.quant.biases import shift_bias
from qbench.quant.gram import Grams, Sampling, grouped_weight
from qbench.quant.layers import encode, select_layers, weight_of
from qbench.quant.layerwise import Report, enough_rows, float_weight, same_inputs
from qbench.quant.path_following import align, follow_path
from qbench.quant.sweep import sweep
from qbench.registry import EdgeBits, LayerBits, method


@method("gpfq", paper="arXiv:2201.11113")
def gpfq(
    model: nn.Module,
    data: Data,
    *,
    bits: Annotated[int, Field(ge=1, le=12)] = 4,
    alphabet: Literal["midtread", "clipped", "linspace_zero", "median"] = "midtread",
    levels: Annotated[int, Field(ge=2, le=4096)] | None = None,
    c: Annotated[float, Field(gt=0)] = 1.16,
    percentile: Annotated[float, Field(gt=50, le=100)] = 100.0,
    step: Literal["radius", "mse"] = "radius",
    granularity: Literal["layer", "channel"] = "layer",
    sparsity: Literal["none", "soft", "hard"] = "none",
    threshold: Annotated[float, Field(ge=0)] = 0.0,
    act_order: bool = False,
    bias_correction: bool = False,
    images: Annotated[int, Field(ge=1)] | None = None,
    oversample: Annotated[int, Field(ge=1)] | None = 32,
    patch_stride: Literal["layer", "kernel"] = "layer",
    retain: Annotated[float, Field(gt=0, le=1)] | None = None,
    layer_bits: LayerBits = None,
    edge_bits: EdgeBits = None,
    skip: tuple[str, ...] = (),
) -> nn.Module:
    """Choose weights one after the other so that each makes up for the error of those before it.

    The target is each layer's output in the float network; the inputs are those of the network quantized so far.

    Args:
        model: changed in place.
        data: its calibration images, and its float network.
        bits: K = 2**(bits - 1) sets the size of the alphabet.
        alphabet: `midtread`: k * step, |k| <= K, which is 2**bits + 1 levels (the authors' code of 2023, v3);
            `clipped`: without +K, so 2**bits levels; `linspace_zero`: 2**bits values from -c * radius to c * radius,
            and 0 (code of January 2022); `median`: values from -c to c times the median absolute weight (code of
            2020).
        levels: how many the alphabet `median` has; default 2**bits.
        c: the largest level in units of the radius. The authors use 1.16 for ResNet-18, 1.77 for MobileNetV2, 1.81 for
            ResNet-50; larger alphabets leave room for making up for errors.
        percentile: of a neuron's absolute weights, in percent; their mean over the neurons is the radius.
        step: `radius`: c * radius / K; `mse`: the step with the least squared rounding error.
        granularity: one radius a layer, as the authors have it, or one an output channel.
        sparsity: `soft` moves values towards 0 by `threshold` before rounding (L1), `hard` sets those that are not
            beyond it to 0 and spreads the levels over the rest (L0).
        threshold: see sparsity, in units of the weights.
        act_order: take the inputs by decreasing energy instead of in their order.
        bias_correction: move each bias by the mean of the error that is left.
        images: use the first so many calibration images; default all.
        oversample: use about so many input patches for each weight of a neuron (and at least 16384 in all), spread
            evenly over the images; null uses every patch.
        patch_stride: `kernel` takes patches that do not overlap, as the authors do.
        retain: draw int(retain * L + 1) of the L patches of each image with replacement instead, as the authors do.
        layer_bits: bits of the layers whose name equals or begins with a key; 32 leaves them in float.
        edge_bits: bits of the first and the last layer; 32 leaves them in float.
        skip: names, or first parts of names, of layers left in float.

    Raises:
        Unsupported: a layer whose output is not its weight times its input patches, such as transposed convolutions.
        UserError: options that contradict each other, or a threshold beyond the largest level.
    """
    alphabets = Alphabets(alphabet, levels, c, percentile / 100, step, granularity, sparsity, threshold)
    alphabets.check()
    model.eval()
    chosen = {name: width for name, _, width in select_layers(model, bits, edge_bits, skip, layer_bits)}
    batches = data.calibration if images is None else data.calibration.first(images)
    report = Report("nearest")
    for stop in sweep(model, batches, reference=data.reference, layers=chosen):
        weight = float_weight(stop)
        rows = enough_rows(oversample, weight.shape[-1])
        sums = stop.grams(Sampling(patch_stride, rows, retain, seed=data.seed + stop.index))
        book = alphabets.build(weight.flatten(0, 1), chosen[stop.name])
        path = follow_path(weight, sums.H.float(), sums.G.float(), book, act_order=act_order)
        encode(stop.layer, book.encoding(path.indices.reshape(weight_of(stop.layer).shape)))
        aligned = None if same_inputs(stop) else align(weight, sums.H, sums.G, act_order=act_order)
        report.add_path(stop, weight, aligned, path.values, book.reach, sums)
        if bias_correction:
            shift_bias(model, stop.name, _mean_error(weight, grouped_weight(stop.layer), sums))
        data.progress((stop.index + 1) / stop.total)
    report.record(data, "gpfq", chosen)
    return model


def _mean_error(weight: Tensor, quantized: Tensor, sums: Grams) -> Tensor:
    """(N,): mean of `X W - X~ Q`."""
    wanted = weight.double() @ sums.float_mean[..., None]
    got = quantized.double() @ sums.mean[..., None]
    return (wanted - got).flatten()
