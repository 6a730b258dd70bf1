"""Images in class folders, `<root>/<split>/<class>/*`."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from PIL import Image
from pydantic import Field

from qbench.datasets.base import Dataset, Split
from qbench.errors import UserError
from qbench.registry import dataset

Resize = Literal["auto", "always", "never"]
Count = Annotated[int, Field(ge=1)]

_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".gif")
_SAMPLE = 16
_ORIGINAL_SIDE = 256
"""Images that all have one square size below this have been resized by somebody."""


@dataset("image_folder")
def image_folder(
    *,
    root: str,
    train: str = "train",
    evaluation: str = "val",
    resize: Resize = "auto",
    limit: Count | None = None,
    skip_unreadable: bool = False,
) -> Dataset:
    """Images in folders `<root>/<split>/<class>/*`; classes are numbered in the order of their names.

    Args:
        root: looked for as given, then in the folder that QBENCH_DATA names.
        train: folder of the training split, of which the calibration images are drawn.
        evaluation: folder of the evaluation split.
        resize: `never` only crops; `auto` only crops images that all have one square size below 256.
        limit: at most this many images of each split, spread evenly over it.
        skip_unreadable: leave out, and count, images that cannot be decoded.
    """
    place = find(root)
    names = sorted({name for split in (train, evaluation) for name in class_folders(place, split)})
    return read(place, names, (train, evaluation), resize, limit, skip_unreadable)


def read(
    root: Path, classes: Sequence[str], splits: tuple[str, str], resize: Resize, limit: int | None, skip: bool
) -> Dataset:
    """A classification dataset of two split folders.

    Args:
        root: of the dataset.
        classes: names of class folders; a label is the position of the name.
        splits: folders of training and evaluation.
        resize: as for `image_folder`.
        limit: as for `image_folder`.
        skip: as `skip_unreadable` of `image_folder`.

    Raises:
        UserError: a folder is missing, holds no images, or is not one of the classes.
    """
    labels = {name: label for label, name in enumerate(classes)}
    digest = hashlib.sha256()
    train, evaluation = (_split(root, name, labels, resize, limit, skip, digest) for name in splits)
    return Dataset("classification", classes, train, train, evaluation, digest.hexdigest()[:16])


def thin(split: Split, limit: int | None) -> Split:
    """At most `limit` images, spread evenly over the split."""
    return split if limit is None or limit >= len(split) else split.subset(_spread(len(split), limit))


def find(root: str) -> Path:
    """The folder as given, or below the one that QBENCH_DATA names.

    Raises:
        UserError: there is none.
    """
    data = os.environ.get("QBENCH_DATA")
    places = [Path(root), *([Path(data) / root] if data else [])]
    for place in places:
        if place.is_dir():
            return place
    looked = " and ".join(str(place) for place in places)
    hint = "" if data else "; set QBENCH_DATA to the folder that holds it, or the option root"
    raise UserError(f"dataset folder {root!r} not found: looked for {looked}{hint}")


def class_folders(root: Path, split: str) -> list[str]:
    """The names of the class folders of a split.

    Raises:
        UserError: there are none.
    """
    folder = root / split
    names = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir()) if folder.is_dir() else []
    if not names:
        raise UserError(f"{folder} has no class folders; the images of a class are expected in {folder}/<class>/")
    return names


def _split(
    root: Path,
    name: str,
    labels: Mapping[str, int],
    resize: Resize,
    limit: int | None,
    skip: bool,
    digest: hashlib._Hash,
) -> Split:
    ids: list[str] = []
    targets: list[int] = []
    for label in class_folders(root, name):
        if label not in labels:
            raise UserError(f"{root / name / label} is not one of the {len(labels):,} classes; rename or remove it")
        sizes = _sizes(root / name / label)
        files = sorted(sizes)
        digest.update("".join(f"{name}/{label}/{file} {sizes[file]}\n" for file in files).encode())
        ids += [f"{name}/{label}/{file}" for file in files]
        targets += [labels[label]] * len(files)
    if not ids:
        raise UserError(f"{root / name} has class folders, but no images in them ({' '.join(_SUFFIXES)})")
    split = thin(Split(ids, lambda position: _load(root / ids[position]), targets, skip_unreadable=skip), limit)
    resized = resize == "never" or (resize == "auto" and _look_resized([root / split.ids[i] for i in _sample(split)]))
    return replace(split, resized=resized)


def _sizes(folder: Path) -> dict[str, int]:
    with os.scandir(folder) as entries:
        return {entry.name: entry.stat().st_size for entry in entries if entry.name.lower().endswith(_SUFFIXES)}


def _spread(count: int, chosen: int) -> list[int]:
    return np.linspace(0, count - 1, chosen).round().astype(int).tolist()


def _sample(split: Split) -> list[int]:
    return _spread(len(split), min(_SAMPLE, len(split)))


def _load(path: Path) -> Image.Image:
    try:
        with Image.open(path) as image:
            image.load()
            return image
    except (OSError, SyntaxError, ValueError) as error:
        raise OSError(f"{path}: {error}") from error


def _look_resized(paths: list[Path]) -> bool:
    sizes = set()
    for path in paths:
        try:
            with Image.open(path) as image:
                sizes.add(image.size)
        except (OSError, SyntaxError, ValueError):
            continue  # reported when it is decoded
    return len(sizes) == 1 and all(width == height < _ORIGINAL_SIDE for width, height in sizes)
