"""A small single-shot detector: one map of cells, each of which scores the classes and places the sides of a box.

In the manner of FCOS (Tian et al., 1904.01355), with class scores that learn the overlap of their own box, as in
Generalized Focal Loss (Li et al., 2006.04388).

The weights that ship with the package were made, from random ones, by

    qbench train digit_detector --dataset digit_scenes --epochs 36 --batch-size 32 --lr 0.002 -o FILE
"""

from __future__ import annotations

import math
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import batched_nms, generalized_box_iou_loss

from qbench.datasets.base import Boxes
from qbench.models.base import Detections, Model, Preprocess
from qbench.models.checkpoints import Checkpoint
from qbench.models.digits import WEIGHTS
from qbench.quant.heads import Heads, declare
from qbench.registry import model

CLASSES = 10
STRIDE = 8
"""Pixels per cell."""
REACH = 1.0
"""How far from a box's centre, in cells along each axis, a cell may answer for it."""
MIN_SCORE, MAX_IOU, MOST = 0.05, 0.5, 100
_LARGEST = 6.0
"""Largest logarithm of a distance that is decoded, so that a badly quantized network gives no infinite boxes."""

Outputs = tuple[Tensor, Tensor]
"""Logits of the classes (B, CLASSES, h, w), and log distances to the four sides, in cells (B, 4, h, w)."""


@model("digit_detector")
def digit_detector() -> Model:
    """A single-shot detector of digits on 96x96 RGB images, with a residual timm backbone."""
    return Model(
        task="detection",
        build=Detector,
        weights=Checkpoint(str(WEIGHTS / "digit_detector.safetensors")),
        preprocess=Preprocess(size=(96, 96)),
        loss=loss,
        decode=decode,
    )


class Detector(nn.Module):
    """Backbone, a neck that adds the coarser map to the finer one, and one head."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        backbone: Any = timm.create_model("test_resnet", pretrained=False, features_only=True, out_indices=(2, 3))
        fine, coarse = backbone.feature_info.channels()
        self.backbone = backbone
        self.fine = nn.Conv2d(fine, width, 1)
        self.coarse = nn.Conv2d(coarse, width, 1)
        self.trunk = nn.Sequential(_block(width), _block(width))
        scores = nn.Conv2d(width, CLASSES, 1)
        # Nearly all cells are background: start from a score of 1 %.
        assert scores.bias is not None
        nn.init.constant_(scores.bias, -math.log(99))
        self.classes = nn.Sequential(_block(width), scores)
        self.sides = nn.Sequential(_block(width), nn.Conv2d(width, 4, 1))
        declare(self, Heads(boxes=("sides",), scores=("classes",), outputs=("sides.1", "classes.1")))

    def forward(self, x: Tensor) -> Outputs:
        fine, coarse = self.backbone(x)
        merged = self.fine(fine) + F.interpolate(self.coarse(coarse), scale_factor=2.0, mode="nearest")
        cells = self.trunk(merged)
        return self.classes(cells), self.sides(cells)


def _block(width: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True)
    )


def cell_centres(height: int, width: int, device: torch.device | None = None) -> Tensor:
    """(height * width, 2) x and y of every cell's centre in pixels, row by row."""
    y, x = torch.meshgrid(torch.arange(height, device=device), torch.arange(width, device=device), indexing="ij")
    return (torch.stack([x, y], dim=-1).flatten(0, 1) + 0.5) * STRIDE


def decode_boxes(sides: Tensor) -> Tensor:
    """(B, 4, h, w) to boxes (B, h * w, 4) in pixels."""
    centres = cell_centres(sides.shape[2], sides.shape[3], sides.device)
    distances = sides.float().clamp(max=_LARGEST).exp().flatten(2).transpose(1, 2) * STRIDE
    return torch.cat([centres - distances[..., :2], centres + distances[..., 2:]], dim=-1)


def encode_boxes(xyxy: Tensor, centres: Tensor) -> Tensor:
    """(n, 4) outputs that decode to the boxes (n, 4), each at the cell whose centre (n, 2) lies in it."""
    return (torch.cat([centres - xyxy[:, :2], xyxy[:, 2:] - centres], dim=-1) / STRIDE).log()


def assign(xyxy: Tensor, centres: Tensor) -> Tensor:
    """Which box each cell answers for.

    Args:
        xyxy: (n, 4) boxes in pixels.
        centres: (cells, 2).

    Returns:
        (cells,) index of the smallest box that contains the cell and has its centre near; -1 for background.
    """
    if not len(xyxy):
        return torch.full((len(centres),), -1, device=centres.device)
    inside = ((centres[:, None] > xyxy[:, :2]) & (centres[:, None] < xyxy[:, 2:])).all(dim=-1)
    middle = (xyxy[:, :2] + xyxy[:, 2:]) / 2
    near = ((centres[:, None] - middle).abs() <= REACH * STRIDE).all(dim=-1)
    area = (xyxy[:, 2:] - xyxy[:, :2]).prod(dim=-1).expand(len(centres), -1)
    smallest, index = area.masked_fill(~(inside & near), math.inf).min(dim=-1)
    return index.masked_fill(smallest.isinf(), -1)


def loss(outputs: Outputs, targets: list[Boxes]) -> Tensor:
    """Quality focal loss of the classes plus generalised-IoU loss of the boxes, per positive cell."""
    logits, sides = outputs
    found = decode_boxes(sides)
    centres = cell_centres(sides.shape[2], sides.shape[3], sides.device)
    boxes = [torch.as_tensor(target.xyxy, dtype=torch.float32, device=sides.device) for target in targets]
    owners = torch.stack([assign(xyxy, centres) for xyxy in boxes])
    image, cell = torch.nonzero(owners >= 0, as_tuple=True)
    first = torch.tensor([0, *[len(b) for b in boxes]], device=sides.device).cumsum(0)
    wanted = owners[image, cell] + first[image]
    labels = torch.cat([torch.as_tensor(target.labels, device=sides.device) for target in targets])[wanted]
    positives = max(1, len(wanted))
    giou = generalized_box_iou_loss(found[image, cell], torch.cat(boxes)[wanted])
    quality = torch.zeros(*owners.shape, CLASSES, device=sides.device)
    quality[image, cell, labels] = (1 - giou.detach()).clamp(0, 1)
    scores = logits.float().flatten(2).transpose(1, 2)
    focus = (scores.detach().sigmoid() - quality).square()
    focal = (focus * F.binary_cross_entropy_with_logits(scores, quality, reduction="none")).sum()
    return (focal + 2 * giou.sum()) / positives


@torch.no_grad()
def decode(outputs: Any) -> list[Detections]:
    """Boxes of all cells and classes that score enough, after non-maximum suppression per class; the best 100."""
    logits, sides = outputs
    boxes = decode_boxes(sides)
    scores = logits.float().sigmoid().flatten(2).transpose(1, 2)
    image, cell, label = torch.nonzero(scores > MIN_SCORE, as_tuple=True)
    kept_boxes, kept_scores = boxes[image, cell], scores[image, cell, label]
    best = batched_nms(kept_boxes, kept_scores, image * CLASSES + label, MAX_IOU)
    detections = []
    for number in range(len(logits)):
        own = best[image[best] == number][:MOST]
        detections.append(Detections(kept_boxes[own], kept_scores[own], label[own]))
    return detections
