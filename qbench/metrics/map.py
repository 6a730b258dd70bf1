"""COCO mean average precision, by faster-coco-eval."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from qbench.datasets.base import Boxes
from qbench.metrics.base import Finished
from qbench.registry import metric

NAMES = (
    *("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large"),
    *("AR1", "AR10", "AR100", "AR_small", "AR_medium", "AR_large"),
)


@metric("map", unit="AP", direction="higher", task="detection")
def mean_average_precision(finished: Finished) -> dict[str, Any]:
    """The twelve numbers of the COCO protocol, in [0, 1]; AP is the mean over IoU .50:.95 and classes."""
    evaluation = finished.dataset.evaluation
    return {
        **coco_stats(evaluation.targets, finished.outcomes, len(finished.dataset.classes)),
        "images": len(evaluation),
        "objects": sum(len(boxes.labels) for boxes in evaluation.targets),
        "detections": len(finished.outcomes["score"]),
    }


def coco_stats(targets: Sequence[Boxes], detections: Mapping[str, np.ndarray], classes: int) -> dict[str, float | None]:
    """The twelve COCO numbers by name; None where there is no object of that size.

    Args:
        targets: objects of every image.
        detections: `image` (n,), `xyxy` (n, 4), `score` (n,), `label` (n,), of all images one after the other.
        classes: how many classes there are.
    """
    from faster_coco_eval import COCO, COCOeval_faster

    truth = COCO(
        {
            "images": [{"id": number + 1, "width": 0, "height": 0} for number in range(len(targets))],
            "categories": [{"id": label + 1, "name": str(label)} for label in range(classes)],
            "annotations": _annotations(targets),
        }
    )
    evaluator = COCOeval_faster(truth, truth.loadRes(_results(detections)), "bbox", print_function=_quiet)
    evaluator.evaluate()
    evaluator.accumulate()
    evaluator.summarize()
    return {name: None if value < 0 else float(value) for name, value in zip(NAMES, evaluator.stats[:12], strict=True)}


def _quiet(*_: object) -> None:
    pass


def _annotations(targets: Sequence[Boxes]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for number, boxes in enumerate(targets):
        xywh = _xywh(boxes.xyxy)
        area = xywh[:, 2] * xywh[:, 3] if boxes.area is None else boxes.area
        crowd = np.zeros(len(xywh), dtype=int) if boxes.crowd is None else boxes.crowd
        for box, label, size, many in zip(xywh.tolist(), boxes.labels, area, crowd, strict=True):
            found.append(
                {
                    "id": len(found) + 1,
                    "image_id": number + 1,
                    "category_id": int(label) + 1,
                    "bbox": box,
                    "area": float(size),
                    "iscrowd": int(many),
                }
            )
    return found


def _results(detections: Mapping[str, np.ndarray]) -> list[dict[str, Any]]:
    columns = (detections["image"], detections["label"], _xywh(detections["xyxy"]), detections["score"])
    return [
        {"image_id": int(image) + 1, "category_id": int(label) + 1, "bbox": box.tolist(), "score": float(score)}
        for image, label, box, score in zip(*columns, strict=True)
    ]


def _xywh(xyxy: np.ndarray) -> np.ndarray:
    """(n, 4) left, top, width, height, in double precision."""
    boxes = np.asarray(xyxy, dtype=np.float64).reshape(-1, 4)
    return np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1)
