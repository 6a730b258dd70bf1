"""Average precision at an IoU of 0.5, as Pascal VOC counts it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from qbench.datasets.base import Boxes
from qbench.metrics.ap import iou
from qbench.metrics.base import Finished
from qbench.registry import metric

IOU = 0.5
Area = Literal["all", "11"]


@metric("voc_ap50", unit="AP50", direction="higher", task="detection")
def voc_ap50(finished: Finished, *, points: Area = "all") -> dict[str, Any]:
    """Pascal VOC's mean average precision at an IoU of 0.5, in [0, 1], and that of each class that has objects.

    A detection belongs to the object that it overlaps most, and is wrong if a better one has found that already (COCO
    then takes the next object). Difficult objects, as crowd regions are, count neither for nor against.

    Source: M. Everingham et al., "The Pascal Visual Object Classes (VOC) Challenge", IJCV 88(2), 2010.

    Args:
        finished: the run.
        points: the area under the whole curve, as from VOC 2010 on; or the mean of 11 points, as before.
    """
    classes = finished.dataset.classes
    found = class_aps(finished.dataset.evaluation.targets, finished.outcomes, len(classes), points)
    by_class = {classes[label]: value for label, value in found.items()}
    return {"value": float(np.mean(list(by_class.values()))) if by_class else 0.0, "classes": by_class}


def class_aps(
    targets: Sequence[Boxes], detections: Mapping[str, np.ndarray], classes: int, points: Area = "all"
) -> dict[int, float]:
    """The average precision of each class that has an object which is not difficult.

    Args:
        targets: objects of every image.
        detections: `image` (n,), `xyxy` (n, 4), `score` (n,), `label` (n,), of all images one after the other.
        classes: how many classes there are.
        points: as for `voc_ap50`.
    """
    labels = np.concatenate([one.labels for one in targets])
    difficult = np.concatenate([_difficult(one) for one in targets])
    objects = np.bincount(labels[~difficult], minlength=classes)
    true, ignored = _judge(targets, detections)
    order = np.lexsort((-detections["score"], detections["label"]))
    ends = np.searchsorted(detections["label"][order], np.arange(classes + 1))
    return {
        label: _area(true[own], ignored[own], int(objects[label]), points)
        for label in np.flatnonzero(objects).tolist()
        for own in [order[ends[label] : ends[label + 1]]]
    }


def _difficult(boxes: Boxes) -> np.ndarray:
    return np.zeros(len(boxes.labels), dtype=bool) if boxes.crowd is None else boxes.crowd.astype(bool)


def _judge(targets: Sequence[Boxes], detections: Mapping[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Which detections found an object first, and which belong to a difficult one."""
    score, label, image = (detections[name] for name in ("score", "label", "image"))
    true, ignored = np.zeros(len(score), dtype=bool), np.zeros(len(score), dtype=bool)
    order = np.lexsort((-score, image))
    ends = np.searchsorted(image[order], np.arange(len(targets) + 1))
    for number, boxes in enumerate(targets):
        own = order[ends[number] : ends[number + 1]]
        if not len(own) or not len(boxes.labels):
            continue
        overlap = iou(
            detections["xyxy"][own].astype(float), boxes.xyxy.astype(float), np.zeros(len(boxes.labels), bool)
        )
        overlap[label[own][:, None] != boxes.labels] = 0
        best = overlap.argmax(axis=1)
        hit = overlap[np.arange(len(own)), best] >= IOU
        hard = _difficult(boxes)[best]
        ignored[own] = hit & hard
        firsts = np.unique(best[hit & ~hard], return_index=True)[1]
        true[own[np.flatnonzero(hit & ~hard)[firsts]]] = True
    return true, ignored


def _area(true: np.ndarray, ignored: np.ndarray, objects: int, points: Area) -> float:
    """Under the curve of the best precision at a recall or beyond; of one class, best score first."""
    found = true[~ignored].cumsum()
    recall = np.concatenate([[0.0], found / objects])
    precision = np.concatenate([found / np.arange(1, len(found) + 1), [0.0]])
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    if points == "all":
        return float((np.diff(recall) * envelope[:-1]).sum())
    return float(np.mean([envelope[np.searchsorted(recall[1:], level - 1e-12)] for level in np.linspace(0, 1, 11)]))
