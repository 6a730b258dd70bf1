"""The image cache: shared, bounded, and never trusted blindly."""

import json
import multiprocessing
import os
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from qbench import cache as disk
from qbench.datasets.base import Split
from qbench.datasets.images import open_images
from qbench.errors import UserError
from qbench.models.base import Preprocess

OWN = Preprocess((16, 16), resize=16)


def split(count: int = 12, broken: tuple[int, ...] = (), log: Path | None = None, **options: bool) -> Split:
    def load(position: int) -> Image.Image:
        if position in broken:
            raise OSError(f"/data/{position}.jpg: image file is truncated")
        if log is not None:
            with log.open("a") as file:
                file.write("x")
        return Image.new("RGB", (20, 24), (position, 2 * position, 3 * position))

    return Split([f"{i}.jpg" for i in range(count)], load, list(range(count)), **options)


def test_images_are_decoded_once(tmp_path: Path) -> None:
    log = tmp_path / "log"
    first = open_images(split(log=log), OWN, "f", tmp_path, "evaluation").batch([3, 1])
    again = open_images(split(log=log), OWN, "f", tmp_path, "evaluation")
    assert log.read_text() == "x" * 12
    assert (again.batch([3, 1]) == first).all()
    assert again.batch(range(2, 5)).shape == (3, 3, 16, 16)
    assert first[0, 0, 0, 0] == pytest.approx((3 / 255 - 0.5) / 0.5)
    assert again.sizes.tolist() == [[20, 24]] * 12
    assert again.pixels([3, 1])[:, :, 0, 0].tolist() == [[3, 6, 9], [1, 2, 3]]


def test_pixels_become_what_the_network_is_called_with(tmp_path: Path) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8))
    own = Preprocess((16, 16), mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    images = open_images(Split(["a"], lambda _: noise, [0]), own, "f", tmp_path, "evaluation")
    assert torch.equal(own.normalize(images.pixels([0])), images.batch([0]))


def test_entries_differ_by_transform_fingerprint_and_images(tmp_path: Path) -> None:
    open_images(split(), OWN, "f", tmp_path, "evaluation")
    open_images(split(), Preprocess((16, 16), resize=18), "f", tmp_path, "evaluation")
    open_images(split(), OWN, "g", tmp_path, "evaluation")
    open_images(split().subset([1, 2]), OWN, "f", tmp_path, "evaluation")
    assert len([path for path in (tmp_path / "images").iterdir() if path.is_dir()]) == 4


@pytest.mark.parametrize("harm", ["flip", "cut", "index", "missing"])
def test_damage_is_noticed_and_mended(tmp_path: Path, harm: str) -> None:
    expected = open_images(split(), OWN, "f", tmp_path, "evaluation").batch(range(12))
    (entry,) = [path for path in (tmp_path / "images").iterdir() if path.is_dir()]
    pixels = entry / "pixels.u8"
    content = bytearray(pixels.read_bytes())
    if harm == "flip":
        content[777] ^= 1
        pixels.write_bytes(content)
    elif harm == "cut":
        pixels.write_bytes(content[:-1])
    elif harm == "index":
        (entry / "index.json").write_text('{"checksums": [1')
    else:
        pixels.unlink()
    assert (open_images(split(), OWN, "f", tmp_path, "evaluation").batch(range(12)) == expected).all()
    assert pixels.stat().st_size == 12 * 16 * 16 * 3


def test_an_unreadable_image_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"image 5.jpg cannot be read \(/data/5.jpg: .*truncated\).*skip_unreadable"):
        open_images(split(broken=(5,)), OWN, "f", tmp_path, "evaluation")
    assert not [path for path in (tmp_path / "images").iterdir() if path.is_dir()]


def test_unreadable_images_are_skipped_and_targets_stay_aligned(tmp_path: Path) -> None:
    images = open_images(split(broken=(0, 5), skip_unreadable=True), OWN, "f", tmp_path, "evaluation")
    assert len(images) == len(images.split) == 10
    assert images.unreadable == ["0.jpg", "5.jpg"]
    assert images.split.targets == images.positions.tolist() == [1, 2, 3, 4, 6, 7, 8, 9, 10, 11]
    first_channel = ((images.batch(range(10))[:, 0, 0, 0] * 0.5 + 0.5) * 255).round()
    assert first_channel.tolist() == images.split.targets


def _open(folder: Path, log: Path) -> None:
    open_images(split(64, log=log), OWN, "f", folder, "evaluation").batch(range(64))


def test_writers_at_the_same_time_do_the_work_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_open, args=(tmp_path, tmp_path / "log")) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0] * 4
    assert (tmp_path / "log").read_text() == "x" * 64


def test_the_entries_used_least_recently_make_room(tmp_path: Path) -> None:
    def put(key: str, count: int) -> None:
        def read(entry: Path) -> int:
            if not (entry / "n").is_file():
                raise disk.Damaged
            return (entry / "n").stat().st_size

        disk.obtain(tmp_path, key, read, lambda entry: (entry / "n").write_bytes(bytes(count)), count, limit=250)  # type: ignore[arg-type, return-value]

    for age, key in ((300, "old"), (200, "older")):
        put(key, 100)
        os.utime(tmp_path / key, (time.time() - age,) * 2)
    put("old", 100)  # used again
    (tmp_path / "killed.tmp").mkdir()
    put("new", 100)
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["new", "old"]


def test_too_large_for_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QBENCH_CACHE_GB", "1e-6")
    with pytest.raises(UserError, match="QBENCH_CACHE_GB"):
        open_images(split(), OWN, "f", tmp_path, "evaluation")
    monkeypatch.setenv("QBENCH_CACHE_GB", "many")
    with pytest.raises(UserError, match="not a number of gigabytes"):
        open_images(split(), OWN, "f", tmp_path, "evaluation")


def test_a_cache_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "images").write_text("a file in the way")
    with pytest.raises(UserError, match="cannot be written"):
        open_images(split(), OWN, "f", tmp_path, "evaluation")


def test_index_is_plain_json(tmp_path: Path) -> None:
    open_images(split(), OWN, "f", tmp_path, "evaluation")
    (index,) = tmp_path.glob("images/*/index.json")
    assert np.array(json.loads(index.read_text())["sizes"]).shape == (12, 2)
