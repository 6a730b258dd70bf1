"""Product quantization."""

import math
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from qbench.data import Data
from qbench.quant.encodings import VectorCodebook, to_rows
from qbench.quant.gram import Sampling, groups_of
from qbench.quant.layers import encode, output_axis, select_layers, weight_of
from qbench.quant.sweep import sweep
from qbench.quant.vectors import cluster
from qbench.registry import method

Width = Annotated[int, Field(ge=1, le=12)]
_ROWS = 16384  # input patches from which a metric is taken
_DAMPING = 1e-3  # of the mean diagonal


@method("product", paper="arXiv:1907.05686", in_the_manner_of=True)
def product(
    model: nn.Module,
    data: Data,
    *,
    bits: Width = 8,
    dimension: Annotated[int, Field(ge=1, le=128)] | None = None,
    weighting: Literal["activations", "none"] = "activations",
    iterations: Annotated[int, Field(ge=1, le=1000)] = 25,
    layer_bits: dict[str, Width | Literal[32]] | None = None,
    edge_bits: Width | Literal[32] | None = None,
    skip: tuple[str, ...] = (),
) -> nn.Module:
    """Cut each row of weights into vectors, and replace each by one of 2**bits centroids (product quantization).

    Layer by layer in the order of execution, centroids are chosen for the least error of the layer's outputs: each
    vector's error is weighed by the second moments of the inputs that it meets in the network quantized so far. A
    layer has a centroid for every four vectors at most. The codewords are not fine-tuned, as the paper does it.

    Args:
        model: changed in place.
        data: its calibration images, where errors are weighed; its seed draws the start. Takes each layer's relative
            error as `product`.
        bits: of a code, for `dimension` weights.
        dimension: weights in a vector; default the kernel of a convolution (9 for 3x3), and 4 without one.
        weighting: `none` gives all weights the same error, and needs no images.
        iterations: of k-means at most.
        layer_bits: bits of the layers whose name equals or begins with a key; 32 leaves them in float.
        edge_bits: bits of the first and the last layer; 32 leaves them in float.
        skip: names, or first parts of names, of layers left in float.

    Raises:
        Unsupported: a layer whose output is not its weight times its input patches, unless weighting=none.
    """
    model.eval()
    chosen = {name: (layer, width) for name, layer, width in select_layers(model, bits, edge_bits, skip, layer_bits)}
    errors: dict[str, float] = {}
    if weighting == "none":
        for done, (name, (layer, width)) in enumerate(chosen.items(), 1):
            errors[name] = _quantize(layer, None, width, dimension, iterations, data.seed)
            data.progress(done / len(chosen))
    else:
        for stop in sweep(model, data.calibration, layers=list(chosen), walk_reference=False):
            moments = stop.grams(Sampling(rows=_ROWS, seed=data.seed + stop.index)).H
            errors[stop.name] = _quantize(
                stop.layer, moments, chosen[stop.name][1], dimension, iterations, data.seed + stop.index
            )
            data.progress((stop.index + 1) / stop.total)
    data.record("product", {"error": errors, "unreached": sorted(chosen.keys() - errors.keys())})
    return model


def _quantize(
    layer: nn.Module, moments: Tensor | None, bits: int, dimension: int | None, iterations: int, seed: int
) -> float:
    """Encode the layer; the weighed squared error relative to the weighed squared weights."""
    weight, axis = weight_of(layer), output_axis(layer)
    rows = to_rows(weight, axis)
    g = min(dimension or _kernel(weight), rows.shape[1])
    blocks = -(-rows.shape[1] // g)
    groups = 1 if moments is None else groups_of(layer)
    padded = functional.pad(rows, (0, blocks * g - rows.shape[1])).view(groups, -1, blocks, g)
    vectors = padded.transpose(1, 2).flatten(0, 1)
    metric = _metric(moments, blocks, g, vectors)
    k = min(2**bits, max(1, vectors.shape[0] * vectors.shape[1] // 4))
    found = cluster(vectors, metric, k, iterations, seed)
    codes = found.codes.view(groups, blocks, -1).transpose(1, 2).reshape(len(rows), blocks)
    encode(layer, VectorCodebook(codes.to(torch.int32), found.centroids.float(), tuple(weight.shape), axis))
    energy = float(((vectors.double() @ metric) * vectors).sum())
    return found.objectives[-1] / energy if energy else 0.0


def _kernel(weight: Tensor) -> int:
    area = math.prod(weight.shape[2:])
    return area if area > 1 else 4


def _metric(moments: Tensor | None, blocks: int, g: int, like: Tensor) -> Tensor:
    """(B, g, g): the second moments of the inputs of each block, damped so that dead inputs count a bit."""
    unit = torch.eye(g, dtype=torch.float64, device=like.device)
    if moments is None:
        return unit.expand(len(like), g, g)
    missing = blocks * g - moments.shape[-1]
    padded = functional.pad(moments.double(), (0, missing, 0, missing))
    own = padded.view(-1, blocks, g, blocks, g).diagonal(dim1=1, dim2=3).movedim(-1, 1).flatten(0, 1)
    mean = own.diagonal(dim1=1, dim2=2).mean()
    return own / mean + _DAMPING * unit if mean > 0 else unit.expand(len(like), g, g)
