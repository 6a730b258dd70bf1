"""The Python that a card shows prepares images as the network was scored with."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from unittest.mock import MagicMock

import numpy as np
import pytest
from PIL import Image

from qbench.card import snippet
from qbench.datasets.transform import prepare
from qbench.models.base import Preprocess


@pytest.mark.parametrize("size", [(70, 41), (33, 90), (20, 13)])
@pytest.mark.parametrize(
    "preprocess",
    [
        Preprocess((32, 32), resize=37, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)),
        Preprocess((32, 24), interpolation="bilinear", mean=(0.5,), std=(0.25,)),
        Preprocess((32, 24), mode="squash", interpolation="nearest"),
        Preprocess((32, 24), mode="squash", resize=40),
        Preprocess((32, 48), mode="letterbox", mean=(0.1, 0.2, 0.3)),
    ],
)
def test_the_snippet_prepares_images_alike(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, preprocess: Preprocess, size: tuple[int, int]
) -> None:
    path = tmp_path / "image.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)).save(path)
    given: list[np.ndarray] = []
    session = SimpleNamespace(run=lambda names, inputs: given.append(inputs["images"]))
    fake = ModuleType("onnxruntime")
    fake.InferenceSession = lambda name, options: session  # type: ignore[attr-defined]
    fake.SessionOptions = MagicMock  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "onnxruntime", fake)
    exec(snippet(preprocess, "onnx", str(path)), {})
    with Image.open(path) as image:
        pixels = prepare(image, preprocess)
    wanted = (pixels / 255 - preprocess.mean) / preprocess.std
    assert given[0].dtype == np.float32
    np.testing.assert_allclose(given[0][0], wanted.transpose(2, 0, 1), atol=1e-6)
