"""Pascal VOC folders: coordinates, classes, difficult objects, and XML that is refused."""

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from qbench import registry
from qbench.datasets.base import Dataset
from qbench.errors import UserError

OBJECT = """<object><name>{name}</name><difficult>{difficult}</difficult><part><name>head</name></part>
<bndbox><xmin>{box[0]}</xmin><ymin>{box[1]}</ymin><xmax>{box[2]}</xmax><ymax>{box[3]}</ymax></bndbox></object>"""


def annotation(file: str, *objects: str) -> str:
    size = "<size><width>40</width><height>30</height><depth>3</depth></size>"
    return f"<annotation><filename>{file}</filename>{size}{''.join(objects)}</annotation>"


def one(name: str = "dog", box: tuple[Any, ...] = (1, 1, 40, 30), difficult: int = 0) -> str:
    return OBJECT.format(name=name, box=box, difficult=difficult)


def make(root: Path) -> Path:
    for folder in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (root / folder).mkdir(parents=True)
    content = {"a": [one(), one("cat", (11, 6, 20, 25), 1)], "b": [one("bird")], "c": []}
    for name, objects in content.items():
        Image.new("RGB", (40, 30)).save(root / "JPEGImages" / f"{name}.jpg")
        (root / "Annotations" / f"{name}.xml").write_text(annotation(f"{name}.jpg", *objects))
    (root / "ImageSets" / "Main" / "train.txt").write_text("b\n")
    (root / "ImageSets" / "Main" / "val.txt").write_text("a  1\nc -1\n\n")
    return root


def load(root: Path, **options: Any) -> Dataset:
    return registry.resolve("dataset", "voc", {"root": str(root), **options})()


def test_what_is_read(tmp_path: Path) -> None:
    found = load(make(tmp_path))
    assert found.classes == ["bird", "cat", "dog"]
    assert found.evaluation.ids == ["JPEGImages/a.jpg", "JPEGImages/c.jpg"]
    boxes = found.evaluation.targets[0]
    assert boxes.xyxy.tolist() == [[0, 0, 40, 30], [10, 5, 20, 25]], "the first pixel is 1, the last belongs to the box"
    assert boxes.labels.tolist() == [2, 1]
    assert boxes.crowd is not None
    assert boxes.crowd.tolist() == [False, True]
    assert len(found.evaluation.targets[1].labels) == 0
    assert found.evaluation.load(0).size == (40, 30)
    assert (found.notes, len(found.train)) == ((), 1)
    assert load(tmp_path, classes=["dog", "cat", "bird"]).evaluation.targets[0].labels.tolist() == [0, 1]


def test_boxes_that_count_from_zero_are_clipped_and_counted(tmp_path: Path) -> None:
    make(tmp_path)
    (tmp_path / "Annotations" / "a.xml").write_text(annotation("a.jpg", one(box=(0, 0, 9, 9)), one(box=(50, 1, 60, 9))))
    found = load(tmp_path)
    assert found.evaluation.targets[0].xyxy.tolist() == [[0, 0, 9, 9]]
    assert [note.partition("val.txt: ")[2] for note in found.notes] == [
        "boxes that reach out of their images: clipped: 1",
        "boxes that have no area inside their images: left out: 1",
    ]


BILLION = '<!DOCTYPE a [<!ENTITY x "ha"><!ENTITY y "&x;&x;">]>'
FOREIGN = '<!DOCTYPE a [<!ENTITY x SYSTEM "file:///etc/hostname">]>'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (BILLION + annotation("&y;.jpg", one()), "a.xml declares a document type"),
        ((FOREIGN + annotation("&x;.jpg", one())).encode("utf-16"), "a.xml declares a document type"),
        ("", "a.xml is not well-formed XML"),
        (annotation("a.jpg", one()).replace("</size>", ""), "a.xml is not well-formed XML"),
        (annotation("a.jpg", one(box=("nan", 1, 2, 3))), "a.xml: object.0.bndbox.xmin = 'nan': .* finite"),
        (annotation("a.jpg", one(box=("", 1, 2, 3))), "a.xml: object.0.bndbox.xmin = '': "),
        (annotation("a.jpg", one(box=(9, 1, 2, 3))), "a.xml: a box of JPEGImages/a.jpg ends before it begins"),
        (annotation("a.jpg", one("")), "a.xml: object.0.name = '': "),
        (annotation("a.jpg", "<object><name>dog</name></object>"), "a.xml: object.0.bndbox: field required"),
        (annotation("a.jpg").replace("<width>40</width>", ""), "a.xml: size.width: field required"),
        (annotation("z.jpg", one()), "a.xml: the image JPEGImages/z.jpg is not in"),
    ],
)
def test_wrong_annotations_are_refused(tmp_path: Path, text: str | bytes, message: str) -> None:
    path = make(tmp_path) / "Annotations" / "a.xml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=message) as caught:
        load(tmp_path)
    assert "\n" not in str(caught.value)


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    make(tmp_path)
    with pytest.raises(UserError, match=r"a.xml: 'dog' is not one of the classes; did you mean 'dogs'"):
        load(tmp_path, classes=["cat", "dogs", "bird"])
    (tmp_path / "Annotations" / "a.xml").unlink()
    with pytest.raises(UserError, match=r"a.xml cannot be read \(No such file"):
        load(tmp_path)
    (tmp_path / "ImageSets" / "Main" / "val.txt").write_text("\n")
    with pytest.raises(UserError, match=r"val.txt lists no images"):
        load(tmp_path)
    with pytest.raises(UserError, match=r"test.txt cannot be read"):
        load(tmp_path, evaluation="test")
