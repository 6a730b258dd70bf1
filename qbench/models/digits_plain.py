"""Small plain networks for the scanned digits, of which much can be proved; their weights ship with the package.

They were made, from random weights, by

    qbench train digits_cnn --dataset digits --epochs 60  --batch-size 32 --lr 0.003 -o FILE
    qbench train digits_mlp --dataset digits --epochs 100 --batch-size 32 --lr 0.003 -o FILE
"""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from qbench.models.base import Model, Preprocess
from qbench.models.checkpoints import Checkpoint
from qbench.models.digits import WEIGHTS
from qbench.registry import model


@model("digits_cnn")
def digits_cnn() -> Model:
    """Four convolutions and two linear layers, 0.06 million parameters, on 32x32 grey images."""
    return _model("digits_cnn", _cnn, 32)


@model("digits_mlp")
def digits_mlp() -> Model:
    """Two linear layers, 2,410 parameters, on 8x8 grey images."""
    return _model("digits_mlp", _mlp, 8)


def _model(name: str, build: Callable[[], nn.Module], size: int) -> Model:
    return Model(
        task="classification",
        build=build,
        weights=Checkpoint(str(WEIGHTS / f"{name}.safetensors")),
        preprocess=Preprocess(size=(size, size), mode="squash", mean=(0.0,), std=(1.0,)),
    )


def _cnn() -> nn.Module:
    widths = [(1, 16, 5, 2), (16, 32, 3, 1), (32, 32, 3, 2), (32, 32, 3, 2)]
    convolutions = [nn.Conv2d(a, b, size, stride, padding=size // 2) for a, b, size, stride in widths]
    linear = [nn.Flatten(), nn.Linear(512, 64), nn.ReLU(), nn.Linear(64, 10)]
    return nn.Sequential(*(layer for convolution in convolutions for layer in (convolution, nn.ReLU())), *linear)


def _mlp() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
