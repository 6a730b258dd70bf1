"""The scenes: determinism, disjoint scans, and boxes that are where the digits are."""

import numpy as np
import pytest
import torch

from qbench.datasets import digit_scenes as plugin
from qbench.datasets.base import Boxes, Dataset
from qbench.datasets.digits import scans, scans_of
from qbench.datasets.scenes import MAX_OVERLAP, OBJECTS, SIDE, cover, lay_out, trim


@pytest.fixture(scope="module")
def scenes() -> Dataset:
    return plugin.digit_scenes()


def test_it_is_the_same_every_time_in_any_order(scenes: Dataset) -> None:
    again = plugin.digit_scenes()
    assert again.fingerprint == scenes.fingerprint
    backwards = [again.evaluation.load(position).tobytes() for position in (5, 0)]
    assert backwards == [scenes.evaluation.load(position).tobytes() for position in (5, 0)]
    assert scenes.train.load(0).tobytes() != scenes.evaluation.load(0).tobytes()


def test_splits_are_made_of_disjoint_scans(scenes: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not set(scans_of("train")) & set(scans_of("evaluation"))
    assert not set(scans_of("calibration")) & set(scans_of("train"))
    assert not set(scans_of("calibration")) & set(scans_of("evaluation"))
    pixels, labels = scans()
    changed = pixels.copy()
    changed[scans_of("evaluation")] = 255
    monkeypatch.setattr(plugin, "scans", lambda: (changed, labels))
    other = plugin.digit_scenes()
    assert other.train.load(1).tobytes() == scenes.train.load(1).tobytes()
    assert other.calibration.load(1).tobytes() == scenes.calibration.load(1).tobytes()
    assert other.evaluation.load(1).tobytes() != scenes.evaluation.load(1).tobytes()


def test_sizes_and_boxes(scenes: Dataset) -> None:
    assert [len(split) for split in (scenes.train, scenes.calibration, scenes.evaluation)] == [2000, 256, 300]
    image = scenes.evaluation.load(0)
    assert (image.mode, image.size) == ("RGB", (SIDE, SIDE))
    for boxes in scenes.evaluation.targets:
        assert OBJECTS[0] <= len(boxes.labels) <= OBJECTS[1]
        assert boxes.xyxy.dtype == np.float32
        assert boxes.xyxy.min() >= 0
        assert boxes.xyxy.max() <= SIDE
        assert (boxes.xyxy[:, 2:] - boxes.xyxy[:, :2]).min() >= 6
    assert set(np.concatenate([boxes.labels for boxes in scenes.evaluation.targets])) == set(range(10))


def test_digits_hardly_overlap() -> None:
    layout = lay_out(np.array([[8, 4], [8, 8]]), 200, np.random.default_rng(0))
    for xyxy, placed in zip(layout.xyxy, layout.placed, strict=True):
        for i, a in enumerate(xyxy[placed]):
            for b in xyxy[placed][:i]:
                width, height = np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2])
                smaller = min(np.prod(a[2:] - a[:2]), np.prod(b[2:] - b[:2]))
                assert width <= 0 or height <= 0 or width * height <= MAX_OVERLAP * smaller


def test_boxes_are_tight() -> None:
    for scan in scans()[0]:
        mask = cover(trim(scan), 24, 30)
        assert mask.shape == (30, 24)
        for edge in (mask[0], mask[-1], mask[:, 0], mask[:, -1]):
            assert edge.max() > 0.15, "the digit can be seen at every side of its box"
        # What is cut off is fainter than what counts as ink.
        assert trim(scan).max() == scan.max()


def test_the_pixels_of_a_digit_are_in_its_box(scenes: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    """Changing the scans changes the scene inside of the boxes only."""
    pixels, labels = scans()
    # Same extent, other ink: the layout and all random numbers stay.
    monkeypatch.setattr(plugin, "scans", lambda: (np.where(pixels >= 112, 255, pixels).astype(np.uint8), labels))
    other = plugin.digit_scenes()
    before, after = (np.asarray(d.evaluation.load(2), dtype=int) for d in (scenes, other))
    differs = (before != after).any(axis=-1)
    inside = np.zeros_like(differs)
    for left, top, right, bottom in scenes.evaluation.targets[2].xyxy.astype(int):
        inside[top:bottom, left:right] = True
    assert differs.any()
    assert not (differs & ~inside).any()


def test_augmentation_moves_boxes_with_the_pixels() -> None:
    images = torch.full((24, 3, SIDE, SIDE), -1.0)
    images[:, :, 30:60, 40:64] = 1.0
    targets = [Boxes(np.array([[40, 30, 64, 60]], np.float32), np.array([7]))] * 24
    moved, boxes = plugin.vary(images, targets, torch.Generator().manual_seed(3))
    for image, found in zip(moved, boxes, strict=True):
        # The outside is of one colour, whatever it became.
        changed = (image - image[:, :1, :1]).abs().sum(0) > 0.5 * (image - image[:, :1, :1]).abs().sum(0).max()
        rows, columns = changed.any(1).nonzero(), changed.any(0).nonzero()
        seen = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        assert np.abs(found.xyxy[0] - np.array(seen, dtype=np.float32)).max() < 1.6
        assert found.labels.tolist() == [7]


def test_augmentation_drops_what_leaves_the_image() -> None:
    images = torch.zeros(64, 3, SIDE, SIDE)
    targets = [Boxes(np.array([[0, 0, 8, 8], [40, 40, 60, 60]], np.float32), np.array([1, 2]))] * 64
    _, boxes = plugin.vary(images, targets, torch.Generator().manual_seed(0))
    counts = [len(found.labels) for found in boxes]
    assert min(counts) == 1
    assert max(counts) == 2
    for found in boxes:
        assert found.labels[-1] == 2
        assert found.xyxy.min() >= 0
        assert found.xyxy.max() <= SIDE
