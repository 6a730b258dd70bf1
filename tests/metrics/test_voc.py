"""VOC's average precision: against a plain implementation, by hand, and where it differs from COCO's."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_map import Found, _random

from qbench.datasets.base import Boxes
from qbench.metrics.voc import class_aps


def plain(targets: list[Boxes], found: Found, label: int, eleven: bool) -> float | None:
    """Box by box, as the development kit goes about it."""
    objects = sum(int(((one.labels == label) & ~one.crowd).sum()) for one in targets)
    if not objects:
        return None
    taken: set[tuple[int, int]] = set()
    outcomes = []
    own = [i for i in range(len(found["score"])) if found["label"][i] == label]
    for i in sorted(own, key=lambda i: (-found["score"][i], found["image"][i], i)):
        image, (x0, y0, x1, y1) = int(found["image"][i]), found["xyxy"][i].astype(float)
        best, which = 0.0, -1
        for j, (a0, b0, a1, b1) in enumerate(targets[image].xyxy.astype(float)):
            if targets[image].labels[j] == label:
                shared = max(0.0, min(x1, a1) - max(x0, a0)) * max(0.0, min(y1, b1) - max(y0, b0))
                overlap = shared / ((x1 - x0) * (y1 - y0) + (a1 - a0) * (b1 - b0) - shared)
                if overlap > best:
                    best, which = overlap, j
        if best >= 0.5 and targets[image].crowd[which]:
            continue
        outcomes.append(best >= 0.5 and (image, which) not in taken)
        if outcomes[-1]:
            taken.add((image, which))
    curve = [(sum(outcomes[:n]) / objects, sum(outcomes[:n]) / n) for n in range(1, len(outcomes) + 1)]
    if eleven:
        return float(
            np.mean([max([p for r, p in curve if r >= t - 1e-12], default=0.0) for t in np.linspace(0, 1, 11)])
        )
    steps = zip([0.0, *(r for r, _ in curve)], curve, strict=False)
    return sum((r - before) * max(p for s, p in curve if s >= r) for before, (r, _) in steps)


@given(st.integers(0, 10_000), st.booleans())
@settings(max_examples=40, deadline=None)
def test_it_is_the_development_kits(seed: int, eleven: bool) -> None:
    targets, found = _random(seed, 6)
    # Scores that differ: the kit leaves the order of equal ones open.
    found["score"] = np.random.default_rng(seed).permutation(len(found["score"])).astype(np.float32)
    own = class_aps(targets, found, 3, "11" if eleven else "all")
    for label in range(3):
        expected = plain(targets, found, label, eleven)
        assert (label in own) == (expected is not None)
        if expected is not None:
            assert own[label] == pytest.approx(expected, abs=1e-9)


def _found(*rows: tuple[float, ...]) -> Found:
    columns: Any = np.array(rows, dtype=np.float32).reshape(-1, 5)
    zeros = np.zeros(len(columns), dtype=np.int64)
    return {"image": zeros, "xyxy": columns[:, :4], "score": columns[:, 4], "label": zeros}


def test_by_hand() -> None:
    objects = Boxes(np.array([[0, 0, 10, 10], [20, 0, 30, 10]], np.float32), np.array([0, 0]))
    found = _found((0, 0, 10, 10, 0.9), (0, 0, 10, 10, 0.8), (20, 0, 30, 10, 0.7))
    assert class_aps([objects], found, 1)[0] == pytest.approx(0.5 * 1 + 0.5 * 2 / 3)
    assert class_aps([objects], found, 1, "11")[0] == pytest.approx((6 * 1 + 5 * 2 / 3) / 11)
    assert class_aps([objects], _found(), 1) == {0: 0.0}


def test_difficult_objects_count_for_nothing() -> None:
    xyxy = np.array([[0, 0, 10, 10], [20, 0, 30, 10]], np.float32)
    objects = Boxes(xyxy, np.array([0, 0]), np.array([False, True]))
    found = _found((20, 0, 30, 10, 0.9), (20, 0, 30, 10, 0.8), (0, 0, 10, 10, 0.7))
    assert class_aps([objects], found, 1) == {0: 1.0}
    assert class_aps([Boxes(xyxy[1:], np.array([0]), np.array([True]))], found, 1) == {}
