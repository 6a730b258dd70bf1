"""Classification sets that `datasets` can load: from the Hugging Face hub, or local files such as parquet."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import numpy as np

from qbench.datasets.base import Dataset, Split
from qbench.datasets.folder import Count, thin
from qbench.errors import UserError
from qbench.registry import dataset, nearest


@dataset("hub")
def hub(
    *,
    path: str,
    name: str | None = None,
    data_files: dict[str, str] | None = None,
    revision: str | None = None,
    train: str = "train",
    evaluation: str = "test",
    image: str = "image",
    label: str = "label",
    limit: Count | None = None,
    skip_unreadable: bool = False,
) -> Dataset:
    """An image classification set of the library `datasets`.

    Args:
        path: name on the hub, a folder, or a format (`parquet`, with `data_files`).
        name: configuration, where the set has several.
        data_files: file of each split, for local files.
        revision: commit or tag on the hub.
        train: split that calibration images are drawn from.
        evaluation: split that is scored.
        image: column of the images.
        label: column of the class labels.
        limit: at most this many images of each split, spread evenly over it.
        skip_unreadable: leave out, and count, images that cannot be decoded.
    """
    loaded = _load(path, name=name, data_files=data_files, revision=revision)
    identity: list[Any] = [path, name, revision]
    splits: list[Split] = []
    classes: list[str] = []
    for part in (train, evaluation):
        if part not in loaded:
            raise UserError(
                f"dataset {path!r} has no split {part!r}{nearest(part, list(loaded))} ({', '.join(loaded)})"
            )
        rows = loaded[part]
        classes = _classes(path, rows.features, image, label)
        labels = np.asarray(rows.with_format("numpy")[label][:], dtype=np.int64)
        if labels.size == 0 or labels.min() < 0:
            raise UserError(f"dataset {path!r}: split {part!r} has images without a label; choose a labelled split")
        # Labels and the number of bytes tell two versions apart without reading every image.
        identity += [part, len(rows), rows.info.splits[part].num_bytes, hashlib.sha256(labels.tobytes()).hexdigest()]
        splits.append(thin(_split(rows, part, image, labels, skip_unreadable), limit))
    fingerprint = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]
    return Dataset("classification", classes, splits[0], splits[0], splits[1], fingerprint)


def _load(path: str, **options: Any) -> Any:
    import datasets

    datasets.disable_progress_bars()
    try:
        return datasets.load_dataset(path, **{key: value for key, value in options.items() if value is not None})
    except Exception as error:  # every storage and format has its own
        reason = " ".join(str(error).split())
        raise UserError(
            f"`datasets` cannot load {path!r} ({type(error).__name__}: {reason}); check path, name and data_files"
        ) from error


def _classes(path: str, features: Any, image: str, label: str) -> list[str]:
    for column, kind in ((image, "Image"), (label, "ClassLabel")):
        found = type(features[column]).__name__ if column in features else "missing"
        if found != kind:
            known = ", ".join(f"{key}: {type(value).__name__}" for key, value in features.items())
            raise UserError(f"dataset {path!r}: column {column!r} should be {kind}, but is {found} (columns: {known})")
    return list(features[label].names)


def _split(rows: Any, name: str, image: str, labels: np.ndarray, skip: bool) -> Split:
    pictures = rows.select_columns([image])
    return Split(
        ids=[f"{name}/{position}" for position in range(len(rows))],
        load=lambda position: pictures[position][image],
        targets=labels.tolist(),
        skip_unreadable=skip,
    )
