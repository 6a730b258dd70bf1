"""Scenes for detection: scanned digits on procedural textures, from a seed alone.

The layout of all scenes is drawn at once, the pixels of a scene when it is asked for.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

SIDE = 96
"""Side of a scene, in pixels."""
OBJECTS = (2, 6)
"""Fewest and most digits in a scene."""
HEIGHTS = (20, 48)
"""Smallest and largest height of a digit, in pixels."""
MAX_OVERLAP = 0.08
"""Largest share of the smaller of two boxes that lies in the other."""
_INK = 112
"""Grey level from which a pixel of a scan counts as part of the digit, when its box is found."""
_CANDIDATES = 24


def trim(scan: np.ndarray) -> np.ndarray:
    """The part of a scan (8, 8) that the digit fills."""
    rows, columns = np.nonzero(scan >= _INK)
    return scan[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]


@dataclass(frozen=True)
class Layout:
    """Where the digits of many scenes are."""

    scan: np.ndarray
    """(scenes, candidates) which scan."""
    xyxy: np.ndarray
    """(scenes, candidates, 4) int64 pixels."""
    placed: np.ndarray
    """(scenes, candidates) bool: whether the candidate is in the scene."""


def lay_out(shapes: np.ndarray, scenes: int, rng: np.random.Generator) -> Layout:
    """Place digits at random; a candidate that overlaps an earlier one too much is left out.

    Args:
        shapes: (scans, 2) height and width of every trimmed scan.
        scenes: how many scenes.
        rng: source of randomness.
    """
    wanted = rng.integers(OBJECTS[0], OBJECTS[1] + 1, scenes)
    scan = rng.integers(0, len(shapes), (scenes, _CANDIDATES))
    height = np.exp(rng.uniform(math.log(HEIGHTS[0]), math.log(HEIGHTS[1]), scan.shape))
    stretch = np.exp(rng.uniform(-0.2, 0.2, scan.shape))
    width = np.clip(height * stretch * shapes[scan, 1] / shapes[scan, 0], 6, HEIGHTS[1])
    size = np.round(np.stack([width, height], axis=-1)).astype(np.int64)
    corner = np.floor(rng.random(size.shape) * (SIDE - size + 1)).astype(np.int64)
    xyxy = np.concatenate([corner, corner + size], axis=-1)
    free = _overlap(xyxy) <= MAX_OVERLAP
    placed = np.zeros(scan.shape, dtype=bool)
    for candidate in range(_CANDIDATES):
        clear = (free[:, candidate] | ~placed).all(axis=1)
        placed[:, candidate] = clear & (placed.sum(axis=1) < wanted)
    return Layout(scan, xyxy, placed)


def _overlap(xyxy: np.ndarray) -> np.ndarray:
    """(scenes, n, n) intersection over the smaller of the two areas."""
    low = np.maximum(xyxy[:, :, None, :2], xyxy[:, None, :, :2])
    high = np.minimum(xyxy[:, :, None, 2:], xyxy[:, None, :, 2:])
    area = np.prod(xyxy[..., 2:] - xyxy[..., :2], axis=-1)
    return np.prod(np.clip(high - low, 0, None), axis=-1) / np.minimum(area[:, :, None], area[:, None, :])


def paint(digits: list[tuple[np.ndarray, np.ndarray]], rng: np.random.Generator) -> Image.Image:
    """The RGB image of one scene.

    Args:
        digits: trimmed scan and box (4,) of every digit.
        rng: source of randomness.
    """
    canvas = _texture(rng)
    for scan, box in digits:
        left, top, right, bottom = box.tolist()
        mask = cover(scan, right - left, bottom - top)[..., None]
        ground = canvas[top:bottom, left:right]
        canvas[top:bottom, left:right] = ground + mask * (_colour(ground, rng) - ground)
    canvas += rng.normal(0, rng.uniform(0, 0.05), canvas.shape)
    return Image.fromarray(np.round(np.clip(canvas, 0, 1) * 255).astype(np.uint8))


def cover(scan: np.ndarray, width: int, height: int) -> np.ndarray:
    """(height, width) float32 in [0, 1]: how much of the ground an enlarged digit hides.

    Edges are steeper than those of the enlarged scan, so that the border of the box can be seen.
    """
    ink = Image.fromarray(np.ascontiguousarray(scan)).resize((width, height), Image.Resampling.BILINEAR)
    return np.clip((np.asarray(ink, dtype=np.float32) / 255 - 0.3) / 0.5, 0, 1)


def _colour(ground: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """(3,) a colour that is brighter or darker than the ground, with little contrast at worst."""
    mean = ground.mean(axis=(0, 1))
    level = mean.mean()
    sign = 1 if rng.random() < np.clip(1.5 - 2 * level, 0, 1) else -1
    contrast = rng.uniform(0.25, 0.6)
    return np.clip(mean + sign * contrast + rng.normal(0, 0.1, 3), 0, 1).astype(np.float32)


def _texture(rng: np.random.Generator) -> np.ndarray:
    """(SIDE, SIDE, 3) float32: clouds, grain, stripes and strokes."""
    base, cloud = rng.uniform(0.2, 0.8, 3), rng.uniform(0.05, 0.2)
    coarse = np.clip(base + cloud * rng.normal(size=(5, 5, 3)), 0, 1)
    image = Image.fromarray((coarse * 255).astype(np.uint8)).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    _strokes(image, rng)
    canvas = np.asarray(image, dtype=np.float32) / 255
    grain = Image.fromarray(rng.normal(size=(32, 32)).astype(np.float32)).resize(
        (SIDE, SIDE), Image.Resampling.BILINEAR
    )
    canvas = canvas + rng.uniform(0, 0.1) * np.asarray(grain)[..., None]
    angle, period, phase = rng.uniform(0, np.pi), rng.uniform(4, 24), rng.uniform(0, 2 * np.pi)
    y, x = np.mgrid[:SIDE, :SIDE].astype(np.float32)
    wave = np.sin((np.cos(angle) * x + np.sin(angle) * y) * (2 * np.pi / period) + phase)
    return (canvas + rng.uniform(0, 0.1) * wave[..., None]).astype(np.float32)


def _strokes(image: Image.Image, rng: np.random.Generator) -> None:
    """Up to five lines and arcs that look like parts of digits."""
    draw = ImageDraw.Draw(image)
    for _ in range(rng.integers(0, 6)):
        colour = tuple(rng.integers(0, 256, 3).tolist())
        x, y = rng.integers(-8, SIDE, 2).tolist()
        width, height = rng.integers(8, 40, 2).tolist()
        thick, start, sweep = int(rng.integers(1, 4)), int(rng.integers(0, 360)), int(rng.integers(40, 200))
        if rng.random() < 0.5:
            draw.line((x, y, x + width, y + height), fill=colour, width=thick)
        else:
            draw.arc((x, y, x + width, y + height), start, start + sweep, fill=colour, width=thick)
