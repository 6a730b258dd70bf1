"""Small timm models for the scanned digits; their weights ship with the package.

They were made, from random weights, by

    qbench train digits_resnet       --dataset digits --epochs 60  --batch-size 32 --lr 0.003 -o FILE
    qbench train digits_efficientnet --dataset digits --epochs 60  --batch-size 32 --lr 0.003 -o FILE
    qbench train digits_vit          --dataset digits --epochs 100 --batch-size 32 --lr 0.002 -o FILE
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import timm
from torch import nn

from qbench.models.base import Model, Preprocess
from qbench.models.checkpoints import Checkpoint
from qbench.registry import model

WEIGHTS = Path(__file__).parent / "weights"
"""Where the weights are that ship with the package."""


@model("digits_resnet")
def digits_resnet() -> Model:
    """A residual network of 0.37 million parameters on 32x32 grey images."""
    return _model("digits_resnet", "test_resnet")


@model("digits_efficientnet")
def digits_efficientnet() -> Model:
    """A depthwise-separable network of 0.10 million parameters on 32x32 grey images."""
    return _model("digits_efficientnet", "test_efficientnet")


@model("digits_vit")
def digits_vit() -> Model:
    """A vision transformer of 0.26 million parameters on 32x32 grey images, with 64 patches of 4x4 pixels."""
    return _model("digits_vit", "test_vit", img_size=32, patch_size=4)


def _model(name: str, architecture: str, **arguments: Any) -> Model:
    build: functools.partial[nn.Module] = functools.partial(
        timm.create_model, architecture, pretrained=False, in_chans=1, num_classes=10, **arguments
    )
    return Model(
        task="classification",
        build=build,
        weights=Checkpoint(str(WEIGHTS / f"{name}.safetensors")),
        preprocess=Preprocess(size=(32, 32), mean=(0.5,), std=(0.5,)),
    )
