"""COCO average precision from stored matches, so that a paired bootstrap over images needs neither boxes nor targets.

Matching follows the COCO protocol (Lin et al., 1405.0312) for objects of all areas and the best 100 detections of each
image and class; images of weight 1 give exactly its AP.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from qbench.datasets.base import Boxes

IOUS = np.linspace(0.5, 0.95, 10)
RECALLS = np.linspace(0, 1, 101)
MOST = 100
"""Detections per image and class that count."""
_PREFIX = "match_"
_ARRAYS = ("label", "image", "true", "ignored", "objects")


@dataclass(frozen=True, eq=False)
class Matches:
    """Which detections found an object, best score first within each class."""

    label: np.ndarray
    """(n,) int32 class, ascending."""
    image: np.ndarray
    """(n,) int32 position of the image."""
    true: np.ndarray
    """(n, 10) bool: an object was found, at each IoU."""
    ignored: np.ndarray
    """(n, 10) bool: counts neither for nor against, because it lies in a crowd region."""
    objects: np.ndarray
    """(images, classes) int32: how many objects there are to find."""
    _drawn: dict[tuple[int, int], np.ndarray] = field(default_factory=dict, repr=False, init=False)

    def to_arrays(self) -> dict[str, np.ndarray]:
        """As arrays whose names begin with `match_`."""
        return {_PREFIX + name: getattr(self, name) for name in _ARRAYS}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> Matches:
        """The inverse of `to_arrays`; other arrays may be among them."""
        return cls(**{name: arrays[_PREFIX + name] for name in _ARRAYS})

    def replicates(self, replicates: int, seed: int) -> np.ndarray:
        """(replicates,) AP of images drawn with replacement; the same images for every run with that many."""
        key = replicates, seed
        if key not in self._drawn:
            images = len(self.objects)
            drawn = np.random.default_rng(seed).multinomial(images, np.full(images, 1 / images), replicates)
            self._drawn[key] = ap_from_matches(self, drawn)
        return self._drawn[key]


def match(detections: Mapping[str, np.ndarray], targets: Sequence[Boxes], classes: int) -> Matches:
    """Match detections to objects.

    Args:
        detections: `image` (n,), `xyxy` (n, 4), `score` (n,), `label` (n,), of all images one after the other.
        targets: objects of every image, in the same pixels.
        classes: how many classes there are.

    Raises:
        ValueError: a detection is of another class.
    """
    if len(strange := detections["label"][detections["label"] >= classes]):
        raise ValueError(
            f"the detector finds class {strange[0]}, but the dataset has {classes}: set the model's classes"
        )
    chosen = _best(detections)
    image, label = (detections[name][chosen].astype(np.int32) for name in ("image", "label"))
    xyxy = detections["xyxy"][chosen].astype(np.float64)
    true = np.zeros((len(chosen), len(IOUS)), dtype=bool)
    ignored = np.zeros_like(true)
    objects = np.zeros((len(targets), classes), dtype=np.int32)
    places = _places(image, label)
    for number, boxes in enumerate(targets):
        crowd = np.zeros(len(boxes.labels), dtype=bool) if boxes.crowd is None else boxes.crowd.astype(bool)
        np.add.at(objects[number], boxes.labels[~crowd], 1)
        for one in np.unique(boxes.labels):
            found = places.get((number, int(one)))
            if found is None:
                continue
            own = boxes.labels == one
            overlap = iou(xyxy[found], boxes.xyxy[own].astype(np.float64), crowd[own])
            true[found], ignored[found] = _greedy(overlap, crowd[own])
    return Matches(label, image, true, ignored, objects)


def _best(detections: Mapping[str, np.ndarray]) -> np.ndarray:
    """Positions of the best detections of each image and class, ordered by class, then falling score, then image."""
    image, label, score = (detections[name] for name in ("image", "label", "score"))
    order = np.lexsort((np.arange(len(score)), -score, image, label))
    group = np.stack([label[order], image[order]])
    starts = np.flatnonzero(np.r_[True, (group[:, 1:] != group[:, :-1]).any(axis=0)]) if len(order) else np.array([0])
    rank = np.arange(len(order)) - np.repeat(starts, np.diff(np.r_[starts, len(order)]))
    order = order[rank < MOST]
    return order[np.lexsort((image[order], -score[order], label[order]))]


def _places(image: np.ndarray, label: np.ndarray) -> dict[tuple[int, int], np.ndarray]:
    """Positions of the detections of each (image, class), in their order."""
    if not len(image):
        return {}
    order = np.lexsort((label, image))
    cuts = np.flatnonzero((np.diff(image[order]) != 0) | (np.diff(label[order]) != 0)) + 1
    return {(int(image[group[0]]), int(label[group[0]])): group for group in np.split(order, cuts)}


def iou(found: np.ndarray, objects: np.ndarray, crowd: np.ndarray) -> np.ndarray:
    """(n, m) intersection over union of boxes (n, 4) and (m, 4); over the found box's own area where m is a crowd."""
    low = np.maximum(found[:, None, :2], objects[None, :, :2])
    high = np.minimum(found[:, None, 2:], objects[None, :, 2:])
    shared = np.prod(np.clip(high - low, 0, None), axis=-1)
    own, other = (np.prod(boxes[:, 2:] - boxes[:, :2], axis=-1) for boxes in (found, objects))
    union = np.where(crowd[None], own[:, None], own[:, None] + other[None] - shared)
    return np.divide(shared, union, out=np.zeros_like(shared), where=union > 0)


def _greedy(overlap: np.ndarray, crowd: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The best detection chooses first, at each IoU on its own; only crowds can be chosen again.

    Args:
        overlap: (detections, objects), best detection first.
        crowd: (objects,) bool.

    Returns:
        found an object (detections, 10), and lies in a crowd (detections, 10).
    """
    true = np.zeros((len(overlap), len(IOUS)), dtype=bool)
    ignored = np.zeros_like(true)
    plain = np.flatnonzero(~crowd)
    # Of equal overlaps the protocol takes the last.
    plain = plain[::-1]
    in_crowd = overlap[:, crowd].max(axis=1, initial=0.0)
    taken = np.zeros((len(IOUS), len(plain)), dtype=bool)
    rows = np.arange(len(IOUS))
    for number in np.flatnonzero(overlap.max(axis=1, initial=0.0) >= IOUS[0]):
        if len(plain):
            free = np.where(taken, -1.0, overlap[number, plain])
            choice = free.argmax(axis=1)
            true[number] = free[rows, choice] >= IOUS
            taken[rows, choice] |= true[number]
        ignored[number] = ~true[number] & (in_crowd[number] >= IOUS)
    return true, ignored


def average_precision(matches: Matches) -> float:
    """AP at IoU .50:.95, in [0, 1]."""
    return float(ap_from_matches(matches, np.ones((1, len(matches.objects))))[0])


def ap_from_matches(matches: Matches, image_weights: np.ndarray) -> np.ndarray:
    """AP at IoU .50:.95, for several weightings of the images at once.

    Args:
        matches: of one run.
        image_weights: (B, images) how often each image counts.

    Returns:
        (B,) AP in [0, 1]; 0 where no image of positive weight has an object.
    """
    weights = image_weights.astype(np.float64)
    objects = weights @ matches.objects
    total = np.zeros(len(weights))
    ends = np.searchsorted(matches.label, np.arange(matches.objects.shape[1] + 1))
    for label, (start, end) in enumerate(itertools.pairwise(ends)):
        own = slice(start, end)
        w = weights[:, matches.image[own]]
        total += _class_ap(w, matches.true[own], matches.ignored[own], objects[:, label])
    present = (objects > 0).sum(axis=1)
    return total / np.maximum(present, 1)


def _class_ap(weights: np.ndarray, true: np.ndarray, ignored: np.ndarray, objects: np.ndarray) -> np.ndarray:
    """AP of one class (B,), averaged over the ten IoUs.

    Precision peaks and recall grows at true detections only, so that the curve is needed at these alone.
    """
    everything = weights.cumsum(axis=1)
    total = np.zeros(len(weights))
    for at in range(true.shape[1]):
        hits = np.flatnonzero(true[:, at])
        if not len(hits):
            continue
        counted = everything
        if ignored[:, at].any():
            counted = everything - (weights * ignored[:, at]).cumsum(axis=1)
        found = weights[:, hits].cumsum(axis=1)
        precision = found / np.maximum(counted[:, hits], 1e-9)
        envelope = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
        recall = found / np.maximum(objects, 1e-9)[:, None]
        reached = np.searchsorted(RECALLS, recall, side="right")
        steps = np.diff(reached, axis=1, prepend=0)
        total += np.where(objects > 0, (envelope * steps).sum(axis=1), 0.0)
    return total / (len(RECALLS) * true.shape[1])


def interval(matches: Matches, replicates: int = 300, seed: int = 0, level: float = 0.95) -> tuple[float, float, float]:
    """AP, with the ends of its percentile interval from a bootstrap over images."""
    drawn = matches.replicates(replicates, seed)
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return average_precision(matches), float(low), float(high)


def paired_interval(
    a: Matches, b: Matches, replicates: int = 300, seed: int = 0, level: float = 0.95
) -> tuple[float, float, float]:
    """AP of `a` minus AP of `b`, with the ends of its percentile interval from a paired bootstrap over images.

    Raises:
        ValueError: the two runs are not of the same images.
    """
    if not np.array_equal(a.objects, b.objects):
        raise ValueError(f"paired runs must have the same images: {a.objects.shape} and {b.objects.shape}")
    difference = average_precision(a) - average_precision(b)
    drawn = a.replicates(replicates, seed) - b.replicates(replicates, seed)
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return difference, float(low), float(high)
