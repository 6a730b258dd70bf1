"""From a decoded image to the pixels of a network's input, and boxes there and back."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image

from qbench.models.base import Preprocess

_FILTERS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
}


@dataclass(frozen=True)
class _Placement:
    """Where an image lands: it is resized to `size` (width, height), and its corner is put at `offset` (x, y)."""

    size: tuple[int, int]
    offset: tuple[int, int]


def prepare(image: Image.Image, preprocess: Preprocess, resized: bool = False) -> np.ndarray:
    """Resize and crop as torchvision and timm do in evaluation, filters widened when shrinking (antialias).

    Where the image does not reach, the input is black in mode `crop`, and of the mean colour in mode `letterbox`.

    Args:
        image: of any mode; it is made grey for networks of one channel, RGB otherwise.
        preprocess: of the model.
        resized: the image has been resized already; mode `crop` only crops it, if it is large enough.

    Returns:
        (H, W, C) uint8.
    """
    image = image.convert("L" if preprocess.channels == 1 else "RGB")
    placement = _place(image.size, preprocess, resized)
    if placement.size != image.size:
        image = image.resize(placement.size, _FILTERS[preprocess.interpolation])
    height, width = preprocess.size
    x, y = placement.offset
    if x <= 0 and y <= 0 and image.width + x >= width and image.height + y >= height:
        pixels = np.asarray(image.crop((-x, -y, width - x, height - y)))
    else:
        canvas = Image.new(image.mode, (width, height), _fill(preprocess))
        canvas.paste(image, (x, y))
        pixels = np.asarray(canvas)
    return pixels.reshape(height, width, preprocess.channels)


def to_network(
    xyxy: np.ndarray, original_size: tuple[int, int], preprocess: Preprocess, resized: bool = False
) -> np.ndarray:
    """Boxes (n, 4) in pixels of the original image, in pixels of the network's input; nothing is clipped.

    Args:
        xyxy: left, top, right, bottom; the result has their precision, float32 at least.
        original_size: (width, height).
        preprocess: of the model.
        resized: as for `prepare`.
    """
    scale, offset = _affine(original_size, preprocess, resized)
    return (np.asarray(xyxy, dtype=np.float64).reshape(-1, 4) * scale + offset).astype(_precision(xyxy))


def to_image(
    xyxy: np.ndarray, original_size: tuple[int, int], preprocess: Preprocess, resized: bool = False
) -> np.ndarray:
    """The inverse of `to_network`."""
    scale, offset = _affine(original_size, preprocess, resized)
    return ((np.asarray(xyxy, dtype=np.float64).reshape(-1, 4) - offset) / scale).astype(_precision(xyxy))


def _precision(xyxy: np.ndarray) -> np.dtype:
    return np.result_type(xyxy.dtype, np.float32)


def _affine(original: tuple[int, int], preprocess: Preprocess, resized: bool) -> tuple[np.ndarray, np.ndarray]:
    placement = _place(original, preprocess, resized)
    scale = np.array(placement.size) / np.array(original)
    return np.tile(scale, 2), np.tile(np.array(placement.offset, dtype=np.float64), 2)


def _place(original: tuple[int, int], preprocess: Preprocess, resized: bool) -> _Placement:
    size = _resized(original, preprocess, resized)
    height, width = preprocess.size
    return _Placement(size, (_centre(size[0], width), _centre(size[1], height)))


def _resized(original: tuple[int, int], preprocess: Preprocess, resized: bool) -> tuple[int, int]:
    (width, height), (target_height, target_width) = original, preprocess.size
    side = preprocess.resize
    if preprocess.mode == "squash":
        return (side, side) if side else (target_width, target_height)
    if preprocess.mode == "letterbox":
        ratio = min(target_width / width, target_height / height)
        return max(1, round(width * ratio)), max(1, round(height * ratio))
    if side is None or (resized and width >= target_width and height >= target_height):
        return original
    # torchvision cuts the longer side off rather than rounding it.
    return (side, int(side * height / width)) if width <= height else (int(side * width / height), side)


def _centre(have: int, want: int) -> int:
    """Where the image begins on the canvas: torchvision rounds a crop to even, and a border down."""
    return -round((have - want) / 2.0) if have >= want else (want - have) // 2


def _fill(preprocess: Preprocess) -> tuple[int, ...] | int:
    if preprocess.mode != "letterbox":
        return 0
    colour = tuple(round(255 * value) for value in preprocess.mean)
    return colour[0] if len(colour) == 1 else colour
