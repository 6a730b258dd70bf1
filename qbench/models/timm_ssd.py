"""SSD and SSDLite on any timm backbone."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field
from torch import nn
from torchvision.models.detection.anchor_utils import DefaultBoxGenerator
from torchvision.models.detection.ssd import SSD, SSDHead
from torchvision.models.detection.ssdlite import SSDLiteHead

from qbench.models.base import Model
from qbench.models.pyramid import Shrinking, letterbox
from qbench.models.single_stage import single_stage
from qbench.registry import model

Share = Annotated[float, Field(gt=0, le=1)]
_ASPECTS = [2, 3]
"""Width over height of anchors, besides 1 and its inverse."""


@model("ssd")
def ssd(
    *,
    backbone: str,
    classes: Annotated[int, Field(ge=1)] = 80,
    size: Annotated[int, Field(ge=32)] = 320,
    lite: bool = True,
    stride: Literal[8, 16] = 16,
    maps: Annotated[int, Field(ge=1, le=8)] = 6,
    smallest: Share = 0.2,
    largest: Share = 0.95,
    args: dict[str, Any] | None = None,
    checkpoint: str | None = None,
    random: Annotated[int, Field(ge=0)] | None = None,
) -> Model:
    """SSD or SSDLite (torchvision's heads and loss) on the maps of a timm backbone.

    Sources: W. Liu et al., arXiv:1512.02325, 2016; M. Sandler et al., "MobileNetV2", arXiv:1801.04381, 2018.

    Args:
        backbone: as `timm.list_models` has it; it must have maps of the strides 8 or 16, and 32.
        classes: how many.
        size: side of the network's square input; images keep their shape.
        lite: heads and added maps are depthwise-separable.
        stride: of the finest map that is looked at.
        maps: how many are looked at; those behind the backbone's are added.
        smallest: side of the anchors of the finest map, as a share of the input's.
        largest: the same of the coarsest map.
        args: more arguments of `timm.create_model`.
        checkpoint: safetensors file, looked for as given, then in the folder that QBENCH_WEIGHTS names.
        random: seed of random weights, to train from or to try out speed and export.
    """
    build = functools.partial(_build, backbone, args or {}, classes, size, lite, stride, maps, (smallest, largest))
    title = f"{'ssdlite' if lite else 'ssd'}_{backbone}_{size}"
    columns = range(1, classes + 1)
    return single_stage(title, build, letterbox(backbone, size), columns, checkpoint=checkpoint, random=random)


def _build(
    backbone: str,
    args: Mapping[str, Any],
    classes: int,
    size: int,
    lite: bool,
    stride: int,
    maps: int,
    sides: tuple[float, float],
) -> SSD:
    body = Shrinking(backbone, args, stride, maps, lite=lite)
    anchors = DefaultBoxGenerator([_ASPECTS] * maps, min_ratio=sides[0], max_ratio=sides[1])
    given = (body.out_channels, anchors.num_anchors_per_location(), classes + 1)
    head = SSDLiteHead(*given, norm_layer=nn.BatchNorm2d) if lite else SSDHead(*given)
    return SSD(body, anchors, (size, size), classes + 1, head=head)
