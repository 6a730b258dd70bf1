"""Does a network answer as that of the toolkit from which it was read?"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from qbench.data import Batches
from qbench.errors import Unsupported
from qbench.quant.activations import StaticQuantizer, input_quantizers
from qbench.quant.layers import named_weight_layers
from qbench.runtimes.base import flatten

TOLERANCE = 0.25
"""Greatest distance between both networks' answers, in parts of what quantization changes about them (2-norms)."""
_NUDGE = 1 + 1e-6
_IMAGES = 32

Rounding = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Codes of values: `(x, scale, zero_point) -> codes`, not yet clamped; what is halfway is where toolkits differ."""


@torch.no_grad()
def compare(
    model: nn.Module,
    toolkits: Callable[[Tensor], Any],
    floats: nn.Module,
    batches: Batches,
    toolkit: str,
    rounding: Rounding | None = None,
) -> dict[str, Any]:
    """How far the model's answers are from those of the toolkit's own network.

    Distances are those of all answers (2-norm), relative to what quantization changes about the toolkit's network.
    Values halfway between two codes are frequent: pixels, averages of codes. A copy of the model that rounds them as
    the toolkit does must answer like the toolkit's network, but for the order of sums in float32. What that order can
    change is measured: one value that is rounded otherwise moves others, layer after layer, and some networks with
    quantizers on every edge move further by it than `TOLERANCE`.

    Args:
        model: with all that the toolkit decided.
        toolkits: the toolkit's network.
        floats: the float network.
        batches: calibration images.
        toolkit: its name, for errors.
        rounding: the toolkit's; None is that of quantizers here.

    Returns:
        `distance`, that of the copy (`with_its_rounding`), how far the copy is from itself if its layers' sums
        change by a millionth (`nudged`), the share of images with the `same_guess`, and `images`.

    Raises:
        Unsupported: the copy is more than `TOLERANCE` apart, and further than from itself: the toolkit does something
            that was not read.
    """
    alike = copy.deepcopy(model).cpu()
    if rounding is not None:
        for quantizer in input_quantizers(alike).values():
            vars(quantizer)["forward"] = partial(_round, quantizer, rounding)
    elsewhere = nudged(alike)
    changed, ours, copied, moved, same, images = 0.0, 0.0, 0.0, 0.0, 0, 0
    for batch in batches.first(min(_IMAGES, batches.images)):
        wanted, answers, copys = _joined(toolkits(batch.cpu())), _joined(model(batch)), _joined(alike(batch.cpu()))
        changed += float((wanted - _joined(floats(batch.cpu()))).square().sum())
        ours += float((wanted - answers).square().sum())
        copied += float((wanted - copys).square().sum())
        moved += float((copys - _joined(elsewhere(batch.cpu()))).square().sum())
        same += int((answers.argmax(1) == wanted.argmax(1)).sum())
        images += len(batch)
    distance, with_its_rounding, itself = ((d / changed) ** 0.5 if d else 0.0 for d in (ours, copied, moved))
    allowed = max(TOLERANCE, itself)
    if not with_its_rounding <= allowed:
        raise Unsupported(
            f"the network as read from {toolkit} answers unlike {toolkit}'s own: {with_its_rounding:.2f} of what"
            f" quantization changes apart, {allowed:.2f} are allowed; {toolkit} does something that was not read"
        )
    return {
        "distance": distance,
        "with_its_rounding": with_its_rounding,
        "nudged": itself,
        "same_guess": same / images,
        "images": images,
    }


def nudged(model: nn.Module) -> nn.Module:
    """A copy whose layers' sums change by a millionth, about what the order of their terms does to them in float32."""
    copied = copy.deepcopy(model)
    for layer in named_weight_layers(copied).values():
        layer.register_forward_hook(lambda _layer, _inputs, sums: sums * _NUDGE)
    return copied


def _joined(outputs: Any) -> Tensor:
    """(B, n) all outputs of each image in a row."""
    return torch.cat([tensor.cpu().double().flatten(1) for tensor in flatten(outputs)], dim=1)


def _round(quantizer: Any, rounding: Rounding, x: Tensor) -> Tensor:
    shape = (-1, *(1 for _ in x.shape[2:])) if quantizer.scale.dim() else ()
    scale, zero = quantizer.scale.view(shape), quantizer.zero_point.view(shape)
    low = quantizer.low if isinstance(quantizer, StaticQuantizer) else 0
    return (rounding(x, scale, zero).clamp(low, low + 2**quantizer.bits - 1) - zero) * scale
