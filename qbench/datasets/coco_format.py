"""Annotation files in COCO's JSON format."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated as With

import numpy as np
from pydantic import Field, FiniteFloat, PositiveInt, TypeAdapter

from qbench.datasets.base import Boxes
from qbench.datasets.objects import Annotated, Name, validated
from qbench.errors import UserError


@dataclass(frozen=True, slots=True)
class _Image:
    id: int
    file_name: Name
    width: PositiveInt
    height: PositiveInt


@dataclass(frozen=True, slots=True)
class _Category:
    id: int
    name: Name


@dataclass(frozen=True, slots=True)
class _Object:
    image_id: int
    category_id: int
    bbox: tuple[FiniteFloat, FiniteFloat, FiniteFloat, FiniteFloat]
    """Left, top, width, height."""
    area: With[FiniteFloat, Field(ge=0)] | None = None
    iscrowd: bool = False


@dataclass(frozen=True, slots=True)
class File:
    """What is read of a file."""

    images: With[list[_Image], Field(min_length=1)]
    categories: With[list[_Category], Field(min_length=1)]
    annotations: list[_Object]


def read(path: Path) -> File:
    """The content of an annotation file, without segmentations.

    Raises:
        UserError: it is missing or not JSON, or a key is missing or wrong.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(
            f"annotation file {path} cannot be read ({error.strerror}); put it there, or name another"
        ) from error
    found: File = validated(TypeAdapter(File), content, path)
    for kind, entries in (("images", found.images), ("categories", found.categories)):
        one, times = Counter(entry.id for entry in entries).most_common(1)[0]
        if times > 1:
            raise UserError(f"{path}: {kind} has the id {one} {times} times; ids must differ")
    return found


def categories(file: File) -> dict[int, str]:
    """Names by id, in the order of the ids, which may have gaps."""
    return dict(sorted((category.id, category.name) for category in file.categories))


def annotated(file: File, path: Path, folder: str, ids: Sequence[int]) -> list[Annotated]:
    """The images in the order of the file, with their objects; images without any are among them.

    Args:
        file: as `read`.
        path: of the file, for messages.
        folder: of the images, below the dataset's root.
        ids: of the categories, in the order of the labels.

    Raises:
        UserError: an object is of an image or a category that the file does not list.
    """
    images = {image.id for image in file.images}
    labels = {one: label for label, one in enumerate(ids)}
    objects: defaultdict[int, list[_Object]] = defaultdict(list)
    for position, one in enumerate(file.annotations):
        if one.image_id not in images or one.category_id not in labels:
            key = "image_id" if one.image_id not in images else "category_id"
            raise UserError(f"{path}: annotations.{position}.{key} = {getattr(one, key)} is not listed in the file")
        objects[one.image_id].append(one)
    return [
        Annotated(f"{folder}/{image.file_name}", (image.width, image.height), _boxes(objects[image.id], labels), path)
        for image in file.images
    ]


def _boxes(objects: Sequence[_Object], labels: Mapping[int, int]) -> Boxes:
    xywh = np.array([one.bbox for one in objects], dtype=np.float64).reshape(-1, 4)
    xyxy = np.concatenate([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], axis=1)
    area = [w * h if one.area is None else one.area for one, (w, h) in zip(objects, xywh[:, 2:], strict=True)]
    return Boxes(
        xyxy.astype(np.float32),
        np.array([labels[one.category_id] for one in objects], dtype=np.int64),
        np.array([one.iscrowd for one in objects], dtype=bool),
        np.array(area, dtype=np.float32),
    )
