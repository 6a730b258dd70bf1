"""Single-stage detectors from parts of torchvision: the network is backbone and heads, all behind them is outside.

torchvision's own detectors resize images, make anchors, and decode and suppress boxes inside of `forward`. Here these
parts are taken apart, so that what is quantized, exported and timed is tensors in, tensors out.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection import FCOS
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.ssd import SSD
from torchvision.ops import box_iou

from qbench.datasets.base import Boxes
from qbench.errors import UserError
from qbench.models.base import Detections, Model, Preprocess, Weights
from qbench.models.checkpoints import Checkpoint
from qbench.models.timm import Random
from qbench.quant.heads import Heads, declare
from qbench.quant.layers import named_weight_layers

Build = Callable[[], Any]
"""Makes a detector of torchvision."""


class Network(nn.Module):
    """Backbone and heads of a detector, under torchvision's names of parameters.

    Heads that all maps of a pyramid share are a module for each map, with the same parameters: so each map has input
    quantizers of its own, whose ranges are those of its features. `head` is that of the first map.
    """

    def __init__(self, detector: Any) -> None:
        super().__init__()
        self.backbone, self.head = detector.backbone, detector.head
        levels = 1 if isinstance(detector, SSD) else len(detector.anchor_generator.sizes)
        self.shared = nn.ModuleList(same_parameters(self.head) for _ in range(levels - 1))
        declare(self, _heads(self))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """What the heads say of all anchors, (B, anchors, n) each, in torchvision's order."""
        maps = list(self.backbone(x).values())
        if not len(self.shared):
            return tuple(self.head(maps).values())
        heads = [self.head, *self.shared]
        found = [list(head([features]).values()) for head, features in zip(heads, maps, strict=True)]
        return tuple(torch.cat(parts, dim=1) for parts in zip(*found, strict=True))


def same_parameters(module: nn.Module) -> Any:
    """A copy of the module with the same parameters."""
    return copy.deepcopy(module, {id(parameter): parameter for parameter in module.parameters()})


def _heads(network: Network) -> Heads:
    places = ["head", *(f"shared.{number}" for number in range(len(network.shared)))]
    outputs: list[str] = []
    for place in places:
        # A member of a list of heads is one map's, and ends in its output; next to a tower there are outputs only.
        last: dict[tuple[str, ...], str] = {}
        for name in named_weight_layers(network.get_submodule(place)):
            parts = name.split(".")
            if parts[1] != "conv":
                last[tuple(parts[:3])] = f"{place}.{name}"
        outputs += last.values()
    boxes, scores = (tuple(f"{place}.{kind}_head" for place in places) for kind in ("regression", "classification"))
    return Heads(boxes, scores, tuple(outputs))


def finite(outputs: Sequence[Tensor]) -> None:
    """
    Raises:
        ValueError: an output is not finite: it would pass for an image without objects.
    """
    if not all(bool(torch.isfinite(output).all()) for output in outputs):
        raise ValueError("the detector's output is not finite (NaN or infinity)")


class Reader:
    """Anchors, loss and decoding of a detector, for one size of input."""

    def __init__(self, build: Build, size: tuple[int, int], columns: Sequence[int]) -> None:
        """
        Args:
            build: makes the detector, of which only what has no weights is used.
            size: (height, width) of the input.
            columns: which of the network's scores is that of each class.
        """
        self.build, self.size, self.columns = build, size, tuple(columns)

    @functools.cached_property
    def _detector(self) -> Any:
        with torch.device("meta"):
            return self.build().eval()

    @functools.cached_property
    def _shapes(self) -> tuple[list[str], list[tuple[int, int]]]:
        """Names of the outputs, and (height, width) of the maps."""
        with torch.no_grad():
            maps = list(self._detector.backbone(torch.empty(1, 3, *self.size, device="meta")).values())
            return list(self._detector.head(maps)), [tuple(features.shape[-2:]) for features in maps]

    @functools.cache  # noqa: B019  a reader lives as long as its model
    def _anchors(self, device: torch.device) -> tuple[Tensor, list[int]]:
        """(anchors, 4) in pixels, and how many each map has."""
        _, maps = self._shapes
        image = ImageList(torch.empty(1, 3, *self.size, device="meta"), [self.size])
        features = [torch.empty(1, 1, *shape, device=device) for shape in maps]
        (anchors,) = self._detector.anchor_generator(image, features)
        cells = [height * width for height, width in maps]
        return anchors, [count * len(anchors) // sum(cells) for count in cells]

    def loss(self, outputs: Sequence[Tensor], targets: list[Boxes]) -> Tensor:
        """The detector's own loss; crowd regions are left out of the targets."""
        named = {name: output.float() for name, output in zip(self._shapes[0], outputs, strict=True)}
        wanted = [self._target(boxes, outputs[0].device) for boxes in targets]
        anchors, counts = self._anchors(outputs[0].device)
        given: list[Any] = [wanted, named, [anchors] * len(targets)]
        if isinstance(self._detector, SSD):
            given.append([self._matched(target["boxes"], anchors) for target in wanted])
        elif isinstance(self._detector, FCOS):
            given.append(counts)
        return torch.stack(list(self._detector.compute_loss(*given).values())).sum()

    def _target(self, boxes: Boxes, device: torch.device) -> dict[str, Tensor]:
        if boxes.labels.max(initial=-1) >= len(self.columns):
            own, many = len(self.columns), int(boxes.labels.max()) + 1
            raise UserError(f"the model finds {own} classes, but the dataset has {many} or more: set its classes")
        kept = slice(None) if boxes.crowd is None else ~boxes.crowd
        columns = torch.tensor(self.columns, device=device)
        return {
            "boxes": torch.as_tensor(boxes.xyxy[kept], dtype=torch.float32, device=device),
            "labels": columns[torch.as_tensor(boxes.labels[kept], device=device)],
        }

    def _matched(self, boxes: Tensor, anchors: Tensor) -> Tensor:
        if not len(boxes):
            return torch.full((len(anchors),), -1, device=anchors.device)
        matched: Tensor = self._detector.proposal_matcher(box_iou(boxes, anchors))
        return matched

    @torch.no_grad()
    def decode(self, outputs: Sequence[Tensor]) -> list[Detections]:
        """Boxes that score enough, after the detector's own suppression per class.

        Raises:
            ValueError: an output is not finite: it would pass for an image without objects.
        """
        finite(outputs)
        anchors, counts = self._anchors(outputs[0].device)
        named: dict[str, Any] = {name: output.float() for name, output in zip(self._shapes[0], outputs, strict=True)}
        own: Any = anchors
        if not isinstance(self._detector, SSD):
            named = {name: output.split(counts, dim=1) for name, output in named.items()}
            own = anchors.split(counts)
        images = len(outputs[0])
        found = self._detector.postprocess_detections(named, [own] * images, [self.size] * images)
        return [self._detections(one) for one in found]

    def _detections(self, found: dict[str, Tensor]) -> Detections:
        """Without what was found of scores that are no class's."""
        labels = torch.full((max(self.columns) + 1,), -1, device=found["labels"].device)
        labels[list(self.columns)] = torch.arange(len(self.columns), device=labels.device)
        known = found["labels"] < len(labels)
        known[known.clone()] = labels[found["labels"][known]] >= 0
        return Detections(found["boxes"][known], found["scores"][known], labels[found["labels"][known]])


def single_stage(
    title: str,
    build: Build,
    preprocess: Preprocess,
    columns: Sequence[int],
    *,
    checkpoint: str | None,
    random: int | None,
) -> Model:
    """A detector of torchvision as a model.

    Args:
        title: what boards call it.
        build: makes the detector.
        preprocess: its input.
        columns: which of the network's scores is that of each class.
        checkpoint: safetensors file with its weights.
        random: seed of random weights, where there is no checkpoint.

    Raises:
        UserError: none or both of checkpoint and seed are given.
    """
    network = functools.partial(_network, build)
    reader = Reader(build, preprocess.size, columns)
    return Model(
        task="detection",
        build=network,
        weights=weights(title, network, checkpoint, random),
        preprocess=preprocess,
        loss=reader.loss,
        name=title,
        decode=reader.decode,
    )


def _network(build: Build) -> nn.Module:
    return Network(build())


def weights(title: str, network: functools.partial[nn.Module], checkpoint: str | None, random: int | None) -> Weights:
    """
    Raises:
        UserError: none or both of checkpoint and seed are given.
    """
    if (checkpoint is None) == (random is None):
        raise UserError(f"model {title} needs its weights: give checkpoint: <file.safetensors>, or random: <seed>")
    return Checkpoint(checkpoint) if checkpoint is not None else Random(network, random or 0)
