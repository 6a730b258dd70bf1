"""Magnitude pruning."""

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from qbench.data import Data
from qbench.errors import UserError
from qbench.quant.layers import encodings, select_layers, weight_of
from qbench.quant.pruning import set_zeros
from qbench.registry import method


@method("prune", paper="arXiv:1506.02626")
def prune(
    model: nn.Module,
    data: Data,
    *,
    sparsity: Annotated[float, Field(ge=0, lt=1)] = 0.5,
    granularity: Literal["network", "layer"] = "layer",
    skip: tuple[str, ...] = (),
) -> nn.Module:
    """Set the smallest weights to zero, for later steps to quantize and compress.

    The zeros hold: a later method either gives these weights the value 0 or stops as unsupported. Uniform grids have a
    0, and `kmeans` and `ecsq` move the level nearest to it there; methods that start from the float network again
    (`gpfq`), or that share codes between weights (`product`), do not keep zeros. Nothing is trained: let `bias_correct`
    follow, because the mean of each layer's output shifts.

    Args:
        model: not quantized yet; changed in place.
        data: takes the share of zeros of each layer, as `prune`.
        sparsity: share of weights set to zero.
        granularity: `layer` prunes that share of each layer; `network` the smallest of all layers together.
        skip: names, or first parts of names, of layers left as they are.

    Raises:
        UserError: a layer is quantized already.
    """
    chosen = {name: layer for name, layer, _ in select_layers(model, 16, skip=skip)}
    done = [name for name in encodings(model) if name.removesuffix(".weight") in chosen]
    if done:
        raise UserError(f"prune: {done[0]} is quantized already; put prune in front of the step that does it")
    weights = [weight_of(layer) for layer in chosen.values()]
    if granularity == "layer":
        masks = [_smallest(weight.flatten(), sparsity).view_as(weight) for weight in weights]
    else:
        flat = _smallest(torch.cat([weight.flatten() for weight in weights]), sparsity)
        parts = flat.split([weight.numel() for weight in weights])
        masks = [part.view_as(weight) for part, weight in zip(parts, weights, strict=True)]
    for layer, mask in zip(chosen.values(), masks, strict=True):
        with torch.no_grad():
            layer.weight.masked_fill_(mask, 0)  # type: ignore[operator]
        set_zeros(layer, mask)
    data.record("prune", {name: float(mask.float().mean()) for name, mask in zip(chosen, masks, strict=True)})
    return model


def _smallest(weights: Tensor, share: float) -> Tensor:
    """Which of the weights (n,) are the round(share * n) smallest in magnitude; the first ones of equals."""
    mask = torch.zeros_like(weights, dtype=torch.bool)
    mask[weights.abs().sort(stable=True).indices[: round(share * len(weights))]] = True
    return mask
