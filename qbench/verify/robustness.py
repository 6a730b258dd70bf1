"""Is a quantized classifier's answer the same for all images in a box? Attacks, and a complete verifier."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from qbench.verify.classifier import Classifier, Pixels

Split = Literal["longest_axis", "abs_gradient", "product"]
"""Which pixel's range is halved: the longest, that with the greatest gradient of the least margin, or with the greatest
product of both."""
State = Literal["robust", "falsified", "timeout"]
_STRIDE = 0.1  # of an attack, in widths of the box
_BATCH = 8
"""Boxes looked at together."""


@dataclass(frozen=True)
class Decision:
    """What is known of one image."""

    state: State
    boxes: int
    """How many were looked at."""
    witness: Tensor | None
    """Pixels (C, H, W) of another class, if falsified."""


@torch.enable_grad()
def attack(
    classifier: Classifier, box: Pixels, targets: Tensor, *, steps: int, generator: torch.Generator
) -> list[Tensor | None]:
    """Images of another class in each box, by targeted steps along the sign of the gradient (arXiv:2211.16187).

    For every wrong class one attack begins at a random place. All places that are looked at are whole pixels.

    Args:
        classifier: what is attacked.
        box: B boxes.
        targets: the classes (B,) that images should have.
        steps: of a tenth of the box's width each.
        generator: of the beginnings.

    Returns:
        for each box pixels (C, H, W), or None if none were found.
    """
    with torch.no_grad():
        classes = classifier(box.low[:1]).shape[1]
    rows, goals = (torch.ones(len(box), classes).scatter_(1, targets[:, None], 0)).nonzero().unbind(1)
    own = box[rows]
    width = own.high - own.low
    place = own.low + torch.rand(own.low.shape, generator=generator) * width
    found: list[Tensor | None] = [None] * len(box)
    for step in range(steps + 1):
        pixels = place.round().requires_grad_()
        logits = classifier(pixels)
        for i in (logits.argmax(1) != targets[rows]).nonzero().flatten().tolist():
            found[int(rows[i])] = pixels[i].detach()
        if step == steps or all(each is not None for each in found):
            break
        gap = logits.gather(1, goals[:, None]) - logits.gather(1, targets[rows, None])
        (slope,) = torch.autograd.grad(gap.sum(), pixels)
        place = (place + _STRIDE * width * slope.sign()).minimum(own.high).maximum(own.low)
    return found


def decide(
    classifier: Classifier,
    box: Pixels,
    target: int,
    *,
    seconds: float,
    steps: int,
    split: Split,
    generator: torch.Generator,
) -> Decision:
    """Whether all images in one box are of the target class: by branch and bound, complete if the time suffices.

    A box that an attack succeeds in decides; one whose margins are positive is done; any other is halved along one
    pixel's range, into boxes of whole pixels, so that there is an end.

    Args:
        classifier: what is verified.
        box: a single one.
        target: the class.
        seconds: after which it gives up.
        steps: of the attacks.
        split: how the pixel is chosen.
        generator: of the attacks.
    """
    until = time.monotonic() + seconds
    queue, boxes = deque([box]), 0
    while queue:
        if time.monotonic() > until:
            return Decision("timeout", boxes, None)
        parts = [queue.popleft() for _ in range(min(_BATCH, len(queue)))]
        now = Pixels(torch.cat([part.low for part in parts]), torch.cat([part.high for part in parts]))
        boxes += len(now)
        targets = torch.full((len(now),), target)
        for witness in attack(classifier, now, targets, steps=steps, generator=generator):
            if witness is not None:
                return Decision("falsified", boxes, witness)
        least, slope = _least_margin(classifier, now, targets, wants_slope=split != "longest_axis")
        # A single image was looked at by the attack.
        unknown = (least <= 0) & (now.high > now.low).flatten(1).any(1)
        queue.extend(_halves(now[unknown], slope[unknown], split))
    return Decision("robust", boxes, None)


def _least_margin(classifier: Classifier, box: Pixels, targets: Tensor, *, wants_slope: bool) -> tuple[Tensor, Tensor]:
    """Least margins (B,), and how much they change with each pixel's range (B, C, H, W)."""
    with torch.set_grad_enabled(wants_slope):
        ends = Pixels(box.low.clone().requires_grad_(wants_slope), box.high.clone().requires_grad_(wants_slope))
        least = classifier.margins(ends, targets).amin(1)
    if not wants_slope:
        return least, torch.zeros_like(box.low)
    low, high = torch.autograd.grad(least.sum(), (ends.low, ends.high))
    return least.detach(), low.abs() + high.abs()


def _halves(box: Pixels, slope: Tensor, split: Split) -> list[Pixels]:
    """Two boxes for each, disjoint and of whole pixels."""
    width = (box.high - box.low).flatten(1)
    by_slope = torch.where(width > 0, slope.flatten(1) + torch.finfo(slope.dtype).tiny, 0)
    score = {"longest_axis": width, "abs_gradient": by_slope, "product": by_slope * width}[split]
    halves = []
    for i, axis in enumerate(score.argmax(1).tolist()):
        low, high = box.low[i : i + 1].clone(), box.high[i : i + 1].clone()
        middle = torch.floor((low.flatten()[axis] + high.flatten()[axis]) / 2)
        high.view(-1)[axis], low.view(-1)[axis] = middle, middle + 1
        halves += [Pixels(box.low[i : i + 1], high), Pixels(low, box.high[i : i + 1])]
    return halves
