"""Scoring: the outcome of every image, computed in the fastest way whose predictions agree with the plain one."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from qbench import floatruntime
from qbench.data import ImageSource
from qbench.datasets.images import ImageArray
from qbench.datasets.transform import to_image
from qbench.models.base import Detections, Model, first_device
from qbench.quant.activations import input_quantizers

Forward = Callable[[Tensor], Any]

_WORTH_CONVERTING = 20_000_000
"""Input pixels of all images, from which on a float runtime makes up for its conversion."""


def score(
    module: nn.Module,
    model: Model,
    images: ImageArray,
    *,
    device: torch.device,
    threads: int,
    batch_size: int | None = None,
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Run a network over all images; targets come from `images.split`.

    Args:
        module: the network; it is moved to the device, in channels-last layout, in evaluation mode.
        model: the float model's plugin, for decoding.
        images: the evaluation images.
        device: where to run.
        threads: cores to use.
        batch_size: None for what suits the device; it is halved when memory does not suffice.

    Returns:
        Outcomes and notes. Classification: `prediction`, `target`, `correct`, `top5`, each (N,). Detection, one row for
        each box: `image` (n,) position, `xyxy` (n, 4) float32 in pixels of the original image, `score`, `label`.
        Notes: `images`, `unreadable` (ids), `executed`, `batch_size`, `memory_format`, `seconds`, `images_per_second`.

    Raises:
        ValueError: an output is not finite, or does not have the shape that the task needs.
    """
    if len(images) == 0:
        raise ValueError("there are no images to score")
    started = time.perf_counter()
    torch.set_num_threads(threads)
    # Not in inference mode: the parameters would become tensors that no later step may use.
    module.to(device=device).to(memory_format=torch.channels_last).eval()
    size = batch_size or (64 if device.type != "cpu" else max(8, 4 * threads))
    collect = _Detected(model, images) if model.task == "detection" else _Classified(images)
    forward, executed = _fastest(module, images, min(size, len(images)), device, threads)
    with torch.inference_mode():
        smallest = _run(forward, images, size, device, collect)
    seconds = time.perf_counter() - started
    notes = {
        "images": len(images),
        "unreadable": images.unreadable,
        "executed": executed,
        "batch_size": smallest,
        "memory_format": "channels_last",
        "seconds": seconds,
        "images_per_second": len(images) / seconds,
    }
    return collect.outcomes(), notes


def execute(forward: Forward, model: Model, images: ImageArray, batch_size: int) -> dict[str, np.ndarray]:
    """The outcomes, as of `score`, of any function on the CPU that answers like the network.

    Args:
        forward: takes (B, C, H, W), B at most `batch_size`.
        model: the float model's plugin, for decoding.
        images: the evaluation images.
        batch_size: images for each call.
    """
    collect = _Detected(model, images) if model.task == "detection" else _Classified(images)
    _run(forward, images, batch_size, torch.device("cpu"), collect)
    return collect.outcomes()


def _fastest(
    module: nn.Module, images: ImageArray, size: int, device: torch.device, threads: int
) -> tuple[Forward, str]:
    """The network itself, or a float runtime that gives the same answers, with its name."""
    height, width = images.preprocess.size
    if device.type != "cpu" or len(images) * height * width < _WORTH_CONVERTING:
        return module, "eager"
    if input_quantizers(module):
        # A rounding that flips in another runtime moves the outputs by a whole step.
        return module, "eager (it quantizes activations)"
    try:
        compiled = floatruntime.compile(module, images.batch(range(size)), threads)
    except floatruntime.Refused as reason:
        return module, f"eager ({reason})"
    return compiled, "openvino float32"


def _run(
    forward: Forward, images: ImageSource, size: int, device: torch.device, collect: _Classified | _Detected
) -> int:
    """Feed all batches, the next one being prepared meanwhile; returns the batch size that memory allowed for."""
    start = 0
    with ThreadPoolExecutor(1) as ahead:
        waiting = ahead.submit(images.batch, range(min(size, len(images))))
        while start < len(images):
            batch = waiting.result()
            stop = start + len(batch)
            waiting = ahead.submit(images.batch, range(stop, min(stop + size, len(images))))
            parts = _feed(forward, batch, start, device, collect)
            size = parts if parts < len(batch) else size
            start = stop
    return size


def _feed(forward: Forward, batch: Tensor, start: int, device: torch.device, collect: _Classified | _Detected) -> int:
    """Run one batch, in parts when it does not fit in memory; returns the size of the parts."""
    size, done = len(batch), 0
    while done < len(batch):
        part = batch[done : done + size]
        try:
            outputs = forward(part.to(device))
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            if size == 1 or not _out_of_memory(error):
                raise
            size //= 2
            if device.type == "cuda":
                torch.cuda.empty_cache()
            continue
        collect.add(start + done, len(part), outputs)
        done += len(part)
    return size


def _out_of_memory(error: BaseException) -> bool:
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)


class _Classified:
    def __init__(self, images: ImageArray) -> None:
        self.target = np.array(images.split.targets, dtype=np.int64)
        self.prediction = np.zeros(len(images), dtype=np.int64)
        self.top5 = np.zeros(len(images), dtype=bool)

    def add(self, start: int, count: int, outputs: Any) -> None:
        classes = int(self.target.max()) + 1
        if not isinstance(outputs, Tensor) or outputs.dim() != 2 or len(outputs) != count or outputs.shape[1] < classes:
            shape = tuple(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
            raise ValueError(f"the network's output is {shape} instead of logits ({count}, {classes} or more)")
        if not torch.isfinite(outputs).all():
            raise ValueError(
                f"the network's output is not finite (NaN or infinity) on images {start} to {start + count - 1}"
            )
        best = outputs.topk(min(5, outputs.shape[1]), dim=1).indices.cpu().numpy()
        rows = slice(start, start + count)
        self.prediction[rows] = outputs.argmax(dim=1).cpu().numpy()
        self.top5[rows] = (best == self.target[rows, None]).any(axis=1)

    def outcomes(self) -> dict[str, np.ndarray]:
        correct = self.prediction == self.target
        return {"prediction": self.prediction, "target": self.target, "correct": correct, "top5": self.top5}


class _Detected:
    def __init__(self, model: Model, images: ImageArray) -> None:
        if model.decode is None:
            raise ValueError("the detection model has no `decode`, so its outputs cannot be read")
        self.decode, self.images = model.decode, images
        self.found: list[dict[str, np.ndarray]] = []

    def add(self, start: int, count: int, outputs: Any) -> None:
        detections = self.decode(outputs)
        if len(detections) != count:
            raise ValueError(f"the detector answers for {len(detections)} images instead of {count}")
        self.found += [self._original(start + i, found) for i, found in enumerate(detections)]

    def _original(self, position: int, found: Detections) -> dict[str, np.ndarray]:
        xyxy, scores = found.xyxy.float().cpu().numpy(), found.scores.float().cpu().numpy()
        if not (np.isfinite(xyxy).all() and np.isfinite(scores).all()):
            raise ValueError(f"the detector's output is not finite (NaN or infinity) on image {position}")
        width, height = self.images.sizes[position].tolist()
        return {
            "image": np.full(len(scores), position, dtype=np.int64),
            "xyxy": to_image(xyxy, (width, height), self.images.preprocess, self.images.split.resized),
            "score": scores,
            "label": found.labels.cpu().numpy().astype(np.int64),
        }

    def outcomes(self) -> dict[str, np.ndarray]:
        return {key: np.concatenate([found[key] for found in self.found]) for key in self.found[0]}


def agree(module_a: nn.Module, module_b: nn.Module, images: ImageSource, n: int) -> dict[str, Any]:
    """Whether two networks give the same outputs, bit for bit, on the first `n` images.

    Both run in evaluation mode and in channels-last layout: another layout may round differently.

    Returns:
        `images`, `equal`, and `max_difference`, infinite where only one of two outputs is finite.
    """
    count = min(n, len(images))
    equal, largest = True, 0.0
    for module in (module_a, module_b):
        module.to(memory_format=torch.channels_last).eval()
    with torch.inference_mode():
        for start in range(0, count, 8):
            batch = images.batch(range(start, min(start + 8, count)))
            left, right = (_tensors(module(batch.to(first_device(module)))) for module in (module_a, module_b))
            if [a.shape for a in left] != [b.shape for b in right]:
                return {"images": count, "equal": False, "max_difference": float("inf")}
            for a, b in zip(left, right, strict=True):
                difference = _difference(a, b.to(a.device))
                equal, largest = equal and a.dtype == b.dtype and difference == 0, max(largest, difference)
    return {"images": count, "equal": equal, "max_difference": largest}


def _tensors(outputs: Any) -> list[Tensor]:
    if isinstance(outputs, Tensor):
        return [outputs]
    parts = outputs.values() if isinstance(outputs, dict) else outputs
    return [tensor for part in parts for tensor in _tensors(part)]


def _difference(a: Tensor, b: Tensor) -> float:
    same = (a == b) | (a.isnan() & b.isnan())
    return (
        float((a.double() - b.double()).abs().nan_to_num(torch.inf, torch.inf).masked_fill(same, 0).max())
        if a.numel()
        else 0.0
    )
