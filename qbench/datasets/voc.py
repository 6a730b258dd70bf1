"""Detection sets in the layout of Pascal VOC."""

from __future__ import annotations

from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import Element, TreeBuilder
from xml.parsers import expat

import numpy as np
from pydantic import FiniteFloat, PositiveInt, TypeAdapter

from qbench.datasets.base import Boxes, Dataset
from qbench.datasets.folder import Count, find
from qbench.datasets.objects import Annotated, Listing, Name, assemble, validated
from qbench.errors import UserError
from qbench.registry import dataset, nearest


@dataclass(frozen=True, slots=True)
class _Box:
    xmin: FiniteFloat
    ymin: FiniteFloat
    xmax: FiniteFloat
    ymax: FiniteFloat


@dataclass(frozen=True, slots=True)
class _Object:
    name: Name
    bndbox: _Box
    difficult: bool = False


@dataclass(frozen=True, slots=True)
class _Size:
    width: PositiveInt
    height: PositiveInt


@dataclass(frozen=True, slots=True)
class _Annotation:
    filename: Name
    size: _Size
    object: list[_Object]


_FORM = TypeAdapter(_Annotation)


@dataset("voc")
def voc(
    *,
    root: str,
    train: str = "train",
    evaluation: str = "val",
    classes: list[str] | None = None,
    limit: Count | None = None,
    skip_unreadable: bool = False,
) -> Dataset:
    """Pascal VOC: `ImageSets/Main/<split>.txt`, `Annotations/*.xml` and `JPEGImages/*`.

    Objects marked as difficult count neither for nor against a detector. Coordinates count from 1, as VOC's do.

    Source: M. Everingham et al., "The Pascal Visual Object Classes (VOC) Challenge", IJCV 88(2), 2010.

    Args:
        root: the folder that holds these three; looked for as given, then in the folder that QBENCH_DATA names.
        train: split that calibration images are drawn from.
        evaluation: split that is scored.
        classes: names in the order of their labels; by default those that occur, in alphabetical order, as VOC has it.
        limit: at most this many images of each split, spread evenly over it.
        skip_unreadable: leave out, and count, images that are missing, cannot be decoded or have another size.
    """
    place = find(root)
    lists = {split: place / "ImageSets" / "Main" / f"{split}.txt" for split in (train, evaluation)}
    found = {split: _read(place, path) for split, path in lists.items()}
    names = classes or sorted({one.name for file in found.values() for a in file.values() for one in a.object})
    learned, scored = (
        Listing(lists[split], [_annotated(a, path, names) for path, a in found[split].items()])
        for split in (train, evaluation)
    )
    return assemble(place, names, learned, scored, limit, skip_unreadable)


def _read(root: Path, path: Path) -> dict[Path, _Annotation]:
    """The annotations of a split, by their files."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read ({error}); it should list the images of the split") from error
    # Lists for one class have a second column.
    files = [root / "Annotations" / f"{line.split()[0]}.xml" for line in lines if line.strip()]
    if not files:
        raise UserError(f"{path} lists no images")
    return {file: _annotation(file) for file in files}


def _annotation(path: Path) -> _Annotation:
    root = _parse(path)
    fields: dict[str, Any] = {
        name: _plain(child) for name in ("filename", "size") if (child := root.find(name)) is not None
    }
    found: _Annotation = validated(_FORM, fields | {"object": [_plain(one) for one in root.findall("object")]}, path)
    return found


def _parse(path: Path) -> Element:
    """The XML tree of a file without a document type, so that nothing can be declared that grows or is fetched."""
    builder = TreeBuilder()
    parser = expat.ParserCreate()
    parser.buffer_text = True
    parser.StartElementHandler = builder.start
    parser.EndElementHandler = builder.end
    parser.CharacterDataHandler = builder.data

    def refuse(*_: object) -> None:
        raise UserError(f"{path} declares a document type, which annotations do not need; remove the declaration")

    parser.StartDoctypeDeclHandler = refuse
    try:
        parser.Parse(path.read_bytes(), True)
        return builder.close()
    except OSError as error:
        raise UserError(f"annotation {path} cannot be read ({error.strerror})") from error
    except expat.ExpatError as error:
        raise UserError(f"{path} is not well-formed XML ({error})") from error


def _plain(element: Element) -> Any:
    return {child.tag: _plain(child) for child in element} if len(element) else (element.text or "").strip()


def _annotated(annotation: _Annotation, path: Path, names: list[str]) -> Annotated:
    objects, size = annotation.object, annotation.size
    for one in objects:
        if one.name not in names:
            raise UserError(f"{path}: {one.name!r} is not one of the classes{nearest(one.name, names)}")
    # The first pixel has number 1, and the last one belongs to the box.
    corners = np.array([astuple(one.bndbox) for one in objects]).reshape(-1, 4) - np.array([1, 1, 0, 0])
    labels = np.array([names.index(one.name) for one in objects], dtype=np.int64)
    boxes = Boxes(corners.astype(np.float32), labels, np.array([one.difficult for one in objects], dtype=bool))
    return Annotated(f"JPEGImages/{annotation.filename}", (size.width, size.height), boxes, path)
