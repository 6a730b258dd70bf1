"""Detection sets with annotations in COCO's format."""

from __future__ import annotations

from pathlib import Path

from qbench.datasets import coco_format
from qbench.datasets.base import Dataset
from qbench.datasets.folder import Count, find
from qbench.datasets.objects import Listing, assemble
from qbench.errors import UserError
from qbench.registry import dataset

IDS = tuple(one for one in range(1, 91) if one not in {12, 26, 29, 30, 45, 66, 68, 69, 71, 83})
"""The ids of COCO's 80 categories; classes are numbered in their order."""


@dataset("coco")
def coco(
    *,
    root: str = "coco",
    train: str = "train2017",
    evaluation: str = "val2017",
    limit: Count | None = None,
    skip_unreadable: bool = False,
) -> Dataset:
    """COCO's 80 kinds of objects, or any part of it, in `annotations/instances_<split>.json` and `<split>/*`.

    Source: T.-Y. Lin et al., "Microsoft COCO: Common Objects in Context", arXiv:1405.0312, 2014.

    Args:
        root: looked for as given, then in the folder that QBENCH_DATA names.
        train: split that calibration images are drawn from.
        evaluation: split that is scored.
        limit: at most this many images of each split, spread evenly over it.
        skip_unreadable: leave out, and count, images that are missing, cannot be decoded or have another size.
    """
    files = {split: (f"annotations/instances_{split}.json", split) for split in (train, evaluation)}
    return _read(find(root), files[train], files[evaluation], limit, skip_unreadable, IDS)


@dataset("bccd")
def bccd(
    *,
    root: str = "bccd",
    train: str = "train",
    evaluation: str = "test",
    limit: Count | None = None,
    skip_unreadable: bool = False,
) -> Dataset:
    """Red and white blood cells and platelets, in `annotations/instances_<split>.json` and `images/*`.

    Args:
        root: looked for as given, then in the folder that QBENCH_DATA names.
        train: split that calibration images are drawn from.
        evaluation: split that is scored: `test`, or `val` to choose by.
        limit: at most this many images of each split, spread evenly over it.
        skip_unreadable: leave out, and count, images that are missing, cannot be decoded or have another size.
    """
    files = {split: (f"annotations/instances_{split}.json", "images") for split in (train, evaluation)}
    return _read(find(root), files[train], files[evaluation], limit, skip_unreadable)


@dataset("coco_folder")
def coco_folder(
    *,
    root: str,
    train: str = "annotations/instances_train.json",
    evaluation: str = "annotations/instances_val.json",
    train_images: str = "train",
    evaluation_images: str = "val",
    limit: Count | None = None,
    skip_unreadable: bool = False,
) -> Dataset:
    """Any images with annotations in COCO's format; classes are numbered in the order of their categories' ids.

    Args:
        root: looked for as given, then in the folder that QBENCH_DATA names.
        train: annotation file, below root, of the images that calibration images are drawn from.
        evaluation: annotation file, below root, of the images that are scored.
        train_images: folder, below root, of the training images.
        evaluation_images: folder, below root, of the evaluation images.
        limit: at most this many images of each split, spread evenly over it.
        skip_unreadable: leave out, and count, images that are missing, cannot be decoded or have another size.
    """
    return _read(find(root), (train, train_images), (evaluation, evaluation_images), limit, skip_unreadable)


def _read(
    root: Path,
    train: tuple[str, str],
    evaluation: tuple[str, str],
    limit: int | None,
    skip: bool,
    ids: tuple[int, ...] | None = None,
) -> Dataset:
    """A dataset of two (annotation file, image folder); `ids` are those of the categories, if known."""
    files = {path: coco_format.read(path) for path in (root / train[0], root / evaluation[0])}
    (first, names), (second, others) = ((path, coco_format.categories(file)) for path, file in files.items())
    if ids is not None and tuple(names) != ids:
        raise UserError(
            f"{first} does not have the ids of COCO's {len(ids)} categories; use coco_folder, which reads any"
        )
    if names != others:
        raise UserError(f"{first} and {second} have different categories; both splits must have the same ids and names")
    learned, scored = (
        Listing(root / name, coco_format.annotated(files[root / name], root / name, folder, list(names)))
        for name, folder in (train, evaluation)
    )
    return assemble(root, list(names.values()), learned, scored, limit, skip)
