"""A finished run of a small network, for the metrics that execute it for real."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from qbench.data import Batches, Data
from qbench.datasets.base import Dataset, Split
from qbench.datasets.images import ImageArray
from qbench.metrics.base import Finished
from qbench.models.base import Model, Preprocess, cross_entropy
from qbench.quant.activations import StaticQuantizer, quantize_input
from qbench.quant.encodings import Affine
from qbench.quant.layers import encode, weight_layers, weight_of
from qbench.quant.packing import Sizes
from qbench.score import score


class _Images:
    def __len__(self) -> int:
        return 4

    def batch(self, positions: Sequence[int]) -> Tensor:
        return torch.stack([torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(p)) for p in positions])


class _Weights:
    def fingerprint(self) -> str:
        return "random"

    def load(self) -> Mapping[str, Tensor]:
        torch.manual_seed(0)
        return _build().state_dict()


def _build() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)
    )


def _evaluation(preprocess: Preprocess) -> ImageArray:
    pixels = np.random.default_rng(0).integers(0, 256, (13, 8, 8, 3), dtype=np.uint8)
    split = Split([str(i) for i in range(13)], lambda _: None, [i % 5 for i in range(13)])  # type: ignore[arg-type, return-value]
    index = {"positions": list(range(13)), "sizes": [[8, 8]] * 13, "unreadable": []}
    return ImageArray(pixels, split, index, preprocess)


def finished(tmp_path: Path, *, weights: bool = True, inputs: bool = True) -> Finished:
    """The run of a recipe that quantizes weights, inputs, both or neither to 8 bits."""
    model = Model("classification", _build, _Weights(), Preprocess((8, 8)))
    quantized = model.load()
    for layer in weight_layers(quantized):
        if weights:
            weight = weight_of(layer)
            encode(layer, Affine.nearest(weight, weight.flatten(1).abs().amax(1) / 127, bits=8))
        if inputs:
            quantize_input(layer, StaticQuantizer(8, False, 1 / 255))
    empty = Split([], lambda _: None, [])  # type: ignore[arg-type, return-value]
    images = _evaluation(model.preprocess)
    outcomes, _ = score(quantized.eval(), model, images, device=torch.device("cpu"), threads=1)
    return Finished(
        model=model,
        quantized=quantized.eval(),
        load_float=model.load,
        artifact=tmp_path / "none.safetensors",
        sizes=Sizes(0.0, 0, 0, 0),
        float_bytes=0,
        dataset=Dataset("classification", ["a"] * 5, empty, empty, images.split, "none"),
        outcomes=outcomes,
        images=images,
        data=Data(Batches(_Images(), torch.device("cpu")), None, cross_entropy),
        cost={},
        records={},
        threads=1,
        cache=tmp_path,
    )
