"""COCO numbers: the published known answer, and the bootstrap's own AP against faster-coco-eval."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qbench.datasets.base import Boxes
from qbench.metrics.ap import Matches, ap_from_matches, interval, match, paired_interval
from qbench.metrics.map import NAMES, coco_stats

Found = dict[str, np.ndarray]


def _boxes_of(rows: list[dict]) -> np.ndarray:
    xywh = np.array([row["bbox"] for row in rows], dtype=np.float64).reshape(-1, 4)
    return np.concatenate([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], axis=1).astype(np.float32)


@pytest.fixture(scope="module")
def known(shared: Path) -> tuple[list[Boxes], Found, int, list[float]]:
    folder = shared / "data" / "coco-known-answer"
    truth = json.loads((folder / "instances_val2014_100.json").read_text())
    results = json.loads((folder / "instances_val2014_fakebbox100_results.json").read_text())
    labels = {one: i for i, one in enumerate(sorted(c["id"] for c in truth["categories"]))}
    images = {one: i for i, one in enumerate(sorted(image["id"] for image in truth["images"]))}
    targets = []
    for one in images:
        rows = [a for a in truth["annotations"] if a["image_id"] == one]
        targets.append(
            Boxes(
                _boxes_of(rows),
                np.array([labels[a["category_id"]] for a in rows], dtype=np.int64),
                np.array([a["iscrowd"] for a in rows], dtype=bool),
                np.array([a["area"] for a in rows], dtype=np.float32),
            )
        )
    found = {
        "image": np.array([images[r["image_id"]] for r in results]),
        "xyxy": _boxes_of(results),
        "score": np.array([r["score"] for r in results], dtype=np.float32),
        "label": np.array([labels[r["category_id"]] for r in results]),
    }
    lines = (folder / "val2014_fake_eval_res.txt").read_text().split("type=bbox")[1].splitlines()
    expected = [float(line.rpartition("=")[2]) for line in lines if "Average" in line][:12]
    return targets, found, len(labels), expected


def test_known_answer(known: tuple) -> None:
    targets, found, classes, expected = known
    stats = coco_stats(targets, found, classes)
    assert [stats[name] for name in NAMES] == pytest.approx(expected, abs=1e-3)


def test_own_ap_equals_it_with_crowds_and_80_classes(known: tuple) -> None:
    targets, found, classes, _ = known
    matches = match(found, targets, classes)
    assert ap_from_matches(matches, np.ones((1, len(targets))))[0] == pytest.approx(
        coco_stats(targets, found, classes)["AP"], abs=1e-9
    )


def test_no_boxes_score_zero(known: tuple) -> None:
    targets, found, classes, _ = known
    nothing = {name: values[:0] for name, values in found.items()}
    stats = coco_stats(targets, nothing, classes)
    assert all(stats[name] == 0 for name in NAMES)
    assert ap_from_matches(match(nothing, targets, classes), np.ones((2, len(targets)))).tolist() == [0, 0]


def test_sizes_that_do_not_occur_have_no_number() -> None:
    targets = [Boxes(np.array([[0, 0, 10, 10]], np.float32), np.array([0]))]
    stats = coco_stats(targets, _perfect(targets), 1)
    assert stats["AP"] == stats["AP_small"] == pytest.approx(1.0)
    assert stats["AP_large"] is None


def _perfect(targets: list[Boxes]) -> Found:
    return {
        "image": np.concatenate([np.full(len(t.labels), i) for i, t in enumerate(targets)]),
        "xyxy": np.concatenate([t.xyxy for t in targets]),
        "score": np.ones(sum(len(t.labels) for t in targets), dtype=np.float32),
        "label": np.concatenate([t.labels for t in targets]),
    }


def _random(seed: int, images: int, classes: int = 3) -> tuple[list[Boxes], Found]:
    """Objects, some in crowds, and detections near to some of them, with many equal scores and equal overlaps."""
    rng = np.random.default_rng(seed)
    targets = []
    columns: dict[str, list[np.ndarray]] = {"image": [], "xyxy": [], "score": [], "label": []}
    for image in range(images):
        n = int(rng.integers(0, 6))
        corner, size = rng.integers(0, 40, (n, 2)), rng.integers(4, 24, (n, 2))
        xyxy = np.concatenate([corner, corner + size], axis=1).astype(np.float32)
        labels = rng.integers(0, classes, n)
        targets.append(Boxes(xyxy, labels, rng.random(n) < 0.2))
        again = rng.integers(0, n, int(rng.integers(0, 12))) if n else np.zeros(0, dtype=int)
        near = xyxy[again] + rng.integers(-3, 4, (len(again), 4))
        near[:, 2:] = np.maximum(near[:, 2:], near[:, :2] + 1)
        columns["image"].append(np.full(len(again), image))
        columns["xyxy"].append(near.astype(np.float32))
        columns["score"].append(np.round(rng.random(len(again)), 1).astype(np.float32))
        columns["label"].append(np.where(rng.random(len(again)) < 0.8, labels[again], 0))
    return targets, {name: np.concatenate(values) for name, values in columns.items()}


@given(st.integers(0, 10_000), st.integers(1, 12))
@settings(max_examples=40, deadline=None)
def test_own_ap_equals_coco_on_random_boxes(seed: int, images: int) -> None:
    targets, found = _random(seed, images)
    expected = coco_stats(targets, found, 3)["AP"] or 0.0
    own = ap_from_matches(match(found, targets, 3), np.ones((1, images)))[0]
    assert own == pytest.approx(expected, abs=1e-6)


def test_a_weight_of_two_is_the_image_twice() -> None:
    targets, found = _random(1, 8)
    found["score"] = np.random.default_rng(0).permutation(len(found["score"])).astype(np.float32)
    weights = np.array([0, 2, 1, 3, 0, 1, 1, 2])
    order = np.repeat(np.arange(8), weights)
    rows = [np.flatnonzero(found["image"] == image) for image in order]
    repeated = {name: found[name][np.concatenate(rows)] for name in ("xyxy", "score", "label")}
    repeated["image"] = np.repeat(np.arange(len(order)), [len(row) for row in rows])
    expected = coco_stats([targets[image] for image in order], repeated, 3)["AP"]
    own = ap_from_matches(match(found, targets, 3), weights[None])[0]
    assert own == pytest.approx(expected, abs=1e-9)


def test_only_the_best_hundred_of_an_image_and_class_count() -> None:
    targets = [Boxes(np.array([[0, 0, 10, 10]], np.float32), np.array([0]))] * 2
    score = np.linspace(1, 0.1, 150, dtype=np.float32)
    xyxy = np.tile(np.array([[50, 50, 60, 60]], np.float32), (150, 1))
    xyxy[120] = [0, 0, 10, 10]
    found = {"image": np.zeros(150, dtype=int), "xyxy": xyxy, "score": score, "label": np.zeros(150, dtype=int)}
    matches = match(found, targets, 1)
    assert len(matches.label) == 100
    assert ap_from_matches(matches, np.ones((1, 2)))[0] == coco_stats(targets, found, 1)["AP"] == 0


def test_a_class_that_the_dataset_lacks_is_an_error() -> None:
    targets, found = _random(3, 10)
    with pytest.raises(ValueError, match=r"finds class \d, but the dataset has 1: set the model's classes"):
        match(found, [Boxes(one.xyxy, one.labels * 0) for one in targets], 1)


def test_matches_survive_as_arrays() -> None:
    targets, found = _random(3, 10)
    matches = match(found, targets, 3)
    again = Matches.from_arrays(matches.to_arrays() | {"score": found["score"]})
    assert ap_from_matches(again, np.ones((1, 10))) == ap_from_matches(matches, np.ones((1, 10)))


def test_paired_interval() -> None:
    targets, _ = _random(5, 60)
    good = _perfect([Boxes(t.xyxy, t.labels) for t in targets])
    bad = good | {"xyxy": good["xyxy"] + np.array([2, 0, 2, 0], dtype=np.float32)}
    plain = [Boxes(t.xyxy, t.labels) for t in targets]
    best, worse = match(good, plain, 3), match(bad, plain, 3)
    assert paired_interval(best, best) == (0, 0, 0)
    score, low, high = interval(worse)
    assert low < score < high
    assert score == pytest.approx(ap_from_matches(worse, np.ones((1, 60)))[0])
    difference, low, high = paired_interval(best, worse)
    assert 0 < low < difference < high
    assert paired_interval(worse, best) == pytest.approx((-difference, -high, -low))
    narrow = paired_interval(best, worse, level=0.5)
    assert low < narrow[1] < narrow[2] < high
    with pytest.raises(ValueError, match="same images"):
        paired_interval(best, match(_random(5, 50)[1], _random(5, 50)[0], 3))
