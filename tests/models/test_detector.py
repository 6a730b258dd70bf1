"""The detector: box coding, assignment, loss, non-maximum suppression."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qbench.datasets.base import Boxes
from qbench.models import detector
from qbench.models.detector import CLASSES, assign, cell_centres, decode, decode_boxes, encode_boxes, loss


def _outputs(boxes: list[Boxes], side: int = 12) -> tuple[torch.Tensor, torch.Tensor]:
    """What a perfect network answers."""
    logits = torch.full((len(boxes), CLASSES, side, side), -20.0)
    sides = torch.zeros(len(boxes), 4, side, side)
    centres = cell_centres(side, side)
    for number, target in enumerate(boxes):
        xyxy = torch.from_numpy(target.xyxy)
        owners = assign(xyxy, centres)
        for cell in torch.nonzero(owners >= 0).flatten().tolist():
            logits[number, target.labels[owners[cell]], cell // side, cell % side] = 6.0
            wanted = encode_boxes(xyxy[owners[cell]][None], centres[cell][None])
            sides[number, :, cell // side, cell % side] = wanted[0]
    return logits, sides


def _boxes(*rows: tuple[float, ...]) -> Boxes:
    xyxy = np.array([row[:4] for row in rows], dtype=np.float32).reshape(-1, 4)
    return Boxes(xyxy, np.array([int(row[4]) for row in rows], dtype=np.int64))


@given(st.integers(0, 143), st.lists(st.floats(0.5, 90), min_size=4, max_size=4))
@settings(max_examples=50, deadline=None)
def test_decoding_inverts_encoding(cell: int, distances: list[float]) -> None:
    centre = cell_centres(12, 12)[cell]
    box = torch.cat([centre - torch.tensor(distances[:2]), centre + torch.tensor(distances[2:])])
    sides = torch.zeros(1, 4, 12, 12)
    sides[0, :, cell // 12, cell % 12] = encode_boxes(box[None], centre[None])[0]
    assert torch.allclose(decode_boxes(sides)[0, cell], box, atol=1e-3)


def test_perfect_outputs_decode_to_the_targets_and_cost_little() -> None:
    targets = [_boxes((10, 12, 34, 40, 3), (50, 40, 70, 80, 3)), _boxes(), _boxes((0, 0, 20, 30, 9))]
    outputs = _outputs(targets)
    for found, target in zip(decode(outputs), targets, strict=True):
        order = np.lexsort(found.xyxy.numpy().T[::-1])
        assert found.labels.numpy()[order].tolist() == target.labels.tolist()
        assert np.allclose(found.xyxy.numpy()[order], target.xyxy, atol=1e-3)
    worse = (outputs[0], outputs[1] + 0.3)
    assert loss(outputs, targets) < 0.01 < loss(worse, targets)


def test_every_object_of_ordinary_size_has_a_cell() -> None:
    rng = np.random.default_rng(0)
    centres = cell_centres(12, 12)
    for _ in range(200):
        size = rng.uniform(9, 48, 2)
        corner = rng.uniform(0, 96 - size)
        assert (assign(torch.tensor([[*corner, *(corner + size)]], dtype=torch.float32), centres) == 0).any()


def test_the_smaller_box_wins_a_cell() -> None:
    xyxy = torch.tensor([[0.0, 0.0, 96.0, 96.0], [40.0, 40.0, 60.0, 60.0]])
    owners = assign(xyxy, torch.tensor([[48.0, 48.0], [52.0, 41.0], [4.0, 4.0]]))
    assert owners.tolist() == [1, 0, -1], "of cells near to both centres; near to the large one's only; near to none"


def test_no_objects_at_all_is_not_an_error() -> None:
    net = detector.Detector()
    value = loss(net(torch.randn(2, 3, 96, 96)), [_boxes(), _boxes()])
    value.backward()
    assert torch.isfinite(value)


def test_suppression_is_per_class_and_image() -> None:
    logits = torch.full((2, CLASSES, 2, 2), -20.0)
    sides = torch.full((2, 4, 2, 2), 1.0)
    centres = cell_centres(2, 2)
    same = torch.tensor([[-10.0, -10.0, 30.0, 30.0]])
    for cell in range(4):
        sides[:, :, cell // 2, cell % 2] = encode_boxes(same, centres[cell][None])
    logits[0, 4] = torch.tensor([[1.0, 2.0], [3.0, 0.0]])
    logits[0, 5, 0, 0] = 0.5
    logits[1, 4, 0, 0] = 0.0
    first, second = decode((logits, sides))
    assert first.labels.tolist() == [4, 5]
    assert first.scores.tolist() == pytest.approx(torch.tensor([3.0, 0.5]).sigmoid().tolist())
    assert second.labels.tolist() == [4]


def test_wild_outputs_give_finite_boxes_and_at_most_100() -> None:
    sides = torch.full((1, 4, 12, 12), 1e9)
    sides[:, :2] = -1e9
    found = decode((torch.randn(1, CLASSES, 12, 12) * 100, sides))[0]
    assert len(found.scores) <= 100
    assert torch.isfinite(found.xyxy).all()
    assert found.scores.tolist() == sorted(found.scores.tolist(), reverse=True)


def test_outputs_do_not_depend_on_the_rest_of_the_batch() -> None:
    net = detector.Detector().eval()
    x = torch.randn(3, 3, 96, 96)
    with torch.inference_mode():
        logits, sides = net(x)
        assert logits.shape == (3, CLASSES, 12, 12)
        assert sides.shape == (3, 4, 12, 12)
        assert torch.allclose(net(x[1:2])[0], logits[1:2], atol=1e-4)
