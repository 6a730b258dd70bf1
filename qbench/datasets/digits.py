"""Scikit-learn's handwritten digits: real scans that ship with a dependency, so that nothing is downloaded."""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Iterable
from typing import Literal, get_args

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_digits
from torch import Tensor

from qbench.datasets.base import Dataset, Split
from qbench.registry import dataset

CLASSES = tuple("0123456789")
SIZE = 32
"""Side of the images, in pixels; the scans have 8."""
_EVALUATION, _CALIBRATION = 600, 256
_SEED = 0

Part = Literal["train", "calibration", "evaluation"]


@functools.cache
def scans() -> tuple[np.ndarray, np.ndarray]:
    """All 1,797 scans (1797, 8, 8) uint8, ink on a black ground up to 255, and their digits (1797,) int64.

    Source: E. Alpaydin, C. Kaynak, "Optical Recognition of Handwritten Digits", UCI, 1998.
    """
    digits = load_digits()
    return np.round(digits.images * (255 / 16)).astype(np.uint8), digits.target.astype(np.int64)


@functools.cache
def scans_of(part: Part) -> np.ndarray:
    """Which scans belong to a split; everything made of the scans keeps to this division."""
    order = np.random.default_rng(_SEED).permutation(len(scans()[1]))
    evaluation, calibration, train = np.split(order, [_EVALUATION, _EVALUATION + _CALIBRATION])
    return np.sort({"train": train, "calibration": calibration, "evaluation": evaluation}[part])


@dataset("digits")
def digits() -> Dataset:
    """1,797 scanned handwritten digits, enlarged from 8x8 to 32x32 pixels."""
    splits = {part: _split(part) for part in get_args(Part)}
    return Dataset(
        task="classification",
        classes=CLASSES,
        train=splits["train"],
        calibration=splits["calibration"],
        evaluation=splits["evaluation"],
        fingerprint=_fingerprint(splits.values()),
        augment=move,
    )


def _fingerprint(splits: Iterable[Split]) -> str:
    digest = hashlib.sha256()
    for split in splits:
        digest.update("".join(split.ids).encode() + bytes(split.targets) + split.load(0).tobytes())
    return digest.hexdigest()[:16]


def _split(part: Part) -> Split:
    pixels, labels = scans()
    chosen = scans_of(part)

    def load(position: int) -> Image.Image:
        return Image.fromarray(pixels[chosen[position]]).resize((SIZE, SIZE), Image.Resampling.BICUBIC)

    return Split(ids=[f"digit-{scan:04d}" for scan in chosen], load=load, targets=labels[chosen].tolist())


def move(images: Tensor, targets: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Turn by up to 12 degrees, resize by up to 12 % and shift by up to a tenth, each image on its own."""
    turn, zoom, *shift = 2 * torch.rand(4, len(images), generator=generator) - 1
    turn, zoom = turn * math.radians(12), 1 + 0.12 * zoom
    cos, sin = zoom * torch.cos(turn), zoom * torch.sin(turn)
    rows = [cos, -sin, 0.2 * shift[0], sin, cos, 0.2 * shift[1]]
    grid = torch.nn.functional.affine_grid(
        torch.stack(rows, dim=1).view(-1, 2, 3).to(images), list(images.shape), align_corners=False
    )
    return torch.nn.functional.grid_sample(images, grid, padding_mode="border", align_corners=False), targets
