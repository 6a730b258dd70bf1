"""The anchors of SSD: boxes in a fixed pattern, what a network says about each, and which objects each answers for."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor
from torchvision.ops import box_iou

MAPS = (19, 10, 5, 3, 2, 1)
"""Cells along each side of the maps that the heads see, for an image of 300x300."""
COUNTS = (3, 6, 6, 6, 6, 6)
"""Anchors of a cell of each map."""
_SCALES = (0.2, 0.35, 0.5, 0.65, 0.8, 0.95, 1.0)
_ASPECTS = (1.0, 2.0, 0.5, 3.0, 0.3333)
"""As TensorFlow has them."""
_CODING = (10.0, 10.0, 5.0, 5.0)
"""What the coded (cy, cx, h, w) are multiplied with."""
_LARGEST = 4.0
"""Largest logarithm of a size over the anchor's that is decoded: a badly quantized network gives no infinite boxes."""
_MATCH = 0.5


@functools.cache
def anchors() -> Tensor:
    """(1917, 4) centre y, centre x, height and width in shares of the image, cell by cell; not to be changed."""
    return torch.cat([_grid(cells, _shapes(number)) for number, cells in enumerate(MAPS)])


def _shapes(number: int) -> list[tuple[float, float]]:
    """Scale and aspect ratio (width over height) of the anchors of one map."""
    scale, following = _SCALES[number], _SCALES[number + 1]
    if number == 0:
        return [(0.1, 1.0), (scale, 2.0), (scale, 0.5)]
    return [*((scale, aspect) for aspect in _ASPECTS), (math.sqrt(scale * following), 1.0)]


def _grid(cells: int, shapes: list[tuple[float, float]]) -> Tensor:
    centres = (torch.arange(cells) + 0.5) / cells
    y, x = torch.meshgrid(centres, centres, indexing="ij")
    sizes = torch.tensor([(scale / math.sqrt(aspect), scale * math.sqrt(aspect)) for scale, aspect in shapes])
    middle = torch.stack([y, x], dim=-1).flatten(0, 1)[:, None].expand(-1, len(shapes), -1)
    return torch.cat([middle, sizes.expand(len(middle), -1, -1)], dim=-1).flatten(0, 1)


def decode(codes: Tensor, side: int) -> Tensor:
    """Coded boxes (..., 1917, 4) as left, top, right, bottom in pixels of a square image."""
    own = anchors().to(codes.device)
    codes = codes.float() / codes.new_tensor(_CODING, dtype=torch.float32)
    centre = codes[..., :2] * own[:, 2:] + own[:, :2]
    half = codes[..., 2:].clamp(max=_LARGEST).exp() * own[:, 2:] / 2
    return torch.cat([(centre - half).flip(-1), (centre + half).flip(-1)], dim=-1) * side


def encode(xyxy: Tensor, which: Tensor, side: int) -> Tensor:
    """The codes (n, 4) that decode to the boxes (n, 4), each at its anchor (n,)."""
    own = anchors().to(xyxy.device)[which]
    low, high = xyxy[:, :2].flip(-1) / side, xyxy[:, 2:].flip(-1) / side
    codes = torch.cat([((low + high) / 2 - own[:, :2]) / own[:, 2:], ((high - low) / own[:, 2:]).log()], dim=-1)
    return codes * codes.new_tensor(_CODING)


def assign(xyxy: Tensor, side: int) -> Tensor:
    """Which object each anchor answers for: the one it covers best, if well; each object has its best anchor.

    Args:
        xyxy: (n, 4) boxes in pixels of a square image.
        side: of the image.

    Returns:
        (1917,) index of the object; -1 for background.
    """
    own = decode(torch.zeros(len(anchors()), 4, device=xyxy.device), side)
    if not len(xyxy):
        return torch.full((len(own),), -1, device=xyxy.device)
    overlap = box_iou(own, xyxy)
    best, owner = overlap.max(dim=1)
    owner = owner.masked_fill(best < _MATCH, -1)
    owner[overlap.argmax(dim=0)] = torch.arange(len(xyxy), device=xyxy.device)
    return owner
