"""A finished run's network and the float network, compiled by the same runtime for the same batch."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from qbench.errors import Unsupported
from qbench.metrics.base import Finished
from qbench.runtimes.base import Compiled, Runtime, flatten
from qbench.runtimes.choice import choose
from qbench.runtimes.saturation import saturates

_AGREEMENT_IMAGES = 16


@dataclass(frozen=True)
class Deployed:
    """Networks by name: `quantized` (not for the float reference), `float` and `float_again`, a second instance."""

    networks: dict[str, Compiled]
    batch: np.ndarray
    """(B, C, H, W) calibration images."""
    engine: Runtime
    """That compiled them."""
    facts: dict[str, Any]
    """What ran, and why: runtimes considered, counts of layers, agreement with the scored network, seconds it took."""


def deploy(finished: Finished, runtime: str, batch_size: int, threads: int) -> Deployed:
    """Compile both networks for the runtime; `auto` is the one that executes the quantized network fastest.

    Raises:
        Unsupported: the quantized network cannot run for real, or there are fewer cores than threads.
        UserError: there are fewer calibration images than `batch_size`.
    """
    if threads > finished.threads:
        raise Unsupported(f"threads={threads}, but this run may use {finished.threads} cores")
    begin = time.perf_counter()
    (example,) = finished.data.calibration.first(batch_size, batch_size)
    scored = finished.quantized
    choice = choose(runtime, finished.load_float() if finished.is_reference else scored, example, threads)
    engine, first = choice.taken.engine, choice.taken.compiled
    networks = {"float" if finished.is_reference else "quantized": first}
    for name in ("float", "float_again"):
        if name not in networks:
            networks[name] = engine.compile(finished.load_float(), example, threads=threads)
    facts = {
        "runtime": choice.taken.name,
        "considered": choice.considered,
        "batch_size": batch_size,
        "threads": threads,
        "integer_layers": first.integer_layers,
        "compute_layers": first.compute_layers,
        "claimed_layers": len(first.claimed_layers),
        "float_layers": dict(first.float_layers),
        "agreement": agreement(finished, scored, first, batch_size),
        **({"saturates": saturates(engine, threads)} if first.integer_layers else {}),
    }
    facts["preparing_seconds"] = time.perf_counter() - begin
    return Deployed(networks, np.ascontiguousarray(example.cpu().numpy()), engine, facts)


@torch.no_grad()
def agreement(finished: Finished, scored: nn.Module, compiled: Compiled, batch_size: int) -> dict[str, Any]:
    """The deployed network's answers against those of the network that was scored, on calibration images.

    Two executions of a quantized network never agree entirely: sums that differ in their last digit round to different
    codes, and the difference grows from layer to layer. How far it grows without any fault is measured with them.

    Returns:
        `images`; `relative_difference`: |deployed - scored| / |scored| (2-norms) of each image; `noise`: the same of
        the scored network's answers when its inputs change by a millionth; for classification `same_first_guess`: for
        how many images the deployed network guesses the same.
    """
    calibration = finished.data.calibration
    count = min(calibration.images, max(batch_size, _AGREEMENT_IMAGES)) // batch_size * batch_size
    differences: list[float] = []
    noise: list[float] = []
    same = 0
    for images in calibration.first(count, batch_size):
        wanted = rows_of([tensor.cpu().numpy() for tensor in flatten(scored(images))])
        moved = rows_of([tensor.cpu().numpy() for tensor in flatten(scored(images * (1 + 1e-6)))])
        found = rows_of(compiled.run(np.ascontiguousarray(images.cpu().numpy())))
        differences += distances(found, wanted)
        noise += distances(moved, wanted)
        same += int((found.argmax(1) == wanted.argmax(1)).sum())
    facts: dict[str, Any] = {"images": count, "relative_difference": differences, "noise": noise}
    return facts | ({"same_first_guess": same} if finished.model.task == "classification" else {})


def rows_of(outputs: list[np.ndarray]) -> np.ndarray:
    """All outputs of each image, one after the other."""
    return np.concatenate([output.reshape(len(output), -1) for output in outputs], axis=1)


def distances(a: np.ndarray, b: np.ndarray) -> list[float]:
    """|a - b| / |b| (2-norms) of each row."""
    size = np.maximum(np.linalg.norm(b, axis=1), np.finfo(np.float32).tiny)
    distances: list[float] = (np.linalg.norm(a - b, axis=1) / size).tolist()
    return distances
