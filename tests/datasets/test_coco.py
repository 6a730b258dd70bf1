"""Annotations in COCO's format: labels, limits, crowds, and what is wrong with files that people have."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from qbench import registry
from qbench.datasets.base import Dataset, draw
from qbench.datasets.coco import IDS
from qbench.datasets.images import open_images
from qbench.errors import UserError
from qbench.models.base import Preprocess

Content = dict[str, Any]


def content(count: int = 3) -> Content:
    """Images of 40x30 pixels, of which the last has no object; category ids with a gap, not in order."""
    return {
        "images": [{"id": 10 * i, "file_name": f"{i}.png", "width": 40, "height": 30} for i in range(count)],
        "categories": [{"id": 7, "name": "dog"}, {"id": 2, "name": "cat"}],
        "annotations": [
            {"id": i, "image_id": 10 * i, "category_id": 7 if i else 2, "bbox": [4, 5, 10, 20], "iscrowd": int(i == 1)}
            for i in range(count - 1)
        ],
    }


def make(root: Path, change: Callable[[Content], object] = lambda _: None) -> Path:
    """Two splits, the change made to the evaluation split."""
    (root / "annotations").mkdir(parents=True)
    for split in ("train", "val"):
        (root / split).mkdir()
        for i in range(3):
            Image.new("RGB", (40, 30), (i, i, i)).save(root / split / f"{i}.png")
        written = content()
        if split == "val":
            change(written)
        (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(written))
    return root


def load(root: Path, **options: Any) -> Dataset:
    return registry.resolve("dataset", "coco_folder", {"root": str(root), **options})()


def refused(root: Path, message: str, change: Callable[[Content], object]) -> None:
    with pytest.raises(UserError, match=message) as caught:
        load(make(root, change))
    assert "\n" not in str(caught.value)


def test_labels_boxes_crowds_and_images_without_objects(tmp_path: Path) -> None:
    found = load(make(tmp_path))
    assert found.classes == ["cat", "dog"], "in the order of the ids"
    assert [boxes.labels.tolist() for boxes in found.evaluation.targets] == [[0], [1], []]
    assert found.evaluation.targets[0].xyxy.tolist() == [[4, 5, 14, 25]]
    assert found.evaluation.targets[0].area.tolist() == [200]
    assert [boxes.crowd.tolist() for boxes in found.evaluation.targets] == [[False], [True], []]
    assert found.evaluation.targets[2].xyxy.shape == (0, 4)
    assert found.evaluation.ids == ["val/0.png", "val/1.png", "val/2.png"]
    assert found.evaluation.load(2).getpixel((0, 0)) == (2, 2, 2)
    assert found.notes == ()


def test_a_limit_spreads_and_calibration_leaves_training(tmp_path: Path) -> None:
    found, _ = draw(load(make(tmp_path), limit=2), 1, 0)
    assert found.evaluation.ids == ["val/0.png", "val/2.png"]
    assert found.evaluation.load(1).getpixel((0, 0)) == (2, 2, 2)
    assert sorted(found.calibration.ids + found.train.ids) == ["train/0.png", "train/2.png"]


def test_the_fingerprint_follows_boxes_and_files(tmp_path: Path) -> None:
    before = load(make(tmp_path / "a")).fingerprint
    assert load(make(tmp_path / "b")).fingerprint == before
    assert load(make(tmp_path / "c", lambda c: c["annotations"][0]["bbox"].__setitem__(0, 3))).fingerprint != before
    Image.new("RGB", (40, 30), (99, 0, 9)).resize((40, 30)).save(tmp_path / "b" / "val" / "0.png", compress_level=0)
    assert load(tmp_path / "b").fingerprint != before


def test_boxes_outside_and_without_area_are_mended_and_counted(tmp_path: Path) -> None:
    def change(c: Content) -> None:
        boxes = [[-4, 5, 10, 20], [30, 20, 10.5, 10], [50, 5, 5, 5], [4, 5, 0, 9]]
        c["annotations"] += [{"image_id": 20, "category_id": 2, "bbox": box} for box in boxes]

    found = load(make(tmp_path, change))
    assert found.evaluation.targets[2].xyxy.tolist() == [[0, 5, 6, 25], [30, 20, 40, 30]]
    path = tmp_path / "annotations" / "instances_val.json"
    assert found.notes == (
        f"{path}: boxes that reach out of their images: clipped: 2",
        f"{path}: boxes that have no area inside their images: left out: 2",
    )


@pytest.mark.parametrize(
    ("message", "change"),
    [
        (
            r"instances_val.json: annotations.0.bbox.1 = nan: input should be a finite",
            lambda c: c["annotations"][0].update(bbox=[0, float("nan"), 1, 1]),
        ),
        (r"annotations.1.bbox: field required", lambda c: c["annotations"][1].pop("bbox")),
        (r"annotations.0.bbox", lambda c: c["annotations"][0].update(bbox=[1, 2, 3])),
        (r"val/0.png ends before it begins", lambda c: c["annotations"][0].update(bbox=[9, 9, -3, 2])),
        (r"categories.1.name: field required", lambda c: c["categories"][1].pop("name")),
        (r"categories.0.name = '': ", lambda c: c["categories"][0].update(name="")),
        (r"categories has the id 7 2 times", lambda c: c["categories"].append({"id": 7, "name": "eel"})),
        (r"images has the id 0 2 times", lambda c: c["images"].append(c["images"][0])),
        (r"lists the image val/0.png more than once", lambda c: c["images"][1].update(file_name="0.png")),
        (r"annotations.0.category_id = 3 is not listed", lambda c: c["annotations"][0].update(category_id=3)),
        (r"annotations.0.image_id = 3 is not listed", lambda c: c["annotations"][0].update(image_id=3)),
        (r"images.2.width = 0: ", lambda c: c["images"][2].update(width=0)),
        (r"images: list should have at least 1", lambda c: c["images"].clear()),
        (r"none of its 3 images has an object", lambda c: c["annotations"].clear()),
        (r"the image val/9.png is not in .* skip_unreadable", lambda c: c["images"][0].update(file_name="9.png")),
        (r"have different categories", lambda c: c["categories"][0].update(name="wolf")),
    ],
)
def test_wrong_annotations_are_refused(tmp_path: Path, message: str, change: Callable[[Content], object]) -> None:
    refused(tmp_path, message, change)


@pytest.mark.parametrize(("text", "message"), [("", "invalid JSON"), ("{", "invalid JSON"), ("[]", "[a-z]")])
def test_files_of_something_else_are_refused(tmp_path: Path, text: str, message: str) -> None:
    path = make(tmp_path) / "annotations" / "instances_val.json"
    path.write_text(text)
    with pytest.raises(UserError, match=f"instances_val.json: {message}"):
        load(tmp_path)
    path.unlink()
    with pytest.raises(UserError, match=r"instances_val.json cannot be read \(No such file"):
        load(tmp_path)


def test_images_that_cannot_be_used_are_named_or_counted(tmp_path: Path) -> None:
    make(tmp_path, lambda c: c["images"].append({"id": 1, "file_name": "gone.png", "width": 4, "height": 3}))
    (tmp_path / "val" / "0.png").write_text("not an image")
    Image.new("RGB", (30, 40)).save(tmp_path / "val" / "1.png")
    found = load(tmp_path, skip_unreadable=True)
    images = open_images(found.evaluation, Preprocess((8, 8), mode="squash"), "f", tmp_path / "cache", "evaluation")
    assert images.unreadable == ["val/0.png", "val/1.png", "val/gone.png"]
    assert images.split.ids == ["val/2.png"]
    for number, message in ((0, "cannot identify"), (1, "it has 30x40 pixels, but .*instances_val.json says 40x30")):
        split = load(tmp_path, skip_unreadable=True).evaluation.subset([number])
        with pytest.raises((OSError, ValueError), match=message):
            split.load(0)


def test_coco_wants_the_ids_of_coco(tmp_path: Path) -> None:
    assert len(IDS) == 80
    for split in ("train2017", "val2017"):
        (tmp_path / "annotations").mkdir(exist_ok=True)
        (tmp_path / "annotations" / f"instances_{split}.json").write_text(json.dumps(content()))
    with pytest.raises(UserError, match="does not have the ids of COCO's 80 categories; use coco_folder"):
        registry.resolve("dataset", "coco", {"root": str(tmp_path)})()


def test_real_files(shared: Path) -> None:
    root = shared / "data"
    coco = registry.resolve("dataset", "coco", {"root": str(root / "coco")})()
    assert (len(coco.train), len(coco.evaluation), len(coco.classes), coco.notes) == (128, 128, 80, ())
    assert (coco.classes[0], coco.classes[79]) == ("person", "toothbrush")
    assert sum(int(boxes.crowd.sum()) for boxes in coco.train.targets) == 10
    cells = registry.resolve("dataset", "bccd", {"root": str(root / "bccd")})()
    assert (len(cells.train), len(cells.evaluation), cells.classes) == (205, 72, ["RBC", "WBC", "Platelets"])
    assert cells.evaluation.load(0).size == (640, 480)
