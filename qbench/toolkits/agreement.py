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
from qbench.runtimes.base import flatten

TOLERANCE = 0.25
"""Greatest distance between both networks' answers, in parts of what quantization changes about them (2-norms)."""
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
    the toolkit does must answer like the toolkit's network, but for the order of sums in float32.

    Args:
        model: with all that the toolkit decided.
        toolkits: the toolkit's network.
        floats: the float network.
        batches: calibration images.
        toolkit: its name, for errors.
        rounding: the toolkit's; None is that of quantizers here.

    Returns:
        `distance`, that of the copy (`with_its_rounding`), the share of images with the `same_guess`, and `images`.

    Raises:
        Unsupported: the copy is more than `TOLERANCE` apart: the toolkit does something that was not read.
    """
    alike = copy.deepcopy(model).cpu()
    if rounding is not None:
        for quantizer in input_quantizers(alike).values():
            vars(quantizer)["forward"] = partial(_round, quantizer, rounding)
    changed, ours, copied, same, images = 0.0, 0.0, 0.0, 0, 0
    for batch in batches.first(min(_IMAGES, batches.images)):
        wanted, answers = _joined(toolkits(batch.cpu())), _joined(model(batch))
        changed += float((wanted - _joined(floats(batch.cpu()))).square().sum())
        ours += float((wanted - answers).square().sum())
        copied += float((wanted - _joined(alike(batch.cpu()))).square().sum())
        same += int((answers.argmax(1) == wanted.argmax(1)).sum())
        images += len(batch)
    distance, with_its_rounding = ((apart / changed) ** 0.5 if apart else 0.0 for apart in (ours, copied))
    if not with_its_rounding <= TOLERANCE:
        raise Unsupported(
            f"the network as read from {toolkit} answers unlike {toolkit}'s own: {with_its_rounding:.2f} of what"
            f" quantization changes apart, {TOLERANCE} are allowed; {toolkit} does something that was not read"
        )
    return {
        "distance": distance,
        "with_its_rounding": with_its_rounding,
        "same_guess": same / images,
        "images": images,
    }


def _joined(outputs: Any) -> Tensor:
    """(B, n) all outputs of each image in a row."""
    return torch.cat([tensor.cpu().double().flatten(1) for tensor in flatten(outputs)], dim=1)


def _round(quantizer: Any, rounding: Rounding, x: Tensor) -> Tensor:
    shape = (-1, *(1 for _ in x.shape[2:])) if quantizer.scale.dim() else ()
    scale, zero = quantizer.scale.view(shape), quantizer.zero_point.view(shape)
    low = quantizer.low if isinstance(quantizer, StaticQuantizer) else 0
    return (rounding(x, scale, zero).clamp(low, low + 2**quantizer.bits - 1) - zero) * scale
