"""MobileNetV1 of any width, as TensorFlow trained it: SAME padding, batch-norm epsilon 0.001."""

from __future__ import annotations

import functools
from typing import Annotated, Literal

from pydantic import Field
from torch import nn

from qbench.models.base import Model, Preprocess
from qbench.models.checkpoints import Checkpoint
from qbench.registry import model


@model("mobilenetv1")
def mobilenet_v1(
    *,
    checkpoint: str = "mobilenetv1_025.safetensors",
    width: Annotated[float, Field(gt=0)] = 0.25,
    classes: Annotated[int, Field(ge=1)] = 1000,
    activation: Literal["relu6", "relu"] = "relu6",
    size: Annotated[int, Field(ge=1)] = 224,
    resize: Annotated[int, Field(ge=0)] = 256,
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5),
    std: tuple[float, float, float] = (0.5, 0.5, 0.5),
) -> Model:
    """MobileNetV1 with a width multiplier, from a checkpoint converted from TensorFlow.

    Source: A. Howard et al., "MobileNets", arXiv:1704.04861, 2017.

    Args:
        checkpoint: safetensors file, looked for as given, then in the folder that QBENCH_WEIGHTS names.
        width: multiplier of the channels.
        classes: how many.
        activation: after each batch norm.
        size: side of the network's square input.
        resize: shorter side before the crop; 0 crops without resizing.
        mean: of each channel of images in [0, 1].
        std: of each channel of images in [0, 1].
    """
    preprocess = Preprocess((size, size), resize=resize or None, mean=tuple(mean), std=tuple(std))
    build = functools.partial(_build, width, classes, activation)
    name = f"mobilenetv1_{round(100 * width):03d}"
    return Model("classification", build, Checkpoint(checkpoint), preprocess, name=name)


def _build(width: float, classes: int, activation: str) -> nn.Module:
    # timm has named models of some widths only; this is what all of them are made by.
    from timm.models.efficientnet import _gen_mobilenet_v1

    return _gen_mobilenet_v1(
        "mobilenetv1_100", width, pad_type="same", bn_eps=1e-3, num_classes=classes, act_layer=activation
    )
