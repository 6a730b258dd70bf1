"""Small timm models for CIFAR-10 whose first layers keep the resolution of its 32x32 pixels.

Their weights ship with the package. They were made of random ones on one core in half an hour each, with a fifth of
CIFAR-10's training images, by

    qbench train cifar10_resnet --dataset 'cifar10[cutout=8]' -o FILE --epochs 40 --batch-size 128 --lr 0.1 \
      --set optimizer=sgd --set weight_decay=5e-4 --set clip=null --set precision=bf16 --set ema=0.999
    qbench train cifar10_mobilenet --dataset 'cifar10[cutout=8]' -o FILE --epochs 40 --batch-size 64 --lr 0.003 \
      --set optimizer=adamw --set weight_decay=0.05 --set clip=null --set ema=0.99

Accuracy is what that gives, not what these networks can reach.
"""

from __future__ import annotations

from collections.abc import Callable

import timm
from torch import nn

from qbench.models.base import Model, Preprocess
from qbench.models.checkpoints import Checkpoint
from qbench.models.digits import WEIGHTS
from qbench.registry import model


@model("cifar10_resnet")
def cifar10_resnet() -> Model:
    """A residual network of 0.7 million parameters: timm's resnet10t with stages of 24, 48, 96 and 192 channels."""
    return _model("cifar10_resnet", _resnet)


@model("cifar10_mobilenet")
def cifar10_mobilenet() -> Model:
    """MobileNetV2 of half width, 0.7 million parameters, whose first and last reductions are left out."""
    return _model("cifar10_mobilenet", _mobilenet)


def _resnet() -> nn.Module:
    network = timm.create_model("resnet10t", num_classes=10, stem_width=12, channels=(24, 48, 96, 192))
    network.maxpool = nn.Identity()
    return _whole(network, "conv1.0")


def _mobilenet() -> nn.Module:
    network = timm.create_model("mobilenetv2_050", num_classes=10)
    return _whole(network, "conv_stem", "blocks.5.0.conv_dw")


def _whole(network: nn.Module, *names: str) -> nn.Module:
    """These convolutions look at every pixel rather than at every other one."""
    for name in names:
        layer = network.get_submodule(name)
        assert isinstance(layer, nn.Conv2d)
        layer.stride = (1, 1)
    return network


def _model(name: str, build: Callable[[], nn.Module]) -> Model:
    return Model(
        task="classification",
        build=build,
        weights=Checkpoint(str(WEIGHTS / f"{name}.safetensors")),
        preprocess=Preprocess(size=(32, 32), mean=(0.491, 0.482, 0.447), std=(0.247, 0.243, 0.262)),
    )
