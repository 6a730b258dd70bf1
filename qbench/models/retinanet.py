"""RetinaNet on any timm backbone."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field
from torchvision.models.detection import RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator

from qbench.models.base import Model
from qbench.models.pyramid import Pyramid, letterbox
from qbench.models.single_stage import single_stage
from qbench.registry import model

_STRIDES = (8, 16, 32, 64, 128)


@model("retinanet")
def retinanet(
    *,
    backbone: str,
    classes: Annotated[int, Field(ge=1)] = 80,
    size: Annotated[int, Field(ge=32)] = 512,
    width: Annotated[int, Field(ge=8)] = 256,
    anchor: Annotated[float, Field(gt=0)] = 4.0,
    args: dict[str, Any] | None = None,
    checkpoint: str | None = None,
    random: Annotated[int, Field(ge=0)] | None = None,
) -> Model:
    """RetinaNet (torchvision's heads and focal loss) on a feature pyramid of a timm backbone.

    Source: T.-Y. Lin et al., "Focal Loss for Dense Object Detection", arXiv:1708.02002, 2017.

    Args:
        backbone: as `timm.list_models` has it; it must have maps of the strides 8, 16 and 32.
        classes: how many.
        size: side of the network's square input; images keep their shape.
        width: channels of the pyramid and of the heads.
        anchor: side of a map's smallest anchors, in strides of the map.
        args: more arguments of `timm.create_model`.
        checkpoint: safetensors file, looked for as given, then in the folder that QBENCH_WEIGHTS names.
        random: seed of random weights, to train from or to try out speed and export.
    """
    build = functools.partial(_build, backbone, args or {}, classes, width, anchor)
    title = f"retinanet_{backbone}_{size}"
    return single_stage(title, build, letterbox(backbone, size), range(classes), checkpoint=checkpoint, random=random)


def _build(backbone: str, args: Mapping[str, Any], classes: int, width: int, anchor: float) -> RetinaNet:
    sizes = tuple(tuple(anchor * stride * 2 ** (octave / 3) for octave in range(3)) for stride in _STRIDES)
    anchors = AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * len(sizes))
    return RetinaNet(Pyramid(backbone, args, width), classes, anchor_generator=anchors)
