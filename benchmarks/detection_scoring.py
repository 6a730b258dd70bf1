"""Seconds and memory of scoring a detector on a set of COCO's size: 5,000 images, 80 classes, 100 detections an image.

python benchmarks/detection_scoring.py
"""

from __future__ import annotations

import resource
import sys
import time

import numpy as np

from qbench.datasets.base import Boxes
from qbench.metrics.ap import match, paired_interval
from qbench.metrics.map import coco_stats

IMAGES, CLASSES, OBJECTS, DETECTIONS = 5000, 80, 7, 100


def scene(rng: np.random.Generator) -> tuple[list[Boxes], dict[str, np.ndarray]]:
    """Objects, one in a hundred a crowd, and detections of which a fifth lie near to one."""
    counts = rng.poisson(OBJECTS, IMAGES)
    image = np.repeat(np.arange(IMAGES), counts)
    corner, size = rng.uniform(0, 400, (len(image), 2)), np.exp(rng.uniform(2, 5.5, (len(image), 2)))
    xyxy = np.concatenate([corner, corner + size], axis=1).astype(np.float32)
    labels, crowd = rng.integers(0, CLASSES, len(image)), rng.random(len(image)) < 0.01
    cuts = counts.cumsum()[:-1]
    columns = (np.split(values, cuts) for values in (xyxy, labels, crowd))
    targets = [Boxes(*one) for one in zip(*columns, strict=True)]
    where = np.repeat(np.arange(IMAGES), DETECTIONS)
    like = rng.integers(0, len(image), len(where))
    near = rng.random(len(where)) < 0.2
    near &= (first := np.searchsorted(image, where)) < len(image)
    like[near] = (first + rng.integers(0, OBJECTS, len(where)))[near].clip(max=len(image) - 1)
    found = {
        "image": where,
        "xyxy": (xyxy[like] + rng.normal(0, 4, (len(where), 4))).astype(np.float32),
        "score": rng.random(len(where)).astype(np.float32),
        "label": labels[like],
    }
    found["xyxy"][:, 2:] = np.maximum(found["xyxy"][:, 2:], found["xyxy"][:, :2] + 1)
    return targets, found


def main() -> None:
    """Print seconds of each part, and the memory at its most."""
    rng = np.random.default_rng(0)
    targets, found = scene(rng)
    _, other = scene(np.random.default_rng(0))
    other["score"] = other["score"] + rng.normal(0, 0.1, len(other["score"])).astype(np.float32)
    start = time.perf_counter()
    matches = match(found, targets, CLASSES)
    matched = time.perf_counter()
    stats = coco_stats(targets, found, CLASSES)
    scored = time.perf_counter()
    others = match(other, targets, CLASSES)
    before = time.perf_counter()
    difference, low, high = paired_interval(matches, others)
    compared = time.perf_counter()
    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
    print(f"{IMAGES:,} images, {sum(len(t.labels) for t in targets):,} objects, {len(found['score']):,} detections")
    print(f"outcomes for each image  {matched - start:6.1f} s")
    print(f"twelve COCO numbers      {scored - matched:6.1f} s   AP {stats['AP']:.4f}")
    print(f"paired bootstrap of two  {compared - before:6.1f} s   {difference:+.4f} [{low:+.4f}, {high:+.4f}]")
    print(f"one run is scored in     {scored - start:6.1f} s; memory at its most {peak:.2f} GiB")


if __name__ == "__main__":
    main()
