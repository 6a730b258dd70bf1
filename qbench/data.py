"""What a method may see: calibration images, training data where its track allows it, the loss, and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from qbench.datasets.base import Augment
from qbench.errors import UserError
from qbench.models.base import Preprocess
from qbench.quant.checkpoints import Checkpoints
from qbench.sharing import Shared


class ImageSource(Protocol):
    """Preprocessed images by position."""

    def __len__(self) -> int: ...

    def batch(self, positions: Sequence[int]) -> Tensor:
        """Normalised float32 (B, C, H, W)."""


class Batches:
    """The calibration images, in a fixed order: iterating yields batches (B, C, H, W) on the device."""

    def __init__(self, source: ImageSource, device: torch.device, batch_size: int = 32, fingerprint: str = "") -> None:
        self.source, self.device, self.batch_size, self._fingerprint = source, device, batch_size, fingerprint

    @property
    def identity(self) -> tuple[str, int]:
        """A fingerprint of the batches, empty where it is not known; and how many images there are."""
        known = f"{self._fingerprint}: {self.images} in batches of {self.batch_size} on {self.device}"
        return known if self._fingerprint else "", self.images

    @property
    def images(self) -> int:
        """How many images there are."""
        return len(self.source)

    def __len__(self) -> int:
        return -(-self.images // self.batch_size)

    def __iter__(self) -> Iterator[Tensor]:
        for start in range(0, self.images, self.batch_size):
            yield self.source.batch(range(start, min(start + self.batch_size, self.images))).to(self.device)

    def first(self, images: int, batch_size: int | None = None) -> Batches:
        """The first `images` images only, optionally in batches of another size.

        Raises:
            UserError: there are fewer.
        """
        if images > self.images:
            raise UserError(f"{images} calibration images are asked for, but the suite provides {self.images}")
        return Batches(_Head(self.source, images), self.device, batch_size or self.batch_size, self._fingerprint)


class _Head:
    def __init__(self, source: ImageSource, count: int) -> None:
        self.source, self.count = source, count

    def __len__(self) -> int:
        return self.count

    def batch(self, positions: Sequence[int]) -> Tensor:
        return self.source.batch(positions)


class Training:
    """The labelled training split: `epoch` yields shuffled, augmented batches."""

    def __init__(
        self, source: ImageSource, targets: Sequence[Any], device: torch.device, augment: Augment | None
    ) -> None:
        self.source, self.targets, self.device, self.augment = source, targets, device, augment

    @property
    def images(self) -> int:
        """How many images there are."""
        return len(self.source)

    def epoch(
        self, number: int, *, batch_size: int, seed: int, augment: bool = True, skipped: int = 0
    ) -> Iterator[tuple[Tensor, Any]]:
        """One pass in an order set by (seed, number); the last, smaller batch is left out unless it is the only one.

        Each batch has random numbers of its own, whether or not the first ones are `skipped`.

        Yields:
            images (B, C, H, W) and targets: class indices (B,), or a list of `Boxes`.
        """
        order = np.random.default_rng([seed, number]).permutation(self.images)
        size = min(batch_size, self.images)
        for start in range(skipped * size, self.images - size + 1, size):
            chosen = order[start : start + size].tolist()
            x, y = self.source.batch(chosen).to(self.device), collate([self.targets[i] for i in chosen])
            if augment and self.augment is not None:
                x, y = self.augment(x, y, _generator(seed, number, start))
            yield x, y.to(self.device) if isinstance(y, Tensor) else y


def _generator(*seeds: int) -> torch.Generator:
    return torch.Generator().manual_seed(int(np.random.SeedSequence(seeds).generate_state(1, np.uint64)[0]))


def collate(targets: list[Any]) -> Any:
    """Class indices become a tensor (B,); boxes stay a list."""
    return torch.tensor(targets) if isinstance(targets[0], (int, np.integer)) else targets


class Data:
    """The second argument of every method.

    Attributes:
        calibration: the same images for every method, unlabelled.
        loss: `(outputs, targets) -> scalar`, the task's loss.
        device: where the model is and the images come.
        seed: of this run.
        reference: the float network as the recipe's structure steps left it; never changed, in evaluation mode.
        progress: call with a fraction in [0, 1] as often as you like.
        shared: what other runs may have computed for the same network and images.
        preprocess: how the images were prepared; None where that is not known.
        checkpoints: where the state of trainings is kept while they run; None if it is not.
        record: call with a name and JSON-able raw values that belong in the result (a loss curve, errors per layer).
    """

    def __init__(
        self,
        calibration: Batches,
        train: Training | None,
        loss: Callable[[Any, Any], Tensor],
        *,
        reference: nn.Module | None = None,
        seed: int = 0,
        shared: Shared | None = None,
        preprocess: Preprocess | None = None,
        checkpoints: Checkpoints | None = None,
        progress: Callable[[float], None] = lambda _: None,
        record: Callable[[str, Any], None] = lambda _name, _values: None,
    ) -> None:
        self.calibration, self._train, self.loss, self.seed = calibration, train, loss, seed
        self.progress, self.record = progress, record
        self.reference, self.preprocess = reference, preprocess
        self.shared = shared or Shared()
        self.checkpoints = checkpoints
        self.device = calibration.device

    @property
    def train(self) -> Training:
        """The labelled training images.

        Raises:
            UserError: the method's track is not `qat`.
        """
        if self._train is None:
            raise UserError("this method is registered with track='ptq' and may not use labelled data; use track='qat'")
        return self._train

    @property
    def example(self) -> Tensor:
        """The first calibration image as a batch of one."""
        return self.calibration.source.batch([0]).to(self.device)
