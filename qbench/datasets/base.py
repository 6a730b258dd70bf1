"""What a dataset plugin returns: three splits of one task, disjoint by construction."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from PIL.Image import Image

from qbench.errors import UserError

Task = Literal["classification", "detection"]
Augment = Callable[[Any, Any, Any], tuple[Any, Any]]
"""`(images (B, C, H, W), targets, torch.Generator) -> (images, targets)`, on preprocessed training batches."""


@dataclass(frozen=True)
class Boxes:
    """The objects of one image."""

    xyxy: np.ndarray
    """(n, 4) float32, pixels: left, top, right, bottom."""
    labels: np.ndarray
    """(n,) int64, indices into the dataset's classes."""
    crowd: np.ndarray | None = None
    """(n,) bool: regions that count neither for nor against a detector."""
    area: np.ndarray | None = None
    """(n,) float32 object areas (of the mask where there is one); None means the boxes' own."""


@dataclass(frozen=True)
class Split:
    """Images by position. `load` decodes one: an RGB or L image; `targets` are class indices or `Boxes`."""

    ids: Sequence[str]
    load: Callable[[int], Image]
    targets: Sequence[Any]
    resized: bool = False
    """The images have been resized already: preprocessing only crops them."""
    skip_unreadable: bool = False
    """Images that cannot be decoded are left out and counted, rather than an error."""

    def __len__(self) -> int:
        return len(self.ids)

    def subset(self, positions: Sequence[int]) -> Split:
        """Some of the images, in the given order."""
        chosen = [int(p) for p in positions]
        ids, targets = [self.ids[p] for p in chosen], [self.targets[p] for p in chosen]
        return replace(self, ids=ids, targets=targets, load=lambda i: self.load(chosen[i]))


@dataclass(frozen=True)
class Dataset:
    """Three splits of one task; `calibration` is the pool that calibration images are drawn from."""

    task: Task
    classes: Sequence[str]
    train: Split
    calibration: Split
    evaluation: Split
    fingerprint: str
    """Hash of what the images and targets are: names and sizes suffice for files on disk."""
    augment: Augment | None = None
    notes: tuple[str, ...] = ()
    """What was mended or left out when the annotations were read, a line each."""


@dataclass(frozen=True)
class Manifest:
    """Which images every method calibrates on."""

    ids: tuple[str, ...]
    seed: int

    @property
    def hash(self) -> str:
        return hashlib.sha256("\n".join(self.ids).encode()).hexdigest()[:16]


def draw(dataset: Dataset, images: int, seed: int, where: str = "") -> tuple[Dataset, Manifest]:
    """Choose the calibration images, and take them out of the training split.

    Raises:
        UserError: there are fewer images than asked for, or an evaluation image is in another split.
    """
    pool = dataset.calibration
    if not 0 < images <= len(pool):
        raise UserError(
            f"{where}calibration asks for {images} images, but the dataset has {len(pool)}; ask for 1 to {len(pool)}"
        )
    positions = np.random.default_rng(seed).permutation(len(pool))[:images]
    calibration = pool.subset(positions.tolist())
    taken = set(calibration.ids)
    train = dataset.train.subset([i for i, name in enumerate(dataset.train.ids) if name not in taken])
    overlap = set(dataset.evaluation.ids) & (taken | set(train.ids))
    if overlap:
        raise UserError(f"{where}evaluation image {min(overlap)!r} is also used for calibration or training")
    return replace(dataset, calibration=calibration, train=train), Manifest(tuple(calibration.ids), seed)
