import io
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from PIL import Image

from qbench.datasets.base import Dataset, draw
from qbench.datasets.cifar10 import blank, crop_and_flip
from qbench.datasets.images import open_images
from qbench.errors import UserError
from qbench.models.base import Preprocess
from qbench.registry import get

PIXELS = np.random.default_rng(0).integers(0, 256, (30, 32, 32, 3), dtype=np.uint8)
LABELS = np.arange(30) % 10


def write_binary(folder: Path) -> None:
    folder.mkdir(parents=True)
    records = np.concatenate([LABELS[:, None].astype(np.uint8), PIXELS.transpose(0, 3, 1, 2).reshape(30, -1)], axis=1)
    records[:10].tofile(folder / "data_batch_1.bin")
    records[10:20].tofile(folder / "data_batch_2.bin")
    records[20:].tofile(folder / "test_batch.bin")


def write_parquet(folder: Path, column: str = "img") -> None:
    folder.mkdir(parents=True)
    for name, part in (("train-00000-of-00001", slice(0, 20)), ("test-00000-of-00001", slice(20, 30))):
        encoded = []
        for image in PIXELS[part]:
            buffer = io.BytesIO()
            Image.fromarray(image).save(buffer, "png")
            encoded.append({"bytes": buffer.getvalue(), "path": None})
        table = pyarrow.table({column: encoded, "label": LABELS[part]})
        pyarrow.parquet.write_table(table, folder / f"{name}.parquet")


def load(**options: object) -> Dataset:
    found: Dataset = get("dataset", "cifar10")(**options)
    return found


@pytest.mark.parametrize(
    ("write", "inside"), [(write_binary, "cifar-10-batches-bin"), (write_parquet, "plain_text"), (write_parquet, ".")]
)
def test_both_forms_hold_the_same_images(write, inside: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "cifar10" / inside)
    monkeypatch.setenv("QBENCH_DATA", str(tmp_path))
    found = load()
    assert found.train.targets == LABELS[:20].tolist()
    assert found.evaluation.targets == LABELS[20:].tolist()
    assert found.classes[3] == "cat"
    images = open_images(
        found.evaluation, Preprocess(size=(32, 32)), found.fingerprint, tmp_path / "cache", "evaluation"
    )
    pixels = (images.batch(range(10)) * 0.5 + 0.5) * 255
    assert torch.equal(pixels.round().permute(0, 2, 3, 1), torch.tensor(PIXELS[20:]).float())
    drawn, manifest = draw(found, 5, seed=0)
    assert len(drawn.train) == 15
    assert not set(manifest.ids) & set(drawn.train.ids)
    assert len(load(limit=4).evaluation) == 4


def test_the_fingerprint_follows_the_labels(tmp_path: Path) -> None:
    write_binary(tmp_path / "a")
    before = load(root=str(tmp_path / "a")).fingerprint
    assert load(root=str(tmp_path / "a")).fingerprint == before
    file = tmp_path / "a" / "test_batch.bin"
    file.write_bytes(b"\x03" + file.read_bytes()[1:])
    assert load(root=str(tmp_path / "a")).fingerprint != before


def test_what_is_not_cifar10_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not found"):
        load(root=str(tmp_path / "none"))
    with pytest.raises(UserError, match=r"holds no CIFAR-10 \(train split"):
        load(root=str(tmp_path))
    (tmp_path / "python").mkdir()
    (tmp_path / "python" / "data_batch_1").touch()
    with pytest.raises(UserError, match="pickles are not read"):
        load(root=str(tmp_path / "python"))
    write_binary(tmp_path / "cut")
    whole = (tmp_path / "cut" / "data_batch_2.bin").read_bytes()
    (tmp_path / "cut" / "data_batch_2.bin").write_bytes(whole[:-1])
    with pytest.raises(UserError, match=r"data_batch_2\.bin is not whole"):
        load(root=str(tmp_path / "cut"))
    (tmp_path / "cut" / "data_batch_2.bin").write_bytes(b"\x0a" + whole[1:])
    with pytest.raises(UserError, match="labels are not from 0 to 9"):
        load(root=str(tmp_path / "cut"))
    write_parquet(tmp_path / "renamed", column="picture")
    with pytest.raises(UserError, match="is not a parquet file of CIFAR-10"):
        load(root=str(tmp_path / "renamed"))


def test_images_are_shifted_and_flipped_whole() -> None:
    images = torch.rand(64, 3, 6, 6)
    moved = crop_and_flip(images, torch.Generator().manual_seed(0))
    padded = torch.nn.functional.pad(images, [4] * 4)
    seen = set()
    for image, source in zip(moved, padded, strict=True):
        found = [
            (down, right, flip)
            for down in range(9)
            for right in range(9)
            for flip in (False, True)
            if torch.equal(image.flip(2) if flip else image, source[:, down : down + 6, right : right + 6])
        ]
        assert found
        seen.add(found[0])
    assert len({down for down, _, _ in seen}) == len({right for _, right, _ in seen}) == 9
    assert {flip for _, _, flip in seen} == {False, True}
    assert torch.equal(moved, crop_and_flip(images, torch.Generator().manual_seed(0)))


def test_squares_are_blanked(tmp_path: Path) -> None:
    images = torch.ones(500, 3, 8, 8)
    blanked = blank(images, 4, torch.Generator().manual_seed(0)) == 0
    assert torch.equal(blanked[:, 0], blanked[:, 2])
    rows, columns = blanked[:, 0].any(2).sum(1), blanked[:, 0].any(1).sum(1)
    assert torch.equal(blanked[:, 0].sum((1, 2)), rows * columns)
    assert set(rows.tolist()) == set(columns.tolist()) == {2, 3, 4}
    assert blanked[:, 0].float().mean(0).min() > 0.02
    write_binary(tmp_path / "a")
    for cutout in (0, 8):
        augment = load(root=str(tmp_path / "a"), cutout=cutout).augment
        assert augment is not None
        varied, targets = augment(torch.ones(16, 3, 32, 32), torch.arange(16), torch.Generator().manual_seed(0))
        assert torch.equal(targets, torch.arange(16))
        assert bool((varied[:, :, 12:20, 12:20] == 0).any()) is (cutout > 0)


def test_real_images(shared: Path) -> None:
    found = load(root=str(shared / "data" / "cifar10"), limit=100)
    assert found.train.load(0).size == (32, 32)
    assert set(found.evaluation.targets) == set(range(10))
