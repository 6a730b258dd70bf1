"""What a run works on: its dataset, its float model, and the images in the form that the model takes."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qbench.data import Batches, Data, ImageSource, Training
from qbench.datasets import base as datasets
from qbench.datasets.base import Boxes, Dataset, Split
from qbench.datasets.images import ImageArray, open_images
from qbench.datasets.transform import to_network
from qbench.models.base import Model
from qbench.registry import Reference
from qbench.sharing import Shared


class Workspace:
    """Everything is loaded when it is first asked for.

    Args:
        dataset: reference of the dataset.
        model: reference of the float model.
        calibration: how many images, and the seed they are drawn with.
        cache: folder of what is kept between runs.
        device: where the networks run.
    """

    def __init__(
        self, dataset: Reference, model: Reference, calibration: tuple[int, int], cache: Path, device: torch.device
    ) -> None:
        self._dataset, self._calibration = dataset, calibration
        self._origin = [model.name, dict(model.options), model.plugin.fingerprint]
        self.model: Model = model()
        self.cache, self.device = cache, device
        self._opened: dict[str, ImageArray] = {}

    @functools.cached_property
    def dataset(self) -> Dataset:
        """With the calibration images drawn, and taken out of the training split."""
        drawn, _ = datasets.draw(self._dataset(), *self._calibration)
        return drawn

    def images(self, name: str) -> ImageArray:
        """The preprocessed images of the split `train`, `calibration` or `evaluation`."""
        if name not in self._opened:
            split: Split = getattr(self.dataset, name)
            self._opened[name] = open_images(split, self.model.preprocess, self.dataset.fingerprint, self.cache, name)
        return self._opened[name]

    def data(self, *, seed: int, trains: bool, **fields: Any) -> Data:
        """What methods see.

        Args:
            seed: of the run.
            trains: whether the labelled training split may be used.
            fields: of `Data`: reference, progress, record.
        """
        images = self.images("calibration")
        calibration = Batches(_Counted(images), self.device, fingerprint=images.fingerprint)
        train = self._training() if trains else None
        shared = Shared(self.cache / "statistics", self._origin)
        fields |= {"shared": shared, "preprocess": self.model.preprocess}
        return Data(calibration, train, self.model.loss, seed=seed, **fields)

    def _training(self) -> Training:
        images = self.images("train")
        targets = images.split.targets
        if self.model.task == "detection":
            sizes = images.sizes.tolist()
            targets = [
                self._to_network(boxes, size, images.split.resized) for boxes, size in zip(targets, sizes, strict=True)
            ]
        return Training(images, targets, self.device, self.dataset.augment)

    def _to_network(self, boxes: Boxes, size: list[int], resized: bool) -> Boxes:
        return replace(boxes, xyxy=to_network(boxes.xyxy, (size[0], size[1]), self.model.preprocess, resized))


class _Counted:
    """Counts how many different images were looked at."""

    def __init__(self, source: ImageSource) -> None:
        self._source = source
        self.used: set[int] = set()

    def __len__(self) -> int:
        return len(self._source)

    def batch(self, positions: Sequence[int]) -> Tensor:
        self.used.update(positions)
        return self._source.batch(positions)


def images_used(data: Data) -> int:
    """How many different calibration images have been looked at, or are behind what was read instead."""
    source = data.calibration.source
    return max(len(source.used) if isinstance(source, _Counted) else 0, data.shared.images)


def differences(a: nn.Module, b: nn.Module) -> list[str]:
    """The names of parameters and buffers that are not the same in both, bit for bit."""
    left, right = a.state_dict(), b.state_dict()
    alike = {name for name in left.keys() & right.keys() if _same(left[name], right[name])}
    return sorted((left.keys() | right.keys()) - alike)


def _same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(_bytes(a), _bytes(b))


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
