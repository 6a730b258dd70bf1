"""Augmentation of images with boxes: boxes stay on their objects."""

import numpy as np
import torch

from qbench.datasets.base import Boxes
from qbench.datasets.vary import ZOOM, vary

SIZE = (90, 120)


def scene(*rows: tuple[int, int, int, int], crowd: bool = False) -> tuple[torch.Tensor, Boxes]:
    """Bright boxes on a dark ground."""
    image = torch.full((3, *SIZE), -3.0)
    for left, top, right, bottom in rows:
        image[:, top:bottom, left:right] = 3.0
    xyxy = np.array(rows, dtype=np.float32).reshape(-1, 4)
    return image, Boxes(xyxy, np.arange(len(rows)), np.full(len(rows), crowd))


def varied(image: torch.Tensor, boxes: Boxes, times: int) -> tuple[torch.Tensor, list[Boxes]]:
    return vary(image.expand(times, -1, -1, -1), [boxes] * times, torch.Generator().manual_seed(3))


def test_boxes_stay_on_their_objects() -> None:
    image, boxes = scene((30, 25, 70, 60))
    images, moved = varied(image, boxes, 60)
    for bright, one in zip(images.mean(1) > 0.9, moved, strict=True):
        rows, columns = np.flatnonzero(bright.any(1)), np.flatnonzero(bright.any(0))
        seen = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
        np.testing.assert_allclose(one.xyxy[0], seen, atol=1.6)
    widths = np.array([one.xyxy[0, 2] - one.xyxy[0, 0] for one in moved]) / 40
    assert widths.min() < 0.9
    assert ZOOM[1] * 1.1 > widths.max() > 1.5


def test_sides_are_swapped_half_of_the_time() -> None:
    image, boxes = scene((10, 10, 40, 60), (80, 10, 110, 60))
    _, moved = varied(image, boxes, 100)
    both = [one for one in moved if len(one.labels) == 2]
    mirrored = sum(one.xyxy[0, 0] > one.xyxy[1, 0] for one in both)
    assert 0.25 < mirrored / len(both) < 0.75


def test_an_object_stays_and_boxes_are_inside() -> None:
    image, boxes = scene((2, 2, 12, 12), (100, 70, 118, 88), (55, 40, 65, 50))
    _, moved = varied(image, boxes, 200)
    assert {len(one.labels) for one in moved} >= {1, 2, 3}
    for one in moved:
        assert len(one.labels) == len(one.xyxy) == len(one.crowd)  # type: ignore[arg-type]
        assert (one.xyxy[:, 2:] > one.xyxy[:, :2]).all()
        assert (one.xyxy >= 0).all()
        assert (one.xyxy <= np.array([120, 90, 120, 90], dtype=np.float32)).all()


def test_images_without_objects_and_crowds_are_moved_too() -> None:
    image, none = scene()
    images, moved = varied(image, none, 4)
    assert images.shape == (4, 3, *SIZE)
    assert all(one.xyxy.shape == (0, 4) for one in moved)
    _, crowds = varied(*scene((30, 25, 70, 60), crowd=True), 4)
    assert all(one.crowd.all() for one in crowds)  # type: ignore[union-attr]


def test_the_same_seed_gives_the_same_images() -> None:
    image, boxes = scene((30, 25, 70, 60))
    assert torch.equal(varied(image, boxes, 5)[0], varied(image, boxes, 5)[0])
