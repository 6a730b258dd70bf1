"""Annotated images of any format as a detection dataset: wrong boxes are refused, or mended and counted."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated as With
from typing import Any

import numpy as np
from PIL import Image
from pydantic import Field, TypeAdapter, ValidationError

from qbench.datasets.base import Boxes, Dataset, Split
from qbench.datasets.folder import thin
from qbench.datasets.vary import vary
from qbench.errors import UserError

Name = With[str, Field(min_length=1)]


@dataclass(frozen=True)
class Annotated:
    """One image and its objects, as a file describes them."""

    file: str
    """Path of the image below the dataset's root."""
    size: tuple[int, int]
    """(width, height) in pixels."""
    boxes: Boxes
    source: Path
    """The file that says so."""


@dataclass(frozen=True)
class Listing:
    """The images of one split."""

    source: Path
    """The file that lists them."""
    images: Sequence[Annotated]


def assemble(
    root: Path, classes: Sequence[str], train: Listing, evaluation: Listing, limit: int | None, skip_unreadable: bool
) -> Dataset:
    """A detection dataset; its calibration images are drawn from the training split.

    A box that reaches out of its image is clipped, one that has no area in it is left out; the dataset's notes say how
    many there were.

    Args:
        root: folder that the images' paths start from.
        classes: names, in the order of the labels.
        train: images to train and calibrate on.
        evaluation: images to score.
        limit: at most this many images of each split, spread evenly over it.
        skip_unreadable: leave out, and count, images that are missing, cannot be decoded or have another size.

    Raises:
        UserError: a box ends before it begins, an image is missing or listed twice, or a split has no objects.
    """
    digest = hashlib.sha256("\n".join(classes).encode())
    notes: list[str] = []
    splits = [_split(root, listing, limit, skip_unreadable, digest, notes) for listing in (train, evaluation)]
    return Dataset(
        "detection",
        classes,
        splits[0],
        splits[0],
        splits[1],
        digest.hexdigest()[:16],
        augment=vary,
        notes=tuple(dict.fromkeys(notes)),
    )


def _split(
    root: Path, listing: Listing, limit: int | None, skip: bool, digest: hashlib._Hash, notes: list[str]
) -> Split:
    images = listing.images
    ids = [image.file for image in images]
    if len(set(ids)) < len(ids):
        twice = Counter(ids).most_common(1)[0][0]
        raise UserError(f"{listing.source} lists the image {twice} more than once; remove the other entries")
    split = thin(Split(ids, lambda position: _load(root, images[position]), images, skip_unreadable=skip), limit)
    for image in split.targets:
        digest.update(f"{image.file} {image.size} {_bytes(root, image, skip)}\n".encode())
    targets, clipped, lost = [], 0, 0
    for image in split.targets:
        boxes, outside, empty = _inside(image)
        targets.append(boxes)
        clipped, lost = clipped + outside, lost + empty
        for values in (boxes.xyxy, boxes.labels, boxes.crowd, boxes.area):
            digest.update(b"-" if values is None else values.tobytes())
    if not any(len(boxes.labels) for boxes in targets):
        raise UserError(f"{listing.source}: none of its {len(targets):,} images has an object; is it a file of labels?")
    counts = ((clipped, "reach out of their images: clipped"), (lost, "have no area inside their images: left out"))
    notes += [f"{listing.source}: boxes that {what}: {count:,}" for count, what in counts if count]
    return replace(split, targets=targets)


def _bytes(root: Path, image: Annotated, skip: bool) -> int | None:
    try:
        return (root / image.file).stat().st_size
    except OSError as error:
        if skip:
            return None  # left out, and counted, when it is decoded
        raise UserError(
            f"{image.source}: the image {image.file} is not in {root} ({error.strerror}); "
            "fetch it, or set skip_unreadable: true"
        ) from error


def _load(root: Path, image: Annotated) -> Image.Image:
    with Image.open(root / image.file) as opened:
        opened.load()
    if opened.size != image.size:
        # Its boxes would be somewhere else.
        raise ValueError("it has {}x{} pixels, but {} says {}x{}".format(*opened.size, image.source, *image.size))
    return opened


def _inside(image: Annotated) -> tuple[Boxes, int, int]:
    """The parts of the boxes that are inside the image, how many were clipped, and how many have no area."""
    boxes = image.boxes
    wrong = np.flatnonzero((boxes.xyxy[:, 2:] < boxes.xyxy[:, :2]).any(axis=1))
    if len(wrong):
        left, top, right, bottom = boxes.xyxy[wrong[0]].tolist()
        raise UserError(
            f"{image.source}: a box of {image.file} ends before it begins, x from {left} to {right} and y from "
            f"{top} to {bottom}; correct it"
        )
    xyxy = np.clip(boxes.xyxy, 0, np.tile(image.size, 2)).astype(np.float32)
    kept = (xyxy[:, 2:] > xyxy[:, :2]).all(axis=1)
    clipped = (xyxy != boxes.xyxy).any(axis=1) & kept
    crowd, area = (None if values is None else values[kept] for values in (boxes.crowd, boxes.area))
    return Boxes(xyxy[kept], boxes.labels[kept], crowd, area), int(clipped.sum()), int((~kept).sum())


def validated(form: TypeAdapter[Any], content: bytes | dict[str, Any], path: Path) -> Any:
    """The content of an annotation file, checked against its form: JSON, or what was read of another format.

    Raises:
        UserError: naming the first key that is missing or wrong.
    """
    try:
        return form.validate_json(content) if isinstance(content, bytes) else form.validate_python(content)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        shown = f" = {first['input']!r}" if isinstance(first["input"], (str, int, float)) and key else ""
        raise UserError(
            f"{path}: {key}{shown}{': ' if key else ''}{first['msg'][0].lower()}{first['msg'][1:]}"
        ) from None
