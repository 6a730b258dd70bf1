"""`qbench show KEY --pictures`: boxes of the float and the quantized network side by side, where they differ most."""

from __future__ import annotations

import colorsys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from qbench.cache import cache_dir
from qbench.errors import UserError
from qbench.metrics.ap import iou
from qbench.run import Result, restore
from qbench.store import Store, find, write_atomically
from qbench.workspace import Workspace

MIN_SCORE, MIN_IOU = 0.3, 0.5
IMAGES, WIDTH, MARGIN, LINE = 8, 480, 8, 18
"""Images of a sheet; width of an image, gaps and height of a line of text, in pixels."""

Found = Mapping[str, np.ndarray]
"""`xyxy` (n, 4), `score` (n,), `label` (n,) of one image."""


def pictures(key: str, results: Path, out: Path) -> None:
    """Write the contact sheet of a detection run.

    Args:
        key: of the result, or the beginning of it.
        results: folder in which it is looked for.
        out: PNG file.

    Raises:
        UserError: the run has no boxes, its float reference is not there, or `out` cannot be written.
    """
    store, full = find(results, key)
    result = store.read(full)
    if result is None or result.status != "ok" or result.task != "detection":
        raise UserError(f"{full} has no boxes to draw: it is no finished run of a detector")
    reference = _reference(store, result)
    run = restore(result.identity)
    space = Workspace(run.dataset, run.model, run.calibration, cache_dir(), torch.device("cpu"))
    images = space.images("evaluation").split
    pairs = list(zip(*(_by_image(store.outcomes(one), len(images)) for one in (reference, full)), strict=True))
    changes = np.array([change(*pair) for pair in pairs])
    chosen = np.argsort(-changes, kind="stable")[:IMAGES].tolist()
    sheet = draw(
        [images.load(i) for i in chosen],
        [pairs[i] for i in chosen],
        [f"{images.ids[i]}: changed by {changes[i]:.2f}" for i in chosen],
        space.dataset.classes,
        ("float", result.recipe),
    )
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(out, lambda partial: sheet.save(partial, format="PNG"))
    except OSError as error:
        raise UserError(f"{out} cannot be written ({error.strerror})") from error
    print(f"{out}: the {len(chosen)} images whose boxes changed most")


def _reference(store: Store, result: Result) -> str:
    """Key of the float run of the same model on the same images."""
    known, _ = store.read_all()
    for key, other in known.items():
        same = all(other.identity[part] == result.identity[part] for part in ("dataset", "model", "calibration"))
        if same and other.status == "ok" and [step[0] for step in other.identity["recipe"]] == ["fp32"]:
            return key
    raise UserError(f"{store.folder} has no finished float run (recipe fp32) to compare {result.key} with; run it")


def _by_image(outcomes: Mapping[str, np.ndarray], images: int) -> list[Found]:
    """What was found on each image with a score that is worth drawing."""
    shown = outcomes["score"] >= MIN_SCORE
    columns = {name: outcomes[name][shown] for name in ("image", "xyxy", "score", "label")}
    return [
        {name: columns[name][columns["image"] == number] for name in ("xyxy", "score", "label")}
        for number in range(images)
    ]


def change(a: Found, b: Found) -> float:
    """The sum of scores of all boxes that only one of the two networks finds."""
    overlap = iou(a["xyxy"].astype(float), b["xyxy"].astype(float), np.zeros(len(b["label"]), dtype=bool))
    alike = (overlap >= MIN_IOU) & (a["label"][:, None] == b["label"])
    return float(a["score"][~alike.any(axis=1)].sum() + b["score"][~alike.any(axis=0)].sum())


def draw(
    images: Sequence[Image.Image],
    pairs: Sequence[tuple[Found, Found]],
    titles: Sequence[str],
    classes: Sequence[str],
    heads: tuple[str, str],
) -> Image.Image:
    """One row for each image, under its title: what the first network finds on the left, the second on the right."""
    heights = [max(1, round(image.height * WIDTH / image.width)) for image in images]
    size = (2 * WIDTH + 3 * MARGIN, LINE + sum(heights) + len(images) * (LINE + MARGIN))
    sheet = Image.new("RGB", size, "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(LINE - 5)
    top = 0
    for column, text in enumerate(heads):
        pen.text((MARGIN + column * (WIDTH + MARGIN), top), text, fill="black", font=font)
    top += LINE
    for image, pair, title, height in zip(images, pairs, titles, heights, strict=True):
        pen.text((MARGIN, top), title, fill="black", font=font)
        for column, found in enumerate(pair):
            cell = _with_boxes(image.convert("RGB").resize((WIDTH, height)), found, WIDTH / image.width, classes)
            sheet.paste(cell, (MARGIN + column * (WIDTH + MARGIN), top + LINE))
        top += LINE + height + MARGIN
    return sheet


def _with_boxes(image: Image.Image, found: Found, scale: float, classes: Sequence[str]) -> Image.Image:
    pen, font = ImageDraw.Draw(image), ImageFont.load_default(LINE - 7)
    for xyxy, score, label in zip(found["xyxy"] * scale, found["score"], found["label"].tolist(), strict=True):
        colour = _colour(label)
        left, top, right, bottom = np.clip(xyxy, -1, [*image.size] * 2).tolist()
        pen.rectangle((left, top, max(left, right), max(top, bottom)), outline=colour, width=2)
        text = f"{classes[label]} {score:.2f}"
        place = (left + 2, max(0.0, top - LINE + 6))
        pen.rectangle(pen.textbbox(place, text, font=font), fill=colour)
        pen.text(place, text, fill="white", font=font)
    return image


def _colour(label: int) -> tuple[int, ...]:
    """Far from those of the labels near to it, and dark enough for white text."""
    return tuple(round(255 * part) for part in colorsys.hsv_to_rgb(label * 0.381966 % 1, 0.9, 0.7))
