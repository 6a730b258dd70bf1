"""QA-IBP: quantization-aware training for networks whose robustness can be proved."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from qbench.data import Data
from qbench.errors import Unsupported
from qbench.models.base import Preprocess
from qbench.quant.fakequant import Granularity, LearnedInput, LearnedWeight
from qbench.quant.qat import train_quantized
from qbench.quant.schedule import Schedule
from qbench.quant.training import Step
from qbench.registry import method
from qbench.verify.graph import Graph, trace
from qbench.verify.ibp import Bounds, margins
from qbench.verify.interval import Interval

_RAMP = 0.9  # of the training, in which radius and weights of the losses grow
_BEYOND = 0.1  # grey levels that are trained for beyond the radius
Weight = Annotated[float, Field(ge=0)]
Loss = Callable[[Any, Any], Tensor]


@method("qa_ibp", track="qat", paper="arXiv:2211.16187", in_the_manner_of=True)
def qa_ibp(
    model: nn.Module,
    data: Data,
    *,
    bits: Annotated[int, Field(ge=2, le=8)] = 8,
    activation_bits: Annotated[int, Field(ge=2, le=8)] = 8,
    granularity: Granularity = "tensor",
    radius: Annotated[float, Field(ge=0, le=255)] = 4.0,
    robustness: Weight = 0.5,
    tightness: Weight = 0.001,
    margin: Weight = 0.2,
    correct_only: bool = True,
    schedule: Schedule = Schedule(epochs=60, lr=1e-3, optimizer="adamw", weight_decay=5e-5, freeze_bn=0.0),
) -> nn.Module:
    """Train the quantized network so that intervals prove its answers for all images in a box (QA-IBP).

    To the task's loss come `robustness` times what the proved margins of the true class lack of `margin`, and
    `tightness` times the widths of the intervals, layer by layer. Radius and both weights grow linearly over 90 % of
    the training. Quantizers are those of LSQ, where the paper's are fixed point with given ranges.

    Args:
        model: the float model.
        data: with training images.
        bits: of the weights.
        activation_bits: of the inputs of the same layers, unsigned where the first batch has no negative values.
        granularity: one step per weight tensor or per output channel.
        radius: what every pixel may change by, of 255.
        robustness: weight of the margins' loss.
        tightness: weight of the widths.
        margin: what the true class's logit should be above any other.
        correct_only: images count for the margins only while they are classified correctly.
        schedule: of the training.

    Raises:
        Unsupported: there are no bounds for an operation of the network, or it is no classifier.
    """
    if data.preprocess is None:
        raise Unsupported("it is not known how the images were prepared, and so not what a grey level is")
    box = _Box.of(data.preprocess, radius, data.device)
    robust = _Robust(data.loss, box, robustness, tightness, margin, correct_only)
    robust.look(model.eval(), data.example)

    def learned(weight: Tensor, width: int, axis: int) -> LearnedWeight:
        return LearnedWeight(weight, width, granularity, axis)

    return train_quantized(
        model,
        data,
        schedule,
        learned,
        LearnedInput,
        name="qa_ibp",
        bits=bits,
        activation_bits=activation_bits,
        objective=robust,
        on_step=robust.see,
    )


@dataclass(frozen=True)
class _Box:
    """What an image may become, in units of the network's input, (C, 1, 1) each."""

    black: Tensor
    white: Tensor
    radius: Tensor

    @staticmethod
    def of(preprocess: Preprocess, radius: float, device: torch.device) -> _Box:
        ends = torch.tensor([0.0, 255.0], device=device).view(2, 1, 1, 1).expand(2, preprocess.channels, 1, 1)
        black, white = preprocess.normalize(ends)
        return _Box(black, white, (radius + _BEYOND) / 255 * (white - black))

    def around(self, images: Tensor, share: float) -> Interval:
        """Boxes of images (B, C, H, W) with a share of the radius."""
        low, high = images - share * self.radius, images + share * self.radius
        return Interval(low.maximum(self.black), high.minimum(self.white))


class _Robust:
    """The loss, which changes with the share of the training that is done."""

    def __init__(
        self, loss: Loss, box: _Box, robustness: float, tightness: float, margin: float, correct_only: bool
    ) -> None:
        self.loss, self.box, self.margin, self.correct_only = loss, box, margin, correct_only
        self.robustness, self.tightness = robustness, tightness
        self.share = 0.0
        self.graph: Graph | None = None

    def look(self, model: nn.Module, image: Tensor) -> None:
        """Refuse what there are no bounds for, before anything is trained."""
        first = torch.zeros(1, dtype=torch.long, device=image.device)
        margins(trace(model), self.box.around(image, 0.0), first, Bounds())

    def see(self, step: Step) -> None:
        """A step was done."""
        self.share = min(1.0, step.done / _RAMP)

    def __call__(self, net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        self.graph = self.graph or trace(net)
        outputs, bounds = net(x), Bounds()
        lowest = margins(self.graph, self.box.around(x, self.share), y, bounds)
        lacking = (self.margin - lowest).clamp(min=0).sum(1) / lowest.shape[1]
        if self.correct_only:
            lacking = lacking * (outputs.argmax(1) == y)
        widths = sum(bounds.widths[1:])
        return self.loss(outputs, y) + self.share * (self.robustness * lacking.mean() + self.tightness * widths)
