"""Scanned digits on textured grounds, with boxes: a detection task that needs no download."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from qbench.datasets.base import Boxes, Dataset, Split
from qbench.datasets.digits import CLASSES, Part, scans, scans_of
from qbench.datasets.scenes import lay_out, paint, trim
from qbench.registry import dataset

_SCENES: dict[Part, int] = {"train": 2000, "calibration": 256, "evaluation": 300}
_SEEDS: dict[Part, int] = {"train": 0, "calibration": 1, "evaluation": 2}
_ZOOM, _SHIFT, _VISIBLE = 0.2, 0.2, 0.6
"""Augmentation: largest log zoom of an axis, largest shift in half images, least share of a box that must be seen."""


@dataset("digit_scenes")
def digit_scenes() -> Dataset:
    """2 to 6 scanned digits with boxes on a textured ground, 96x96 pixels; no scan is in two splits."""
    splits = {part: _split(part) for part in _SCENES}
    return Dataset(
        task="detection",
        classes=CLASSES,
        train=splits["train"],
        calibration=splits["calibration"],
        evaluation=splits["evaluation"],
        fingerprint=_fingerprint(splits.values()),
        augment=vary,
    )


def _fingerprint(splits: Iterable[Split]) -> str:
    """Of all boxes and of some pixels: a change of the texture shows in any scene."""
    digest = hashlib.sha256()
    for split in splits:
        for boxes in split.targets:
            digest.update(boxes.xyxy.tobytes() + boxes.labels.tobytes())
        for position in range(4):
            digest.update(split.load(position).tobytes())
    return digest.hexdigest()[:16]


def _split(part: Part) -> Split:
    pixels, labels = scans()
    chosen = scans_of(part)
    trimmed = [trim(scan) for scan in pixels[chosen]]
    shapes = np.array([scan.shape for scan in trimmed])
    layout = lay_out(shapes, _SCENES[part], np.random.default_rng(_SEEDS[part]))

    def load(position: int) -> Image.Image:
        placed = layout.placed[position]
        digits = [trimmed[scan] for scan in layout.scan[position, placed]]
        rng = np.random.default_rng([_SEEDS[part], position])
        return paint(list(zip(digits, layout.xyxy[position, placed], strict=True)), rng)

    targets = [
        Boxes(xyxy[placed].astype(np.float32), labels[chosen[scan[placed]]])
        for scan, xyxy, placed in zip(layout.scan, layout.xyxy, layout.placed, strict=True)
    ]
    return Split(ids=[f"scene-{part}-{number:04d}" for number in range(_SCENES[part])], load=load, targets=targets)


def vary(images: Tensor, targets: list[Boxes], generator: torch.Generator) -> tuple[Tensor, list[Boxes]]:
    """Other light and colours, other proportions, and another place; objects that leave the image are dropped."""
    return _move(_recolour(images, generator), targets, generator)


def _recolour(images: Tensor, generator: torch.Generator) -> Tensor:
    count, channels = images.shape[:2]
    order = torch.rand(count, channels, generator=generator).argsort(dim=1).to(images.device)
    swapped = images.gather(1, order[:, :, None, None].expand_as(images))
    contrast = 0.7 + 0.6 * torch.rand(count, 1, 1, 1, generator=generator)
    negative = 1 - 2 * (torch.rand(count, 1, 1, 1, generator=generator) < 0.3).float()
    tint = 0.3 * (2 * torch.rand(count, channels, 1, 1, generator=generator) - 1)
    return swapped * (contrast * negative).to(images) + tint.to(images)


def _move(images: Tensor, targets: list[Boxes], generator: torch.Generator) -> tuple[Tensor, list[Boxes]]:
    count, _, height, width = images.shape
    zoom = torch.exp(_ZOOM * (2 * torch.rand(count, 2, generator=generator) - 1))
    shift = _SHIFT * (2 * torch.rand(count, 2, generator=generator) - 1)
    theta = torch.zeros(count, 2, 3)
    theta[:, 0, 0], theta[:, 1, 1] = 1 / zoom[:, 0], 1 / zoom[:, 1]
    theta[:, :, 2] = -shift / zoom
    grid = torch.nn.functional.affine_grid(theta.to(images), list(images.shape), align_corners=False)
    moved = torch.nn.functional.grid_sample(images, grid, padding_mode="border", align_corners=False)
    half = np.array([width, height], dtype=np.float32) / 2
    return moved, [
        _transform(boxes, z, half * (1 + s - z), 2 * half)
        for boxes, z, s in zip(targets, zoom.numpy(), shift.numpy(), strict=True)
    ]


def _transform(boxes: Boxes, zoom: np.ndarray, offset: np.ndarray, size: np.ndarray) -> Boxes:
    """Boxes times `zoom` plus `offset`, clipped to the image; those mostly outside are left out."""
    corners = boxes.xyxy.reshape(-1, 2, 2) * zoom + offset
    clipped = np.clip(corners, 0, size)
    visible = np.prod(clipped[:, 1] - clipped[:, 0], axis=1) / np.prod(corners[:, 1] - corners[:, 0], axis=1)
    kept = visible > _VISIBLE
    return Boxes(clipped[kept].reshape(-1, 4).astype(np.float32), boxes.labels[kept])
