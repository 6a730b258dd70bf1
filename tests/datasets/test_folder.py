"""Class folders, ImageNet's labels, and `datasets` sources."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from qbench import registry
from qbench.datasets.base import Dataset
from qbench.errors import UserError


def make(root: Path, layout: Mapping[str, int], size: tuple[int, int] = (40, 30)) -> Path:
    for folder, count in layout.items():
        (root / folder).mkdir(parents=True)
        for i in range(count):
            Image.new("RGB", size, (i, i, i)).save(root / folder / f"{i}.png")
    return root


def load(name: str, **options: Any) -> Dataset:
    return registry.resolve("dataset", name, options)()


LAYOUT = {"train/n01440764": 2, "train/n15075141": 1, "val/n01443537": 2}


def test_labels_are_those_of_all_classes(tmp_path: Path) -> None:
    found = load("imagenet", root=str(make(tmp_path / "imagenet", LAYOUT)))
    assert found.train.targets == [0, 0, 999]
    assert found.evaluation.targets == [1, 1]
    assert len(found.classes) == 1000
    assert found.evaluation.ids == ["val/n01443537/0.png", "val/n01443537/1.png"]
    assert found.evaluation.load(1).getpixel((0, 0)) == (1, 1, 1)


def test_found_below_the_data_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path / "imagenet", LAYOUT)
    monkeypatch.setenv("QBENCH_DATA", str(tmp_path))
    assert len(load("imagenet").train) == 3


def test_missing_data_says_where_and_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("QBENCH_DATA", raising=False)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"'imagenet' not found: looked for imagenet; set QBENCH_DATA"):
        load("imagenet")
    make(tmp_path / "imagenet", {"train/n01440764": 1})
    with pytest.raises(UserError, match=r"imagenet/val has no class folders"):
        load("imagenet")


def test_an_unknown_class_folder_is_named(tmp_path: Path) -> None:
    root = make(tmp_path / "imagenet", {**LAYOUT, "train/n00000000": 1})
    with pytest.raises(UserError, match=r"train/n00000000 is not one of the 1,000 classes"):
        load("imagenet", root=str(root))
    (root / "val" / "n01443537" / "0.png").unlink()
    (root / "val" / "n01443537" / "1.png").unlink()
    (root / "train" / "n00000000" / "0.png").unlink()
    (root / "train" / "n00000000").rmdir()
    with pytest.raises(UserError, match="no images in them"):
        load("imagenet", root=str(root))


def test_small_squares_count_as_resized(tmp_path: Path) -> None:
    root = make(tmp_path / "a", {"train/x": 3}, (40, 30))
    make(root, {"val/x": 3}, (227, 227))
    found = load("image_folder", root=str(root))
    assert (found.train.resized, found.evaluation.resized) == (False, True)
    assert not load("image_folder", root=str(root), resize="always").evaluation.resized
    assert load("image_folder", root=str(root), resize="never").train.resized


def test_classes_of_any_folder_and_a_limit(tmp_path: Path) -> None:
    root = make(tmp_path / "a", {"train/cat": 5, "train/dog": 5, "val/dog": 1, "val/eel": 1})
    found = load("image_folder", root=str(root), limit=4)
    assert found.classes == ["cat", "dog", "eel"]
    assert found.train.targets == [0, 0, 1, 1]
    assert found.evaluation.targets == [1, 2]


def test_the_fingerprint_follows_names_and_sizes(tmp_path: Path) -> None:
    root = str(make(tmp_path / "a", {"train/x": 2, "val/x": 2}))
    before = load("image_folder", root=root).fingerprint
    assert load("image_folder", root=root).fingerprint == before
    Image.new("RGB", (99, 99)).save(tmp_path / "a" / "val" / "x" / "0.png")
    assert load("image_folder", root=root).fingerprint != before


def test_skip_unreadable_reaches_the_split(tmp_path: Path) -> None:
    root = make(tmp_path / "a", {"train/x": 2, "val/x": 2})
    (root / "val" / "x" / "1.png").write_bytes(b"\x89PNG\r\n")
    found = load("image_folder", root=str(root), skip_unreadable=True)
    assert found.evaluation.skip_unreadable
    with pytest.raises(OSError, match=r"val/x/1.png"):
        found.evaluation.load(1)


def test_a_parquet_source(shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    files = {part: str(shared / "data" / "cifar10" / f"{part}.parquet") for part in ("train", "test")}
    found = load("hub", path="parquet", data_files=files, image="img", limit=100)
    assert len(found.train) == len(found.evaluation) == 100
    assert found.classes[3] == "cat"
    assert found.evaluation.load(0).size == (32, 32)
    assert set(found.evaluation.targets) == set(range(10))
    with pytest.raises(UserError, match=r"column 'image' should be Image, but is missing"):
        load("hub", path="parquet", data_files=files)
    with pytest.raises(UserError, match=r"no split 'tests'; did you mean 'test'"):
        load("hub", path="parquet", data_files=files, image="img", evaluation="tests")
    with pytest.raises(UserError, match="cannot load"):
        load("hub", path="parquet", data_files={"train": str(tmp_path / "none.parquet")})
