"""ImageNet-1k as it lies on disk everywhere: `<root>/<split>/<wnid>/*`."""

from __future__ import annotations

from qbench.datasets.base import Dataset
from qbench.datasets.folder import Count, Resize, find, read
from qbench.registry import dataset


@dataset("imagenet")
def imagenet(
    *,
    root: str = "imagenet",
    train: str = "train",
    evaluation: str = "val",
    resize: Resize = "auto",
    limit: Count | None = None,
    skip_unreadable: bool = False,
) -> Dataset:
    """ImageNet-1k in folders `<root>/<split>/<wnid>/*`, or any part of it: labels are those of all 1,000 classes.

    Args:
        root: looked for as given, then in the folder that QBENCH_DATA names.
        train: folder of the training split, of which the calibration images are drawn.
        evaluation: folder of the evaluation split.
        resize: `never` only crops; `auto` only crops images that all have one square size below 256.
        limit: at most this many images of each split, spread evenly over it.
        skip_unreadable: leave out, and count, images that cannot be decoded.
    """
    from timm.data import ImageNetInfo

    return read(find(root), ImageNetInfo().label_names(), (train, evaluation), resize, limit, skip_unreadable)
