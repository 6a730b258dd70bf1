"""AdaRound: learned rounding, layer by layer."""

from dataclasses import replace
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from qbench.data import Data
from qbench.quant.encodings import Affine, from_rows, to_rows
from qbench.quant.gram import Grams, Sampling
from qbench.quant.layers import encode, output_axis, select_layers
from qbench.quant.path_following import squared_error
from qbench.quant.reconstruction import float_weight, minimise
from qbench.quant.soft_rounding import SoftRounding, fitted_grid
from qbench.quant.sweep import sweep
from qbench.registry import EdgeBits, method


@method("adaround", paper="arXiv:2004.10568")
def adaround(
    model: nn.Module,
    data: Data,
    *,
    bits: Annotated[int, Field(ge=2, le=8)] = 4,
    granularity: Literal["tensor", "channel"] = "channel",
    symmetric: bool = True,
    steps: Annotated[int, Field(ge=1)] = 1000,
    rounding_weight: Annotated[float, Field(gt=0)] = 0.01,
    images: Annotated[int, Field(ge=1)] | None = None,
    edge_bits: EdgeBits = None,
    skip: tuple[str, ...] = (),
) -> nn.Module:
    """Learn for each weight whether to round it up or down, so that the layer's output changes least.

    The target is each layer's output in the float network; the inputs are those of the network quantized so far. The
    layer's squared error is a quadratic form in its weights, so it is taken over all images at once, from Gram
    matrices, in place of random batches; it is that of the layer itself, without the activation function behind it.

    Args:
        model: changed in place.
        data: its calibration images, and its float network.
        bits: width of the codes.
        granularity: one scale per tensor or per output channel; it minimises sum |w - q|^2.4 and is kept.
        symmetric: codes from -(2**(bits-1) - 1) to 2**(bits-1) - 1 about 0; otherwise 0 to 2**bits - 1, zero point.
        steps: of Adam, per layer; the authors take 10,000 to 20,000 on random batches.
        rounding_weight: of the penalty that decides the roundings.
        images: use the first so many calibration images; default all.
        edge_bits: bits of the first and the last layer; 32 leaves them in float.
        skip: names, or first parts of names, of layers left in float.

    Raises:
        Unsupported: a layer whose output is not its weight times its input patches, such as transposed convolutions.
    """
    model.eval()
    chosen = {name: width for name, _, width in select_layers(model, bits, edge_bits, skip)}
    batches = data.calibration if images is None else data.calibration.first(images)
    errors: dict[str, tuple[float, float]] = {}
    for stop in sweep(model, batches, reference=data.reference, layers=chosen):
        weight = float_weight(stop.name, stop.layer, stop.reference_layer)
        axis = output_axis(stop.layer)
        grid = fitted_grid(weight, chosen[stop.name], symmetric=symmetric, granularity=granularity, axis=axis)
        sums = stop.grams(Sampling(seed=data.seed))
        encoding, errors[stop.name] = learn_rounding(weight, grid, sums, steps=steps, rounding_weight=rounding_weight)
        encode(stop.layer, encoding)
        data.progress((stop.index + 1) / stop.total)
    data.record("reconstruction_error", errors)
    return model


def learn_rounding(
    weight: Tensor, grid: Affine, sums: Grams, *, steps: int, rounding_weight: float = 0.01
) -> tuple[Affine, tuple[float, float]]:
    """The rounding of a layer's weight that makes `||X W - X~ Q||` small, in no row greater than rounding to nearest.

    Args:
        weight: of the layer.
        grid: rounding to nearest.
        sums: Gram matrices of the layer's inputs.
        steps: of Adam.
        rounding_weight: of the penalty.

    Returns:
        the encoding; the relative squared errors of rounding to nearest, and of the encoding.
    """
    H = sums.H / sums.rows
    grouped = weight.reshape(len(H), -1, H.shape[-1])
    # ||X W - X~ Q||^2 = D'HD + 2 D'R + constant, with D = Q - W: no difference of large numbers.
    R = grouped.double() @ (H - sums.G.mT / sums.rows)
    Hf, Rf = H.float(), R.float()
    soft = SoftRounding(weight, grid)

    def loss() -> Tensor:
        D = soft.rows().view_as(grouped) - grouped
        slope = (D.detach() @ Hf).add_(Rf).mul_(2)
        # The tangent at D: its gradient is the loss's own, for one matrix product instead of two.
        return (slope * D).sum()

    minimise(loss, [], steps=steps, roundings=[soft], rounding_weight=rounding_weight)
    learned = soft.encoding(weight)

    def rows(codes: Affine) -> Tensor:
        return to_rows(codes.decode(), codes.axis).view_as(grouped)

    def excess(codes: Affine) -> Tensor:
        D = (rows(codes) - grouped).double()
        return ((D @ H + 2 * R) * D).sum(2).flatten()

    def error(codes: Affine) -> float:
        assert sums.F is not None
        apart, energy = squared_error(grouped, rows(codes), sums.H, sums.G, sums.F)
        return float(apart.sum() / energy.sum().clamp(min=torch.finfo(torch.float64).tiny))

    better = (excess(learned) <= excess(grid))[:, None]
    picked = torch.where(better, to_rows(learned.codes, grid.axis), to_rows(grid.codes, grid.axis))
    kept = replace(grid, codes=from_rows(picked, weight.shape, grid.axis))
    return kept, (error(grid), error(kept))
