"""SSD: anchors, box coding, loss, suppression, and the accuracy that its checkpoint is said to have."""

from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qbench import registry
from qbench.datasets.base import Boxes
from qbench.datasets.coco import IDS
from qbench.datasets.images import open_images
from qbench.errors import UserError
from qbench.metrics.map import coco_stats
from qbench.models import anchors, ssd
from qbench.models.checkpoints import Checkpoint
from qbench.score import score

CHECKPOINT = "ssd_mobilenetv1_075_300_coco.safetensors"


def _target(*rows: tuple[float, ...], crowd: bool = False) -> Boxes:
    xyxy = np.array([row[:4] for row in rows], dtype=np.float32).reshape(-1, 4)
    labels = np.array([int(row[4]) for row in rows], dtype=np.int64)
    return Boxes(xyxy, labels, np.full(len(rows), crowd))


def _outputs(targets: list[Boxes]) -> ssd.Outputs:
    """What a perfect network answers."""
    codes, logits = torch.zeros(len(targets), 1917, 4), torch.full((len(targets), 1917, 91), -20.0)
    for number, target in enumerate(targets):
        xyxy = torch.from_numpy(target.xyxy)
        owner = anchors.assign(xyxy, 300)
        own = torch.nonzero(owner >= 0).flatten()
        codes[number, own] = anchors.encode(xyxy[owner[own]], own, 300)
        logits[number, own, torch.tensor(IDS)[torch.from_numpy(target.labels)[owner[own]]]] = 8.0
    return codes, logits


def test_anchors_are_those_of_the_checkpoint(shared: Path) -> None:
    own = Checkpoint(str(shared / "weights" / CHECKPOINT)).load()["anchors"]
    torch.testing.assert_close(anchors.anchors(), own, rtol=0, atol=1e-5)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 1916), st.tuples(*[st.floats(0, 250)] * 2), st.tuples(*[st.floats(5, 50)] * 2))
def test_decoding_inverts_encoding(which: int, corner: tuple[float, float], size: tuple[float, float]) -> None:
    box = torch.tensor([[*corner, corner[0] + size[0], corner[1] + size[1]]])
    codes = torch.zeros(1, 1917, 4)
    codes[0, which] = anchors.encode(box, torch.tensor([which]), 300)[0]
    torch.testing.assert_close(anchors.decode(codes, 300)[0, which], box[0], rtol=0, atol=1e-3)


def test_a_code_by_hand() -> None:
    cy, cx, h, w = anchors.anchors()[1916].tolist()
    codes = torch.zeros(1917, 4)
    codes[1916] = torch.tensor([1.0, -2.0, 5.0, 2.5])
    y, x, height, width = 0.1 * h + cy, -0.2 * w + cx, np.exp(1) * h, np.exp(0.5) * w
    expected = 300 * np.array([x - width / 2, y - height / 2, x + width / 2, y + height / 2])
    np.testing.assert_allclose(anchors.decode(codes, 300)[1916].numpy(), expected, rtol=1e-5)


def test_perfect_outputs_decode_to_the_targets_and_cost_little() -> None:
    targets = [_target((10, 20, 90, 140, 0), (150, 100, 290, 280, 79)), _target(), _target((5, 5, 40, 30, 11))]
    outputs = _outputs(targets)
    for found, target in zip(ssd.decode(outputs), targets, strict=True):
        order = found.labels.argsort()
        assert found.labels[order].tolist() == target.labels.tolist()
        np.testing.assert_allclose(found.xyxy[order].numpy(), target.xyxy, atol=1e-3)
    assert ssd.loss(outputs, targets) < 0.01 < ssd.loss((outputs[0] + 0.3, outputs[1]), targets)
    assert ssd.loss(outputs, targets) < 1 < ssd.loss((outputs[0], -outputs[1]), targets)


def test_crowds_teach_nothing_and_no_objects_are_no_error() -> None:
    logits = torch.zeros(1, 1917, 91, requires_grad=True)
    crowd = _target((60, 60, 240, 240, 3), crowd=True)
    ssd.loss((torch.zeros(1, 1917, 4), logits), [crowd]).backward()
    owned = anchors.assign(torch.from_numpy(crowd.xyxy), 300) >= 0
    assert logits.grad is not None
    assert owned.any()
    assert not logits.grad[0, owned].any()
    assert torch.isfinite(ssd.loss((torch.zeros(1, 1917, 4), logits), [_target()]))


def test_suppression_is_per_category_and_ids_without_one_are_dropped() -> None:
    codes, logits = torch.zeros(1, 1917, 4), torch.full((1, 1917, 91), -20.0)
    logits[0, 1914:1917, 1] = torch.tensor([1.0, 3.0, 2.0])
    same = anchors.decode(codes, 300)[0, 1916].expand(2, 4)
    codes[0, 1914:1916] = anchors.encode(same, torch.tensor([1914, 1915]), 300)
    logits[0, 1916, 90] = 2.5
    logits[0, 1916, 0] = logits[0, 1916, 12] = 9.0
    (found,) = ssd.decode((codes, logits))
    assert found.labels.tolist() == [0, 79]
    assert found.scores.tolist() == pytest.approx(torch.tensor([3.0, 2.5]).sigmoid().tolist())


def test_wild_outputs_give_finite_boxes_and_nan_is_an_error() -> None:
    (found,) = ssd.decode((torch.full((1, 1917, 4), 1e6), torch.randn(1, 1917, 91)))
    assert len(found.scores) <= 100
    assert torch.isfinite(found.xyxy).all()
    with pytest.raises(ValueError, match="not finite"):
        ssd.decode((torch.zeros(1, 1917, 4), torch.full((1, 1917, 91), torch.nan)))


def test_a_checkpoint_with_other_anchors_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    safetensors.torch.save_file({"anchors": anchors.anchors() * 2}, path)
    model = registry.resolve("model", "ssd_mobilenetv1_075", {"checkpoint": str(path)})()
    with pytest.raises(UserError, match=r"w.safetensors was trained with other anchors"):
        model.load()
    safetensors.torch.save_file(ssd.SSD().state_dict(), path)
    assert isinstance(model.load(), ssd.SSD), "as `qbench train` writes it"


def test_other_classes_have_scores_of_their_own() -> None:
    model = registry.resolve("model", "ssd_mobilenetv1_075", {"classes": 3})()
    network = model.build().eval()
    with torch.no_grad():
        outputs = network(torch.zeros(1, 3, 300, 300))
    assert outputs[1].shape == (1, 1917, 3)
    target = _target((10, 20, 90, 140, 2))
    perfect = (_outputs([target])[0], torch.full((1, 1917, 3), -20.0))
    owned = anchors.assign(torch.from_numpy(target.xyxy), 300) >= 0
    perfect[1][0, owned, 2] = 8.0
    assert model.loss(perfect, [target]) < 0.01
    assert model.decode is not None
    assert model.decode(perfect)[0].labels.tolist() == [2]


@pytest.mark.slow
def test_accuracy(shared: Path, tmp_path: Path) -> None:
    data = registry.resolve("dataset", "coco", {"root": str(shared / "data" / "coco")})()
    model = registry.resolve("model", "ssd_mobilenetv1_075", {"checkpoint": str(shared / "weights" / CHECKPOINT)})()
    images = open_images(data.evaluation, model.preprocess, data.fingerprint, tmp_path, "evaluation")
    outcomes, _ = score(model.load(), model, images, device=torch.device("cpu"), threads=1)
    stats = coco_stats(data.evaluation.targets, outcomes, len(data.classes))
    assert stats["AP"] == pytest.approx(0.252, abs=0.003)
    assert stats["AP50"] == pytest.approx(0.406, abs=0.005)
