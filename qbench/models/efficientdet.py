"""EfficientDet, by the package effdet."""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Sequence
from types import ModuleType
from typing import Annotated, Any

import torch
from pydantic import Field
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn
from torchvision.ops import batched_nms, clip_boxes_to_image

from qbench.datasets.base import Boxes
from qbench.datasets.coco import IDS
from qbench.errors import UserError
from qbench.models.base import Detections, Model, Preprocess
from qbench.models.single_stage import finite, same_parameters, weights
from qbench.quant.heads import Heads, declare
from qbench.registry import model, nearest

_COLUMNS = 90
"""Scores of effdet's own weights: one for each id of COCO from 1."""
MIN_SCORE, MAX_IOU, MOST, CANDIDATES = 0.001, 0.5, 100, 5000
_LARGEST = math.log(1000 / 16)
"""Largest logarithm of a size over the anchor's that is decoded: a badly quantized network gives no infinite boxes."""


@model("efficientdet")
def efficientdet(
    *,
    name: str = "tf_efficientdet_lite0",
    classes: Annotated[int, Field(ge=1)] | None = None,
    size: Annotated[int, Field(ge=32)] | None = None,
    checkpoint: str | None = None,
    random: Annotated[int, Field(ge=0)] | None = None,
) -> Model:
    """EfficientDet on a timm backbone, as the package effdet builds it (pip install 'qbench[efficientdet]').

    Source: M. Tan et al., "EfficientDet: Scalable and Efficient Object Detection", arXiv:1911.09070, 2019.

    Args:
        name: of a configuration of effdet.
        classes: how many; default: COCO's 80, as effdet's weights number them.
        size: side of the network's square input, a multiple of its coarsest stride; default: the configuration's.
        checkpoint: safetensors file with effdet's names, looked for as given, then in the folder that QBENCH_WEIGHTS
            names.
        random: seed of random weights, to train from or to try out speed and export.
    """
    config = _config(name, classes, size)
    height, width = config.image_size
    if height % 2**config.max_level or width % 2**config.max_level:
        raise UserError(f"model efficientdet {name!r}: size={height} is no multiple of {2**config.max_level}")
    mean, std = config.get("mean", IMAGENET_DEFAULT_MEAN), config.get("std", IMAGENET_DEFAULT_STD)
    network = functools.partial(_build, name, classes, size)
    columns = [one - 1 for one in IDS] if classes is None else list(range(classes))
    reader = _Reader(config, columns)
    return Model(
        task="detection",
        build=network,
        weights=weights(f"efficientdet {name!r}", network, checkpoint, random),
        preprocess=Preprocess((height, width), None, "letterbox", "bilinear", tuple(mean), tuple(std)),
        loss=reader.loss,
        name=name if size is None else f"{name}_{size}",
        decode=reader.decode,
    )


def _effdet() -> ModuleType:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it compiles with what torch has deprecated
            import effdet.anchors
            import effdet.loss
    except ImportError as error:
        raise UserError(
            f"model efficientdet needs {error.name}, which is not installed (pip install 'qbench[efficientdet]')"
        ) from None
    return effdet


def _config(name: str, classes: int | None, size: int | None) -> Any:
    known = list(_effdet().config.model_config.efficientdet_model_param_dict)
    if name not in known:
        raise UserError(f"effdet has no configuration {name!r}{nearest(name, known)}")
    config = _effdet().get_efficientdet_config(name)
    config.num_classes = classes or _COLUMNS
    config.image_size = (size, size) if size else tuple(config.image_size)
    return config


def _build(name: str, classes: int | None, size: int | None) -> nn.Module:
    return _Network(_effdet().EfficientDet(_config(name, classes, size), pretrained_backbone=False))


class _Network(nn.Module):
    """An EfficientDet, under its names of parameters, with a module for each map's heads (`single_stage`)."""

    def __init__(self, detector: Any) -> None:
        super().__init__()
        self.backbone, self.fpn = detector.backbone, detector.fpn
        self.class_net, self.box_net = detector.class_net, detector.box_net
        levels = self.class_net.num_levels
        self.shared = nn.ModuleList(
            nn.ModuleDict({"class_net": _level(self.class_net, one), "box_net": _level(self.box_net, one)})
            for one in range(1, levels)
        )
        self.class_net.num_levels = self.box_net.num_levels = 1
        places = ["", *(f"shared.{one}." for one in range(levels - 1))]
        boxes, scores = ([f"{place}{net}" for place in places] for net in ("box_net", "class_net"))
        separable = hasattr(self.class_net.predict, "conv_pw")
        last = "predict.conv_pw" if separable else "predict.conv"
        declare(self, Heads(tuple(boxes), tuple(scores), tuple(f"{net}.{last}" for net in (*boxes, *scores))))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Logits (B, anchors * classes, h, w) of each map, then codes of boxes (B, anchors * 4, h, w) of each."""
        maps = self.fpn(self.backbone(x))
        heads = [self.class_net, *(one["class_net"] for one in self.shared)]  # type: ignore[index]
        boxes = [self.box_net, *(one["box_net"] for one in self.shared)]  # type: ignore[index]
        logits = [head([features])[0] for head, features in zip(heads, maps, strict=True)]
        return (*logits, *(head([features])[0] for head, features in zip(boxes, maps, strict=True)))


def _level(head: Any, level: int) -> nn.Module:
    """The head for one map: convolutions are those of all maps, batch norms its own."""
    own = same_parameters(head)
    own.num_levels = 1
    own.bn_rep = nn.ModuleList(nn.ModuleList([norms[level]]) for norms in head.bn_rep)
    return own


class _Reader:
    """Anchors, loss and decoding."""

    def __init__(self, config: Any, columns: Sequence[int]) -> None:
        self.config, self.columns = config, torch.tensor(columns)

    @functools.cached_property
    def _anchors(self) -> Any:
        return _effdet().anchors.Anchors.from_config(self.config)

    def loss(self, outputs: Sequence[Tensor], targets: list[Boxes]) -> Tensor:
        """effdet's focal and Huber loss; crowd regions are left out of the targets."""
        levels, device = len(outputs) // 2, outputs[0].device
        labeler = _effdet().anchors.AnchorLabeler(self._anchors.to(device), self.config.num_classes)
        boxes, labels = [], []
        for target in targets:
            kept = slice(None) if target.crowd is None else ~target.crowd
            boxes.append(torch.as_tensor(target.xyxy[kept][:, [1, 0, 3, 2]], dtype=torch.float32, device=device))
            # It counts classes from 1.
            labels.append((self.columns[torch.as_tensor(target.labels[kept])] + 1).to(device))
        wanted = labeler.batch_label_anchors(boxes, labels)
        total: Tensor = _effdet().loss.DetectionLoss(self.config)(outputs[:levels], outputs[levels:], *wanted)[0]
        return total

    @torch.no_grad()
    def decode(self, outputs: Sequence[Tensor]) -> list[Detections]:
        """Boxes of the best candidates, after suppression per class; the best 100.

        Raises:
            ValueError: an output is not finite: it would pass for an image without objects.
        """
        finite(outputs)
        levels, classes = len(outputs) // 2, self.config.num_classes
        logits, codes = _rows(outputs[:levels], classes), _rows(outputs[levels:], 4)
        return [self._best(*one) for one in zip(codes, logits.sigmoid(), strict=True)]

    def _best(self, codes: Tensor, scores: Tensor) -> Detections:
        values, which = scores[:, self.columns].flatten().topk(min(CANDIDATES, len(scores) * len(self.columns)))
        which, values = which[values > MIN_SCORE], values[values > MIN_SCORE]
        anchor, label = which // len(self.columns), which % len(self.columns)
        own = codes[anchor]
        own[:, 2:].clamp_(max=_LARGEST)
        anchors = self._anchors.boxes.to(codes.device)[anchor]
        boxes = _effdet().anchors.decode_box_outputs(own, anchors, output_xyxy=True)
        boxes = clip_boxes_to_image(boxes, tuple(self.config.image_size))
        kept = batched_nms(boxes, values, label, MAX_IOU)[:MOST]
        return Detections(boxes[kept], values[kept], label[kept])


def _rows(maps: Sequence[Tensor], width: int) -> Tensor:
    """(B, anchors * width, h, w) of each map to (B, all anchors, width)."""
    return torch.cat([one.float().permute(0, 2, 3, 1).reshape(len(one), -1, width) for one in maps], dim=1)
