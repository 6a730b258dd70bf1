"""Feature maps of timm backbones, as torchvision's detectors take them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.ops import Conv2dNormActivation, FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from qbench.errors import UserError
from qbench.models.base import Preprocess
from qbench.registry import nearest

STRIDES = (8, 16, 32)
_EXTRA = (512, 256, 256, 128)
"""Channels of the maps that SSD adds, the last again for any further."""


def features(name: str, args: Mapping[str, Any], strides: Sequence[int]) -> Any:
    """A timm backbone that returns its maps of these strides.

    Raises:
        UserError: timm has no such model, cannot build it with these arguments, or it has no such maps.
    """
    import timm

    if not timm.is_model(name):
        raise UserError(f"timm has no model {name!r}{nearest(name, timm.list_models())} (timm {timm.__version__})")
    arguments = {"pretrained": False, "features_only": True, **args}
    try:
        with torch.device("meta"):
            described: Any = timm.create_model(name, **arguments).feature_info
        own = described.reduction()
        if not set(strides) <= set(own):
            raise UserError(f"backbone {name!r} has maps of the strides {own}, but the detector needs {[*strides]}")
        return timm.create_model(name, **arguments, out_indices=[own.index(stride) for stride in strides])
    except (TypeError, AttributeError, AssertionError, RuntimeError) as error:
        line = " ".join(str(error).split())
        raise UserError(f"timm cannot build {name!r} with args {dict(args)} as a backbone: {line}") from error


def letterbox(backbone: str, size: int) -> Preprocess:
    """Images keep their shape; values are normalised as the backbone's weights want it."""
    import timm

    own = timm.get_pretrained_cfg(backbone)
    mean, std = (own.mean, own.std) if own else ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    return Preprocess((size, size), mode="letterbox", interpolation="bilinear", mean=tuple(mean), std=tuple(std))


class Pyramid(nn.Module):
    """Maps of equal width, of strides 8 to 128: the backbone's with those above added (FPN), and two more."""

    def __init__(self, name: str, args: Mapping[str, Any], width: int) -> None:
        super().__init__()
        self.body = features(name, args, STRIDES)
        channels = self.body.feature_info.channels()
        self.fpn = FeaturePyramidNetwork(channels, width, extra_blocks=LastLevelP6P7(width, width))
        self.out_channels = width

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        maps: dict[str, Tensor] = self.fpn(_named(self.body(x)))
        return maps


class Shrinking(nn.Module):
    """The backbone's maps, and more behind them, each with half the side of the one before (SSD)."""

    def __init__(self, name: str, args: Mapping[str, Any], stride: int, maps: int, *, lite: bool) -> None:
        super().__init__()
        self.body = features(name, args, [one for one in STRIDES if one >= stride])
        own = self.body.feature_info.channels()[:maps]
        added = [_EXTRA[min(number, len(_EXTRA) - 1)] for number in range(maps - len(own))]
        self.out_channels = [*own, *added]
        ends = zip([own[-1], *added], added, strict=False)
        self.extra = nn.ModuleList(_halving(start, end, lite=lite) for start, end in ends)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        maps = list(self.body(x))[: len(self.out_channels)]
        for extra in self.extra:
            maps.append(extra(maps[-1]))
        return _named(maps)


def _halving(start: int, end: int, *, lite: bool) -> nn.Sequential:
    middle = end // 2
    kinds: dict[str, Any] = {"activation_layer": nn.ReLU6}
    wide = Conv2dNormActivation(middle, middle if lite else end, 3, 2, groups=middle if lite else 1, **kinds)
    blocks = [Conv2dNormActivation(start, middle, 1, **kinds), wide]
    return nn.Sequential(*blocks, *([Conv2dNormActivation(middle, end, 1, **kinds)] if lite else []))


def _named(maps: Sequence[Tensor]) -> dict[str, Tensor]:
    return OrderedDict((str(number), one) for number, one in enumerate(maps))
