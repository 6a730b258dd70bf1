"""Augmentation of images with boxes: mirrored, cut out or shrunk, in other light."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from qbench.datasets.base import Boxes

ZOOM = (0.7, 2.0)
"""How many times larger things become, at least and at most."""
_STRETCH = 0.15
"""Largest logarithm of the change of width over height."""
_VISIBLE = 0.3
"""Least share of a box that must be seen, besides its centre."""
_TRIES = 10
_GAIN, _CAST, _LIGHT = 0.3, 0.1, 0.2
"""Changes of contrast, of the contrast of each channel, and of light, at most; images have a spread of about 1."""


def vary(images: Tensor, targets: list[Boxes], generator: torch.Generator) -> tuple[Tensor, list[Boxes]]:
    """Other light and colours; mirrored half of the time; enlarged and cut out, or shrunk onto the mean colour.

    An object stays if its centre and enough of it are seen; where no object would stay, the image is not moved.

    Args:
        images: (B, C, H, W), normalised.
        targets: their objects.
        generator: source of randomness.
    """
    return _move(_recolour(images, generator), targets, generator)


def _recolour(images: Tensor, generator: torch.Generator) -> Tensor:
    count, channels = images.shape[:2]

    def around(width: float, per: int) -> Tensor:
        return (width * (2 * torch.rand(count, per, 1, 1, generator=generator) - 1)).to(images)

    gain = (1 + around(_GAIN, 1)) * (1 + around(_CAST, channels))
    return images * gain + around(_LIGHT, 1)


def _move(images: Tensor, targets: list[Boxes], generator: torch.Generator) -> tuple[Tensor, list[Boxes]]:
    height, width = images.shape[2:]
    size = np.array([width, height], dtype=np.float64)
    theta = torch.zeros(len(images), 2, 3)
    moved = []
    for number, boxes in enumerate(targets):
        mirrored = torch.rand((), generator=generator).item() < 0.5
        zoom, offset, seen = _placed(_mirror(boxes, width) if mirrored else boxes, size, generator)
        moved.append(seen)
        # From places in the new image to places in the old one, both from -1 to 1.
        theta[number, :, :2] = torch.diag(torch.from_numpy(1 / zoom))
        theta[number, :, 2] = torch.from_numpy((1 - 2 * offset / size) / zoom - 1)
        if mirrored:
            theta[number, 0] *= -1
    grid = torch.nn.functional.affine_grid(theta.to(images), list(images.shape), align_corners=False)
    return torch.nn.functional.grid_sample(images, grid, align_corners=False), moved


def _mirror(boxes: Boxes, width: int) -> Boxes:
    left, top, right, bottom = boxes.xyxy.T
    return replace(boxes, xyxy=np.stack([width - right, top, width - left, bottom], axis=1))


def _placed(boxes: Boxes, size: np.ndarray, generator: torch.Generator) -> tuple[np.ndarray, np.ndarray, Boxes]:
    """Zoom (2,) and offset (2,) in pixels of a place that shows an object, and what it shows."""
    for _ in range(_TRIES):
        drawn = torch.rand(4, generator=generator).double().numpy()
        low, high = math.log(ZOOM[0]), math.log(ZOOM[1])
        stretch = _STRETCH * (2 * drawn[1] - 1) / 2
        zoom = np.exp(low + (high - low) * drawn[0] + np.array([stretch, -stretch]))
        # A larger image covers all of the new one, a smaller one lies in it.
        offset = drawn[2:] * size * (1 - zoom)
        seen = _seen(boxes, zoom, offset, size)
        if len(seen.labels) or not len(boxes.labels):
            return zoom, offset, seen
    return np.ones(2), np.zeros(2), boxes


def _seen(boxes: Boxes, zoom: np.ndarray, offset: np.ndarray, size: np.ndarray) -> Boxes:
    """Boxes times `zoom` plus `offset`, clipped to the image, without those that are mostly outside."""
    corners = boxes.xyxy.reshape(-1, 2, 2) * zoom + offset
    clipped = np.clip(corners, 0, size)
    centre = corners.mean(axis=1)
    area = np.prod(corners[:, 1] - corners[:, 0], axis=1)
    visible = np.prod(clipped[:, 1] - clipped[:, 0], axis=1) / np.maximum(area, 1e-9)
    kept = (visible >= _VISIBLE) & ((centre > 0) & (centre < size)).all(axis=1)
    crowd = None if boxes.crowd is None else boxes.crowd[kept]
    return Boxes(clipped[kept].reshape(-1, 4).astype(np.float32), boxes.labels[kept], crowd)
