"""Wrong input stops a suite before anything is written."""

import json
from pathlib import Path
from textwrap import dedent

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image

from qbench import plan, preflight
from qbench.cli import app
from qbench.commands import run
from qbench.errors import UserError
from qbench.suite import load


def images(folder: Path) -> None:
    for split in ("train", "val"):
        for wnid in ("n01440764", "n01443537"):
            (folder / split / wnid).mkdir(parents=True)
            for i in range(3):
                pixels = np.random.default_rng(i).integers(0, 255, (40, 40, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / split / wnid / f"{i}.png")


def start(folder: Path, **model: object) -> None:
    text = f"""
        tasks:
          - dataset: {{imagenet: {{root: {folder / "imagenet"}{model.pop("data", "")}}}}}
            models: [{{timm: {{name: test_resnet, size: 32, {", ".join(f"{k}: {v}" for k, v in model.items())}}}}}]
            calibration: {{images: 4}}
        recipes: [fp32]
        metrics: [top1]
    """
    (folder / "s.yaml").write_text(dedent(text))
    run(
        folder / "s.yaml",
        folder / "results",
        plugins=[],
        settings=[],
        only=None,
        dry_run=False,
        redo=None,
        jobs=1,
        as_json=False,
    )


def refused(folder: Path, message: str, **model: object) -> None:
    with pytest.raises(UserError, match=message) as caught:
        start(folder, **model)
    assert "\n" not in str(caught.value)
    assert not (folder / "results").exists()


def test_checkpoint_that_does_not_fit(tmp_path: Path) -> None:
    images(tmp_path / "imagenet")
    safetensors.torch.save_file({"conv1.0.weight": torch.zeros(3)}, tmp_path / "w.safetensors")
    refused(
        tmp_path,
        r"w.safetensors does not fit .*missing: .*wrong shape: conv1.0.weight",
        checkpoint=tmp_path / "w.safetensors",
    )


def test_truncated_checkpoint(tmp_path: Path) -> None:
    images(tmp_path / "imagenet")
    path = tmp_path / "w.safetensors"
    safetensors.torch.save_file({"a": torch.zeros(1000)}, path)
    path.write_bytes(path.read_bytes()[:500])
    refused(tmp_path, "is not a complete safetensors file", checkpoint=path)


def test_missing_checkpoint(tmp_path: Path) -> None:
    images(tmp_path / "imagenet")
    refused(tmp_path, "checkpoint 'nowhere.safetensors' not found: looked for", checkpoint="nowhere.safetensors")


def test_unreadable_image(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images(tmp_path / "imagenet")
    bad = tmp_path / "imagenet" / "val" / "n01440764" / "1.png"
    bad.write_bytes(bad.read_bytes()[:50])
    refused(tmp_path, r"n01440764/1.png cannot be read .*skip_unreadable: true", random=0)
    start(tmp_path, random=0, data=", skip_unreadable: true")
    assert "skipped: the evaluation image" in capsys.readouterr().out
    board = (tmp_path / "results" / "s" / "LEADERBOARD.md").read_text()
    assert "5 images scored (1 unreadable ones skipped)" in board


def test_what_was_mended_is_told_once(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    for split, box in (("train", [0, 0, 9, 9]), ("val", [-3, 0, 9, 9])):
        Image.new("RGB", (40, 30)).save(tmp_path / "images" / f"{split}.png")
        content = {
            "images": [{"id": 1, "file_name": f"{split}.png", "width": 40, "height": 30}],
            "categories": [{"id": 1, "name": "cat"}],
            "annotations": [{"image_id": 1, "category_id": 1, "bbox": box}],
        }
        (tmp_path / f"{split}.json").write_text(json.dumps(content))
    (tmp_path / "s.yaml").write_text(
        dedent(f"""
            tasks:
              - dataset: {{coco_folder: {{root: {tmp_path}, train: train.json, evaluation: val.json,
                                          train_images: images, evaluation_images: images}}}}
                models: [digit_detector]
                calibration: {{images: 1}}
            recipes: [fp32, rtn]
            metrics: [map]
        """)
    )
    told: list[str] = []
    preflight.check(plan.make(*load(tmp_path / "s.yaml", [], []), []).runs, tmp_path / "cache", told.append)
    assert [line for line in told if "clipped" in line] == [
        f"{tmp_path}/val.json: boxes that reach out of their images: clipped: 1"
    ]


def test_missing_data(tmp_path: Path) -> None:
    refused(tmp_path, "imagenet", random=0)


def test_results_folder_that_cannot_be_made(tmp_path: Path) -> None:
    images(tmp_path / "imagenet")
    (tmp_path / "results").write_text("")
    with pytest.raises(UserError, match="is not writable"):
        start(tmp_path, random=0)


def test_the_command_line_has_every_command() -> None:
    names = {command.name or command.callback.__name__ for command in app.registered_commands}  # type: ignore[union-attr]
    assert names == {"run", "status", "show", "board", "list", "describe", "check", "train", "analyze", "export"}
