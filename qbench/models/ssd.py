"""SSD on MobileNetV1, as TensorFlow trained it for COCO: SAME padding, batch-norm epsilon 0.001."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from timm.layers import create_conv2d
from torch import Tensor, nn
from torchvision.ops import batched_nms

from qbench.datasets.base import Boxes
from qbench.datasets.coco import IDS
from qbench.errors import UserError
from qbench.models import anchors
from qbench.models.base import Detections, Model, Preprocess
from qbench.models.checkpoints import Checkpoint
from qbench.quant.heads import Heads, declare
from qbench.registry import model

SIDE = 300
COLUMNS = 91
"""Scores of an anchor for COCO: background, and one for each id from 1 to 90, of which ten have no category."""
MIN_SCORE, MAX_IOU, MOST = 0.01, 0.6, 100
NEGATIVES = 3
"""Anchors of background that are learned, per anchor of an object."""
_EXTRAS = ((768, 192, 384), (384, 96, 192), (192, 96, 192), (192, 48, 96))
_CHANNELS = (384, 768, *(out for _, _, out in _EXTRAS))

Outputs = tuple[Tensor, Tensor]
"""Codes of the boxes (B, 1917, 4) and logits of the classes (B, 1917, 91)."""


@model("ssd_mobilenetv1_075")
def ssd_mobilenetv1_075(
    *, checkpoint: str = "ssd_mobilenetv1_075_300_coco.safetensors", classes: Annotated[int, Field(ge=1)] | None = None
) -> Model:
    """SSD 300x300 on MobileNetV1 0.75, as TensorFlow trained it for COCO, or for other classes.

    Source: W. Liu et al., "SSD: Single Shot MultiBox Detector", arXiv:1512.02325, 2016.

    Args:
        checkpoint: safetensors file, looked for as given, then in the folder that QBENCH_WEIGHTS names.
        classes: how many; default: COCO's 80, as TensorFlow numbers them.
    """
    columns = IDS if classes is None else tuple(range(classes))
    return Model(
        task="detection",
        build=functools.partial(SSD, COLUMNS if classes is None else classes),
        weights=_Weights(checkpoint),
        preprocess=Preprocess((SIDE, SIDE), mode="squash", interpolation="bilinear"),
        loss=functools.partial(loss, columns=columns),
        name="ssd_mobilenetv1_075",
        decode=functools.partial(decode, columns=columns),
    )


class _Weights(Checkpoint):
    """A checkpoint that may carry its anchors, which are then compared with those that the boxes are decoded by."""

    def load(self) -> Mapping[str, Tensor]:
        state = dict(super().load())
        own = state.pop("anchors", anchors.anchors())
        if own.shape != anchors.anchors().shape or not torch.allclose(own, anchors.anchors(), atol=1e-5):
            raise UserError(f"{self} was trained with other anchors than SSD's at {SIDE}x{SIDE} on six maps")
        return state


class SSD(nn.Module):
    """Backbone, four more blocks that halve the map, and two 1x1 convolutions on each of the six maps."""

    def __init__(self, columns: int = COLUMNS) -> None:
        super().__init__()
        self.columns = columns
        # timm has named models of some widths only; this is what all of them are made by.
        from timm.models.efficientnet import _gen_mobilenet_v1

        self.backbone = _gen_mobilenet_v1(
            "mobilenetv1_100", 0.75, pad_type="same", bn_eps=1e-3, features_only=True, out_indices=(3, 4)
        )
        self.extras = nn.ModuleList(
            nn.Sequential(_Block(start, middle, 1, 1), _Block(middle, end, 3, 2)) for start, middle, end in _EXTRAS
        )
        heads = list(zip(_CHANNELS, anchors.COUNTS, strict=True))
        self.box = nn.ModuleList(nn.Conv2d(channels, 4 * count, 1) for channels, count in heads)
        self.cls = nn.ModuleList(nn.Conv2d(channels, columns * count, 1) for channels, count in heads)
        for head in self.cls:
            # Nearly all anchors are background: start from a score of 1 %.
            nn.init.constant_(head.get_parameter("bias"), -math.log(99))
        declare(self, Heads(boxes=("box",), scores=("cls",), outputs=("box", "cls")))

    def forward(self, x: Tensor) -> Outputs:
        maps = list(self.backbone(x))
        for extra in self.extras:
            maps.append(extra(maps[-1]))
        codes = [_rows(head(features), 4) for head, features in zip(self.box, maps, strict=True)]
        logits = [_rows(head(features), self.columns) for head, features in zip(self.cls, maps, strict=True)]
        return torch.cat(codes, dim=1), torch.cat(logits, dim=1)


class _Block(nn.Module):
    def __init__(self, channels: int, out: int, kernel: int, stride: int) -> None:
        super().__init__()
        self.conv = create_conv2d(channels, out, kernel, stride=stride, padding="same", bias=True)
        self.act = nn.ReLU6()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.conv(x))


def _rows(head: Tensor, width: int) -> Tensor:
    """(B, anchors * width, h, w) to (B, h * w * anchors, width)."""
    return head.permute(0, 2, 3, 1).reshape(head.shape[0], -1, width)


@torch.no_grad()
def decode(outputs: Any, columns: Sequence[int] = IDS) -> list[Detections]:
    """Boxes of all anchors and categories that score enough, after suppression per category; the best 100.

    Args:
        outputs: of the network.
        columns: which of its scores is that of each class.

    Raises:
        ValueError: an output is not finite: it would pass for an image without objects.
    """
    codes, logits = outputs
    if not (torch.isfinite(codes).all() and torch.isfinite(logits).all()):
        raise ValueError("the detector's output is not finite (NaN or infinity)")
    boxes = anchors.decode(codes, SIDE)
    scores = logits.float()[..., list(columns)].sigmoid()
    return [_best(xyxy, score) for xyxy, score in zip(boxes, scores, strict=True)]


def _best(boxes: Tensor, scores: Tensor) -> Detections:
    anchor, label = torch.nonzero(scores > MIN_SCORE, as_tuple=True)
    found, values = boxes[anchor], scores[anchor, label]
    kept = batched_nms(found, values, label, MAX_IOU)[:MOST]
    return Detections(found[kept], values[kept], label[kept])


def loss(outputs: Outputs, targets: list[Boxes], columns: Sequence[int] = IDS) -> Tensor:
    """The multi-box loss with a sigmoid for each category: Huber for the boxes, the hardest background only.

    Anchors of crowd regions are left out. Divided by the number of anchors that answer for an object.

    Args:
        outputs: of the network.
        targets: of the images.
        columns: which of the network's scores is that of each class.
    """
    parts = [_costs(*one, columns) for one in zip(outputs[0], outputs[1], targets, strict=True)]
    return torch.stack([cost for cost, _ in parts]).sum() / max(1, sum(count for _, count in parts))


def _costs(codes: Tensor, logits: Tensor, target: Boxes, columns: Sequence[int]) -> tuple[Tensor, int]:
    """Of one image: the sum over anchors, and how many anchors answer for an object."""
    codes, logits, device = codes.float(), logits.float(), codes.device
    xyxy = torch.as_tensor(target.xyxy, dtype=torch.float32, device=device)
    labels = torch.tensor(columns, device=device)[torch.as_tensor(target.labels, device=device)]
    crowd = torch.as_tensor(np.zeros(len(xyxy), bool) if target.crowd is None else target.crowd, device=device)
    owner = anchors.assign(xyxy, SIDE)
    covering = torch.nonzero(owner >= 0).flatten()
    own = covering[~crowd[owner[covering]]]
    wanted = torch.zeros_like(logits)
    wanted[own, labels[owner[own]]] = 1
    costs = F.binary_cross_entropy_with_logits(logits, wanted, reduction="none").sum(dim=1)
    background = costs[owner < 0]
    hardest = background.topk(min(len(background), NEGATIVES * max(1, len(own)))).values
    huber = F.smooth_l1_loss(codes[own], anchors.encode(xyxy[owner[own]], own, SIDE), reduction="sum")
    return costs[own].sum() + hardest.sum() + huber, len(own)
