"""CIFAR-10: 32x32 colour images of 10 classes (A. Krizhevsky, 2009), as its authors or the Hugging Face hub pack it."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from pydantic import Field
from torch import Tensor

from qbench.datasets.base import Dataset, Split
from qbench.datasets.folder import Count, find, thin
from qbench.errors import UserError
from qbench.registry import dataset

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
SIZE = 32
_RECORD = 1 + 3 * SIZE * SIZE
_PADDING = 4


@dataset("cifar10")
def cifar10(
    *, root: str = "cifar10", cutout: Annotated[int, Field(ge=0, le=SIZE)] = 0, limit: Count | None = None
) -> Dataset:
    """CIFAR-10; training images are shifted by up to 4 pixels and flipped.

    The folder holds, at any depth, `data_batch_*.bin` and `test_batch.bin` (the authors' binary version) or
    `train*.parquet` and `test*.parquet` with the columns `img` and `label`.

    Args:
        root: looked for as given, then in the folder that QBENCH_DATA names.
        cutout: side of a square that is blanked in every training image (arXiv:1708.04552); for few images.
        limit: at most this many images of each split, spread evenly over it.
    """
    place = find(root)
    digest = hashlib.sha256()
    train, evaluation = (thin(_split(place, name, digest), limit) for name in ("train", "test"))

    def augment(images: Tensor, targets: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        moved = crop_and_flip(images, generator)
        return blank(moved, cutout, generator) if cutout else moved, targets

    return Dataset("classification", CLASSES, train, train, evaluation, digest.hexdigest()[:16], augment)


def _split(root: Path, name: str, digest: hashlib._Hash) -> Split:
    binary = sorted(root.rglob("data_batch_*.bin" if name == "train" else "test_batch.bin"))
    files = binary or sorted(root.rglob(f"{name}*.parquet"))
    if not files:
        hint = "; get the binary version: pickles are not read" if any(root.rglob("data_batch_1")) else ""
        wanted = "data_batch_*.bin and test_batch.bin, or train*.parquet and test*.parquet"
        raise UserError(f"{root} holds no CIFAR-10 ({name} split; looked for {wanted}){hint}")
    labels, load = (_binary if binary else _parquet)(files)
    if labels.size == 0 or not 0 <= labels.min() <= labels.max() < len(CLASSES):
        raise UserError(f"{files[0]}: labels are not from 0 to {len(CLASSES) - 1}")
    # Labels and the numbers of bytes tell two versions apart without reading every image.
    digest.update(f"{name} {[file.stat().st_size for file in files]}".encode() + labels.tobytes())
    return Split([f"{name}/{position}" for position in range(len(labels))], load, labels.tolist())


def _binary(files: Sequence[Path]) -> tuple[np.ndarray, Callable[[int], Image.Image]]:
    """Records of a label and the planes red, green, blue."""
    for file in files:
        if file.stat().st_size % _RECORD:
            raise UserError(f"{file} is not whole: its size is no multiple of {_RECORD} bytes")
    records = np.concatenate([np.fromfile(file, np.uint8).reshape(-1, _RECORD) for file in files])
    pixels = records[:, 1:].reshape(-1, 3, SIZE, SIZE).transpose(0, 2, 3, 1)
    return records[:, 0].astype(np.int64), lambda position: Image.fromarray(np.ascontiguousarray(pixels[position]))


def _parquet(files: Sequence[Path]) -> tuple[np.ndarray, Callable[[int], Image.Image]]:
    """Rows of an encoded image and a label."""
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.concat_tables([pyarrow.parquet.read_table(file, columns=["img", "label"]) for file in files])
        encoded = table["img"].combine_chunks().field("bytes")
        labels = table["label"].to_numpy().astype(np.int64)
    except (pyarrow.ArrowException, KeyError) as error:
        raise UserError(f"{files[0]} is not a parquet file of CIFAR-10 ({' '.join(str(error).split())})") from error
    return labels, lambda position: Image.open(io.BytesIO(encoded[position].as_py()))


def crop_and_flip(images: Tensor, generator: torch.Generator) -> Tensor:
    """Shift each image by up to 4 pixels, what comes in being 0, and flip every other one at random."""
    count, _, height, width = images.shape
    down, right = torch.randint(2 * _PADDING + 1, (2, count, 1), generator=generator)
    flipped = torch.rand(count, 1, generator=generator) < 0.5
    rows, columns = torch.arange(height) + down, torch.arange(width) + right
    columns = torch.where(flipped, columns.flip(1), columns)
    padded = F.pad(images, [_PADDING] * 4).permute(0, 2, 3, 1)
    places = (torch.arange(count)[:, None, None], rows[:, :, None], columns[:, None, :])
    return padded[tuple(place.to(images.device) for place in places)].permute(0, 3, 1, 2)


def blank(images: Tensor, side: int, generator: torch.Generator) -> Tensor:
    """Set a square of each image to 0; its middle is anywhere in the image."""
    count, _, height, width = images.shape
    first, last = -(side // 2), side - side // 2

    def inside(length: int) -> Tensor:
        middle = torch.randint(length, (count, 1), generator=generator)
        place = torch.arange(length) - middle
        return (first <= place) & (place < last)

    square = inside(height)[:, None, :, None] & inside(width)[:, None, None, :]
    return images.masked_fill(square.to(images.device), 0.0)
