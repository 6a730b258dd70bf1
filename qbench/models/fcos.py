"""FCOS on any timm backbone."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field
from torchvision.models.detection import FCOS
from torchvision.models.detection.fcos import FCOSHead

from qbench.errors import UserError
from qbench.models.base import Model
from qbench.models.pyramid import Pyramid, letterbox
from qbench.models.single_stage import single_stage
from qbench.registry import model

_GROUPS = 32
"""Of the heads' group norms."""


@model("fcos")
def fcos(
    *,
    backbone: str,
    classes: Annotated[int, Field(ge=1)] = 80,
    size: Annotated[int, Field(ge=32)] = 512,
    width: Annotated[int, Field(ge=64)] = 256,
    depth: Annotated[int, Field(ge=0)] = 4,
    args: dict[str, Any] | None = None,
    checkpoint: str | None = None,
    random: Annotated[int, Field(ge=0)] | None = None,
) -> Model:
    """FCOS (torchvision's heads and loss) on a feature pyramid of a timm backbone.

    Source: Z. Tian et al., "FCOS: Fully Convolutional One-Stage Object Detection", arXiv:1904.01355, 2019.

    Args:
        backbone: as `timm.list_models` has it; it must have maps of the strides 8, 16 and 32.
        classes: how many.
        size: side of the network's square input; images keep their shape.
        width: channels of the pyramid and of the heads, a multiple of 32, of which the heads' norms have groups.
        depth: convolutions of each head in front of its outputs.
        args: more arguments of `timm.create_model`.
        checkpoint: safetensors file, looked for as given, then in the folder that QBENCH_WEIGHTS names.
        random: seed of random weights, to train from or to try out speed and export.
    """
    if width % _GROUPS:
        raise UserError(f"model fcos: width={width} is no multiple of {_GROUPS}, the groups of its heads' norms")
    build = functools.partial(_build, backbone, args or {}, classes, width, depth)
    title = f"fcos_{backbone}_{size}"
    return single_stage(title, build, letterbox(backbone, size), range(classes), checkpoint=checkpoint, random=random)


def _build(backbone: str, args: Mapping[str, Any], classes: int, width: int, depth: int) -> FCOS:
    return FCOS(Pyramid(backbone, args, width), classes, head=FCOSHead(width, 1, classes, depth))
