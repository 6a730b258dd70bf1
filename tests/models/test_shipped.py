"""The weights that ship with the package: size, origin, and the accuracy that they are said to have."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from qbench.datasets.images import open_images
from qbench.metrics.map import coco_stats
from qbench.models.digits import WEIGHTS
from qbench.registry import get
from qbench.score import score

SHIPPED = {
    "digits_resnet": 0.97,
    "digits_efficientnet": 0.97,
    "digits_vit": 0.97,
    "digits_cnn": 0.98,
    "digits_mlp": 0.94,
    "digit_detector": 0.60,
    "cifar10_resnet": 0.77,
    "cifar10_mobilenet": 0.62,
}
"""Least accuracy; those of CIFAR-10 are scored where its images are."""


def test_nothing_else_ships() -> None:
    assert sorted(path.stem for path in WEIGHTS.glob("*.safetensors")) == sorted(SHIPPED)


@pytest.mark.parametrize("name", SHIPPED)
def test_accuracy(name: str, tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if name.startswith("cifar10"):
        monkeypatch.setenv("QBENCH_DATA", str(request.getfixturevalue("shared") / "data"))
    model = get("model", name)()
    data = get("dataset", _metadata(name)["dataset"].partition("[")[0])()
    images = open_images(data.evaluation, model.preprocess, data.fingerprint, tmp_path, "evaluation")
    outcomes, _ = score(model.load(), model, images, device=torch.device("cpu"), threads=1)
    if model.task == "detection":
        quality = coco_stats(data.evaluation.targets, outcomes, len(data.classes))["AP"]
    else:
        quality = outcomes["correct"].mean()
    assert quality >= SHIPPED[name]
    told: dict[str, Any] = _metadata(name)["evaluation"]
    assert quality == pytest.approx(told["AP" if model.task == "detection" else "top1"], abs=0.005)


@pytest.mark.parametrize("name", SHIPPED)
def test_size_and_origin(name: str) -> None:
    assert (WEIGHTS / f"{name}.safetensors").stat().st_size < 3e6
    told = _metadata(name)
    assert told["model"] == name
    assert {"epochs", "batch_size", "lr", "seed"} <= set(told["training"])


def _metadata(name: str) -> dict[str, Any]:
    with safe_open(WEIGHTS / f"{name}.safetensors", "pt") as file:
        return json.loads(file.metadata()["qbench_training"])
