"""Any single-stage detector of torchvision."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn
from torchvision.models import detection, get_model, get_model_weights, list_models
from torchvision.models.detection import FCOS, RetinaNet
from torchvision.models.detection.ssd import SSD

from qbench.datasets.coco import IDS
from qbench.errors import UserError
from qbench.models.base import Model, Preprocess
from qbench.models.single_stage import single_stage
from qbench.models.timm import digest
from qbench.registry import model, nearest

_COLUMNS = 91
"""Scores of torchvision's own weights: one for each id of COCO, and one for background or nothing."""


@model("torchvision")
def torchvision_detector(
    *,
    name: str,
    pretrained: bool = False,
    checkpoint: str | None = None,
    random: Annotated[int, Field(ge=0)] | None = None,
    classes: Annotated[int, Field(ge=1)] | None = None,
    size: Annotated[int, Field(ge=32)] | None = None,
) -> Model:
    """A single-stage detector of torchvision: SSD, SSDLite, RetinaNet or FCOS.

    Args:
        name: as `torchvision.models.list_models(torchvision.models.detection)` has it.
        pretrained: download torchvision's weights for COCO, or take them from its cache.
        checkpoint: safetensors file with torchvision's names, looked for as given, then in the folder that
            QBENCH_WEIGHTS names.
        random: seed of random weights, to train from or to try out speed and export.
        classes: how many; default: COCO's 80, as torchvision's weights number them.
        size: side of the square input; default: that of an SSD, or else 800. SSDs squash images, the others letterbox.
    """
    # The first RetinaNet was trained with frozen batch norms that add nothing to the variance.
    build = functools.partial(_build, name, classes, pretrained and name == "retinanet_resnet50_fpn")
    with torch.device("meta"):
        made = build()
    ssd = isinstance(made, SSD)
    columns = IDS if classes is None else range(1, classes + 1) if ssd else range(classes)
    side = size or (made.transform.fixed_size[0] if ssd else made.transform.min_size[0])
    preprocess = Preprocess(
        (side, side),
        mode="squash" if ssd else "letterbox",
        interpolation="bilinear",
        mean=tuple(made.transform.image_mean),
        std=tuple(made.transform.image_std),
    )
    if not pretrained:
        return single_stage(name, build, preprocess, columns, checkpoint=checkpoint, random=random)
    if classes is not None or checkpoint is not None or random is not None:
        raise UserError(f"model torchvision {name!r}: pretrained goes without classes, checkpoint and random")
    return replace(single_stage(name, build, preprocess, columns, checkpoint=None, random=0), weights=_Pretrained(name))


def _build(name: str, classes: int | None, without_eps: bool = False) -> SSD | RetinaNet | FCOS:
    known = list_models(module=detection)
    if name not in known:
        raise UserError(f"torchvision has no detector {name!r}{nearest(name, known)} ({', '.join(known)})")
    columns = _COLUMNS if classes is None else classes + name.startswith("ssd")
    made = get_model(name, weights=None, weights_backbone=None, num_classes=columns)
    if not isinstance(made, (SSD, RetinaNet, FCOS)):
        raise UserError(
            f"model torchvision {name!r} has two stages: its second network looks at boxes that the first proposes, so "
            "it has no outputs before boxes are decoded; take one of ssd300_vgg16, ssdlite320_mobilenet_v3_large, "
            "retinanet_resnet50_fpn, retinanet_resnet50_fpn_v2, fcos_resnet50_fpn"
        )
    for module in made.modules():
        if without_eps and isinstance(module, nn.BatchNorm2d):
            module.eps = 0.0
    return made


@dataclass(frozen=True)
class _Pretrained:
    """torchvision's weights for COCO."""

    name: str

    def fingerprint(self) -> str:
        return digest(self._state)

    def load(self) -> Mapping[str, Tensor]:
        return self._state

    @functools.cached_property
    def _state(self) -> Mapping[str, Tensor]:
        try:
            found: Mapping[str, Tensor] = get_model_weights(self.name).DEFAULT.get_state_dict(
                progress=False, check_hash=True, weights_only=True
            )
        except (OSError, RuntimeError) as error:
            line = " ".join(str(error).split())[:160]
            raise UserError(
                f"the pretrained weights of torchvision {self.name!r} cannot be had ({type(error).__name__}: {line}); "
                "connect to the network, or give checkpoint: <file.safetensors>"
            ) from error
        return found
