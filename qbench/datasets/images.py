"""Decoded, resized images, kept on disk as bytes and normalised when they are read."""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from qbench.cache import Damaged, cache_limit, obtain
from qbench.datasets.base import Split
from qbench.datasets.transform import prepare
from qbench.errors import UserError
from qbench.models.base import Preprocess

_VERSION = 1
_CHUNK = 128
_UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)
"""What Pillow raises on a file that is not a whole image."""


class ImageArray:
    """The preprocessed images of a split, without those that could not be read.

    Attributes:
        split: the images that are there, with their ids and targets.
        positions: (N,) where they stood in the split that was opened.
        sizes: (N, 2) width and height of the original images.
        unreadable: ids of the images that were skipped.
        preprocess: how they were prepared.
    """

    def __init__(self, pixels: np.ndarray, split: Split, index: dict[str, Any], preprocess: Preprocess) -> None:
        self._pixels = pixels
        self.positions = np.array(index["positions"], dtype=np.int64)
        self.sizes = np.array(index["sizes"], dtype=np.int64).reshape(-1, 2)
        self.unreadable: list[str] = index["unreadable"]
        self.split = split.subset(index["positions"]) if self.unreadable else split
        self.preprocess = preprocess
        self._index = index
        columns = pixels.shape[2]
        self._mean = np.tile(np.array(preprocess.mean, dtype=np.float32), columns)
        self._std = np.tile(np.array(preprocess.std, dtype=np.float32), columns)

    def __len__(self) -> int:
        return len(self._pixels)

    @property
    def fingerprint(self) -> str:
        """Hash of ids, preprocessing and pixels."""
        identity = [self.split.ids, self._index["checksums"], asdict(self.preprocess)]
        return hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:24]

    def batch(self, positions: Sequence[int]) -> Tensor:
        """Normalised float32 (B, C, H, W), channels last in memory; the values are exactly torchvision's."""
        chosen = self._chosen(positions)
        # On one thread: small batches wait longer for a second one than it saves.
        values = chosen.reshape(-1, len(self._mean)).astype(np.float32)
        values /= 255
        values -= self._mean
        values /= self._std
        return torch.from_numpy(values.reshape(chosen.shape)).permute(0, 3, 1, 2)

    def pixels(self, positions: Sequence[int]) -> Tensor:
        """The same before they are normalised: uint8 (B, C, H, W)."""
        return torch.from_numpy(self._chosen(positions).copy()).permute(0, 3, 1, 2)

    def _chosen(self, positions: Sequence[int]) -> np.ndarray:
        if isinstance(positions, range) and positions.step == 1:
            return self._pixels[positions.start : positions.stop]
        return self._pixels[np.asarray(positions, dtype=np.int64)]


def open_images(split: Split, preprocess: Preprocess, fingerprint: str, cache: Path, name: str) -> ImageArray:
    """The images of a split, from the cache; they are decoded when they are not there, or are damaged.

    Args:
        split: what to open; `split.skip_unreadable` leaves out images that cannot be decoded.
        preprocess: of the model.
        fingerprint: of the dataset.
        cache: folder of everything that is kept between runs.
        name: of the split.

    Raises:
        UserError: an image cannot be read, or the cache cannot be written.
    """
    height, width = preprocess.size
    shape = (height, width, preprocess.channels)
    found, index = obtain(
        cache / "images",
        _key(split, preprocess, fingerprint, name),
        read=lambda entry: _read(entry, shape),
        write=lambda entry: _write(entry, split, preprocess),
        size=len(split) * height * width * preprocess.channels,
        limit=cache_limit(),
    )
    return ImageArray(found, split, index, preprocess)


def _key(split: Split, preprocess: Preprocess, fingerprint: str, name: str) -> str:
    # Normalisation happens when reading, but mean is also the colour of borders.
    fill = preprocess.mean if preprocess.mode == "letterbox" else preprocess.channels
    pixels = [preprocess.size, preprocess.resize, preprocess.mode, preprocess.interpolation, fill]
    identity = [_VERSION, fingerprint, name, split.resized, split.skip_unreadable, pixels]
    digest = hashlib.sha256(json.dumps(identity).encode())
    digest.update("\n".join(split.ids).encode())
    return digest.hexdigest()[:24]


def _read(entry: Path, shape: tuple[int, int, int]) -> tuple[np.ndarray, dict[str, Any]]:
    try:
        index = json.loads((entry / "index.json").read_text(encoding="utf-8"))
        count = len(index["checksums"])
        if (entry / "pixels.u8").stat().st_size != count * int(np.prod(shape)):
            raise Damaged(entry)
        # An empty file cannot be mapped.
        pixels = (
            np.memmap(entry / "pixels.u8", np.uint8, "r", shape=(count, *shape)) if count else np.empty((0, *shape))
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Damaged(entry) from error
    # A plain array: slices of a memmap are memmaps, which are slow to make.
    plain = pixels.view(np.ndarray)
    with ThreadPoolExecutor(_workers()) as pool:
        if list(pool.map(zlib.crc32, plain)) != index["checksums"]:
            raise Damaged(entry)
    return plain, index


def _write(entry: Path, split: Split, preprocess: Preprocess) -> None:
    index: dict[str, Any] = {"positions": [], "sizes": [], "checksums": [], "unreadable": []}
    with (entry / "pixels.u8").open("wb") as file:
        for position, (pixels, size) in enumerate(_decode(split, preprocess)):
            if pixels is None:
                index["unreadable"].append(split.ids[position])
                continue
            file.write(pixels)
            index["positions"].append(position)
            index["sizes"].append(size)
            index["checksums"].append(zlib.crc32(pixels))
    (entry / "index.json").write_text(json.dumps(index), encoding="utf-8")


Decoded = tuple[bytes | None, tuple[int, int]]


def _decode(split: Split, preprocess: Preprocess) -> Iterator[Decoded]:
    """In order, a bounded number at a time."""
    one = _decoder(split, preprocess)
    with ThreadPoolExecutor(_workers()) as pool:
        for start in range(0, len(split), _CHUNK):
            yield from pool.map(one, range(start, min(start + _CHUNK, len(split))))


def _decoder(split: Split, preprocess: Preprocess) -> Callable[[int], Decoded]:
    def decode(position: int) -> Decoded:
        try:
            image = split.load(position)
            return prepare(image, preprocess, split.resized).tobytes(), image.size
        except _UNREADABLE as error:
            if split.skip_unreadable:
                return None, (0, 0)
            reason = " ".join(str(error).split()) or type(error).__name__
            raise UserError(
                f"image {split.ids[position]} cannot be read ({reason}); replace it, or set skip_unreadable: true"
            ) from error

    return decode


def _workers() -> int:
    return len(os.sched_getaffinity(0))
