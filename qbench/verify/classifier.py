"""A quantized classifier of 8-bit images, as its robustness is looked at."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qbench.models.base import Preprocess
from qbench.quant.activations import StaticQuantizer, input_quantizers, quantize_input
from qbench.quant.dropped_input import DroppedInput
from qbench.verify.graph import Graph, trace
from qbench.verify.ibp import FLOAT32, Bounds, margins
from qbench.verify.interval import Interval


@dataclass(frozen=True)
class Pixels:
    """Boxes of images (B, C, H, W): whole numbers from 0 to 255, in float32."""

    low: Tensor
    high: Tensor

    @staticmethod
    def around(images: Tensor, radius: int) -> Pixels:
        """Every pixel may change by `radius`."""
        centre = images.float()
        return Pixels((centre - radius).clamp(min=0), (centre + radius).clamp(max=255))

    def __len__(self) -> int:
        return len(self.low)

    def __getitem__(self, index: Tensor | slice) -> Pixels:
        return Pixels(self.low[index], self.high[index])


@dataclass(frozen=True)
class Classifier:
    """A network on the CPU, in float32: with the convolutions of other devices nobody knows how far they round."""

    network: nn.Module
    graph: Graph
    preprocess: Preprocess

    @staticmethod
    def of(network: nn.Module, preprocess: Preprocess) -> Classifier:
        """
        Raises:
            Unsupported: there are no bounds for an operation of the network.
        """
        own = straight_through(network)
        return Classifier(own, trace(own), preprocess)

    def __call__(self, pixels: Tensor) -> Tensor:
        """Logits (B, classes)."""
        logits: Tensor = self.network(self.preprocess.normalize(pixels))
        return logits

    def margins(self, box: Pixels, targets: Tensor) -> Tensor:
        """Lower bounds (B, classes), float64, of the target's logit less every other, which hold for all pixels in the
        box, however float32 rounds; the targets' own are infinite."""
        # Monotone, so that the ends stay ends when they are rounded.
        ends = (self.preprocess.normalize(end).double() for end in (box.low, box.high))
        return margins(self.graph, Interval(*ends), targets, Bounds(FLOAT32))


def straight_through(network: nn.Module) -> nn.Module:
    """A copy on the CPU with the same answers, bit for bit, through whose input quantizers gradients pass."""
    own = copy.deepcopy(network).cpu().eval()
    for name, quantizer in input_quantizers(own).items():
        if type(quantizer) is StaticQuantizer:
            quantize_input(own.get_submodule(name), DroppedInput(quantizer, 1.0, torch.Generator()))
    return own.requires_grad_(False)
